"""Emulators of rounding: one option's roundings, to be compared bit by bit.

An option has one or more styles (a fused kernel rounds once, an eager one after each step); the
style that agrees best counts.
"""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from npllm.testing.forms.attention import operands, visible_keys
from npllm.testing.forms.common import Array, rounded
from npllm.testing.forms.rope import chosen_factors

__all__ = ["EMULATORS", "NARROW", "emulations"]

F32 = np.float32
NARROW = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
Round = Callable[[Array], Array]


def emulations(convention: str, option: str, op: str, inputs: dict, dtype: Any) -> list[Array]:
    """Evaluate an operation with the roundings of an option, once for each style.

    Parameters
    ----------
    convention : str
        "C2", "C13", "C14" or "C30".
    option : str
    op : str
    inputs : dict
        As `prepare` returns them.
    dtype : dtype
        Of the output.

    Returns
    -------
    outputs : list of array
        float32, of values that `dtype` holds; axes before the last ones flattened.
    """
    emulator = EMULATORS[convention, op]
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        return [rounded(y, dtype) for y in emulator(inputs, option, lambda x: rounded(x, dtype))]


def _norm_cast(inputs: dict, option: str, cast: Round) -> list[Array]:
    """C13: where the row is rounded before it meets the gain."""
    x = inputs["x"].reshape(-1, inputs["x"].shape[-1]).astype(F32)
    w = inputs["weight"].astype(F32)
    normal = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + F32(inputs["eps"]))
    return [w * cast(normal)] if option == "cast before weight" else [w * normal]


def _norm_sum(inputs: dict, option: str, cast: Round) -> list[Array]:
    """C30: the sum of squares in the dtype of the accumulator."""
    x = inputs["x"].reshape(-1, inputs["x"].shape[-1]).astype(F32)
    w, n = inputs["weight"].astype(F32), x.shape[-1]
    if option == "float32":
        sums = [np.sum(x * x, axis=-1, keepdims=True)]
    else:
        squares = np.moveaxis(x * x, -1, 0)
        narrow = _narrow(option, cast)
        sums = [
            total[:, None]
            for total in (_sequential(squares, narrow), _sequential(narrow(squares), narrow))
        ]
    roots = [np.sqrt(total / F32(n) + F32(inputs["eps"])) for total in sums]
    return [y for root in roots for y in (w * (x / root), w * cast(x / root))]


def _linear_sum(inputs: dict, option: str, cast: Round) -> list[Array]:
    """C30: products summed in the dtype of the accumulator, in the order of the columns."""
    x = inputs["x"].reshape(-1, inputs["x"].shape[-1]).astype(F32)
    w = inputs["weight"].astype(F32)
    bias = F32(0) if inputs["bias"] is None else inputs["bias"].astype(F32)
    if option == "float32":
        return [x @ w.T + bias]
    narrow = _narrow(option, cast)

    def total(inner: Round) -> Array:
        acc = np.zeros((len(x), len(w)), dtype=F32)
        for column in range(x.shape[-1]):
            acc = narrow(acc + inner(x[:, column, None] * w[:, column]))
        return acc

    return [narrow(total(lambda p: p) + bias), narrow(total(narrow) + bias)]


def _narrow(option: str, cast: Round) -> Round:
    """The rounding of an accumulator: a named dtype, or that of the output."""
    name = option.removesuffix(" accumulator")
    return (lambda x: rounded(x, NARROW[name])) if name in NARROW else cast


def _sequential(terms: Array, narrow: Round) -> Array:
    acc = np.zeros(terms.shape[1:], dtype=F32)
    for term in terms:
        acc = narrow(acc + term)
    return acc


def _softmax_place(inputs: dict, option: str, cast: Round) -> list[Array]:
    """C14: dtype of the softmax, and the place of the scale; eager (rounds each step) and fused."""
    q, k, v = operands(inputs, {}, F32)
    keep = visible_keys(inputs, {}, q, k, np.arange(q.shape[-2]))
    scale = F32(q.shape[-1] ** -0.5 if inputs["scale"] is None else inputs["scale"])
    outputs = []
    for each in (cast, lambda x: x):  # eager, fused
        on_q = option == "scale on q"
        s = each((cast(q * scale) if on_q else q) @ np.swapaxes(k, -1, -2))
        s = s if on_q else each(s * scale)
        inner = cast if option == "softmax in the model dtype" else (lambda x: x)
        s = np.where(keep, s, -np.inf)
        m = s.max(axis=-1, keepdims=True)
        e = inner(np.exp(inner(s - np.where(m == -np.inf, 0, m))))
        total = inner(e.sum(axis=-1, keepdims=True))
        p = each(inner(e / np.where(total == 0, 1, total)))
        outputs.append(p @ v)
    return outputs


def _phase_dtype(inputs: dict, option: str, _: Round) -> list[Array]:
    """C2: phases in float32 or float64, everything after them in float32."""
    wide = np.float64 if option == "float64" else F32
    x, d_rope = inputs["x"].reshape(-1, *inputs["x"].shape[-3:]).astype(F32), inputs["d_rope"]
    half = d_rope // 2
    power = float(inputs["base"]) ** (np.arange(0, d_rope, 2, dtype=F32) / F32(d_rope)).astype(
        np.float64
    )
    positions = inputs["positions"].reshape(-1, inputs["positions"].shape[-1])
    inv_freq = F32(1) / (chosen_factors(inputs, positions, {}, half) * power.astype(F32))
    phase = positions.astype(wide)[:, None, :, None] * inv_freq.astype(wide)
    magnitude = F32(inputs["magnitude"])
    cos, sin = magnitude * np.cos(phase).astype(F32), magnitude * np.sin(phase).astype(F32)
    a, b, rest = x[..., :half], x[..., half:d_rope], x[..., d_rope:]
    return [np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)]


EMULATORS: dict[tuple[str, str], Callable] = {
    ("C13", "rms_norm"): _norm_cast,
    ("C30", "rms_norm"): _norm_sum,
    ("C30", "linear"): _linear_sum,
    ("C14", "attention"): _softmax_place,
    ("C2", "rope"): _phase_dtype,
}
"""(convention, operation) -> function (inputs, option, cast) -> outputs, one a style."""
