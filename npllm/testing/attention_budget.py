"""The error budget of attention, one head and one block of rows at a time."""

from typing import Any

import numpy as np

from npllm.testing.arithmetic import LAMBDA, STEP, Arithmetic, dot_terms, gamma, repeats
from npllm.testing.inputs import attention_inputs
from npllm.threads import run_blocks

__all__ = ["attention_budget"]

Array = Any

BLOCK = 2**16  # entries of the table of scores that exist at a time


def attention_budget(
    a: Arithmetic,
    q: Array,
    k: Array,
    v: Array,
    causal: bool = True,
    window: int | None = None,
    valid: Array = None,
    scale: float | None = None,
    bias: Array = None,
    softcap: float | None = None,
    mask: Array = None,
) -> tuple:
    """Bound the error of y = sum_j p_j v_j: an error d of a score moves y by p_j d (v_j - y)."""
    shape = (*q.shape[:-1], v.shape[-1])
    q, k, v, seen, bias = attention_inputs(q, k, v, causal, window, valid, bias, mask)
    k, v = (np.where(np.isfinite(x), x, 0.0) for x in (k, v))  # a hidden key may hold anything
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group, n_rows = q.shape[1] // k.shape[1], max(1, BLOCK // max(1, k.shape[2]))
    parts = [np.zeros((*q.shape[:3], v.shape[3])) for _ in range(3)]

    def fill(at: tuple) -> None:
        b, h, _ = at
        see = slice(*_span(seen[at]))
        kv = b, h // group, see
        with np.errstate(all="ignore"):  # on a thread of its own
            block = _rows(
                a, q[at], k[kv], v[kv], seen[at][:, see], bias[at][:, see], scale, softcap
            )
        for part, new in zip(parts, block, strict=True):
            part[at] = new

    starts = range(0, q.shape[2], n_rows)
    run_blocks(
        fill,
        [
            (b, h, slice(start, start + n_rows))
            for b, h in np.ndindex(q.shape[:2])
            for start in starts
        ],
    )
    return tuple(part.reshape(shape) for part in parts)


def _span(seen: Array) -> tuple[int, int]:
    """First key that any row of a block sees, and the one behind the last."""
    keys = np.flatnonzero(seen.any(axis=0))
    return (int(keys[0]), int(keys[-1]) + 1) if len(keys) else (0, 1)


def _scores(
    a: Arithmetic, q: Array, k: Array, seen: Array, bias: Array, scale: float, softcap: float | None
) -> tuple:
    """Return scores, the deterministic error of each, and the variance of it in units of u**2."""
    raw, size, variance = dot_terms(q, k, a.u, 4)
    raw, size, variance = scale * raw, abs(scale) * size, scale**2 * variance
    det = gamma(q.shape[-1] + 2, a.u) * size + np.where(
        size > a.largest * min(1.0, abs(scale)), np.inf, 0.0
    )
    operand = 2 * a.u_operand * (1 + a.u_operand) * size
    rounded = (
        (a.roundings - 1) * 2 * a.u_out * np.abs(raw)
    )  # the scores, before and after the scale
    s, slope, ends = raw, 1.0, np.abs(raw)
    if softcap is not None:
        t = np.tanh(raw / softcap)
        s, slope, ends = softcap * t, 1 - t * t, ends + 4 * softcap * np.abs(t)
    s = s + np.where(seen, bias, 0.0)
    ends = ends + np.abs(s)
    off = (operand + rounded) * slope
    return s, slope * det + a.u * ends + off, slope**2 * variance + ends**2 + (off / a.u) ** 2


def _rows(
    a: Arithmetic,
    q: Array,
    k: Array,
    v: Array,
    seen: Array,
    bias: Array,
    scale: float,
    softcap: float | None,
) -> tuple:
    """Deterministic and statistical budget and condition of some rows of one head."""
    s, det_s, variance_s = _scores(a, q, k, seen, bias, scale, softcap)
    s = np.where(seen, s, -np.inf)
    largest = np.max(s, axis=-1, keepdims=True)
    distance = np.where(seen, largest - s, 0.0)
    e = np.where(seen, np.exp(-distance), 0.0)
    p = e / np.maximum(np.sum(e, axis=-1, keepdims=True), 1e-300)
    y, size = p @ v, p @ np.abs(v)
    n = np.count_nonzero(seen, axis=-1)[:, None]  # keys that enter the sums

    delta = np.where(seen, det_s + a.u * (distance + 2), 0.0)
    weights = np.where(
        seen & (delta > 0), np.exp(-distance) * np.expm1(np.minimum(delta, 700.0)), 0.0
    )
    weights = weights / np.maximum(np.sum(e, axis=-1, keepdims=True), 1e-300)
    u_p = max(a.u_probability, a.u_out if a.roundings > 1 else 0.0)
    lost = (
        n * max(a.lost, STEP[a.probabilities or "float64"]) * np.max(np.abs(v), axis=0, initial=0.0)
    )
    last = a.u_out * np.abs(y) + np.where(n > 0, a.step * (n + 1) + lost, 0.0)
    moved = np.sum(weights, axis=-1, keepdims=True)
    det = np.sqrt(moved) * _deviation(weights, v, y) / np.maximum(1 - moved, 1e-300)
    det = np.where((moved < 0.5) & np.isfinite(np.max(delta, axis=-1, keepdims=True)), det, np.inf)
    det = det + (2 * gamma(n + 2, a.u) + u_p) * size + last

    sigma = np.where(seen, variance_s + distance**2 + 4, 0.0)
    spread = _deviation(p * p * sigma, v, y) ** 2
    _, _, walk = dot_terms(p, v.T, a.u)
    total = n * repeats(e, np.sum(e, axis=-1), a.u)[:, None] * y**2
    stat = a.u * np.sqrt(spread + total + walk + y**2) + u_p * np.sqrt((p * p) @ (v * v))
    small = np.where(p < 2 * a.u, np.minimum(p, a.u), 0.0)  # what the sums lose in one direction
    bias = small @ np.abs(v) + np.sum(small, axis=-1, keepdims=True) * np.abs(y)
    stat = LAMBDA * stat + bias + last
    stat = np.where(n * a.u <= 0.125, stat, det)
    terms = size + (p * np.abs(np.where(seen, s, 0.0))) @ np.abs(v)
    return det, stat, np.where(terms == 0, 1.0, terms / np.abs(y))


def _deviation(weights: Array, v: Array, y: Array) -> Array:
    """Root of sum_j w_j (v_j - y)**2, without the table of all differences."""
    total = np.sum(weights, axis=-1, keepdims=True)
    centre = np.where(total > 0, weights @ v / np.where(total > 0, total, 1.0), y)
    around = weights @ (v * v) - total * centre**2
    return np.sqrt(np.maximum(around, 0.0) + total * (centre - y) ** 2)
