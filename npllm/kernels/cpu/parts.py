"""Operations of the set compiled with Numba, below the layer.  What they compute is in the kernels
that they call.

A product of a few rows is bound by reading the weight and is `gemv`'s, one of many rows by
arithmetic and is `gemm`'s; attention is in `attention`.  All run on Numba's threads; what they are
not made for (a mask that is no band, a processor without FMA) takes the blocks and the threads of
`tiled`.
"""

import math

import numpy as np
from numba import get_num_threads, prange

from npllm import ops
from npllm.arrays import DTYPES, ieee_semantics
from npllm.kernels.cpu import gemm, tiled
from npllm.kernels.cpu.attention import PANELS, attend_many, attend_step, fold_scores, rotate_all
from npllm.kernels.cpu.gemv import FEW_ROWS, add_product, gate_all, gated_product
from npllm.kernels.cpu.layout import frozen, is_row_major, row_major, row_major_copy, rows_of
from npllm.kernels.cpu.simd import kernel
from npllm.ops.attention import evaluate_mask
from npllm.ops.mask.rule import ALL, FAR
from npllm.quantized.int8 import GROUP, Int8Weight
from npllm.threads import run_blocks, scratch

__all__ = ["gelu", "linear", "linear_add", "norm_linear", "norm_swiglu", "rope_attention"]

NOTHING, NO_SCALES = frozen(np.zeros(0, np.float32)), frozen(np.zeros((0, 0), np.float32))
BITS = {DTYPES["bfloat16"]: np.uint16, DTYPES["float16"]: np.int16, DTYPES["float32"]: np.float32}


# ----------------------------------------------------------------------------------------------------------------- products


def linear(x, weight, bias=None):
    """Compute `npllm.ops.linear`."""
    if not fits_product(x, weight, bias):
        return ops.linear(x, weight, bias)
    return biased(multiplied(x, weight, NOTHING, 0.0), bias)


def norm_linear(x, norm_weight, eps, weight, bias=None):
    """Compute rms_norm, then linear."""
    if not (fits_product(x, weight, bias) and fits_gain(x, norm_weight)):
        return NotImplemented
    return biased(multiplied(x, weight, norm_weight, eps), bias)


@ieee_semantics
def biased(y, bias):
    """Add a bias to new rows, in place."""
    if bias is not None:
        y += bias
    return y


def multiplied(x, weight, gain, eps):
    """The product of rows, normalised where there is a gain, with a weight."""
    d_out, d_in = weight.shape
    n = x.size // d_in
    if n > FEW_ROWS:
        if not gemm.width():
            return tiled.linear(tiled.rms_norm(x, gain, eps) if len(gain) else x, weight)
        return gemm.unpacked(
            many_rows(x, weight, gain, eps), np.empty((n, d_out), np.float32)
        ).reshape(*x.shape[:-1], d_out)
    y = np.zeros((n, d_out), np.float32)
    add_product(*stored(weight), rows_of(x), bits(gain), np.float32(eps), y)
    return y.reshape(*x.shape[:-1], d_out)


def many_rows(x, weight, gain=NOTHING, eps=0.0):
    """The product of many rows, normalised where there is a gain, as panels in a buffer."""
    return gemm.product(gemm.packed(rows_of(x), bits(gain), eps), *stored(weight))


def norm_swiglu(x, norm_weight, eps, weight, bias=None):
    """Compute rms_norm, linear, and swiglu of the two halves."""
    if not fits_gated(x, norm_weight, weight, bias):
        return NotImplemented
    d_in, d_ff = weight.shape[1], len(weight) // 2
    n = x.size // d_in
    if n > FEW_ROWS:
        if not gemm.width():
            return NotImplemented
        y = gemm.unpacked(
            gated_panels(x, norm_weight, eps, weight, bias), np.empty((n, d_ff), np.float32)
        )
    else:
        y = np.empty((n, d_ff), np.float32)
        gated_product(
            *stored(weight),
            rows_of(x),
            bits(norm_weight),
            np.float32(eps),
            bias_or_nothing(bias),
            y,
        )
    return y.reshape(*x.shape[:-1], d_ff)


@ieee_semantics
def gated_panels(x, norm_weight, eps, weight, bias):
    """Compute `norm_swiglu` of many rows, as panels [n_panel, d_ff, columns] in a buffer."""
    both = many_rows(x, weight, norm_weight, eps)
    d_ff = len(weight) // 2
    if bias is not None:
        both[:, : 2 * d_ff] += bias.astype(np.float32, copy=False)[:, None]
    y = scratch("gated", (len(both), d_ff, both.shape[2]), np.float32)
    gate_all(both, y)
    return y


