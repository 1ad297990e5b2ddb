"""Error budgets of the operations that work entry by entry, or pair by pair."""

from typing import Any

import numpy as np

from npllm.testing.arithmetic import LAMBDA, Arithmetic, condition_of, gamma, lost_terms, repeats
from npllm.testing.exact import gold
from npllm.testing.inputs import f64, frequencies, gate_and_up, widened_weight

__all__ = [
    "add_budget",
    "embed_budget",
    "gelu_budget",
    "rope_budget",
    "softmax_budget",
    "swiglu_budget",
]

Array = Any

_HELD = {
    "float64": ["float64", "float32", "float16", "bfloat16"],
    "float32": ["float32", "float16", "bfloat16"],
    "float16": ["float16"],
    "bfloat16": ["bfloat16"],
    "tf32": [],
}


def rope_budget(
    a: Arithmetic,
    x: Array,
    positions: Array = None,
    base: float = 10000.0,
    d_rope: int | None = None,
    magnitude: float = 1.0,
    factors: Array = None,
    inv_freq: Array = None,
    cos: Array = None,
    sin: Array = None,
) -> tuple:
    """Bound the error of y = a cos - b sin, b cos + a sin, and that of the tables."""
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

    halves = (
        side(first * cos, second * sin, first * cos - second * sin),
        side(second * cos, first * sin, second * cos + first * sin),
    )
    passed = copy_error(a, x, wide[..., d_rope:])
    rest = passed, passed, np.ones_like(passed)
    return tuple(np.concatenate(parts, axis=-1) for parts in zip(*halves, rest, strict=True))


def softmax_budget(a: Arithmetic, x: Array, axis: int = -1) -> tuple:
    """Bound p_j = exp(x_j - m) / sum: an error of the argument becomes a relative one."""
    s = np.moveaxis(f64(x), axis, -1)
    largest = np.max(s, axis=-1, keepdims=True)
    distance = np.where(s == -np.inf, 0.0, largest - s)
    e = np.exp(-distance) * (s > -np.inf)
    p, n = e / np.sum(e, axis=-1, keepdims=True), s.shape[-1]
    each = a.u * (distance + 2)
    mean = np.sum(p * each, axis=-1, keepdims=True)
    last = a.roundings * a.u_out * p + np.where(s == -np.inf, 0.0, a.tiny + a.step)
    det = p * (each + mean + gamma(n, a.u) + 2 * a.u) + last
    spread = np.sum((p * each) ** 2, axis=-1, keepdims=True)
    spread = spread + (n * repeats(e, np.sum(e, axis=-1), a.u)[..., None] + 2) * a.u**2
    bias = lost_terms(p, np.ones(p.shape[:-1]), a.u)[..., None]
    stat = p * (LAMBDA / 3**0.5 * np.sqrt(each**2 + spread) + bias) + last
    stat = stat if a.independent(n) else det
    return tuple(np.moveaxis(part, -1, axis) for part in (det, stat, 1 + distance))


def swiglu_budget(
    a: Arithmetic, gate_up: Array = None, gate: Array = None, up: Array = None
) -> tuple:
    """Bound the error of y = gate up / (1 + exp(-gate)): seven roundings at most."""
    g, u = gate_and_up(gate_up, gate, up)
    y = g * u / (1 + np.exp(-g))
    floor = np.abs(g * u) * a.tiny + (1 + np.abs(u)) * a.step
    last = a.roundings * a.u_out * np.abs(y) + floor
    return np.abs(y) * 7 * a.u + last, np.abs(y) * LAMBDA * a.u * 2**0.5 + last, np.ones_like(y)


def gelu_budget(a: Arithmetic, x: Array, approximate: str = "none") -> tuple:
    """Bound the error of y = x (1 + f(z)) / 2: the sum cancels where x is far below zero."""
    wide, y = f64(x), gold("gelu", {"x": x, "approximate": approximate})
    f = np.where(wide == 0, 0.0, 2 * y / np.where(wide == 0, 1.0, wide) - 1)
    z = (
        wide * 0.5**0.5
        if approximate == "none"
        else (2 / np.pi) ** 0.5 * (wide + 0.044715 * wide**3)
    )
    slope = 2 / np.pi**0.5 * np.exp(-z * z) if approximate == "none" else 1 - f * f
    own = 12 if approximate == "none" else 4  # units of f: vector forms of erf are that rough
    inner = (
        np.abs(z) * slope * (2 if approximate == "none" else 6) + own * np.abs(f) + np.abs(1 + f)
    )
    det = (
        np.abs(wide) / 2 * a.u * inner
        + np.abs(y) * (2 * a.u + a.roundings * a.u_out)
        + (1 + np.abs(wide)) * a.step
    )
    return det, det, condition_of(np.abs(wide) * (1 + np.abs(f)) / 2, y)


def embed_budget(a: Arithmetic, ids: Array, weight: Array) -> tuple:
    """Bound the error of a row of the table: none where it is copied."""
    table, _ = widened_weight(weight)
    y = table[np.asarray(ids)]
    error = copy_error(a, weight, y)
    return error, error, np.ones_like(y)


def copy_error(a: Arithmetic, stored: Array, y: Array) -> Array:
    """Bound the error of copied values: one rounding where the output has fewer bits."""
    exact = str(getattr(stored, "dtype", "")) in _HELD[a.dtype]
    if exact:
        return np.full_like(y, a.step if a.flush_to_zero else 0.0)
    return a.u_out * np.abs(y) + a.step


def add_budget(a: Arithmetic, x: Array, y: Array) -> tuple:
    """Bound the error of z = x + y: one rounding, two where the dtypes differ."""
    p, q = f64(x), f64(y)
    z = p + q
    error = a.roundings * a.u_out * np.abs(z)
    if a.accumulate != a.dtype:
        error = error + a.u * np.abs(z) + a.step
    elif a.flush_to_zero:  # else a subnormal sum is exact
        error = error + a.step
    return error, error, condition_of(np.abs(p) + np.abs(q), z)
