"""Attention of many queries in one kernel: rotation, the cache, scores, softmax, weighted sum.

A task is some queries of one key/value head, those of all its query heads side by side: 64 columns
(16 without AVX-512) are a panel, as in `gemm`.  For each block of keys, S = K Q [n_key, columns]
and Y += V^T P [d_head, columns] are the tiles of `gemm`, and the softmax between them runs down the
columns, so that nothing is ever summed across a vector.

Source: "FlashAttention-2" (Dao 2023), section 3.1: queries outside, keys inside.
"""

from typing import Any

import numpy as np
from numba import prange

from npllm.kernels.cpu.gemm_tiles import TILE_ROWS, multiply
from npllm.kernels.cpu.launching import kernel
from npllm.kernels.cpu.layout import EMPTY
from npllm.kernels.cpu.panels import pack, unpack
from npllm.kernels.cpu.rotation import append_token, rotate
from npllm.kernels.cpu.simd import LANES, fma, load, maximum, splat, store
from npllm.kernels.cpu.simd_arrays import atomic_fetch_add, flat_memory
from npllm.kernels.cpu.simd_math import exp

__all__ = [
    "KEYS",
    "PANELS",
    "append_new",
    "apply_band_mask",
    "attend_many",
    "pack_queries",
    "update_columns",
    "write_rows",
]

Array = Any

LOWEST = np.float32(np.finfo(np.float32).min)
KEYS = 16 * TILE_ROWS  # of a block
PANELS = 8  # of a task


