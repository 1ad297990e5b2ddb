"""Correct float32 implementations of every operation, in several orders of summation.  They share
no code with npllm.
"""

import math

import numpy as np

F = np.float32


def sequential(p):
    return np.cumsum(p, axis=-1, dtype=F)[..., -1]


def backwards(p):
    return sequential(p[..., ::-1])


def pairwise(p):
    while p.shape[-1] > 1:
        odd = p[..., -1:] if p.shape[-1] % 2 else p[..., :0]
        even = p[..., : p.shape[-1] // 2 * 2]
        p = np.concatenate([even[..., 0::2] + even[..., 1::2], odd], axis=-1)
    return p[..., 0]


def lanes(p):
    """Sixteen partial sums, as a vector unit keeps them."""
    padded = np.concatenate([p, np.zeros((*p.shape[:-1], -p.shape[-1] % 16), F)], axis=-1)
    return pairwise(np.cumsum(padded.reshape(*p.shape[:-1], -1, 16), axis=-2, dtype=F)[..., -1, :])


def shuffled(p):
    return sequential(p[..., np.random.default_rng(p.shape[-1]).permutation(p.shape[-1])])


def numpy_sum(p):
    return np.sum(p, axis=-1, dtype=F)


SUMS = {f.__name__: f for f in (sequential, backwards, pairwise, lanes, shuffled, numpy_sum)}


def linear(total, x, weight, bias=None):
    y = total(x[..., None, :] * weight)
    return y if bias is None else y + bias


def cut(y, n_head, n_kv_head):
    heads = np.swapaxes(y.reshape(*y.shape[:-1], n_head + 2 * n_kv_head, -1), -2, -3)
    return (
        heads[..., :n_head, :, :],
        heads[..., n_head : n_head + n_kv_head, :, :],
        heads[..., n_head + n_kv_head :, :, :],
    )


def qkv_projection(total, x, weight, n_head, n_kv_head):
    return cut(linear(total, x, weight), n_head, n_kv_head)


def rms_norm(total, x, weight, eps):
    mean = total(x * x)[..., None] / F(x.shape[-1])
    return weight * (x * (F(1) / np.sqrt(mean + F(eps))))


def layer_norm(total, x, weight, bias, eps):
    n = F(x.shape[-1])
    c = x - total(x)[..., None] / n
    return weight * (c / np.sqrt(total(c * c)[..., None] / n + F(eps))) + bias


def rope(_, x, positions, base, d_rope, magnitude=1.0, factors=None):
    exponent = np.arange(0, d_rope, 2, dtype=F) / F(d_rope)  # as PyTorch computes it, in float32
    inv_freq = F(1) / (F(base) ** exponent)
    inv_freq = inv_freq if factors is None else F(1) / (factors.astype(F) * F(base) ** exponent)
    phase = positions.astype(F)[:, None] * inv_freq
    cos, sin = F(magnitude) * np.cos(phase), F(magnitude) * np.sin(phase)
    a, b, rest = x[..., : d_rope // 2], x[..., d_rope // 2 : d_rope], x[..., d_rope:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def softmax(total, x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / total(e)[..., None]


def seen_keys(n_seq, n_ctx, window=None, valid=None):
    i, j = np.arange(n_ctx - n_seq, n_ctx)[:, None], np.arange(n_ctx)
    seen = (j <= i) if window is None else (j <= i) & (j > i - window)
    return seen[None, None] if valid is None else seen & valid[:, None, None, :]


def attention(
    total, q, k, v, window=None, valid=None, bias=None, softcap=None, seen=None, scale=None
):
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    s = total(q[..., :, None, :] * k[..., None, :, :]) * F(
        q.shape[-1] ** -0.5 if scale is None else scale
    )
    s = s if softcap is None else F(softcap) * np.tanh(s / F(softcap))
    s = s if bias is None else s + bias
    seen = seen_keys(q.shape[2], k.shape[2], window, valid) if seen is None else seen
    s = np.where(seen, s, F(-np.inf))
    m = s.max(axis=-1, keepdims=True)
    e = np.exp(s - np.where(np.isfinite(m), m, F(0)))
    weights = e / np.maximum(total(e)[..., None], F(1e-37))
    return total(np.swapaxes(weights[..., None] * v[..., None, :, :], -1, -2))


def swiglu(_, gate_up):
    g, u = np.split(gate_up, 2, axis=-1)
    return g / (F(1) + np.exp(-g)) * u


def gelu(_, x, approximate):
    if approximate == "tanh":
        return (
            F(0.5) * x * (F(1) + np.tanh(F((2 / math.pi) ** 0.5) * (x + F(0.044715) * x * x * x)))
        )
    return F(0.5) * x * (F(1) + np.vectorize(math.erf, otypes=[F])(x * F(0.5**0.5)))


def embed(_, ids, weight):
    return weight[ids]


def add(_, x, y):
    return x + y


NAIVE = {
    f.__name__: f
    for f in (
        linear,
        qkv_projection,
        rms_norm,
        layer_norm,
        rope,
        softmax,
        attention,
        swiglu,
        gelu,
        embed,
        add,
    )
}


def naive(op, inputs, total=numpy_sum):
    """An operation in float32; the heads of a projection behind each other."""
    with np.errstate(all="ignore"):
        y = NAIVE[op](total, **inputs)
    return np.concatenate(y, axis=-3) if isinstance(y, tuple) else y


def library(op, ops, inputs):
    """The same by a set of npllm."""
    mask = ops_mask(inputs)
    with np.errstate(all="ignore"):
        return {
            "linear": lambda: ops.linear(**inputs),
            "rms_norm": lambda: ops.rms_norm(**inputs),
            "layer_norm": lambda: ops.layer_norm(**inputs),
            "rope": lambda: ops.apply_rope(
                inputs["x"],
                *(tables(ops, inputs) if "base" in inputs else (inputs["cos"], inputs["sin"])),
            ),
            "attention": lambda: ops.attention(
                inputs["q"],
                inputs["k"],
                inputs["v"],
                mask=mask,
                bias=inputs.get("bias"),
                softcap=inputs.get("softcap"),
            ),
            "swiglu": lambda: ops.swiglu(*np.split(inputs["gate_up"], 2, axis=-1)),
            "gelu": lambda: ops.gelu(**inputs),
            "embed": lambda: ops.embed(**inputs),
            "add": lambda: ops.add(**inputs),
        }[op]()


def ops_mask(inputs):
    from npllm import ops

    rule = (
        ops.mask.causal()
        if inputs.get("window") is None
        else ops.mask.sliding_window(inputs["window"])
    )
    return rule & ops.mask.padding(inputs["valid"]) if "valid" in inputs else rule


def tables(ops, inputs):
    from npllm.ops import rope_frequencies

    inv_freq = rope_frequencies(inputs["d_rope"], inputs["base"])
    inv_freq = inv_freq if "factors" not in inputs else (inv_freq / inputs["factors"]).astype(F)
    return ops.rope_tables(inputs["positions"], inv_freq, inputs.get("magnitude", 1.0))
