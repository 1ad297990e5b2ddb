"""The set compiled with Numba: its operations, and the products of a few rows, where reading the weights is all that counts.

A product with many rows is bound by arithmetic and is `gemm`'s; the kernels of attention are in `attention`.  All run on Numba's
threads; what they are not made for (a mask that is no band, a processor without FMA) takes the blocks and the threads of `tiled`.
"""

from dataclasses import replace

import numpy as np
from numba import get_num_threads, prange

from npllm import ops
from npllm.arrays import DTYPES
from npllm.cache import KVCache
from npllm.int8 import GROUP, Int8Weight, quantize
from npllm.kernels import gemm, tiled
from npllm.kernels.attention import PANELS, attend_many, attend_step, fold_scores, rotate_all
from npllm.kernels.gemm import root_mean_square
from npllm.kernels.simd import (
    LANES,
    divide,
    exp,
    fma,
    is_int8,
    kernel,
    load,
    load_pairs,
    pairs,
    prefetch,
    single,
    splat,
    store,
    total,
)
from npllm.kernels.tiled import TILED
from npllm.ops.fusions import cut_heads
from npllm.ops.mask import causal
from npllm.ops.mask.rule import ALL, FAR
from npllm.threads import run_blocks, scratch

__all__ = ["COMPILED", "linear", "linear_add", "norm_linear", "norm_swiglu", "rope_attention"]

FEW_ROWS = 12  # up to here reading the weight straight is faster than panels; a multiple of 4
AHEAD = 512  # entries of each stream of weights that are fetched ahead
STEP = 2 * LANES
NOTHING, NO_SCALES = np.zeros(0, np.float32), np.zeros((0, 0), np.float32)
BITS = {DTYPES["bfloat16"]: np.uint16, DTYPES["float16"]: np.int16, DTYPES["float32"]: np.float32}


# ----------------------------------------------------------------------------------------------------------------- products