def linear_add(x, weight, residual, bias=None):
    """Compute linear, then add."""
    fits = (
        fits_product(x, weight, bias)
        and tiled.is_float32(residual)
        and residual.shape == (*x.shape[:-1], len(weight))
    )
    if not fits:
        return NotImplemented
    d_out, d_in = weight.shape
    n = x.size // d_in
    if n > FEW_ROWS:
        if not gemm.width():
            return NotImplemented
        y = gemm.add_unpacked(many_rows(x, weight), row_major_copy(residual.reshape(n, d_out)))
    else:
        y = row_major_copy(residual.reshape(n, d_out))
        add_product(*stored(weight), rows_of(x), NOTHING, np.float32(0), y)
    return biased(y, bias).reshape(residual.shape)


def bias_or_nothing(bias):
    """A bias as kernels take it."""
    return NOTHING if bias is None else row_major(bias.astype(np.float32, copy=False))


def fits_gated(x, gain, weight, bias):
    """Tell whether norm, weight and gate are what the kernels are made for."""
    return fits_product(x, weight, bias) and fits_gain(x, gain) and len(weight) % 2 == 0


def fits_gain(x, gain):
    """Tell whether a gain is one that the kernels are made for."""
    return (
        type(gain) is np.ndarray
        and gain.shape == x.shape[-1:]
        and gain.dtype in BITS
        and is_row_major(gain)
    )


def bits(x):
    """A stored array as Numba can take it."""
    return frozen(x.view(BITS[x.dtype]))


def stored(weight):
    """A weight as the kernels take it: its entries, and their scales where they are in 8 bits."""
    if isinstance(weight, Int8Weight):
        return row_major(weight.values), row_major(weight.scales)
    return bits(weight), NO_SCALES


def fits_product(x, weight, bias=None):
    """Tell whether a product is one that the kernels are made for, also of a weight in 8 bits."""
    return tiled.is_float32(x) and x.size > 0 and fits_weight(weight, x.shape[-1], bias)


def fits_weight(weight, d_in, bias=None):
    """Tell whether a weight is one that the kernels are made for."""
    if isinstance(weight, Int8Weight):
        return (
            type(weight.values) is np.ndarray
            and (weight.values.dtype, weight.scales.dtype) == (np.int8, np.float32)
            and weight.shape[1] == d_in > 0
            and d_in % GROUP == 0
            and len(weight) > 0
            and is_row_major(weight.values)
            and is_row_major(weight.scales)
            and tiled.fits_bias(bias, weight)
        )
    return tiled.fits_weight(weight, d_in, bias)


# --------------------------------------------------------------------------------------------------------------- activation


def gelu(x, approximate="none"):
    """Compute `npllm.ops.gelu`; the exact form in float64 on all threads."""
    if not (tiled.is_float32(x) and approximate == "none" and x.size > 0):
        return ops.gelu(x, approximate)
    y = np.empty(x.shape, np.float32)
    gelu_all(row_major(x).reshape(-1), y.reshape(-1))
    return y


@kernel(parallel=True)
def gelu_all(x, y):
    """Compute y = x * erfc(-x / sqrt(2)) / 2."""
    for i in prange(len(x)):
        wide = np.float64(x[i])
        y[i] = wide * math.erfc(wide * -(0.5**0.5)) / 2


# ---------------------------------------------------------------------------------------------------------------- attention


def rope_attention(qkv, step):
    """Compute rotation, append and attention; one token a sequence takes one kernel, which writes
    into the cache itself.
    """
    cos, sin, n_head, n_kv_head = step[:4]
    if not (tiled.is_float32(qkv) and fits_rope(qkv.shape, cos, sin, n_head, n_kv_head)):
        return NotImplemented
    n_batch, n_seq, d_qkv = qkv.shape
    if n_seq > 1 or step.cache is None:
        return rope_attention_many(qkv, step)
    d_head = d_qkv // (n_head + 2 * n_kv_head)
    token = one_token(step, n_batch, d_head)
    if token is None:
        return NotImplemented
    y = np.empty((n_batch, 1, n_head * d_head), np.float32)
    attend_step(row_major(qkv), *token, n_head, y)
    return y


def one_token(step, n_batch, d_head):
    """What attention of one new token a sequence needs: its rotation, keys and values with room for
    its own, and which it sees.

    None where keys are not float32, or heads see different ones.
    """
    keys, values, slots = reserve_slots(step.cache, step.layer, n_batch, step.n_kv_head, d_head)
    seen = visible(step.mask, slots, n_batch, step.n_head)
    return (
        (*flat(step.cos, step.sin), keys, values, seen)
        if fits_kept(keys, values) and seen is not None
        else None
    )


def flat(*tables):
    """Tables of one token as kernels take them: [n_batch or 1, d_rope]."""
    return (rows_of(x) for x in tables)


def reserve_slots(cache, layer, n_batch, n_kv_head, d_head):
    """Keys and values of a layer with room for one token of each sequence, and their slots."""
    k = np.empty((n_batch, n_kv_head, 1, d_head), np.float32)  # its shape is asked for
    keys, values, slots = cache.reserve_slots(layer, k, k)
    return slots_first(keys), slots_first(values), slots


