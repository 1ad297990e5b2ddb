"""Softmax of one row at a time in compiled kernels, also over blocks of keys."""

from typing import Any

import numpy as np

from npllm.kernels.cpu.launching import kernel
from npllm.kernels.cpu.simd import LANES, fma, load, reduce_add, splat, store
from npllm.kernels.cpu.simd_math import exp

__all__ = ["exponentials", "softmax_update"]

Array = Any


@kernel(nogil=True)
def exponentials(p: Array, largest: float) -> float:
    """Compute p = exp(p - largest) in place; returns the sum."""
    n = len(p)
    whole, minus, sums = n // LANES * LANES, splat(-largest), splat(np.float32(0))
    one = splat(np.float32(1))
    for j in range(0, whole, LANES):
        e = exp(fma(one, load(p, j), minus))
        store(p, j, e)
        sums = fma(one, e, sums)
    denominator = reduce_add(sums)
    for j in range(whole, n):
        p[j] = np.exp(p[j] - largest)
        denominator += p[j]
    return denominator


@kernel(nogil=True)
def softmax_update(s: Array, m: Array, sums: Array, a: Array) -> None:
    """Turn a tile of scores into exp(s - m), and bring maximum m, sum and weighted sum a up to
    date, all in place.
    """
    for k in range(len(s)):
        largest = m[k, 0]
        for x in s[k]:
            largest = max(largest, x)
        # where nothing is seen any finite number will do; scores that are all NaN stay NaN
        shift = np.float32(0) if largest == -np.inf else largest
        decay = np.exp(m[k, 0] - shift)
        m[k, 0] = largest
        sums[k, 0] = sums[k, 0] * decay + exponentials(s[k], shift)
        if decay != 1:
            a[k] *= decay
