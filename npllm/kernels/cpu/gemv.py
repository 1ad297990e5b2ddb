"""Products of a few rows, which are memory-bound: each weight is read once, in its stored dtype.

A weight is widened in registers, `fma(load(weight, p), load(x, i), acc)`; several distant streams
of its rows are read at once, and each is prefetched.
"""

from typing import Any

import numpy as np
from numba import prange, types
from numba.extending import overload

from npllm.kernels.cpu.block_gemv import add_product_blocks
from npllm.kernels.cpu.launching import kernel
from npllm.kernels.cpu.panels import root_mean_square
from npllm.kernels.cpu.simd import (
    LANES,
    fma,
    load,
    load_pairs,
    load_scalar,
    prefetch,
    prefetch_pairs,
    reduce_add,
    splat,
)
from npllm.kernels.cpu.simd_arrays import deinterleave
from npllm.quantized.int8 import GROUP

__all__ = ["FEW_ROWS", "add_product"]

Array = Any

FEW_ROWS = (
    16  # up to here a weight is read directly, and a row has the same bits alone and in company
)
AHEAD = 512  # entries of each stream of weights that are prefetched
STEP = 2 * LANES


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


@kernel()
def dot_four(weight: Array, p: int, q: int, r: int, s: int, x: Array, n: int) -> tuple[float, ...]:
    """Products of four rows of a weight, which begin at p, q, r and s, with one vector."""
    a = b = c = d = splat(np.float32(0))
    whole = n // STEP * STEP
    for i in range(0, whole, STEP):
        prefetch_pairs(weight, p + i + AHEAD)
        prefetch_pairs(weight, q + i + AHEAD)
        prefetch_pairs(weight, r + i + AHEAD)
        prefetch_pairs(weight, s + i + AHEAD)
        x0, x1 = load(x, i), load(x, i + LANES)
        w0, w1 = load_pairs(weight, p + i)
        a = fma(w1, x1, fma(w0, x0, a))
        w0, w1 = load_pairs(weight, q + i)
        b = fma(w1, x1, fma(w0, x0, b))
        w0, w1 = load_pairs(weight, r + i)
        c = fma(w1, x1, fma(w0, x0, c))
        w0, w1 = load_pairs(weight, s + i)
        d = fma(w1, x1, fma(w0, x0, d))
    return (
        reduce_add(a) + dot_remainder(weight, p, x),
        reduce_add(b) + dot_remainder(weight, q, x),
        reduce_add(c) + dot_remainder(weight, r, x),
        reduce_add(d) + dot_remainder(weight, s, x),
    )


@kernel()
def dot_two_by_four(weight: Array, p: int, q: int, x: Array, k: int, n: int) -> tuple[float, ...]:
    """Products of two rows of a weight, which begin at p and q, with four vectors: rows k ... k + 3
    of x.
    """
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = splat(np.float32(0))
    k0, k1, k2, k3 = k * n, (k + 1) * n, (k + 2) * n, (k + 3) * n
    whole = n // STEP * STEP
    for i in range(0, whole, STEP):
        if k == 0:
            prefetch_pairs(weight, p + i + AHEAD)
            prefetch_pairs(weight, q + i + AHEAD)
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
    return (
        reduce_add(a0),
        reduce_add(a1),
        reduce_add(a2),
        reduce_add(a3),
        reduce_add(b0),
        reduce_add(b1),
        reduce_add(b2),
        reduce_add(b3),
    )


