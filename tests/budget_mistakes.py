"""Wrong implementations of every operation: each must be over budget."""

import math

import ml_dtypes
import numpy as np
from budget_implementations import naive, numpy_sum, seen_keys

F, H, B = np.float32, np.float16, ml_dtypes.bfloat16


def rounded(dtype, inputs):
    return {
        name: x.astype(dtype).astype(F) if getattr(x, "dtype", None) == F else x
        for name, x in inputs.items()
    }


def changed(y, at, value):
    y = y.copy()
    y[at] = value(y[at])
    return y


GENERAL = {
    "zeros": lambda _, y: np.zeros_like(y),
    "negated": lambda _, y: -y,
    "channels rolled": lambda _, y: np.roll(y, 1, axis=-1),
    "last channels skipped": lambda _, y: changed(y, (..., slice(-3, None)), np.zeros_like),
    "last row stale": lambda _, y: changed(y, (..., -1, slice(None)), lambda _row: y[..., -2, :]),
    "every fourth channel off": lambda _, y: changed(
        y, (..., slice(None, None, 4)), lambda x: x * F(1.001)
    ),
    "output rounded to float16": lambda _, y: y.astype(H).astype(F),
    "output rounded to bfloat16": lambda _, y: y.astype(B).astype(F),
    "one row scaled": lambda _, y: changed(y, (..., 1, slice(None)), lambda x: x * F(1.01)),
    "rows exchanged": lambda _, y: np.concatenate(
        [y[..., 1:2, :], y[..., :1, :], y[..., 2:, :]], axis=-2
    ),
}


def half_sum(p):
    total = np.zeros(p.shape[:-1], H)
    for n in range(p.shape[-1]):
        total = (total + p[..., n].astype(H)).astype(H)
    return total.astype(F)


def short_sum(p):
    return numpy_sum(p[..., :-1])


def bad_rows(
    x,
    weight,
    eps,
    *,
    inside=lambda x: (x * x).mean(-1, keepdims=True),
    root=lambda m, eps: np.sqrt(m + eps),
    gain=lambda w: w,
):
    return (gain(weight) * x / root(inside(x), F(eps))).astype(F)


def bad_centred(x, weight, bias, eps, *, centre=True, n=0, root=lambda m, eps: np.sqrt(m + eps)):
    c = x - x.mean(-1, keepdims=True) if centre else x
    return (
        weight * c / root((c * c).sum(-1, keepdims=True) / F(x.shape[-1] - n), F(eps)) + bias
    ).astype(F)


