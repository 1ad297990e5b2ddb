"""Panels: rows transposed for the matrix product of many rows, and back."""

from typing import Any

import numpy as np
from numba import prange

from npllm.kernels.cpu.launching import kernel
from npllm.kernels.cpu.simd import LANES, fma, load, load_scalar, reduce_add, splat

__all__ = ["pack_all", "root_mean_square", "unpack_all"]

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
    """Transpose up to 64 rows into a panel, 16 x 16 entries at a time; each row is normalised where
    there is a gain.
    """
    n, d = rows.shape
    roots = np.ones(n, np.float32)
    if len(gain):
        for k in range(n):
            roots[k] = root_mean_square(rows[k], eps)
    panel[:, n:] = 0
    for start in range(0, d, 16):
        for first in range(0, n, 16):
            for k in range(
                first, min(first + 16, n)
            ):  # whose lines may lie in one set of the cache: each is read once
                for i in range(start, min(start + 16, d)):
                    g = load_scalar(gain, i) if len(gain) else np.float32(1)
                    panel[i, k] = g * (rows[k, i] / roots[k])


@kernel(nogil=True)
def unpack(panel: Array, y: Array, add: bool) -> None:
    """Transpose a panel into its rows, or add it to them, 16 x 16 entries at a time."""
    n, d = y.shape
    for start in range(0, d, 16):
        for first in range(0, n, 16):
            for k in range(first, min(first + 16, n)):
                for i in range(start, min(start + 16, d)):
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
