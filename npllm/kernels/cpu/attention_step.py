"""Attention of a few queries of each sequence: a decoding step, or several proposed tokens at once.

A query's scores, its softmax and its sum over values are evaluated in one order, in runs of keys
from the first one that it sees to the last, whatever other queries there are: it has the same bits
alone and in company.
"""

from typing import Any

import numpy as np
from numba import prange

from npllm.kernels.cpu.launching import kernel
from npllm.kernels.cpu.rotation import append_token, rotate
from npllm.kernels.cpu.simd import LANES, fma, load, reduce_add, splat, store
from npllm.kernels.cpu.simd_arrays import array_at, flat_memory
from npllm.kernels.cpu.simd_rows import add_each, fma_each, load_each, store_each, sums_of_sixteen
from npllm.kernels.cpu.softmax import exponentials

__all__ = ["attend_rows", "attend_step"]

Array = Any

BLOCK = 64  # keys, or values, that stay in the nearest cache while all queries read them
RUN = 32  # values whose sum is added to that of other runs; divides BLOCK
WIDE = 4 * LANES  # channels of values that are added up at a time


@kernel(parallel=True)
def attend_step(
    qkv: Array,
    cos: Array,
    sin: Array,
    keys: Array,
    values: Array,
    bounds: Array,
    seen: Array,
    n_head: int,
    y: Array,
) -> None:
    """Rotate a few tokens of each sequence, write their keys and values into the last columns, and
    attend; heads on all threads.

    qkv [n_batch, n_seq, (n_head+2*n_kv_head)*d_head], cos and sin [n_batch or 1, n_seq, d_rope],
    keys and values [n_ctx, n_batch, n_kv_head, d_head], y [n_batch, n_seq, n_head*d_head].  A query
    sees the keys from bounds[..., 0] to before bounds[..., 1], [n_batch or 1, n_seq, 2], where
    seen [n_batch or 1, n_seq, n_ctx] is true; without a row of `seen` all of them.
    """
    n_ctx, n_batch, n_kv_head, d_head = keys.shape
    n_seq, group = qkv.shape[1], n_head // n_kv_head
    for b in range(n_batch):
        row = b if len(cos) > 1 else 0
        for t in range(n_seq):
            slot = n_ctx - n_seq + t
            append_token(
                qkv[b, t], cos[row, t], sin[row, t], n_head, keys[slot, b], values[slot, b]
            )
    for at in prange(n_batch * n_head):
        b, h = at // n_head, at % n_head
        q, row = np.empty((n_seq, d_head), np.float32), b if len(cos) > 1 else 0
        for t in range(n_seq):
            rotate(qkv[b, t, h * d_head : (h + 1) * d_head], cos[row, t], sin[row, t], q[t])
        limits = bounds[b if len(bounds) > 1 else 0]
        p, totals = softmax_weights(q, keys[:, b, h // group], limits, seen, b)
        sums = np.zeros((n_seq, d_head), np.float32)
        weighted_sums(p, totals, values[:, b, h // group], limits, sums)
        for t in range(n_seq):
            for i in range(d_head):
                y[b, t, h * d_head + i] = sums[t, i]


@kernel(parallel=True)
def attend_rows(
    qkv: Array,
    cos: Array,
    sin: Array,
    keys: Array,
    values: Array,
    table: Array,
    seen: Array,
    n_head: int,
    y: Array,
) -> None:
    """Do what `attend_step` does, for one token of each row, where each row's keys lie elsewhere.

    qkv [n_row, (n_head+2*n_kv_head)*d_head], cos and sin [n_row, d_rope], keys and values [n_ctx,
    1, n_kv_head, d_head] those of the row that has most, y [n_row, n_head*d_head]; table [n_row,
    6]: the addresses of a row's keys and values, the bytes from head to head of both, how many
    there are with the new ones, the first that is seen; seen [0, 1, 0].
    """
    n_kv_head, d_head = keys.shape[2], keys.shape[3]
    group, some_keys, some_values = n_head // n_kv_head, keys[:, 0, 0], values[:, 0, 0]
    for b in range(len(qkv)):
        slot = table[b, 4] - 1
        for h in range(n_kv_head):
            start = (n_head + h) * d_head
            k = array_at(some_keys, table[b, 0] + h * table[b, 2])
            rotate(qkv[b, start : start + d_head], cos[b], sin[b], k[slot])
            start += n_kv_head * d_head
            v = array_at(some_values, table[b, 1] + h * table[b, 3])
            for i in range(d_head):
                v[slot, i] = qkv[b, start + i]
    for at in prange(len(qkv) * n_head):
        b, h = at // n_head, at % n_head
        q, limits = np.empty((1, d_head), np.float32), np.empty((1, 2), np.int64)
        rotate(qkv[b, h * d_head : (h + 1) * d_head], cos[b], sin[b], q[0])
        limits[0, 0], limits[0, 1] = table[b, 5], table[b, 4]
        k = array_at(some_keys, table[b, 0] + h // group * table[b, 2])[: table[b, 4]]
        v = array_at(some_values, table[b, 1] + h // group * table[b, 3])[: table[b, 4]]
        p, totals = softmax_weights(q, k, limits, seen, 0)
        sums = np.zeros((1, d_head), np.float32)
        weighted_sums(p, totals, v, limits, sums)
        for i in range(d_head):
            y[b, h * d_head + i] = sums[0, i]


@kernel()
def softmax_weights(
    q: Array, keys: Array, bounds: Array, seen: Array, b: int
) -> tuple[Array, Array]:
    """exp(s - max s) with s = scale * keys @ q, [n_seq, n_ctx]: between the bounds of each query; 0
    where a key is not seen.  And their sums, [n_seq].
    """
    n_seq, n_ctx = len(q), len(keys)
    p, totals = np.empty((n_seq, n_ctx), np.float32), np.empty(n_seq, np.float32)
    for start in range(0, n_ctx, BLOCK):
        for t in range(n_seq):
            first, stop = max(start, bounds[t, 0]), min(start + BLOCK, bounds[t, 1])
            scores(q[t], keys, first, stop, p[t])
    for t in range(n_seq):
        largest = np.float32(-np.inf)
        for j in range(bounds[t, 0], bounds[t, 1]):
            if len(seen) and not seen[b if len(seen) > 1 else 0, t, j]:
                p[t, j] = -np.inf
            largest = max(largest, p[t, j])
        if largest == -np.inf:  # nothing is seen
            largest = np.float32(0)
        totals[t] = exponentials(p[t, bounds[t, 0] : bounds[t, 1]], largest)
    return p, totals


@kernel(inline="always")
def scores(q: Array, keys: Array, first: int, stop: int, p: Array) -> None:
    """Write scale * keys @ q for the keys first ... stop - 1 into p."""
    d, kept, stride = len(q), flat_memory(keys), keys.strides[0] // 4
    whole, scale, zero = d // LANES * LANES, np.float32(1 / np.sqrt(d)), splat(np.float32(0))
    four = zero, zero, zero, zero
    sixteen = four + four + four + four
    many = (stop - first) // LANES * LANES if d == whole else 0
    for j in range(first, first + many, LANES):
        sums = sixteen
        for i in range(0, whole, LANES):
            sums = fma_each(load(q, i), load_each(kept, j * stride + i, stride, sixteen), sums)
        store(p, j, fma(splat(scale), sums_of_sixteen(sums), splat(np.float32(-0.0))))
    for j in range(first + many, stop):
        s = zero
        for i in range(0, whole, LANES):
            s = fma(load(q, i), load(kept, j * stride + i), s)
        score = reduce_add(s)
        for i in range(whole, d):
            score += q[i] * keys[j, i]
        p[j] = score * scale


@kernel()
def weighted_sums(p: Array, totals: Array, values: Array, bounds: Array, y: Array) -> None:
    """Compute y[t] = sum_j p[t, j] * values[j] / totals[t] between the bounds of each query; zeros
    where the total is, or where there is no key.
    """
    n_ctx, d = values.shape
    for start in range(0, n_ctx, BLOCK):
        for t in range(len(y)):
            first = bounds[t, 0] + start
            add_values(p[t], values, first, min(first + BLOCK, bounds[t, 1]), y[t])
    for t in range(len(y)):
        if totals[t] > 0:
            for i in range(d):
                y[t, i] /= totals[t]


@kernel(inline="always")
def add_values(p: Array, values: Array, first: int, stop: int, y: Array) -> None:
    """Compute y += sum_j p[j] * values[j] over the keys first ... stop - 1, run by run."""
    d, one, zero = len(y), splat(np.float32(1)), splat(np.float32(0))
    kept, stride, whole = flat_memory(values), values.strides[0] // 4, d // LANES * LANES
    many, four = d // WIDE * WIDE, (zero, zero, zero, zero)
    for start in range(first, stop, RUN):
        end = min(start + RUN, stop)
        for i in range(0, many, WIDE):
            sums = four
            for j in range(start, end):
                sums = fma_each(splat(p[j]), load_each(kept, j * stride + i, LANES, four), sums)
            store_each(y, i, LANES, add_each(load_each(y, i, LANES, four), sums))
        for i in range(many, whole, LANES):
            a = zero
            for j in range(start, end):
                a = fma(splat(p[j]), load(kept, j * stride + i), a)
            store(y, i, fma(one, load(y, i), a))
        for i in range(whole, d):
            part = np.float32(0)
            for j in range(start, end):
                part += p[j] * values[j, i]
            y[i] += part
