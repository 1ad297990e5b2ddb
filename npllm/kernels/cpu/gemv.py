"""Products of a few rows, which are memory-bound: each weight is read once, in its stored dtype.

A weight is widened in registers, `fma(load(weight, p), load(x, i), acc)`; four distant streams of
its rows are read at once, and each is prefetched.  The rows of x are taken four, two or one at a
time, and every row is summed in the same order: over runs of channels in sixteen lanes, then over
the runs, then over the lanes.
"""

from typing import Any

import numpy as np
from numba import prange, types
from numba.extending import overload

from npllm.kernels.cpu.block_gemv import add_product_blocks
from npllm.kernels.cpu.launching import kernel
from npllm.kernels.cpu.panels import rms_norm_row
from npllm.kernels.cpu.simd import (
    LANES,
    load,
    load_pairs,
    load_scalar,
    prefetch_far,
    prefetch_pairs,
    splat,
)
from npllm.kernels.cpu.simd_addresses import float_at, set_float, stack_floats, store_vectors
from npllm.kernels.cpu.simd_arrays import deinterleave
from npllm.kernels.cpu.simd_rows import add_each, fma_each, load_each, reduce_each
from npllm.quantized.int8 import GROUP

__all__ = ["add_product", "rms_norm_rows", "rows_of_bias"]

Array = Any
Vectors = tuple[Any, ...]  # sixteen float32 of each of a few rows
Starts = tuple[int, int, int, int]
Sums = tuple[tuple[float, ...], ...]  # of each stream, for each row

AHEAD = 2048  # bytes of each stream of weights that are prefetched, into the second cache alone:
# into the first, AMD's Zen 4 reads at 0.8 to 0.9 of this speed
STEP = 2 * LANES
WORD, VECTOR = 4, 4 * LANES  # bytes of a float32, and of sixteen
SPAN = LANES * GROUP  # channels whose scales are widened at once
SCALES = 4 * LANES  # of four streams
RUN = 6 * STEP  # channels whose sum is added to that of other runs: the error of a long chain grows


