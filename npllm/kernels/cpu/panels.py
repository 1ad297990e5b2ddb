"""Panels: rows transposed for the matrix product of many rows, and back."""

from typing import Any

import numpy as np
from numba import prange

from npllm.kernels.cpu.launching import kernel
from npllm.kernels.cpu.simd import LANES, fma, load, load_scalar, reduce_add, splat
from npllm.kernels.cpu.simd_rows import transpose_block

__all__ = ["pack", "pack_all", "rms_norm_row", "root_mean_square", "unpack", "unpack_all"]

Array = Any


@kernel(nogil=True)
def root_mean_square(x: Array, eps: float) -> float:
    """sqrt(mean of x**2 + eps) of one contiguous row."""
    square, d = splat(np.float32(0)), len(x)
    whole = d // LANES * LANES
    for i in range(0, whole, LANES):
        square = fma(load(x, i), load(x, i), square)
    mean = reduce_add(square)
    for i in range(whole, d):
        mean += x[i] * x[i]
    return np.sqrt(mean / np.float32(d) + eps)


@kernel(nogil=True)
def pack(rows: Array, gain: Array, eps: float, panel: Array) -> None:
    """Transpose up to 64 rows into a panel; each row is normalised where there is a gain."""
    n, d = rows.shape
    panel[:, n:] = 0
    wide = np.empty((LANES if len(gain) else 0, d), np.float32)
    for first in range(0, n, LANES):
        count = min(LANES, n - first)
        if len(gain):
            for k in range(count):
                rms_norm_row(rows[first + k], gain, eps, wide[k])
            transpose_rows(wide[:count], panel, first)
        else:
            transpose_rows(rows[first : first + count], panel, first)


@kernel(nogil=True)
def rms_norm_row(x: Array, gain: Array, eps: float, y: Array) -> None:
    """Write a row, divided by its root mean square and scaled, to y."""
    root = root_mean_square(x, eps)
    for i in range(len(x)):
        y[i] = load_scalar(gain, i) * (x[i] / root)


@kernel(nogil=True)
def transpose_rows(rows: Array, panel: Array, column: int) -> None:
    """Write up to sixteen rows into columns of a panel."""
    n, d = rows.shape
    columns, whole = panel.shape[1], d // LANES * LANES if n == LANES else 0
    for i in range(0, whole, LANES):
        transpose_block(False, rows, i, d, panel, i * columns + column, columns)
    for k in range(n):
        for i in range(whole, d):
            panel[i, column + k] = rows[k, i]


@kernel(nogil=True)
def unpack(panel: Array, y: Array, add: bool) -> None:
    """Transpose a panel into its rows, or add it to them."""
    n, d = y.shape
    columns = panel.shape[1]
    for first in range(0, n, LANES):
        whole = d // LANES * LANES if first + LANES <= n else 0
        for i in range(0, whole, LANES):
            if add:
                transpose_block(True, panel, i * columns + first, columns, y, first * d + i, d)
            else:
                transpose_block(False, panel, i * columns + first, columns, y, first * d + i, d)
        for k in range(first, min(first + LANES, n)):
            for i in range(whole, d):
                y[k, i] = y[k, i] + panel[i, k] if add else panel[i, k]


@kernel(parallel=True)
def pack_all(rows: Array, gain: Array, eps: float, panels: Array) -> None:
    """Pack every panel."""
    n = panels.shape[2]
    for p in prange(len(panels)):
        pack(rows[p * n : (p + 1) * n], gain, eps, panels[p])


@kernel(parallel=True)
def unpack_all(panels: Array, y: Array, add: bool) -> None:
    """Unpack every panel, or add it."""
    n = panels.shape[2]
    for p in prange(len(panels)):
        unpack(panels[p], y[p * n : (p + 1) * n], add)
