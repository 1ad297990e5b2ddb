"""A few tokens through half a layer whose weights are under a LoRA adapter, in one kernel.

The low-rank products are small beside the weights, and one thread computes them.
"""

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from npllm.kernels.cpu.attention_step import attend_step
from npllm.kernels.cpu.gated import swiglu_row
from npllm.kernels.cpu.gemv import add_product, rows_of_bias
from npllm.kernels.cpu.launching import kernel
from npllm.kernels.cpu.layout import frozen
from npllm.kernels.cpu.simd_arrays import channels_of_weight, rows_of_weight
from npllm.models.params import LayerParams
from npllm.quantized.adapted import AdaptedWeight

__all__ = [
    "adapted_attention_step",
    "adapted_mlp_step",
    "base_layer",
    "is_adapted",
    "low_rank_operands",
]

Array = Any

PROJECTIONS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
NO_UPDATE = frozen(np.zeros((0, 0), np.float32))
_OPERANDS: WeakKeyDictionary[AdaptedWeight, tuple[Array, Array]] = WeakKeyDictionary()


def is_adapted(*weights: Any) -> bool:
    """Tell whether one of some weights is under an adapter."""
    return any(type(weight) is AdaptedWeight for weight in weights)


def base_layer(layer: LayerParams) -> LayerParams:
    """Return a layer with the bases of its adapted weights."""
    bases = {name: getattr(layer, name) for name in PROJECTIONS}
    return layer._replace(**{name: x.base for name, x in bases.items() if type(x) is AdaptedWeight})


def low_rank_operands(weight: Any) -> tuple[Array, Array]:
    """Return the updates of a weight as two factors for a kernel, made once for each weight.

        scale * (x A^T) B^T of each update = its block of columns of (x @ a) @ b

    Returns
    -------
    a : float32 array [d_in, d_rank]
        A^T of all updates side by side.
    b : float32 array [d_rank, d_out]
        scale * B^T of each update, in the columns of its rows; zeros elsewhere.
    """
    if type(weight) is not AdaptedWeight:
        return NO_UPDATE, NO_UPDATE
    known = _OPERANDS.get(weight)
    if known is None:
        a = np.concatenate([u.a.astype(np.float32).T for u in weight.updates], axis=1)
        b, start = np.zeros((a.shape[1], len(weight)), np.float32), 0
        for u in weight.updates:
            rank = len(u.a)
            wide = u.b.astype(np.float64).T * u.scale
            b[start : start + rank, u.first : u.stop] = wide
            start += rank
        known = _OPERANDS[weight] = frozen(np.ascontiguousarray(a)), frozen(b)
    return known


@kernel(nogil=True)
def add_low_rank(x: Array, gain: Array, eps: float, a: Array, b: Array, y: Array) -> None:
    """Add (rms_norm(x) @ a) @ b to y [n, d_out], in place; x [n, d_in] itself without a gain."""
    d_in, rank = a.shape
    if rank == 0:
        return
    h, t = np.empty(d_in, np.float32), np.empty(rank, np.float32)
    update = np.empty(y.shape[1], np.float32)
    for k in range(len(x)):
        factor = np.float32(1)
        if len(gain):
            total = np.float64(0)
            for i in range(d_in):
                total += np.float64(x[k, i]) * np.float64(x[k, i])
            factor = np.float32(1 / np.sqrt(total / d_in + np.float64(eps)))
        for i in range(d_in):
            h[i] = x[k, i] * factor * gain[i] if len(gain) else x[k, i]
        t[:] = 0
        for i in range(d_in):
            for r in range(rank):
                t[r] += h[i] * a[i, r]
        update[:] = 0
        for r in range(rank):
            for o in range(len(update)):
                update[o] += t[r] * b[r, o]
        for o in range(len(update)):
            y[k, o] += update[o]


@kernel()
def adapted_attention_step(
    x: Array,
    gain: Array,
    wide_gain: Array,
    eps: float,
    qkv_weight: Array,
    qkv_scales: Array,
    qkv_bias: Array,
    qkv_a: Array,
    qkv_b: Array,
    cos: Array,
    sin: Array,
    keys: Array,
    values: Array,
    bounds: Array,
    seen: Array,
    n_head: int,
    o_weight: Array,
    o_scales: Array,
    o_a: Array,
    o_b: Array,
) -> None:
    """Compute `npllm.kernels.cpu.decode.attention_step` with updates of both weights; wide_gain is
    the gain in float32.
    """
    n_batch, n_seq, _ = x.shape
    n = n_batch * n_seq
    rows = x.reshape(n, -1)
    qkv = rows_of_bias(n, rows_of_weight(qkv_weight), qkv_bias)
    add_product(qkv_weight, qkv_scales, rows, gain, eps, qkv)
    add_low_rank(rows, wide_gain, eps, qkv_a, qkv_b, qkv)
    y = np.empty((n_batch, n_seq, channels_of_weight(o_weight)), np.float32)
    heads = qkv.reshape(n_batch, n_seq, -1)
    attend_step(heads, cos, sin, keys, values, bounds, seen, n_head, y)
    flat = y.reshape(n, -1)
    add_product(o_weight, o_scales, flat, gain[:0], np.float32(0), rows)
    add_low_rank(flat, wide_gain[:0], np.float32(0), o_a, o_b, rows)


@kernel()
def adapted_mlp_step(
    x: Array,
    gain: Array,
    wide_gain: Array,
    eps: float,
    gate_up: Array,
    gate_up_scales: Array,
    gate_up_bias: Array,
    gate_up_a: Array,
    gate_up_b: Array,
    down: Array,
    down_scales: Array,
    down_a: Array,
    down_b: Array,
) -> None:
    """Compute `npllm.kernels.cpu.decode.mlp_step` with updates of both weights; wide_gain is the
    gain in float32.
    """
    d_ff = channels_of_weight(down)
    both = rows_of_bias(len(x), 2 * d_ff, gate_up_bias)
    add_product(gate_up, gate_up_scales, x, gain, eps, both)
    add_low_rank(x, wide_gain, eps, gate_up_a, gate_up_b, both)
    y = np.empty((len(x), d_ff), np.float32)
    for k in range(len(x)):
        swiglu_row(both[k, :d_ff], both[k, d_ff:], y[k])
    add_product(down, down_scales, y, gain[:0], np.float32(0), x)
    add_low_rank(y, wide_gain[:0], np.float32(0), down_a, down_b, x)
