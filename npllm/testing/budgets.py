"""Error budgets: how far a correct implementation may be off, entry by entry.

Each operation has two: a deterministic bound, which no correct implementation exceeds whatever its order of summation, and a
statistical one, which rounding errors that are independent exceed with a probability of less than one in a million.  The
derivation is docs/budgets.md; the terms are named after it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from npllm.errors import NpllmValueError
from npllm.testing.arithmetic import LAMBDA, Arithmetic, dot_terms, gamma, repeats, sum_terms
from npllm.testing.attention_budget import attention_budget
from npllm.testing.inputs import f64, frequencies, gate_and_up, split_qkv, widened_weight

__all__ = ["BUDGETS", "Budget", "budget"]

Array = Any
Inputs = Mapping[str, Any]


class Budget(NamedTuple):
    """Largest errors that a correct implementation makes, entry by entry.

    Parameters
    ----------
    deterministic : float64 array
        A bound for every order of summation; infinity where the arithmetic promises nothing.
    statistical : float64 array
        What independent rounding errors reach; never above the deterministic bound.
    condition : float64 array
        Sum of the absolute terms over the absolute value: what a relative error of the terms is multiplied by.
    """

    deterministic: Array
    statistical: Array
    condition: Array


def budget(op: str, inputs: Inputs, *, dtype: str = "float32", accumulate: str = "float32", roundings: int = 1,
           operands: str | None = None, probabilities: str | None = None) -> Budget:
    """Bound the error of an operation on given inputs, entry by entry.

        |computed - exact| <= deterministic, always;   <= statistical, for independent rounding errors

    Parameters
    ----------
    op : str
        "linear", "qkv_projection", "rms_norm", "layer_norm", "rope", "softmax", "attention", "swiglu", "gelu", "embed" or "add".
    inputs : dict
        The arguments by parameter name, as NumPy arrays and numbers.
    dtype : str
        Of the output: "float64", "float32", "float16" or "bfloat16".
    accumulate : str
        In which sums and elementary functions are evaluated.
    roundings : int
        How often a value is rounded to `dtype` on its way to the output.
    operands : str, optional
        To which the factors of matrix products are rounded before, such as "tf32".
    probabilities : str, optional
        To which attention rounds its probabilities, such as "bfloat16".

    Returns
    -------
    budget : Budget
        Arrays of the output's shape.

    Raises
    ------
    NpllmValueError
        For an unknown operation, dtype or input name.

    Notes
    -----
    Source: docs/budgets.md; Higham, "Accuracy and Stability of Numerical Algorithms" (2nd ed. 2002), chapters 2 to 4.
    """
    if op not in BUDGETS:
        raise NpllmValueError(f"no budget is called {op!r}; there are {', '.join(BUDGETS)}")
    arithmetic = Arithmetic(dtype, accumulate, roundings, operands, probabilities)
    with np.errstate(all="ignore"):  # an overflow is a bound of infinity
        deterministic, statistical, condition = BUDGETS[op](arithmetic, **inputs)
    deterministic = np.where(np.isnan(deterministic), np.inf, deterministic)
    statistical = np.fmin(statistical, deterministic)
    return Budget(deterministic, statistical, condition)


def condition_of(magnitude: Array, y: Array) -> Array:
    """Divide the sum of the absolute terms by the absolute value; 1 where both are zero."""
    return np.where(magnitude == 0, 1.0, magnitude / np.abs(y))


def linear_budget(a: Arithmetic, x: Array, weight: Array, bias: Array = None) -> tuple:
    """Bound the error of y = sum_i x_i w_i + bias: n products, n additions."""
    rows, w, weight_roundings = f64(x).reshape(-1, x.shape[-1]), *widened_weight(weight)
    n = rows.shape[-1]
    product, magnitude, variance = dot_terms(rows, w)
    b = np.zeros(len(w)) if bias is None else f64(bias)
    y, magnitude = product + b, magnitude + np.abs(b)
    last = a.u_out * np.abs(y) + (a.roundings - 1) * a.u_out * np.abs(product) + (n + 1) * a.step
    operand = 2 * a.u_operand * (1 + a.u_operand)
    det = (gamma(n + 1 + weight_roundings, a.u) + operand) * magnitude + last
    det = np.where(magnitude > a.largest, np.inf, det)
    squares = np.sqrt((rows**2) @ (w**2).T)
    stat = LAMBDA * a.u * np.sqrt(variance + y * y + weight_roundings * squares**2) + last
    stat = stat + operand * (LAMBDA * squares + np.abs(product))
    stat = stat if a.independent(n) else det
    return tuple(part.reshape(*x.shape[:-1], len(w)) for part in (det, stat, condition_of(magnitude, y)))


def qkv_budget(a: Arithmetic, x: Array, weight: Array, n_head: int, n_kv_head: int, bias: Array = None) -> tuple:
    """A linear map whose output is cut into heads: query heads, key heads, value heads, one after the other."""
    return tuple(np.concatenate(split_qkv(part, n_head, n_kv_head), axis=-3) for part in linear_budget(a, x, weight, bias))


def rms_norm_budget(a: Arithmetic, x: Array, weight: Array, eps: float) -> tuple:
    """Bound the error of y = w x / sqrt(mean x**2 + eps): the root halves the relative error of the mean."""
    wide, n = f64(x), x.shape[-1]
    total = np.sum(wide * wide, axis=-1, keepdims=True)
    inside = total / n + eps
    y = f64(weight) * wide / np.sqrt(inside)
    share = np.where(inside > 0, total / n / inside, 0.0)
    underflow = np.where(inside > 0, a.tiny / inside, 0.0)  # of the squares, also where subnormals are flushed
    last = a.roundings * a.u_out
    det = np.abs(y) * (gamma(n + 1, a.u) / 2 * share + 4 * a.u + last + underflow) + a.step
    det = np.where(total > a.largest, np.inf, det)
    walk = np.sqrt(n * repeats(wide * wide))[..., None]
    stat = np.abs(y) * (LAMBDA * a.u / 3**0.5 * (walk / 2 * share + 1) + last + underflow) + a.step
    return det, stat if a.independent(n) else det, np.ones_like(y)


def layer_norm_budget(a: Arithmetic, x: Array, weight: Array, bias: Array, eps: float) -> tuple:
    """Bound the error of y = w c / sqrt(mean c**2 + eps) + b, c = x - mean x: an error of the mean shifts the whole row."""
    wide, n, w, b = f64(x), x.shape[-1], f64(weight), f64(bias)
    total, magnitude, variance = (part[..., None] for part in sum_terms(wide))
    centred = wide - total / n
    square = np.mean(centred**2, axis=-1, keepdims=True)
    root = np.sqrt(square + eps)
    share, normal = np.where(root > 0, square / root**2, 0.0), w * centred / root
    last = a.u_out * np.abs(normal + b) + (a.roundings - 1) * a.u_out * np.abs(normal) + a.step
    ends = a.u * (np.abs(normal) + np.abs(b))

    def bound(shift: Array, walk: Array, few: float) -> Array:
        inner = share * (walk + shift**2 / np.maximum(square, a.tiny)) / 2
        return np.abs(w) / root * shift + np.abs(normal) * (inner + few * a.u) + ends + last

    det = bound((gamma(n, a.u) * magnitude + a.u * np.abs(total)) / n, gamma(n + 3, a.u), 5)
    det = np.where(np.sum(wide**2, axis=-1, keepdims=True) > a.largest, np.inf, det)
    walk = LAMBDA * a.u * np.sqrt(n * repeats(centred**2) / 3)[..., None]
    stat = bound(LAMBDA * a.u * np.sqrt(variance + total**2) / n, walk, LAMBDA / 3**0.5)
    terms = np.abs(w) * (np.abs(wide) + magnitude / n) / root + np.abs(b)
    return det, stat if a.independent(n) else det, condition_of(terms, normal + b)


def rope_budget(a: Arithmetic, x: Array, positions: Array = None, base: float = 10000.0, d_rope: int | None = None,
                magnitude: float = 1.0, factors: Array = None, inv_freq: Array = None, cos: Array = None,
                sin: Array = None) -> tuple:
    """Bound the error of y = a cos - b sin, b cos + a sin: two products, one sum, and the error of the tables."""
    wide = f64(x)
    if cos is None:
        d_rope = x.shape[-1] if d_rope is None else d_rope
        phase, unsure = frequencies(positions, base, d_rope, factors, inv_freq)
        table = magnitude * (a.u * (phase + 3) + unsure * phase)
        cos, sin = magnitude * np.cos(phase), magnitude * np.sin(phase)
    else:
        d_rope, table = cos.shape[-1], 0.0
        cos, sin = (f64(t)[..., None, :, : d_rope // 2] for t in (cos, sin))
    first, second = wide[..., : d_rope // 2], wide[..., d_rope // 2 : d_rope]

    def side(p: Array, q: Array, y: Array) -> tuple:
        off, last = (np.abs(first) + np.abs(second)) * table, a.u_out * np.abs(y) + 2 * a.step
        last = last + (a.roundings - 1) * a.u_out * (np.abs(p) + np.abs(q))
        det = 2 * a.u * (np.abs(p) + np.abs(q)) + last + off
        stat = LAMBDA * a.u / 3**0.5 * np.sqrt(p * p + q * q + y * y) + last + off
        return det, stat, condition_of(np.abs(p) + np.abs(q), y)

    halves = (side(first * cos, second * sin, first * cos - second * sin),
              side(second * cos, first * sin, second * cos + first * sin))
    passed = wide[..., d_rope:]
    rest = np.zeros_like(passed), np.zeros_like(passed), np.ones_like(passed)
    return tuple(np.concatenate(parts, axis=-1) for parts in zip(*halves, rest, strict=True))


def softmax_budget(a: Arithmetic, x: Array, axis: int = -1) -> tuple:
    """p_j = exp(x_j - m) / sum: the exponential turns an error of its argument into a relative one."""
    s = np.moveaxis(f64(x), axis, -1)
    largest = np.max(s, axis=-1, keepdims=True)
    distance = np.where(s == -np.inf, 0.0, largest - s)
    e = np.exp(-distance) * (s > -np.inf)
    p, n = e / np.sum(e, axis=-1, keepdims=True), s.shape[-1]
    each = a.u * (distance + 2)
    mean = np.sum(p * each, axis=-1, keepdims=True)
    last = a.roundings * a.u_out * p + np.where(s == -np.inf, 0.0, a.tiny + a.step)
    det = p * (each + mean + gamma(n, a.u) + 2 * a.u) + last
    spread = np.sum((p * each) ** 2, axis=-1, keepdims=True) + (n * repeats(e)[..., None] + 2) * a.u**2
    stat = p * LAMBDA / 3**0.5 * np.sqrt(each**2 + spread) + last
    stat = stat if a.independent(n) else det
    return tuple(np.moveaxis(part, -1, axis) for part in (det, stat, 1 + distance))


def swiglu_budget(a: Arithmetic, gate_up: Array = None, gate: Array = None, up: Array = None) -> tuple:
    """Bound the error of y = gate up / (1 + exp(-gate)): exponential 2, sum, quotient, product, and what the sum hides."""
    g, u = gate_and_up(gate_up, gate, up)
    y = g * u / (1 + np.exp(-g))
    floor = np.abs(g * u) * a.tiny + (1 + np.abs(u)) * a.step
    last = a.roundings * a.u_out * np.abs(y) + floor
    return np.abs(y) * 7 * a.u + last, np.abs(y) * LAMBDA * a.u * 2**0.5 + last, np.ones_like(y)


def gelu_budget(a: Arithmetic, x: Array, approximate: str = "none") -> tuple:
    """Bound the error of y = x (1 + f(z)) / 2: the sum cancels where x is far below zero."""
    from npllm.testing.exact import gold

    wide, y = f64(x), gold("gelu", {"x": x, "approximate": approximate})
    f = np.where(wide == 0, 0.0, 2 * y / np.where(wide == 0, 1.0, wide) - 1)
    z = wide * 0.5**0.5 if approximate == "none" else (2 / np.pi) ** 0.5 * (wide + 0.044715 * wide**3)
    slope = 2 / np.pi**0.5 * np.exp(-z * z) if approximate == "none" else 1 - f * f
    inner = np.abs(z) * slope * (2 if approximate == "none" else 6) + 4 * np.abs(f) + (np.abs(1 + f))
    det = np.abs(wide) / 2 * a.u * inner + np.abs(y) * (2 * a.u + a.roundings * a.u_out) + (1 + np.abs(wide)) * a.step
    return det, det, condition_of(np.abs(wide) * (1 + np.abs(f)) / 2, y)


def embed_budget(a: Arithmetic, ids: Array, weight: Array) -> tuple:
    """Bound the error of y = a row of the table: exact, or one rounding where the output has fewer bits."""
    table, _ = widened_weight(weight)
    y = table[np.asarray(ids)]
    exact = np.isin(str(getattr(weight, "dtype", "")), _HELD[a.dtype])
    error = np.zeros_like(y) if exact else a.u_out * np.abs(y) + a.step
    return error, error, np.ones_like(y)


_HELD = {"float64": ["float64", "float32", "float16", "bfloat16"], "float32": ["float32", "float16", "bfloat16"],
         "float16": ["float16"], "bfloat16": ["bfloat16"], "tf32": []}


def add_budget(a: Arithmetic, x: Array, y: Array) -> tuple:
    """Bound the error of z = x + y: one rounding, two where the output has fewer bits than the accumulation."""
    p, q = f64(x), f64(y)
    z = p + q
    error = np.abs(z) * (a.roundings * a.u_out + (a.u if a.u < a.u_out else 0.0)) + (a.step if a.u < a.u_out else 0.0)
    return error, error, condition_of(np.abs(p) + np.abs(q), z)


BUDGETS: dict[str, Callable] = {
    "linear": linear_budget, "qkv_projection": qkv_budget, "rms_norm": rms_norm_budget, "layer_norm": layer_norm_budget,
    "rope": rope_budget, "softmax": softmax_budget, "attention": attention_budget, "swiglu": swiglu_budget,
    "gelu": gelu_budget, "embed": embed_budget, "add": add_budget,
}
"""One function an operation: (arithmetic, **inputs) -> deterministic, statistical, condition."""