@kernel(parallel=True)
def attend_many(
    qkv: Array,
    cos: Array,
    sin: Array,
    keys: Array,
    values: Array,
    n_head: int,
    band: tuple[int, int],
    slot: int,
    panels: Array,
    y: Array,
    counter: Array,
) -> None:
    """Write the keys and values of new tokens into the last columns, and attend; whichever thread
    is free takes the next task.

    qkv [n_batch, n_seq, (n_head+2*n_kv_head)*d_head], cos and sin [n_batch, n_seq, d_rope], keys
    and values [n_ctx, n_batch, n_kv_head, d_head], the first n_ctx - n_seq filled; a query sees the
    keys at distances band[0] <= i - j < band[1]; slot: that of the first key; panels [n_thread,
    PANELS, d_head, columns] are buffers for queries; y [n_batch, n_seq, n_head*d_head].
    """
    n_batch, n_kv_head = keys.shape[1:3]
    n_seq, group, columns = qkv.shape[1], n_head // n_kv_head, panels.shape[3]
    for at in prange(n_batch * n_seq):
        append_new(qkv, cos, sin, n_head, at, keys, values)
    size = PANELS * columns
    n_part = (group * n_seq + size - 1) // size
    for thread in prange(len(panels)):
        task = atomic_fetch_add(counter)
        while task < n_batch * n_kv_head * n_part:
            b, h, start = (
                task % n_batch,
                task // n_batch % n_kv_head,
                (n_part - 1 - task // (n_batch * n_kv_head)) * size,
            )
            stop = min(start + size, group * n_seq)
            attend_part(
                qkv[b],
                cos[b],
                sin[b],
                keys[:, b, h],
                values[:, b, h],
                group,
                h,
                start,
                stop,
                band,
                slot,
                panels[thread],
                y[b],
            )
            task = atomic_fetch_add(counter)


@kernel(nogil=True)
def append_new(
    qkv: Array, cos: Array, sin: Array, n_head: int, at: int, keys: Array, values: Array
) -> None:
    """Write keys and values of new token `at` of all rows into its column."""
    n_seq = qkv.shape[1]
    b, n = at // n_seq, at % n_seq
    j = len(keys) - n_seq + n
    append_token(qkv[b, n], cos[b, n], sin[b, n], n_head, keys[j, b], values[j, b])


@kernel(nogil=True)
def attend_part(
    qkv: Array,
    cos: Array,
    sin: Array,
    keys: Array,
    values: Array,
    group: int,
    h: int,
    start: int,
    stop: int,
    band: tuple[int, int],
    slot: int,
    q: Array,
    y: Array,
) -> None:
    """One task: columns start ... stop - 1, of which column c is token c // group with head c %
    group of the group.
    """
    n_ctx, d_head = keys.shape
    columns, n_past = q.shape[2], n_ctx - len(qkv)
    n_panel = (stop - start + columns - 1) // columns
    scale = np.float32(1 / np.sqrt(d_head))
    pack_queries(qkv, cos, sin, group, h, start, stop, scale, q)
    sums, largest = (
        np.zeros((n_panel, columns), np.float32),
        np.full((n_panel, columns), -np.inf, np.float32),
    )
    weighted, scores = (
        np.zeros((n_panel, d_head, columns), np.float32),
        np.empty((KEYS, columns), np.float32),
    )
    tile = np.empty(TILE_ROWS * columns, np.float32)
    j = max(0, n_past + start // group - band[1] + 1)
    last = min(n_ctx, n_past + (stop - 1) // group - band[0] + 1)
    while j < last:
        n_block = block_length(slot + j)
        for p in range(n_panel):
            seen = (
                n_past + (start + (p + 1) * columns - 1) // group - band[0] + 1 - j
            )  # by the last query of the panel
            n_key = min(n_block, last - j, (seen + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS)
            if n_key <= 0:
                continue
            at, step = p * d_head * columns, keys.strides[0] // 4
            multiply(
                flat_memory(keys),
                j * step,
                step,
                1,
                n_key,
                q,
                at,
                d_head,
                scores,
                0,
                False,
                at,
                tile,
                columns,
                KEYS,
            )
            apply_band_mask(scores, n_key, start + p * columns, group, n_past - j, band)
            update_columns(scores, n_key, np.float32(1), largest[p], sums[p], weighted[p])
            step = values.strides[0] // 4
            multiply(
                flat_memory(values),
                j * step,
                1,
                step,
                d_head,
                scores,
                0,
                n_key,
                weighted,
                at,
                True,
                0,
                tile,
                columns,
                KEYS,
            )
        j += n_block
    for p in range(n_panel):
        write_rows(weighted[p], sums[p], group, h, start + p * columns, stop, y)


@kernel(nogil=True)
def block_length(slot: int) -> int:
    """Keys from a slot to the end of its block: blocks end at multiples of KEYS, so that a token
    has the same bits wherever the prompt is cut, and whichever keys were dropped before.
    """
    return KEYS - slot % KEYS


@kernel(nogil=True)
def write_rows(
    weighted: Array, sums: Array, group: int, h: int, start: int, stop: int, y: Array
) -> None:
    """Divide a panel by its sums, and write column c, which is `start + c` of a task, to its row of
    y; 0 where no key was seen, but a value that is NaN stays NaN, as in the definition.
    """
    d_head, columns = weighted.shape
    rows = np.empty((columns, d_head), np.float32)
    unpack(weighted, rows, False)
    for k in range(min(columns, stop - start)):
        c, total = start + k, sums[k] if sums[k] != 0 else np.float32(np.inf)
        row = y[c // group, (h * group + c % group) * d_head :]
        for i in range(d_head):
            row[i] = rows[k, i] / total


@kernel(nogil=True)
def pack_queries(
    qkv: Array,
    cos: Array,
    sin: Array,
    group: int,
    h: int,
    start: int,
    stop: int,
    scale: float,
    q: Array,
) -> None:
    """Rotate queries, scale them, and write them into panels; columns without a query are 0."""
    d_head, columns = q.shape[1:]
    rows = np.empty((columns, d_head), np.float32)
    for first in range(start, stop, columns):
        count = min(columns, stop - first)
        for k in range(count):
            n, at = (first + k) // group, (h * group + (first + k) % group) * d_head
            rotate(qkv[n, at : at + d_head], cos[n], sin[n], rows[k])
            for i in range(d_head):
                rows[k, i] *= scale
        pack(rows[:count], EMPTY, np.float32(0), q[(first - start) // columns])


@kernel(nogil=True)
def apply_band_mask(
    scores: Array, n_key: int, start: int, group: int, shift: int, band: tuple[int, int]
) -> None:
    """Set the scores of pairs outside the band to -inf; column c is token (start + c) // group,
    whose slot - j is `shift` more.
    """
    columns = scores.shape[1]
    for k in range(n_key):  # is seen by columns from `low` to `high`
        low = (k + band[0] - shift) * group - start
        high = (k + band[1] - shift) * group - start
        for c in range(min(columns, low)):
            scores[k, c] = -np.inf
        for c in range(max(0, high), columns):
            scores[k, c] = -np.inf


@kernel(nogil=True)
def update_columns(
    scores: Array, n_key: int, scale: float, largest: Array, sums: Array, weighted: Array
) -> None:
    """Turn a block of scores into exp(scale * (s - maximum)), and bring maximum, sum and weighted
    sum of every column up to date.  The difference comes first: where the maximum stays, nothing
    is rounded anew.
    """
    columns, one, zero = scores.shape[1], splat(np.float32(1)), splat(np.float32(0))
    lowest, factor, negative = splat(LOWEST), splat(scale), splat(np.float32(-1))
    for c in range(0, columns, LANES):
        top = load(largest, c)
        for k in range(n_key):
            top = maximum(top, load(scores, k * columns + c))
        # where nothing is seen yet any finite number will do
        minus, part = fma(negative, maximum(top, lowest), zero), zero
        decay = exp(fma(factor, fma(one, load(largest, c), minus), zero))
        store(largest, c, top)
        for k in range(n_key):
            e = exp(fma(factor, fma(one, load(scores, k * columns + c), minus), zero))
            store(scores, k * columns + c, e)
            part = fma(one, e, part)
        store(sums, c, fma(load(sums, c), decay, part))
        for i in range(len(weighted)):
            store(
                weighted,
                i * columns + c,
                fma(load(weighted, i * columns + c), decay, zero),
            )
