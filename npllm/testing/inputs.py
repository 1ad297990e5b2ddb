"""Inputs of an operation as float64 arrays: widening, cuts, masks and angles."""

from typing import Any

import numpy as np

from npllm.errors import NpllmValueError

__all__ = [
    "attention_inputs",
    "f64",
    "frequencies",
    "gate_and_up",
    "split_qkv",
    "visible_keys",
    "widened_weight",
]

Array = Any

GROUP = 64  # entries of an 8-bit weight that share a scale


def f64(x: Array) -> Array:
    """Return any array of numbers as NumPy float64; of a device, a copy."""
    x = x.get() if hasattr(x, "get") else x
    return np.asarray(x).astype(np.float64)


def widened_weight(weight: Array) -> tuple[Array, int]:
    """Return a weight matrix in float64, and the roundings that widening it may take."""
    if not hasattr(weight, "widened"):
        return f64(weight), 0
    if not hasattr(weight, "scales"):  # blocks of GGUF: a scale's product, that with q, a minimum
        return f64(weight.widened()), 3
    group = getattr(weight, "group", GROUP)
    scales = np.repeat(f64(weight.scales), group, axis=-1)[:, : weight.values.shape[1]]
    return f64(weight.values) * scales, 1


def gate_and_up(gate_up: Array, gate: Array, up: Array) -> tuple[Array, Array]:
    """Cut a fused projection into gate and up, the gate first; or take both as they come."""
    if gate_up is None:
        return f64(gate), f64(up)
    half = gate_up.shape[-1] // 2
    return f64(gate_up[..., :half]), f64(gate_up[..., half:])


def split_qkv(y: Array, n_head: int, n_kv_head: int) -> tuple[Array, Array, Array]:
    """Cut rows [..., n_seq, width] into query, key and value heads, heads before positions."""
    n_all = n_head + 2 * n_kv_head
    if y.shape[-1] % n_all:
        raise NpllmValueError(
            f"the rows of weight must be (n_head + 2 * n_kv_head) * d_head, a multiple of {n_all}, "
            f"got {y.shape[-1]}"
        )
    heads = np.swapaxes(y.reshape(*y.shape[:-1], n_all, -1), -2, -3)
    return (
        heads[..., :n_head, :, :],
        heads[..., n_head : n_head + n_kv_head, :, :],
        heads[..., n_head + n_kv_head :, :, :],
    )


def frequencies(
    positions: Array, base: float, d_rope: int, factors: Array, inv_freq: Array
) -> tuple[Array, Array]:
    """Return phases [..., 1, n_seq, d_rope/2], and the relative error of their frequencies.

    A base leaves open how the frequencies are rounded.  In float32 the exponent e = 2 i / d_rope is
    off by u e, so that the power is off by u e log(base); the power, its inverse and the factor add
    a unit each.  Given frequencies are exact.
    """
    if inv_freq is None:
        exponent = np.arange(0, d_rope, 2) / d_rope
        inv_freq = float(base) ** -exponent
        inv_freq = inv_freq if factors is None else inv_freq / f64(factors)
        unsure = 2.0**-24 * (exponent * abs(np.log(float(base))) + 2 + (factors is not None))
    else:
        inv_freq, unsure = f64(inv_freq), np.zeros(())
    return f64(positions)[..., None, :, None] * inv_freq, unsure


def visible_keys(
    shape: tuple, causal: bool, window: int | None, valid: Array, mask: Array
) -> Array:
    """Return which keys each query sees, bool [n_batch or 1, n_head or 1, n_seq, n_ctx]."""
    n_seq, n_ctx = shape
    i, j = np.arange(n_ctx - n_seq, n_ctx)[:, None], np.arange(n_ctx)[None, :]
    seen = np.ones((n_seq, n_ctx), dtype=bool)
    if causal:
        seen &= j <= i
    if window is not None:
        seen &= j > i - window
    seen = seen[None, None]
    if valid is not None:
        seen = seen & np.asarray(valid).astype(bool)[:, None, None, :]
    return seen if mask is None else seen & np.asarray(mask)


def attention_inputs(
    q: Array,
    k: Array,
    v: Array,
    causal: bool,
    window: int | None,
    valid: Array,
    bias: Array,
    mask: Array,
) -> tuple[Array, Array, Array, Array, Array]:
    """Return q, k, v with one batch axis; visible keys and bias [n_batch, n_head, n_seq, n_ctx]."""
    q, k, v = (f64(x).reshape(-1, *x.shape[-3:]) for x in (q, k, v))
    shape = (len(q), q.shape[1], q.shape[2], k.shape[2])
    seen = np.broadcast_to(visible_keys(shape[2:], causal, window, valid, mask), shape)
    bias = np.broadcast_to(np.zeros(()) if bias is None else f64(bias), shape)
    return q, k, v, seen & (bias > -np.inf), bias