@kernel()
def rest(weight, p, x):
    """What a row's product has beyond the last whole step."""
    n, y = len(x), np.float32(0)
    for i in range(n // STEP * STEP, n):
        y += single(weight, p + i) * x[i]
    return y


@kernel()
def dot_four(weight, p, stride, x, n):
    """Products of four rows of a weight, which begin at p, p + stride, ..., with one vector."""
    a = b = c = d = splat(np.float32(0))
    q, r, s = p + stride, p + 2 * stride, p + 3 * stride
    whole = n // STEP * STEP
    for i in range(0, whole, STEP):
        prefetch(weight, p + i + AHEAD)
        prefetch(weight, q + i + AHEAD)
        prefetch(weight, r + i + AHEAD)
        prefetch(weight, s + i + AHEAD)
        x0, x1 = load(x, i), load(x, i + LANES)
        w0, w1 = load_pairs(weight, p + i)
        a = fma(w1, x1, fma(w0, x0, a))
        w0, w1 = load_pairs(weight, q + i)
        b = fma(w1, x1, fma(w0, x0, b))
        w0, w1 = load_pairs(weight, r + i)
        c = fma(w1, x1, fma(w0, x0, c))
        w0, w1 = load_pairs(weight, s + i)
        d = fma(w1, x1, fma(w0, x0, d))
    return (total(a) + rest(weight, p, x), total(b) + rest(weight, q, x), total(c) + rest(weight, r, x),
            total(d) + rest(weight, s, x))


@kernel()
def dot_two_by_four(weight, p, q, x, k, n):
    """Products of two rows of a weight, which begin at p and q, with four vectors: rows k ... k + 3 of x."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = splat(np.float32(0))
    k0, k1, k2, k3 = k * n, (k + 1) * n, (k + 2) * n, (k + 3) * n
    whole = n // STEP * STEP
    for i in range(0, whole, STEP):
        if k == 0:
            prefetch(weight, p + i + AHEAD)
            prefetch(weight, q + i + AHEAD)
        u0, u1 = load_pairs(weight, p + i)
        w0, w1 = load_pairs(weight, q + i)
        x0, x1 = load(x, k0 + i), load(x, k0 + i + LANES)
        a0, b0 = fma(u1, x1, fma(u0, x0, a0)), fma(w1, x1, fma(w0, x0, b0))
        x0, x1 = load(x, k1 + i), load(x, k1 + i + LANES)
        a1, b1 = fma(u1, x1, fma(u0, x0, a1)), fma(w1, x1, fma(w0, x0, b1))
        x0, x1 = load(x, k2 + i), load(x, k2 + i + LANES)
        a2, b2 = fma(u1, x1, fma(u0, x0, a2)), fma(w1, x1, fma(w0, x0, b2))
        x0, x1 = load(x, k3 + i), load(x, k3 + i + LANES)
        a3, b3 = fma(u1, x1, fma(u0, x0, a3)), fma(w1, x1, fma(w0, x0, b3))
    return total(a0), total(a1), total(a2), total(a3), total(b0), total(b1), total(b2), total(b3)


@kernel()
def dot_four_int8(values, scales, p, stride, x):
    """As `dot_four`, of a weight in 8 bits: each group is summed up, and scaled then."""
    zero = splat(np.float32(0))
    a = b = c = d = zero
    q, r, s = p + stride, p + 2 * stride, p + 3 * stride
    for i in range(0, len(x), GROUP):
        prefetch(values, p + i + 2 * AHEAD)
        prefetch(values, q + i + 2 * AHEAD)
        prefetch(values, r + i + 2 * AHEAD)
        prefetch(values, s + i + 2 * AHEAD)
        u = v = w = z = zero
        for j in range(i, i + GROUP, LANES):
            part = load(x, j)
            u, v = fma(load(values, p + j), part, u), fma(load(values, q + j), part, v)
            w, z = fma(load(values, r + j), part, w), fma(load(values, s + j), part, z)
        a = fma(u, splat(single(scales, (p + i) // GROUP)), a)
        b = fma(v, splat(single(scales, (q + i) // GROUP)), b)
        c = fma(w, splat(single(scales, (r + i) // GROUP)), c)
        d = fma(z, splat(single(scales, (s + i) // GROUP)), d)
    return total(a), total(b), total(c), total(d)


@kernel(parallel=True)
def add_product_one(weight, x, y):
    """Compute y [d_out] += weight [d_out, d_in] @ x [d_in]; four distant streams of rows are read at once."""
    d_out, d_in = weight.shape
    n = d_out // 4
    for o in prange(n):
        a, b, c, d = dot_four(weight, o * d_in, n * d_in, x, d_in)
        y[o] += a
        y[o + n] += b
        y[o + 2 * n] += c
        y[o + 3 * n] += d
    for o in range(4 * n, d_out):
        y[o] += dot_four(weight, o * d_in, 0, x, d_in)[0]


@kernel(parallel=True)
def add_product_int8(values, scales, x, y):
    """Compute y [n, d_out] += x [n, d_in] @ weight.T, of a weight in 8 bits."""
    d_out, d_in = values.shape
    quarter = (d_out + 3) // 4
    for o in prange(quarter):
        step = quarter if o + 3 * quarter < d_out else 0
        for k in range(len(y)):
            four = dot_four_int8(values, scales, o * d_in, step * d_in, x[k])
            for j in range(4):
                row = o + j * quarter
                if row < d_out:
                    y[k, row] += four[j] if step or j == 0 else dot_four_int8(values, scales, row * d_in, 0, x[k])[0]


@kernel(parallel=True)
def add_product_few(weight, x, y):
    """Compute y [n, d_out] += x [4m, d_in] @ weight.T, for n up to 4m rows; two distant streams of rows are read at once."""
    d_out, d_in = weight.shape
    half = (d_out + 1) // 2
    for o in prange(half):
        other = min(o + half, d_out - 1)
        for k in range(0, len(y), 4):
            sums = dot_two_by_four(weight, o * d_in, other * d_in, x, k, d_in)
            for j in range(min(4, len(y) - k)):
                y[k + j, o] += sums[j] + rest(weight, o * d_in, x[k + j])
                if o + half < d_out:
                    y[k + j, other] += sums[4 + j] + rest(weight, other * d_in, x[k + j])


@kernel()
def ready(weight, x, gain, eps):
    """The rows of x as products want them: normalised where there is a gain, padded to a multiple of 4, in the weight's order."""
    n, d = x.shape
    rows = np.zeros((1 if n == 1 else (n + 3) // 4 * 4, d), np.float32)
    for k in range(n):
        rows[k] = x[k]
        if len(gain):
            normalise(rows[k], gain, eps)
        pairs(weight, rows[k])
    return rows


@kernel()
def normalise(x, gain, eps):
    """Divide a row by its root mean square, in place, and scale it."""
    root = root_mean_square(x, eps)
    for i in range(len(x)):
        x[i] = single(gain, i) * (x[i] / root)


@kernel()
def add_product(weight, scales, x, gain, eps, y):
    """Compute y [n, d_out] += rms_norm(x) @ weight.T; without a gain x is not normalised."""
    rows = ready(weight, x, gain, eps)
    if is_int8(weight):
        add_product_int8(weight, scales, rows, y)
    elif len(x) == 1:
        add_product_one(weight, rows[0], y[0])
    else:
        add_product_few(weight, rows, y)


@kernel(parallel=True)
def gated_product(weight, scales, x, gain, eps, bias, y):
    """Compute y [n, d_ff] = swiglu of the two halves of rms_norm(x) @ weight.T, with a bias where there is one."""
    d_ff = y.shape[1]
    both = np.zeros((len(x), 2 * d_ff), np.float32)
    if len(bias):
        for k in range(len(x)):
            both[k] = bias
    add_product(weight, scales, x, gain, eps, both)
    n_part = (d_ff + 255) // 256
    for at in prange(len(x) * n_part):
        k, start = at // n_part, at % n_part * 256
        gate(both[k, start : min(start + 256, d_ff)], both[k, d_ff + start : d_ff + min(start + 256, d_ff)],
             y[k, start : min(start + 256, d_ff)])


@kernel(nogil=True)
def gate(g, u, y):
    """Compute y = silu(g) * u on one run of channels."""
    whole = len(g) // LANES * LANES
    one, minus, zero = splat(np.float32(1)), splat(np.float32(-1)), splat(np.float32(0))
    for i in range(0, whole, LANES):
        x = load(g, i)
        silu = divide(x, fma(one, one, exp(fma(minus, x, zero))))
        store(y, i, fma(silu, load(u, i), zero))
    for i in range(whole, len(g)):
        y[i] = g[i] / (np.float32(1) + np.exp(-g[i])) * u[i]


def linear(x, weight, bias=None):
    """Compute `npllm.ops.linear`."""
    if not fits_product(x, weight, bias):
        return ops.linear(x, weight, bias)
    return biased(multiplied(x, weight, NOTHING, 0.0), bias)


def norm_linear(x, norm_weight, eps, weight, bias=None):
    """Compute `npllm.ops.norm_linear`."""
    if not (fits_product(x, weight, bias) and fits_gain(x, norm_weight)):
        return ops.norm_linear(x, norm_weight, eps, weight, bias)
    return biased(multiplied(x, weight, norm_weight, eps), bias)


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
        return gemm.unpacked(many_rows(x, weight, gain, eps), np.empty((n, d_out), np.float32)).reshape(*x.shape[:-1], d_out)
    y = np.zeros((n, d_out), np.float32)
    add_product(*stored(weight), x.reshape(n, d_in), bits(gain), np.float32(eps), y)
    return y.reshape(*x.shape[:-1], d_out)


def many_rows(x, weight, gain=NOTHING, eps=0.0):
    """The product of many rows, normalised where there is a gain, in panels of 64 rows."""
    return gemm.product(gemm.packed(x.reshape(-1, x.shape[-1]), bits(gain), eps), *stored(weight))


def norm_swiglu(x, norm_weight, eps, weight, bias=None):
    """Compute `npllm.ops.norm_swiglu`."""
    if not (fits_product(x, weight, bias) and fits_gain(x, norm_weight)) or len(weight) % 2:
        return ops.norm_swiglu(x, norm_weight, eps, weight, bias)
    d_in, d_ff = weight.shape[1], len(weight) // 2
    n = x.size // d_in
    if n > FEW_ROWS:
        if not gemm.width():
            return TILED.norm_swiglu(x, norm_weight, eps, weight, bias)
        both = many_rows(x, weight, norm_weight, eps)
        if bias is not None:
            both[:, : 2 * d_ff] += bias.astype(np.float32, copy=False)[:, None]
        gate_all(both, d_ff)
        return gemm.unpacked(both, np.empty((n, d_ff), np.float32)).reshape(*x.shape[:-1], d_ff)
    y = np.empty((n, d_ff), np.float32)
    gated_product(*stored(weight), x.reshape(n, d_in), bits(norm_weight), np.float32(eps),
                  NOTHING if bias is None else bias.astype(np.float32), y)
    return y.reshape(*x.shape[:-1], d_ff)


def linear_add(x, weight, residual, bias=None):
    """Compute `npllm.ops.linear_add`."""
    fits = fits_product(x, weight, bias) and tiled.is_float32(residual) and residual.shape == (*x.shape[:-1], len(weight))
    if not fits:
        return ops.linear_add(x, weight, residual, bias)
    d_out, d_in = weight.shape
    n = x.size // d_in
    if n > FEW_ROWS:
        if not gemm.width():
            return TILED.linear_add(x, weight, residual, bias)
        y = gemm.add_unpacked(many_rows(x, weight), residual.reshape(n, d_out).copy())
    else:
        y = residual.reshape(n, d_out).copy()
        add_product(*stored(weight), x.reshape(n, d_in), NOTHING, np.float32(0), y)
    return biased(y, bias).reshape(residual.shape)


@kernel(parallel=True)
def gate_all(both, d_ff):
    """Compute g = silu(g) * u in place in panels [n_panel, 2*d_ff, columns], whose first half of rows is g."""
    for p in prange(len(both)):
        for i in range(d_ff):
            gate(both[p, i], both[p, d_ff + i], both[p, i])


def fits_gain(x, gain):
    """Tell whether a gain is one that the kernels are made for."""
    return type(gain) is np.ndarray and gain.shape == x.shape[-1:] and gain.dtype in BITS and gain.flags.c_contiguous


def bits(x):
    """A stored array as Numba can take it."""
    return x.view(BITS[x.dtype])


def stored(weight):
    """A weight as the kernels take it: its entries, and their scales where they are in 8 bits."""
    return (weight.values, weight.scales) if isinstance(weight, Int8Weight) else (bits(weight), NO_SCALES)


def fits_product(x, weight, bias=None):
    """Tell whether a product is one that the kernels are made for, also of a weight in 8 bits."""
    if isinstance(weight, Int8Weight):
        return (tiled.is_float32(x) and type(weight.values) is np.ndarray and x.size > 0 and x.shape[-1] == weight.shape[1]
                and weight.shape[1] % GROUP == 0 and len(weight) > 0 and weight.values.flags.c_contiguous
                and weight.scales.flags.c_contiguous and tiled.fits_bias(bias, weight))
    return tiled.fits_linear(x, weight, bias)


# ---------------------------------------------------------------------------------------------------------------- attention


def rope_attention(qkv, cos, sin, n_head, n_kv_head, *, mask=None, cache=None, layer=0):
    """Compute `npllm.ops.rope_attention`; one token a sequence goes through one kernel, which writes into the cache itself."""
    if not fits_rope(qkv, cos, sin, n_head, n_kv_head):
        return ops.fusions.compose_rope_attention(COMPILED, qkv, cos, sin, n_head, n_kv_head, mask=mask, cache=cache, layer=layer)
    if qkv.shape[1] > 1 or cache is None:
        return rope_attention_many(qkv, cos, sin, n_head, n_kv_head, mask, cache, layer)
    d_head = qkv.shape[-1] // (n_head + 2 * n_kv_head)
    k = qkv[..., : n_kv_head * d_head].reshape(len(qkv), n_kv_head, 1, d_head)  # the shape of keys and values
    keys, values, slots = cache.extend(layer, k, k)
    last = slots.stop - 1
    seen = visible(mask, last, slots)
    y = np.empty((len(qkv), 1, n_head * d_head), np.float32)
    cos, sin = (x.reshape(-1, x.shape[-1]) for x in (cos, sin))
    attend_step(np.ascontiguousarray(qkv), cos, sin, keys, values, seen, n_head, y)
    return y


def fits_rope(qkv, cos, sin, n_head, n_kv_head):
    """Tell whether these are float32 tokens, and tables that fit."""
    n_all = n_head + 2 * n_kv_head
    return (tiled.is_float32(qkv, cos, sin) and qkv.ndim == 3 and qkv.size > 0 and qkv.shape[-1] % n_all == 0
            and n_head % n_kv_head == 0 and cos.shape == sin.shape and cos.ndim in (2, 3) and cos.shape[-2] == qkv.shape[1]
            and cos.shape[-1] % 2 == 0 and cos.shape[-1] <= qkv.shape[-1] // n_all
            and (cos.ndim == 2 or cos.shape[0] in (1, len(qkv))))


def rope_attention_many(qkv, cos, sin, n_head, n_kv_head, mask, cache, layer):
    """Many tokens: one kernel where the mask is a band of distances, else the blocks of the tiled set."""
    n_batch, n_seq, _ = qkv.shape
    k = cut_heads(qkv, n_head, n_kv_head)[1]
    if cache is None:
        keys, values, slots = np.empty(k.shape, np.float32), np.empty(k.shape, np.float32), range(n_seq)
    else:
        keys, values, slots = cache.extend(layer, k, k)
    cos, sin = (np.broadcast_to(x, (n_batch, n_seq, x.shape[-1])) for x in (cos, sin))
    band = (-FAR, FAR) if mask is None else getattr(mask, "band", None)
    if band is None or not gemm.width():
        return attend_by_blocks(qkv, cos, sin, n_head, n_kv_head, mask, keys, values, slots)
    y = np.empty((n_batch, n_seq, n_head * k.shape[-1]), np.float32)
    room = scratch("queries", (get_num_threads(), PANELS, k.shape[-1], gemm.width()), np.float32)
    attend_many(qkv, cos, sin, keys, values, n_head, band, room, y, np.zeros(1, np.int64))
    return y


def attend_by_blocks(qkv, cos, sin, n_head, n_kv_head, mask, keys, values, slots):
    """Rotate queries into an array of their own, write keys and values into the last columns, and attend."""
    heads = cut_heads(qkv, n_head, n_kv_head)
    n_batch, _, n_seq, _ = heads[0].shape
    q = np.empty(heads[0].shape, np.float32)
    parts = [(x[b, h], cos[b], sin[b], y[b, h, y.shape[-2] - n_seq :], y is not values)
             for x, y in zip(heads, (q, keys, values), strict=True) for b in range(n_batch) for h in range(x.shape[1])]
    run_blocks(lambda part: rotate_all(*part), parts)
    y, _ = tiled.attend(q, keys, values, mask, None, range(slots.stop - n_seq, slots.stop), slots, fold_scores)
    return ops.merge_heads(y)


def visible(mask, slot, slots):
    """Which cached keys the query in a slot sees, [n_batch or 1, n_ctx]; no row at all where it sees every one."""
    bound = ALL if mask is None else getattr(mask, "bound", tiled.unknown)(slot, slot, slots.start, slots.stop - 1)
    if bound == ALL:
        return np.zeros((0, len(slots)), bool)
    seen = np.asarray(mask(np.array([[slot]]), np.arange(slots.start, slots.stop)[None]))
    return np.broadcast_to(seen.reshape(-1, seen.shape[-1]), (seen.size // seen.shape[-1], len(slots)))


COMPILED = replace(TILED, linear=linear, norm_linear=norm_linear, norm_swiglu=norm_swiglu, linear_add=linear_add,
                   rope_attention=rope_attention, name="compiled")


def call_all(dtype):
    """Call every kernel once with small read-only weights, as a checkpoint's are, so that all of them are compiled."""
    gain = np.zeros(64, DTYPES["bfloat16" if dtype == "int8" else dtype])
    weight = quantize(np.zeros((64, 64))) if dtype == "int8" else np.zeros((64, 64), DTYPES[dtype])
    gain.flags.writeable = False
    if dtype != "int8":
        weight.flags.writeable = False
    for n in (1, 2, FEW_ROWS + 1):
        x = np.ones((1, n, 64), np.float32)
        linear(x, weight)
        linear_add(x, weight, np.ones((1, n, 64), np.float32))
        norm_swiglu(x, gain, 0.0, weight)
        qkv = norm_linear(x, gain, 0.0, weight)[..., :48]
        cos, sin = np.ones((2, n, 16), np.float32)
        rope_attention(qkv, cos, sin, 1, 1, mask=causal(), cache=KVCache(1, 1, 64))
