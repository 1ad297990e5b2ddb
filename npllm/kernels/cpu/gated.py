"""The gated feed-forward layer's first half in compiled kernels: a product, then SwiGLU."""

from typing import Any

import numpy as np
from numba import prange

from npllm.kernels.cpu.gemv import add_product, rows_of_bias
from npllm.kernels.cpu.launching import kernel
from npllm.kernels.cpu.simd import LANES, fma, load, splat, store
from npllm.kernels.cpu.simd_math import silu

__all__ = ["gated_product", "swiglu_panels"]

Array = Any


@kernel()
def gated_product(
    weight: Array, scales: Array, x: Array, gain: Array, eps: float, bias: Array, y: Array
) -> None:
    """Compute y [n, d_ff] = swiglu of the two halves of rms_norm(x) @ weight.T, with a bias where
    there is one.
    """
    d_ff = y.shape[1]
    both = rows_of_bias(len(x), 2 * d_ff, bias)
    add_product(weight, scales, x, gain, eps, both)
    for k in range(len(x)):
        swiglu_row(both[k, :d_ff], both[k, d_ff:], y[k])


@kernel(nogil=True)
def swiglu_row(g: Array, u: Array, y: Array) -> None:
    """Compute y = silu(g) * u on one run of channels."""
    whole = len(g) // LANES * LANES
    zero = splat(np.float32(-0.0))  # which leaves the sign of a product that is 0
    for i in range(0, whole, LANES):
        store(y, i, fma(silu(load(g, i)), load(u, i), zero))
    for i in range(whole, len(g)):
        x = np.float64(g[i])
        y[i] = np.float32(x / (1 + np.exp(-x))) * u[i]


@kernel(parallel=True)
def swiglu_panels(both: Array, y: Array) -> None:
    """Compute y = silu(g) * u in panels: y [n_panel, d_ff, columns], and both [n_panel, at least
    2*d_ff, columns] is g, then u.
    """
    d_ff = y.shape[1]
    for p in prange(len(both)):
        for i in range(d_ff):
            swiglu_row(both[p, i], both[p, d_ff + i], y[p, i])
