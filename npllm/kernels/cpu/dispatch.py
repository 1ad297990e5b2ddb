"""Operations of the set compiled with Numba, below the layer: which kernel a call takes.

A product of a few rows is memory-bound and is `gemv`'s; one of many rows is compute-bound and is
`gemm`'s.  All run on Numba's threads.  A processor without FMA takes the tiled set for many rows.
"""

import math
from typing import Any

import numpy as np
from numba import prange

from npllm import ops
from npllm.arrays import ieee_semantics
from npllm.kernels import FEW_ROWS
from npllm.kernels.cpu import gemm, tiled
from npllm.kernels.cpu.block_gemv import block_table, fits_blocks, widen_rows
from npllm.kernels.cpu.fits import is_float32
from npllm.kernels.cpu.gated import gated_product, swiglu_panels
from npllm.kernels.cpu.gemv import add_product, rms_norm_rows
from npllm.kernels.cpu.launching import kernel, launch
from npllm.kernels.cpu.layout import EMPTY, few_rows_of, row_major, row_major_copy, rows_of
from npllm.kernels.cpu.operands import (
    as_bits,
    bias_or_empty,
    fits_gain,
    fits_gated,
    fits_product,
    gain_bits,
    kernel_operands,
    widened_to_fit,
)
from npllm.ops.embedding import require_ids
from npllm.quantized.block_weight import BlockWeight
from npllm.quantized.permuted import PermutedWeight
from npllm.threads import scratch

__all__ = ["embed", "gelu", "linear", "linear_add", "norm_linear", "norm_swiglu", "rms_norm"]

Array = Any