@kernel()
def dot_remainder(weight: Array, p: int, x: Array) -> float:
    """What a row's product has beyond the last whole step."""
    n = len(x)
    y: Any = np.float32(0)
    for i in range(n // STEP * STEP, n):
        y += load_scalar(weight, p + i) * x[i]
    return y


@kernel()
def stream_stride(d_out: int, streams: int) -> int:
    """Rows between streams that share d_out rows: odd, since streams at a distance of a power of
    two bytes have bank conflicts.
    """
    return (d_out + streams - 1) // streams | 1


@kernel(inline="always")
def dot_streams(
    weight: Array, _scales: Array, starts: Starts, x: Array, k: int, zeros: Vectors
) -> Sums:
    """Products of four rows of a weight, which begin at `starts`, with rows k, k + 1, ... of x, as
    many as there are `zeros`, over whole steps.
    """
    (p, q, r, s), n = starts, x.shape[1]
    at, whole, ahead = k * n, n // STEP * STEP, AHEAD // weight.itemsize
    a = b = c = d = zeros
    for start in range(0, whole, RUN):
        t = u = v = w = zeros
        for i in range(start, min(start + RUN, whole), STEP):
            prefetch_pairs(weight, p + i + ahead)
            prefetch_pairs(weight, q + i + ahead)
            prefetch_pairs(weight, r + i + ahead)
            prefetch_pairs(weight, s + i + ahead)
            x0, x1 = load_each(x, at + i, n, zeros), load_each(x, at + i + LANES, n, zeros)
            w0, w1 = load_pairs(weight, p + i)
            t = fma_each(w1, x1, fma_each(w0, x0, t))
            w0, w1 = load_pairs(weight, q + i)
            u = fma_each(w1, x1, fma_each(w0, x0, u))
            w0, w1 = load_pairs(weight, r + i)
            v = fma_each(w1, x1, fma_each(w0, x0, v))
            w0, w1 = load_pairs(weight, s + i)
            w = fma_each(w1, x1, fma_each(w0, x0, w))
        a, b, c, d = add_each(a, t), add_each(b, u), add_each(c, v), add_each(d, w)
    return reduce_each(a), reduce_each(b), reduce_each(c), reduce_each(d)


@kernel()
def widen_scales(scales: Array, starts: Starts, i: int, n: int, wide: int) -> None:
    """Write the scales of n groups, at most sixteen, from channel i on of each stream to an
    address, in float32, VECTOR bytes from one stream to the next.

    To convert each where it multiplies would cost a seventh of the speed of weights in the cache.
    """
    for j in range(4):
        at, to = (starts[j] + i) // GROUP, wide + j * VECTOR
        prefetch_far(scales, at + AHEAD // GROUP)
        if n == LANES:
            store_vectors(to, (load(scales, at),))
        else:
            for g in range(n):
                set_float(to + g * WORD, load_scalar(scales, at + g))


@kernel(inline="always")
def dot_streams_int8(
    values: Array, scales: Array, starts: Starts, x: Array, k: int, zeros: Vectors
) -> Sums:
    """As `dot_streams`, of a weight in 8 bits: each group is summed up, and scaled then."""
    (p, q, r, s), n = starts, x.shape[1]
    at, wide = k * n, stack_floats(SCALES)
    a = b = c = d = zeros
    for start in range(0, n, SPAN):
        stop = min(start + SPAN, n)
        widen_scales(scales, starts, start, (stop - start) // GROUP, wide)
        for i in range(start, stop, GROUP):
            if k == 0:
                prefetch_far(values, p + i + AHEAD)
                prefetch_far(values, q + i + AHEAD)
                prefetch_far(values, r + i + AHEAD)
                prefetch_far(values, s + i + AHEAD)
            t = u = v = w = zeros
            for j in range(i, i + GROUP, LANES):
                part = load_each(x, at + j, n, zeros)
                t = fma_each(load(values, p + j), part, t)
                u = fma_each(load(values, q + j), part, u)
                v = fma_each(load(values, r + j), part, v)
                w = fma_each(load(values, s + j), part, w)
            scale = wide + (i - start) // GROUP * WORD
            a = fma_each(splat(float_at(scale)), t, a)
            b = fma_each(splat(float_at(scale + VECTOR)), u, b)
            c = fma_each(splat(float_at(scale + 2 * VECTOR)), v, c)
            d = fma_each(splat(float_at(scale + 3 * VECTOR)), w, d)
    return reduce_each(a), reduce_each(b), reduce_each(c), reduce_each(d)


def dot_of_type(
    weight: Array, scales: Array, starts: Starts, x: Array, k: int, zeros: Vectors
) -> Sums:
    """Call `dot_streams` or `dot_streams_int8`, of which only the one is compiled that the weight
    takes.
    """
    raise NotImplementedError("kernels call this")


@overload(dot_of_type, strict=False, inline="always")  # which would compare annotations
def _choose(weight: Any, scales: Any, starts: Any, x: Any, k: Any, zeros: Any) -> Any:  # noqa: ARG001
    dot = dot_streams_int8 if weight.dtype == types.int8 else dot_streams
    return lambda weight, scales, starts, x, k, zeros: dot(weight, scales, starts, x, k, zeros)


@kernel()
def add_streams(
    weight: Array, scales: Array, o: int, n: int, x: Array, k: int, y: Array, zeros: Vectors
) -> None:
    """Add to y the products of rows o, o + n, o + 2n and o + 3n of a weight with a few rows of x
    from k on.
    """
    d_out, d_in = weight.shape
    p, step, last = o * d_in, n * d_in, (d_out - 1) * d_in
    starts = p, min(p + step, last), min(p + 2 * step, last), min(p + 3 * step, last)
    sums = dot_of_type(weight, scales, starts, x, k, zeros)
    for j in range(4):
        row = o + j * n
        if row < d_out:
            for t in range(len(zeros)):
                more = sums[j][t]
                if d_in % STEP != 0:
                    more += dot_remainder(weight, row * d_in, x[k + t])
                y[k + t, row] += more


# four rows are what arithmetic limits: a call would cost a tenth there, and compiling three copies
# more than it saves
add_streams_inlined = kernel(inline="always")(add_streams.py_func)


@kernel()
def add_all_rows(weight: Array, scales: Array, o: int, n: int, x: Array, y: Array) -> None:
    """As `add_streams`, with all rows of x."""
    k, zero = np.int64(0), splat(np.float32(0))
    while k + 4 <= len(x):
        add_streams_inlined(weight, scales, o, n, x, k, y, (zero, zero, zero, zero))
        k += 4
    if k + 2 <= len(x):
        add_streams(weight, scales, o, n, x, k, y, (zero, zero))
        k += 2
    if k < len(x):
        add_streams(weight, scales, o, n, x, k, y, (zero,))


@kernel(parallel=True)
def add_products(weight: Array, scales: Array, x: Array, y: Array) -> None:
    """Compute y [n, d_out] += x [n, d_in] @ weight.T."""
    n = stream_stride(len(weight), 4)
    for o in prange(n):
        # unsigned in the loop, signed where types are inferred: one type, one compilation
        add_all_rows(weight, scales, np.int64(o), n, x, y)


@kernel()
def prepare_rows(weight: Array, x: Array, gain: Array, eps: float) -> Array:
    """Prepare the rows of x for products: normalised where there is a gain, in the weight's
    order.
    """
    n, d = x.shape
    rows = np.empty((n, d), np.float32)
    for k in range(n):
        if len(gain):
            rms_norm_row(x[k], gain, eps, rows[k])
        else:
            for i in range(d):
                rows[k, i] = x[k, i]
        deinterleave(weight, rows[k])
    return rows


@kernel(nogil=True)
def rms_norm_rows(x: Array, gain: Array, eps: float, y: Array) -> None:
    """Write each row, divided by its root mean square and scaled, to y."""
    for k in range(len(x)):
        rms_norm_row(x[k], gain, eps, y[k])


@kernel(nogil=True)
def rows_of_bias(n: int, width: int, bias: Array) -> Array:
    """Return n new rows of a bias, to which a product is added; zeros where it has no entry."""
    y = np.zeros((n, width), np.float32)
    for k in range(n):
        for i in range(len(bias)):
            y[k, i] = bias[i]
    return y


@kernel()
def add_product(weight: Array, scales: Array, x: Array, gain: Array, eps: float, y: Array) -> None:
    """Compute y [n, d_out] += rms_norm(x) @ weight.T; without a gain x is not normalised."""
    add_prepared(weight, scales, prepare_rows(weight, x, gain, eps), y)


def add_prepared(weight: Array, scales: Array, rows: Array, y: Array) -> None:
    """Compute y [n, d_out] += rows @ weight.T, of rows from `prepare_rows`."""
    raise NotImplementedError("kernels call this")


@overload(add_prepared, strict=False)  # which would compare annotations
def _choose_product(weight: Any, scales: Any, rows: Any, y: Any) -> Any:  # noqa: ARG001
    def of_blocks(weight: Array, scales: Array, rows: Array, y: Array) -> None:  # noqa: ARG001
        add_product_blocks(weight, rows, y)

    def of_entries(weight: Array, scales: Array, rows: Array, y: Array) -> None:
        add_products(weight, scales, rows, y)

    return of_blocks if weight.dtype == types.int64 else of_entries
