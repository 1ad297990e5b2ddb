"""Error budgets of the operations that sum over a row: linear maps and norms."""

from typing import Any

import numpy as np

from npllm.quantized.activations import activation_group
from npllm.testing.arithmetic import (
    LAMBDA,
    Arithmetic,
    condition_of,
    dot_terms,
    gamma,
    lost_terms,
    repeats,
    sum_terms,
)
from npllm.testing.inputs import f64, split_qkv, widened_weight

__all__ = ["layer_norm_budget", "linear_budget", "qkv_budget", "rms_norm_budget"]

Array = Any


def linear_budget(a: Arithmetic, x: Array, weight: Array, bias: Array = None) -> tuple:
    """Bound the error of y = sum_i x_i w_i + bias: n products, n additions."""
    rows, w, weight_roundings = f64(x).reshape(-1, x.shape[-1]), *widened_weight(weight)
    n = rows.shape[-1]
    product, magnitude, variance = dot_terms(rows, w, a.u)
    b = np.zeros(len(w)) if bias is None else f64(bias)
    y, magnitude = product + b, magnitude + np.abs(b)
    last = a.u_out * np.abs(y) + (a.roundings - 1) * a.u_out * np.abs(product) + (n + 1) * a.step
    operand = 2 * a.u_operand * (1 + a.u_operand)
    det = (gamma(n + 1 + weight_roundings, a.u) + operand) * magnitude + last
    det = np.where(magnitude > a.largest, np.inf, det)
    squares = np.sqrt((rows**2) @ (w**2).T)
    stat = LAMBDA * a.u * np.sqrt(variance + y * y + weight_roundings * squares**2) + last
    stat = stat + a.u_operand * (LAMBDA * (2 / 3) ** 0.5 * squares + np.abs(product))
    off = a.group_errors(rows, activation_group(weight))
    det = det + (1 + gamma(n + 1 + weight_roundings, a.u)) * (off @ np.abs(w).T)
    stat = stat + LAMBDA / 3**0.5 * np.sqrt((off**2) @ (w**2).T)
    stat = stat if a.independent(n) else det
    return tuple(
        part.reshape(*x.shape[:-1], len(w)) for part in (det, stat, condition_of(magnitude, y))
    )


def qkv_budget(
    a: Arithmetic, x: Array, weight: Array, n_head: int, n_kv_head: int, bias: Array = None
) -> tuple:
    """Bound a linear map whose output is cut into heads: q, k and v behind each other."""
    return tuple(
        np.concatenate(split_qkv(part, n_head, n_kv_head), axis=-3)
        for part in linear_budget(a, x, weight, bias)
    )


def rms_norm_budget(a: Arithmetic, x: Array, weight: Array, eps: float) -> tuple:
    """Bound y = w x / sqrt(mean x**2 + eps): the root halves the error of the mean."""
    wide, n = f64(x), x.shape[-1]
    total = np.sum(wide * wide, axis=-1, keepdims=True)
    inside = total / n + eps
    y = f64(weight) * wide / np.sqrt(inside)
    share = np.where(inside > 0, total / n / inside, 0.0)
    underflow = np.where(inside > 0, a.tiny / inside, 0.0)  # of squares, flushed ones included
    last, floor = a.roundings * a.u_out, a.step * (2 + np.abs(f64(weight)))
    det = np.abs(y) * (gamma(n + 1, a.u) / 2 * share + 4 * a.u + last + underflow) + floor
    det = np.where(total > a.largest, np.inf, det)
    walk, bias = _positive_sum(a, wide * wide)
    few = LAMBDA / 3**0.5 * a.u
    stat = np.abs(y) * ((walk / 3**0.5 + bias) / 2 * share + few + last + underflow) + floor
    return det, stat if a.independent(n) else det, np.ones_like(y)


def layer_norm_budget(a: Arithmetic, x: Array, weight: Array, bias: Array, eps: float) -> tuple:
    """Bound y = w c / sqrt(mean c**2 + eps) + b, c = x - mean x."""
    wide, n, w, b = f64(x), x.shape[-1], f64(weight), f64(bias)
    total, magnitude, variance = (part[..., None] for part in sum_terms(wide, a.u))
    centred = wide - total / n
    square = np.mean(centred**2, axis=-1, keepdims=True)
    root = np.sqrt(square + eps)
    share, normal = np.where(root > 0, square / root**2, 0.0), w * centred / root
    last = a.u_out * np.abs(normal + b) + (a.roundings - 1) * a.u_out * np.abs(normal)
    last = last + a.step * (2 + np.abs(w) * (1 + 2 / root))
    ends = a.u * (np.abs(normal) + np.abs(b))

    def bound(shift: Array, walk: Array, few: float) -> Array:
        inner = share * (walk + shift**2 / np.maximum(square, a.tiny)) / 2
        return np.abs(w) / root * shift + np.abs(normal) * (inner + few * a.u) + ends + last

    det = bound((gamma(n, a.u) * magnitude + a.u * np.abs(total)) / n, gamma(n + 3, a.u), 5)
    det = np.where(np.sum(wide**2, axis=-1, keepdims=True) > a.largest, np.inf, det)
    shift = LAMBDA * a.u * np.sqrt(variance + total**2) / n
    stat = bound(shift, sum(_positive_sum(a, centred**2)), LAMBDA / 3**0.5)
    terms = np.abs(w) * (np.abs(wide) + magnitude / n) / root + np.abs(b)
    return det, stat if a.independent(n) else det, condition_of(terms, normal + b)


def _positive_sum(a: Arithmetic, p: Array) -> tuple[Array, Array]:
    """Relative error of a sum of positive terms in any order, and its loss in one direction."""
    total = np.sum(p, axis=-1)
    walk = LAMBDA * a.u * np.sqrt(p.shape[-1] * repeats(p, total, a.u))
    return walk[..., None], (lost_terms(p, total, a.u) / np.where(total > 0, total, 1.0))[..., None]