def embed(ids: Array, weight: Any) -> Array:
    """Compute `npllm.ops.embed`; rows of blocks are widened by the kernel of their format."""
    if not (type(weight) is BlockWeight and type(ids) is np.ndarray and fits_blocks(weight)):
        return ops.embed(ids, weight)
    require_ids(ids, weight)
    y = np.empty((ids.size, weight.shape[1]), np.float32)
    launch(widen_rows, block_table(weight), ids.reshape(-1).astype(np.int64), y)
    return y.reshape(*ids.shape, weight.shape[1])


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Compute `npllm.ops.rms_norm`; of a few rows with the bits of the kernels that fuse it."""
    if not (is_float32(x) and fits_gain(x, weight) and 0 < x.size <= FEW_ROWS * x.shape[-1]):
        return tiled.rms_norm(x, weight, eps)
    rows = few_rows_of(x)
    y = np.empty(rows.shape, np.float32)
    launch(rms_norm_rows, rows, as_bits(weight), np.float32(eps), y)
    return y.reshape(x.shape)


def linear(x: Array, weight: Array, bias: Array = None) -> Array:
    """Compute `npllm.ops.linear`."""
    wide_x, wide = widened_to_fit(x, weight)
    if isinstance(wide, PermutedWeight) and is_float32(x) and x.shape[-1] == wide.shape[1]:
        return linear(np.take(x, wide.order, axis=-1), wide.base, bias)
    if not fits_product(wide_x, wide, bias):
        return ops.linear(x, weight, bias)
    y = rows_product(wide_x, wide, EMPTY, 0.0)
    return y if bias is None else add_bias(y, bias)


def norm_linear(x: Array, norm_weight: Array, eps: float, weight: Array, bias: Array = None) -> Any:
    """Compute rms_norm, then linear."""
    if not (fits_product(x, weight, bias) and fits_gain(x, norm_weight)):
        return NotImplemented
    return add_bias(rows_product(x, weight, norm_weight, eps), bias)


@ieee_semantics
def add_bias(y: Array, bias: Array) -> Array:
    """Add a bias to new rows, in place."""
    if bias is not None:
        y += bias
    return y


def rows_product(x: Array, weight: Array, gain: Array, eps: float) -> Array:
    """The product of rows, normalised where there is a gain, with a weight."""
    d_out, d_in = weight.shape
    n = x.size // d_in
    if n > FEW_ROWS:
        if not gemm.panel_columns():
            return tiled.linear(tiled.rms_norm(x, gain, eps) if len(gain) else x, weight)
        return gemm.unpacked(
            many_rows(x, weight, gain, eps), np.empty((n, d_out), np.float32)
        ).reshape(*x.shape[:-1], d_out)
    y = np.zeros((n, d_out), np.float32)
    rows = few_rows_of(x)
    launch(
        add_product,
        *kernel_operands(weight),
        rows,
        gain_bits(gain, weight),
        np.float32(eps),
        y,
    )
    return y.reshape(*x.shape[:-1], d_out)


def many_rows(x: Array, weight: Array, gain: Array = EMPTY, eps: float = 0.0) -> Array:
    """The product of many rows, normalised where there is a gain, as panels in a buffer."""
    rows = rows_of(x)
    panels = gemm.packed(rows, gain_bits(gain, weight), eps)
    return gemm.product(panels, *kernel_operands(weight), len(rows))


def norm_swiglu(x: Array, norm_weight: Array, eps: float, weight: Array, bias: Array = None) -> Any:
    """Compute rms_norm, linear, and swiglu of the two halves."""
    if not fits_gated(x, norm_weight, weight, bias):
        return NotImplemented
    d_in, d_ff = weight.shape[1], len(weight) // 2
    n = x.size // d_in
    if n > FEW_ROWS:
        if not gemm.panel_columns():
            return NotImplemented
        y = gemm.unpacked(
            gated_panels(x, norm_weight, eps, weight, bias), np.empty((n, d_ff), np.float32)
        )
    else:
        y = np.empty((n, d_ff), np.float32)
        launch(
            gated_product,
            *kernel_operands(weight),
            few_rows_of(x),
            as_bits(norm_weight),
            np.float32(eps),
            bias_or_empty(bias),
            y,
        )
    return y.reshape(*x.shape[:-1], d_ff)


def gated_panels(x: Array, norm_weight: Array, eps: float, weight: Array, bias: Array) -> Array:
    """Compute `norm_swiglu` of many rows, as panels [n_panel, d_ff, columns] in a buffer."""
    return gate_panels(many_rows(x, weight, norm_weight, eps), len(weight) // 2, bias)


@ieee_semantics
def gate_panels(both: Array, d_ff: int, bias: Array) -> Array:
    """Add a bias to panels of gate and up, in place, and compute swiglu of the two."""
    if bias is not None:
        both[:, : 2 * d_ff] += bias.astype(np.float32, copy=False)[:, None]
    y = scratch("gated", (len(both), d_ff, both.shape[2]), np.float32)
    launch(swiglu_panels, both, y)
    return y


def linear_add(x: Array, weight: Array, residual: Array, bias: Array = None) -> Any:
    """Compute linear, then add."""
    fits = (
        fits_product(x, weight, bias)
        and is_float32(residual)
        and residual.shape == (*x.shape[:-1], len(weight))
    )
    if not fits:
        return NotImplemented
    d_out, d_in = weight.shape
    n = x.size // d_in
    if n > FEW_ROWS:
        if not gemm.panel_columns():
            return NotImplemented
        y = gemm.add_unpacked(many_rows(x, weight), row_major_copy(residual.reshape(n, d_out)))
    else:
        y = row_major_copy(residual.reshape(n, d_out))
        no_gain = gain_bits(EMPTY, weight)
        launch(add_product, *kernel_operands(weight), few_rows_of(x), no_gain, np.float32(0), y)
    return add_bias(y, bias).reshape(residual.shape)


def gelu(x: Array, approximate: str = "none") -> Array:
    """Compute `npllm.ops.gelu`; the exact form in float64 on all threads."""
    if not (is_float32(x) and approximate == "none" and x.size > 0):
        return ops.gelu(x, approximate)
    y = np.empty(x.shape, np.float32)
    launch(gelu_all, row_major(x).reshape(-1), y.reshape(-1))
    return y


@kernel(parallel=True)
def gelu_all(x: Array, y: Array) -> None:
    """Compute y = x * erfc(-x / sqrt(2)) / 2."""
    for i in prange(len(x)):
        wide = np.float64(x[i])
        y[i] = wide * math.erfc(wide * -(0.5**0.5)) / 2