def bad_rope(
    x,
    positions,
    base,
    d_rope,
    magnitude,
    *,
    sign=1,
    pairs=False,
    partner=None,
    phase_dtype=np.float64,
):
    inv_freq = base ** (-np.arange(0, d_rope, 2) / d_rope)
    phase = (positions[:, None] * inv_freq).astype(phase_dtype).astype(np.float64)
    cos, sin = magnitude * np.cos(phase), sign * magnitude * np.sin(phase)
    partner = d_rope // 2 if partner is None else partner
    first = np.arange(0, d_rope, 2) if pairs else np.arange(d_rope // 2)
    second = first + 1 if pairs else first + partner
    y = x.astype(np.float64)
    a, b = y[..., first].copy(), y[..., second].copy()
    y[..., first], y[..., second] = a * cos - b * sin, b * cos + a * sin
    return y.astype(F)


def attend(inputs, total=numpy_sum, **changes):
    return naive("attention", {**inputs, **changes}, total)


def top_left(inputs):
    n_seq, n_ctx = inputs["q"].shape[2], inputs["k"].shape[2]
    return np.broadcast_to(
        seen_keys(n_seq, n_seq, inputs["window"])[..., :1, :1] | True, (1, 1, n_seq, n_ctx)
    ) & (np.arange(n_ctx) <= np.arange(n_seq)[:, None])


def tiled_heads(inputs):
    group = inputs["q"].shape[1] // inputs["k"].shape[1]
    return attend(
        inputs, k=np.tile(inputs["k"], (1, group, 1, 1)), v=np.tile(inputs["v"], (1, group, 1, 1))
    )


def extra_key(inputs):
    """The zeros behind the last key enter the softmax, as the tail of a tile does."""
    k, v = (
        np.concatenate([inputs[name], np.zeros_like(inputs[name][:, :, :3])], axis=2)
        for name in "kv"
    )
    seen = seen_keys(inputs["q"].shape[2], inputs["k"].shape[2], inputs["window"])
    return attend(
        inputs, k=k, v=v, seen=np.concatenate([seen, np.ones_like(seen[..., :3])], axis=-1)
    )


def half_weights(inputs):
    """Probabilities in float16."""
    return attend(inputs, total=lambda p: numpy_sum(p.astype(H).astype(F)))


SPECIAL = {
    "linear": {
        "no bias": lambda i: naive("linear", {"x": i["x"], "weight": i["weight"]}),
        "weight transposed": lambda i: naive("linear", {**i, "weight": i["weight"].T}),
        "last product skipped": lambda i: naive("linear", i, short_sum),
        "float16 accumulation": lambda i: naive("linear", i, half_sum),
        "inputs in float16": lambda i: naive("linear", rounded(H, i)),
        "inputs in bfloat16": lambda i: naive("linear", rounded(B, i)),
    },
    "qkv_projection": {
        "keys and values exchanged": lambda i: np.concatenate(
            [
                naive("qkv_projection", i)[..., :4, :, :],
                naive("qkv_projection", i)[..., 6:, :, :],
                naive("qkv_projection", i)[..., 4:6, :, :],
            ],
            axis=-3,
        ),
        "heads reversed": lambda i: naive("qkv_projection", i)[..., ::-1, :, :],
        "positions before heads": lambda i: naive(
            "linear", {"x": i["x"], "weight": i["weight"]}
        ).reshape(2, 8, 5, 8),
        "float16 accumulation": lambda i: naive("qkv_projection", i, half_sum),
        "inputs in float16": lambda i: naive("qkv_projection", rounded(H, i)),
    },
    "rms_norm": {
        "eps outside the root": lambda i: bad_rows(**i, root=lambda m, eps: np.sqrt(m) + eps),
        "eps of another model": lambda i: naive("rms_norm", {**i, "eps": 1e-6}),
        "centred": lambda i: bad_rows(**i, inside=lambda x: x.var(-1, keepdims=True)),
        "sum instead of mean": lambda i: bad_rows(
            **i, inside=lambda x: (x * x).sum(-1, keepdims=True)
        ),
        "gain 1 + w": lambda i: bad_rows(**i, gain=lambda w: 1 + w),
        "gain twice": lambda i: bad_rows(**i, gain=lambda w: w * w),
        "float16 accumulation": lambda i: naive("rms_norm", i, half_sum),
    },
    "layer_norm": {
        "not centred": lambda i: bad_centred(**i, centre=False),
        "n - 1": lambda i: bad_centred(**i, n=1),
        "eps outside the root": lambda i: bad_centred(**i, root=lambda m, eps: np.sqrt(m) + eps),
        "no bias": lambda i: bad_centred(**{**i, "bias": 0 * i["bias"]}),
        "float16 accumulation": lambda i: naive("layer_norm", i, half_sum),
    },
    "rope": {
        "interleaved": lambda i: bad_rope(**i, pairs=True),
        "backwards": lambda i: bad_rope(**i, sign=-1),
        "base 10000": lambda i: bad_rope(**{**i, "base": 1e4}),
        "positions off by one": lambda i: bad_rope(**{**i, "positions": i["positions"] + 1}),
        "no magnitude": lambda i: bad_rope(**{**i, "magnitude": 1.0}),
        "phase in bfloat16": lambda i: bad_rope(**i, phase_dtype=B),
        "partner of the whole head": lambda i: bad_rope(**i, partner=8),
    },
    "softmax": {
        "base 2": lambda i: naive("softmax", {"x": i["x"] * F(math.log(2))}),
        "last entry not counted": lambda i: naive("softmax", i, short_sum),
        "exponentials in float16": lambda i: naive(
            "softmax", i, lambda p: numpy_sum(p.astype(H).astype(F))
        ),
        "other axis": lambda i: naive("softmax", {"x": np.ascontiguousarray(i["x"].T)}).T,
        "inputs in float16": lambda i: naive("softmax", rounded(H, i)),
    },
    "attention": {
        "top-left": lambda i: attend(i, seen=top_left(i)),
        "window of w + 1": lambda i: attend(i, window=i["window"] + 1),
        "no window": lambda i: attend(i, window=None),
        "heads tiled": tiled_heads,
        "scale 1 / d": lambda i: attend(i, scale=1 / i["q"].shape[-1]),
        "no softcap": lambda i: attend(i, softcap=None),
        "keys and values exchanged": lambda i: attend(i, k=i["v"], v=i["k"]),
        "keys behind the end": extra_key,
        "probabilities in float16": half_weights,
        "float16 accumulation": lambda i: attend(i, half_sum),
        "inputs in bfloat16": lambda i: naive("attention", rounded(B, i)),
    },
    "swiglu": {
        "up first": lambda i: naive("swiglu", {"gate_up": np.roll(i["gate_up"], 32, axis=-1)}),
        "gelu": lambda i: (
            naive("gelu", {"x": i["gate_up"][..., :32], "approximate": "none"})
            * i["gate_up"][..., 32:]
        ),
        "relu": lambda i: np.maximum(i["gate_up"][..., :32], 0) * i["gate_up"][..., 32:],
        "sigmoid": lambda i: i["gate_up"][..., 32:] / (1 + np.exp(-i["gate_up"][..., :32])),
        "inputs in float16": lambda i: naive("swiglu", rounded(H, i)),
    },
    "gelu": {
        "tanh form": lambda i: naive("gelu", {**i, "approximate": "tanh"}),
        "quick form": lambda i: i["x"] / (1 + np.exp(F(-1.702) * i["x"])),
        "silu": lambda i: i["x"] / (1 + np.exp(-i["x"])),
        "relu": lambda i: np.maximum(i["x"], 0),
        "inputs in float16": lambda i: naive("gelu", rounded(H, i)),
    },
    "embed": {
        "ids off by one": lambda i: i["weight"][(i["ids"] + 1) % 16],
        "times sqrt(d_model)": lambda i: F(4) * i["weight"][i["ids"]],
        "table transposed": lambda i: i["weight"].T[i["ids"]],
        "inputs in float16": lambda i: naive("embed", rounded(H, i)),
    },
    "add": {
        "difference": lambda i: i["x"] - i["y"],
        "stream only": lambda i: i["x"].copy(),
        "half only": lambda i: i["y"].copy(),
        "added twice": lambda i: i["x"] + 2 * i["y"],
        "inputs in float16": lambda i: naive("add", rounded(H, i)),
    },
}


def mistakes(op):
    """Name -> function (inputs) -> wrong output."""
    return {
        **{name: lambda i, wrong=wrong: wrong(i, naive(op, i)) for name, wrong in GENERAL.items()},
        **SPECIAL[op],
    }
