"""Attention of one query of each sequence: a decoding step."""

from typing import Any

import numpy as np
from numba import prange

from npllm.kernels.cpu.launching import kernel
from npllm.kernels.cpu.rotation import append_token, rotate
from npllm.kernels.cpu.simd import LANES, fma, load, reduce_add, splat, store
from npllm.kernels.cpu.simd_arrays import flat_memory
from npllm.kernels.cpu.softmax import exponentials

__all__ = ["attend_step"]

Array = Any


@kernel(parallel=True)
def attend_step(
    qkv: Array,
    cos: Array,
    sin: Array,
    keys: Array,
    values: Array,
    seen: Array,
    n_head: int,
    y: Array,
) -> None:
    """Rotate one token of each sequence, write its key and value into the last column, and attend;
    heads on all threads.

    qkv [n_batch, 1, (n_head+2*n_kv_head)*d_head], cos and sin [n_batch or 1, d_rope], keys and
    values [n_ctx, n_batch, n_kv_head, d_head], seen [n_batch or 1, n_ctx] or without a row, y
    [n_batch, 1, n_head*d_head].
    """
    n_ctx, n_batch, n_kv_head, d_head = keys.shape
    group = n_head // n_kv_head
    for b in range(n_batch):
        row = b if len(cos) > 1 else 0
        append_token(
            qkv[b, 0], cos[row], sin[row], n_head, keys[n_ctx - 1, b], values[n_ctx - 1, b]
        )
    for at in prange(n_batch * n_head):
        b, h = at // n_head, at % n_head
        q, row = np.empty(d_head, np.float32), b if len(cos) > 1 else 0
        rotate(qkv[b, 0, h * d_head : (h + 1) * d_head], cos[row], sin[row], q)
        p = softmax_weights(q, keys[:, b, h // group], seen, b)
        weighted_sum(p, values[:, b, h // group], y[b, 0, h * d_head : (h + 1) * d_head])


@kernel()
def softmax_weights(q: Array, keys: Array, seen: Array, b: int) -> Array:
    """softmax(scale * keys @ q) over the keys that are seen; zeros where none is."""
    n_ctx, d = keys.shape
    kept, stride, whole, scale = (
        flat_memory(keys),
        keys.strides[0] // 4,
        d // LANES * LANES,
        np.float32(1 / np.sqrt(d)),
    )
    p, largest = np.empty(n_ctx, np.float32), np.float32(-np.inf)
    row = b if len(seen) > 1 else 0
    for j in range(n_ctx):
        if len(seen) and not seen[row, j]:
            p[j] = -np.inf
            continue
        s = splat(np.float32(0))
        for i in range(0, whole, LANES):
            s = fma(load(q, i), load(kept, j * stride + i), s)
        score = reduce_add(s)
        for i in range(whole, d):
            score += q[i] * keys[j, i]
        p[j] = score * scale
        largest = max(largest, p[j])
    if largest == -np.inf:  # nothing is seen
        largest = np.float32(0)
    exponentials(p, largest)
    return p


@kernel()
def weighted_sum(p: Array, values: Array, y: Array) -> None:
    """Compute y = sum_j p[j] * values[j] / sum_j p[j]; zeros where the sum is."""
    n_ctx, d = values.shape
    kept, stride, whole = flat_memory(values), values.strides[0] // 4, d // LANES * LANES
    y[:] = 0
    for start in range(0, n_ctx, 64):  # keys whose values stay in the nearest cache
        stop = min(start + 64, n_ctx)
        for i in range(0, whole, LANES):
            a = load(y, i)
            for j in range(start, stop):
                a = fma(splat(p[j]), load(kept, j * stride + i), a)
            store(y, i, a)
        for i in range(whole, d):
            for j in range(start, stop):
                y[i] += p[j] * values[j, i]
    denominator = np.float32(0)
    for j in range(n_ctx):
        denominator += p[j]
    if denominator > 0:
        for i in range(d):
            y[i] /= denominator
