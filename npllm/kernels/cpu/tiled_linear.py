"""Products in plain NumPy: blocks of the weight are widened into a buffer and multiplied there."""

from collections.abc import Callable
from typing import Any

import numpy as np

from npllm import ops
from npllm.arrays import DTYPES, ieee_semantics
from npllm.kernels.cpu.fits import fits_weight, is_float32
from npllm.threads import n_threads, run_blocks, scratch

__all__ = ["columns_product", "dot_into_scratch", "linear", "spans", "widened"]

Array = Any

MEMORY_BOUND_ROWS = 16  # up to here blocks are smaller, and stay in the CPU cache
BLOCK_FEW, BLOCK_MANY = 2**19, 2**21  # entries of a weight that are widened at a time


@ieee_semantics
def linear(x: Array, weight: Array, bias: Array = None) -> Array:
    """Compute `npllm.ops.linear`: blocks of rows of the weight are widened into a buffer and
    multiplied there.
    """
    if not fits_linear(x, weight, bias):
        return ops.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    few = len(rows) <= MEMORY_BOUND_ROWS
    y = (
        product_few(rows, weight)
        if few
        else np.ascontiguousarray(columns_product(np.ascontiguousarray(rows.T), weight).T)
    )
    if bias is not None:
        y += bias.astype(np.float32, copy=False)
    return y.reshape(*x.shape[:-1], len(weight))


def columns_product(columns: Array, weight: Array, widen: Callable | None = None) -> Array:
    """Return `weight @ columns`, [d_out, n]: so BLAS is some 8 % faster than with rows, and a block
    of the result is contiguous.
    """
    y = np.empty((len(weight), columns.shape[1]), np.float32)
    run_blocks(
        lambda span: np.dot((widen or widened)(weight[span]), columns, out=y[span]),
        weight_blocks(weight, BLOCK_MANY),
    )
    return y


def product_few(rows: Array, weight: Array) -> Array:
    """Return `rows @ weight.T` for a few rows."""
    y = np.empty((len(rows), len(weight)), np.float32)
    product_of = _product_bf16 if weight.dtype == DTYPES["bfloat16"] else _product
    halves = (
        [np.ascontiguousarray(rows[:, n::2]) for n in (0, 1)]
        if product_of is _product_bf16
        else rows
    )
    run_blocks(
        lambda span: product_of(halves, weight[span], y[:, span]), weight_blocks(weight, BLOCK_FEW)
    )
    return y


def weight_blocks(weight: Array, entries: int) -> list[slice]:
    """Cut a weight into slices of rows: at most `entries` entries each, where a row has no more,
    and at least two slices for each thread.
    """
    d_out, d_in = weight.shape
    return spans(d_out, max(1, min(entries // d_in, -(-d_out // (2 * n_threads())))))


def spans(n: int, size: int) -> list[slice]:
    """Cut 0 ... n - 1 into slices of at most `size`."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _product(rows: Array, weight: Array, y: Array) -> None:
    """One block: widen it, and multiply."""
    y[...] = dot_into_scratch(rows, widened(weight).T, "product")


def widened(weight: Array) -> Array:
    """A block of a weight in float32: itself, or its values in a buffer of this thread."""
    if weight.dtype == np.float32:
        return weight
    wide = scratch("weight", weight.shape, np.float32)
    if weight.dtype == DTYPES["bfloat16"]:  # its bits are the upper half of the float32's
        bits = wide.view(np.uint32)
        bits[...] = weight.view(np.uint16)
        np.left_shift(bits, 16, out=bits)
    else:
        wide[...] = weight
    return wide


def _product_bf16(halves: list[Array], weight: Array, y: Array) -> None:
    """One block of bfloat16, two neighbours at a time: a 32-bit word holds the even channel below
    and the odd one above.
    """
    pairs = weight.view(np.uint32)
    wide = scratch("weight", pairs.shape, np.uint32)
    np.left_shift(pairs, 16, out=wide)
    y[...] = dot_into_scratch(halves[0], wide.view(np.float32).T, "product")
    np.bitwise_and(pairs, np.uint32(0xFFFF0000), out=wide)
    y += dot_into_scratch(halves[1], wide.view(np.float32).T, "product")


def dot_into_scratch(a: Array, b: Array, name: str) -> Array:
    """Multiply matrices into a buffer of this thread; `np.dot` lets other threads run meanwhile,
    `np.matmul` often does not.
    """
    return np.dot(a, b, out=scratch(name, (len(a), b.shape[1]), np.float32))


def fits_linear(x: Array, weight: Array, bias: Array = None) -> bool:
    """Tell whether a product is one that the kernels are made for; the definition does the others,
    and raises the errors.
    """
    return is_float32(x) and x.size > 0 and fits_weight(weight, x.shape[-1], bias)