def fits_kept(*arrays):
    """Tell whether cached keys and values are what the kernels are made for: float32, the channels
    of a head side by side.
    """
    return tiled.is_float32(*arrays) and all(
        x.strides[-1] == 4 and x.flags.aligned and x.flags.writeable for x in arrays
    )


def slots_first(x):
    """A view [n_ctx, n_batch, n_kv_head, d_head] of keys or values: contiguous at no length, so
    that Numba knows one type of it.

    A single head of a single sequence is contiguous always, which is another type.
    """
    return x.transpose(2, 0, 1, 3)


def fits_rope(shape, cos, sin, n_head, n_kv_head):
    """Tell whether tables fit float32 tokens of a shape [n_batch, n_seq,
    (n_head+2*n_kv_head)*d_head].
    """
    n_all = n_head + 2 * n_kv_head
    return (
        tiled.is_float32(cos, sin)
        and len(shape) == 3
        and math.prod(shape) > 0
        and min(n_head, n_kv_head) > 0
        and shape[-1] % n_all == 0
        and n_head % n_kv_head == 0
        and cos.shape == sin.shape
        and cos.ndim in (2, 3)
        and cos.shape[-2] == shape[1]
        and cos.shape[-1] % 2 == 0
        and 0 < cos.shape[-1] <= shape[-1] // n_all
        and (cos.ndim == 2 or cos.shape[0] in (1, shape[0]))
    )


def rope_attention_many(qkv, step):
    """Many tokens: one kernel where the mask is a band of distances, else the blocks of the tiled
    set.
    """
    cos, sin, n_head, n_kv_head = step[:4]
    mask, cache = step.mask, step.cache
    n_batch, n_seq, _ = qkv.shape
    k = ops.split_qkv(qkv, n_head, n_kv_head)[1]
    if cache is None:
        keys, values, slots = (
            np.empty(k.shape, np.float32),
            np.empty(k.shape, np.float32),
            range(n_seq),
        )
    else:
        keys, values, slots = cache.reserve_slots(step.layer, k, k)
    if not fits_kept(keys, values):
        return NotImplemented
    qkv, *tables = map(
        row_major, (qkv, *(np.broadcast_to(x, (n_batch, *x.shape[-2:])) for x in (cos, sin)))
    )
    band = (-FAR, FAR) if mask is None else getattr(mask, "band", None)
    if band is None or not gemm.width():
        return attend_by_blocks(qkv, *tables, n_head, n_kv_head, mask, keys, values, slots)
    y = np.empty((n_batch, n_seq, n_head * k.shape[-1]), np.float32)
    panels = scratch("queries", (get_num_threads(), PANELS, k.shape[-1], gemm.width()), np.float32)
    attend_many(
        qkv,
        *tables,
        slots_first(keys),
        slots_first(values),
        n_head,
        band,
        panels,
        y,
        np.zeros(1, np.int64),
    )
    return y


def attend_by_blocks(qkv, cos, sin, n_head, n_kv_head, mask, keys, values, slots):
    """Rotate queries into an array of their own, write keys and values into the last columns, and
    attend.
    """
    heads = ops.split_qkv(qkv, n_head, n_kv_head)
    n_batch, _, n_seq, _ = heads[0].shape
    q = np.empty(heads[0].shape, np.float32)
    parts = [
        (x[b, h], cos[b], sin[b], y[b, h, y.shape[-2] - n_seq :], y is not values)
        for x, y in zip(heads, (q, keys, values), strict=True)
        for b in range(n_batch)
        for h in range(x.shape[1])
    ]
    run_blocks(lambda part: rotate_all(*part), parts)
    y, _ = tiled.attend(
        q, keys, values, mask, None, range(slots.stop - n_seq, slots.stop), slots, fold_scores
    )
    return ops.merge_heads(y)


def visible(mask, slots, n_batch, n_head):
    """Which cached keys the query in the last slot sees, [n_batch or 1, n_ctx]; no row at all where
    it sees every one.

    None where its heads see different ones.
    """
    slot = slots.stop - 1
    bound = (
        ALL
        if mask is None
        else getattr(mask, "bound", tiled.unknown)(slot, slot, slots.start, slot)
    )
    if bound == ALL:
        return np.zeros((0, len(slots)), bool)
    q = np.broadcast_to(np.float32(0), (n_batch, n_head, 1, 1))  # its shape is asked for
    seen = np.asarray(evaluate_mask(np, mask, q, range(slot, slot + 1), slots))
    if seen.ndim > 2 and seen.shape[-3] != 1:
        return None
    seen = np.broadcast_to(seen, np.broadcast_shapes(seen.shape, (1, len(slots))))
    return np.array(seen.reshape(-1, len(slots)), bool)