@kernel()
def dot_four_int8(
    values: Array, scales: Array, p: int, q: int, r: int, s: int, x: Array
) -> tuple[float, ...]:
    """As `dot_four`, of a weight in 8 bits: each group is summed up, and scaled then."""
    zero = splat(np.float32(0))
    a = b = c = d = zero
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
        a = fma(u, splat(load_scalar(scales, (p + i) // GROUP)), a)
        b = fma(v, splat(load_scalar(scales, (q + i) // GROUP)), b)
        c = fma(w, splat(load_scalar(scales, (r + i) // GROUP)), c)
        d = fma(z, splat(load_scalar(scales, (s + i) // GROUP)), d)
    return reduce_add(a), reduce_add(b), reduce_add(c), reduce_add(d)


@kernel(parallel=True)
def add_product_one(weight: Array, x: Array, y: Array) -> None:
    """Compute y [d_out] += weight [d_out, d_in] @ x [d_in]; four distant streams of rows are read
    at once.
    """
    d_out, d_in = weight.shape
    n, last = stream_stride(d_out, 4), (d_out - 1) * d_in
    for o in prange(n):
        p, step = o * d_in, n * d_in
        four = dot_four(
            weight,
            p,
            min(p + step, last),
            min(p + 2 * step, last),
            min(p + 3 * step, last),
            x,
            d_in,
        )
        for j in range(4):
            if o + j * n < d_out:
                y[o + j * n] += four[j]


@kernel(parallel=True)
def add_product_int8(values: Array, scales: Array, x: Array, y: Array) -> None:
    """Compute y [n, d_out] += x [n, d_in] @ weight.T, of a weight in 8 bits; four distant streams
    of rows are read at once.
    """
    d_out, d_in = values.shape
    n, last = stream_stride(d_out, 4), (d_out - 1) * d_in
    for o in prange(n):
        p, step = o * d_in, n * d_in
        for k in range(len(y)):
            four = dot_four_int8(
                values,
                scales,
                p,
                min(p + step, last),
                min(p + 2 * step, last),
                min(p + 3 * step, last),
                x[k],
            )
            for j in range(4):
                if o + j * n < d_out:
                    y[k, o + j * n] += four[j]


@kernel(parallel=True)
def add_product_few(weight: Array, x: Array, y: Array) -> None:
    """Compute y [n, d_out] += x [4m, d_in] @ weight.T, for n up to 4m rows; two distant streams of
    rows are read at once.
    """
    d_out, d_in = weight.shape
    n = stream_stride(d_out, 2)
    for o in prange(n):
        other = min(o + n, d_out - 1)
        for k in range(0, len(y), 4):
            sums = dot_two_by_four(weight, o * d_in, other * d_in, x, k, d_in)
            for j in range(min(4, len(y) - k)):
                y[k + j, o] += sums[j] + dot_remainder(weight, o * d_in, x[k + j])
                if o + n < d_out:
                    y[k + j, other] += sums[4 + j] + dot_remainder(weight, other * d_in, x[k + j])


@kernel()
def prepare_rows(weight: Array, x: Array, gain: Array, eps: float) -> Array:
    """Prepare the rows of x for products: normalised where there is a gain, padded to a multiple
    of 4, in the weight's order.
    """
    n, d = x.shape
    rows = np.zeros((1 if n == 1 else (n + 3) // 4 * 4, d), np.float32)
    for k in range(n):
        for i in range(d):
            rows[k, i] = x[k, i]
        if len(gain):
            rms_norm_row(rows[k], gain, eps)
        deinterleave(weight, rows[k])
    return rows


@kernel()
def rms_norm_row(x: Array, gain: Array, eps: float) -> None:
    """Divide a row by its root mean square, in place, and scale it."""
    root = root_mean_square(x, eps)
    for i in range(len(x)):
        x[i] = load_scalar(gain, i) * (x[i] / root)


@kernel()
def add_product(weight: Array, scales: Array, x: Array, gain: Array, eps: float, y: Array) -> None:
    """Compute y [n, d_out] += rms_norm(x) @ weight.T; without a gain x is not normalised."""
    rows = prepare_rows(weight, x, gain, eps)
    add_prepared(weight, scales, rows, y)


def add_prepared(weight: Array, scales: Array, rows: Array, y: Array) -> None:
    """Compute y [n, d_out] += rows @ weight.T, of rows from `prepare_rows`."""


@overload(add_prepared)
def choose_product(weight: Any, scales: Any, rows: Any, y: Any) -> Any:  # noqa: ARG001
    """Choose by the weight's type, so that only the products of this type are compiled."""

    def of_int8(weight: Array, scales: Array, rows: Array, y: Array) -> None:
        add_product_int8(weight, scales, rows, y)

    def of_floats(weight: Array, scales: Array, rows: Array, y: Array) -> None:  # noqa: ARG001
        if len(y) == 1:
            add_product_one(weight, rows[0], y[0])
        else:
            add_product_few(weight, rows, y)

    def of_blocks(weight: Array, scales: Array, rows: Array, y: Array) -> None:  # noqa: ARG001
        add_product_blocks(weight, rows, y)

    chosen = {types.int8: of_int8, types.int64: of_blocks}
    return chosen.get(weight.dtype, of_floats)
