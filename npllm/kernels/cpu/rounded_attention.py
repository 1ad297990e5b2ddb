"""Attention of many queries on products of bfloat16: `attention`'s, on the tiles of a product.

    s = scale * sum_c q'[c] * k'[c],   y = sum_j w'_j * v'_j / sum_j w_j,   w_j = exp(s_j - maximum)

where ' is the nearest bfloat16; sums are float32.  Panels of 64 queries are rounded once.  A block
of keys and values is rounded for all panels of a task: into rows of words, the channels of a key
side by side, and the keys of a channel.  Blocks begin at multiples of KEYS, counted from slot 0, so
that pairs of keys, and the order of sums, do not depend on where a prompt is cut; 0 stands for keys
that no query of the task sees.
"""

from typing import Any

import numpy as np
from numba import prange

from npllm.kernels.cpu.attention import (
    KEYS,
    PANELS,
    append_new,
    apply_band_mask,
    pack_queries,
    update_columns,
    write_rows,
)
from npllm.kernels.cpu.dot_products import form_of
from npllm.kernels.cpu.launching import kernel, launch, n_workers
from npllm.kernels.cpu.matrix_tiles import HEIGHT, bfloat16_units
from npllm.kernels.cpu.rope_attention import attend_band, attend_by_blocks, slots_first
from npllm.kernels.cpu.rounded_panels import bfloat16_function, round_pairs
from npllm.kernels.cpu.rounded_tiles import COLUMNS, NUMBERS, TILE_ROWS, WORD, bfloat16_tile
from npllm.kernels.cpu.simd import LANES
from npllm.kernels.cpu.simd_addresses import call_address
from npllm.kernels.cpu.simd_arrays import atomic_fetch_add, flat_memory
from npllm.kernels.cpu.simd_rows import transpose_block
from npllm.ops.mask.rule import FAR
from npllm.threads import scratch

__all__ = ["attend_rounded"]

Array = Any

STEP = 2 * LANES  # channels of a key that are rounded at once
PANEL = COLUMNS * WORD  # bytes of a row of a panel


def attend_rounded(
    qkv: Array,
    cos: Array,
    sin: Array,
    n_head: int,
    n_kv_head: int,
    mask: Any,
    keys: Array,
    values: Array,
    slots: range,
) -> Array:
    """Compute `rope_attention.attend_band` with rounded operands.

    In one kernel where the mask is a band of distances, behind padding on the left or not, and
    heads have a multiple of 16 channels.  Where products of bfloat16 are float32's, attention is.
    """
    how, heads = form_of("bfloat16"), (n_head, n_kv_head)
    if how == "float32":
        return attend_band(qkv, cos, sin, *heads, mask, keys, values, slots)
    band: Any = (-FAR, FAR, None) if mask is None else getattr(mask, "left_band", None)
    n_batch, n_seq, _ = qkv.shape
    d_head = keys.shape[-1]
    if band is None or d_head % LANES or (band[2] is not None and band[2].shape != (n_batch,)):
        return attend_by_blocks(qkv, cos, sin, *heads, mask, keys, values, slots, is_rounded=True)
    start = np.zeros(n_batch, np.int64)
    if band[2] is not None:
        start[:] = np.clip(band[2] - slots.start, 0, len(slots))
    y = np.empty((n_batch, n_seq, n_head * d_head), np.float32)
    queries = scratch("queries", (n_workers(), PANELS, d_head, COLUMNS), np.float32)
    launch(
        attend_all,
        form(how),
        qkv,
        cos,
        sin,
        slots_first(keys),
        slots_first(values),
        n_head,
        band[:2],
        start,
        slots.start,
        queries,
        y,
        np.zeros(1, np.int64),
    )
    return y


def form(how: str) -> tuple[int, int, int, int]:
    """What the kernel needs of a form of products: the addresses of the product of a tile and of
    the rounding of a panel; and of how many rows and of how many words a tile takes a multiple.
    """
    if how == "tiles":
        return bfloat16_units(COLUMNS).address, bfloat16_function().address, HEIGHT, LANES
    tile = bfloat16_tile(how == "instruction", COLUMNS)
    return tile.address, bfloat16_function().address, TILE_ROWS, 1


@kernel(parallel=True)
def attend_all(
    form: tuple[int, int, int, int],
    qkv: Array,
    cos: Array,
    sin: Array,
    keys: Array,
    values: Array,
    n_head: int,
    band: tuple[int, int],
    first_keys: Array,
    slot: int,
    panels: Array,
    y: Array,
    counter: Array,
) -> None:
    """`attention.attend_many` with rounded operands; row b of the batch sees no key before
    first_keys[b].
    """
    n_batch, n_kv_head = keys.shape[1:3]
    n_seq, group, size = qkv.shape[1], n_head // n_kv_head, PANELS * COLUMNS
    for at in prange(n_batch * n_seq):
        append_new(qkv, cos, sin, n_head, at, keys, values)
    n_part, n_heads = (group * n_seq + size - 1) // size, n_batch * n_kv_head
    for thread in prange(len(panels)):
        task = atomic_fetch_add(counter)
        while task < n_heads * n_part:
            b, h, start = task % n_batch, task // n_batch % n_kv_head, task // n_heads
            start = (n_part - 1 - start) * size
            attend_part(
                form,
                qkv[b],
                cos[b],
                sin[b],
                keys[:, b, h],
                values[:, b, h],
                group,
                h,
                start,
                min(start + size, group * n_seq),
                band,
                first_keys[b],
                slot,
                panels[thread],
                y[b],
            )
            task = atomic_fetch_add(counter)


@kernel(nogil=True)
def attend_part(
    form: tuple[int, int, int, int],
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
    first_key: int,
    slot: int,
    q: Array,
    y: Array,
) -> None:
    """One task, as `attention.attend_part`."""
    tile, rounding, height, unit = form
    n_ctx, d_head = keys.shape
    n_past, n_panel = n_ctx - len(qkv), (stop - start + COLUMNS - 1) // COLUMNS
    scale = np.float32(1 / np.sqrt(d_head))
    width = (d_head + STEP - 1) // STEP * LANES  # words of a row of keys
    queries = np.zeros((n_panel, width, COLUMNS), np.uint32)
    pack_queries(qkv, cos, sin, group, h, start, stop, np.float32(1), q)
    for p in range(n_panel):
        call_address(rounding, (q[p].ctypes.data, d_head, queries[p].ctypes.data, 0))
    sums = np.zeros((n_panel, COLUMNS), np.float32)
    largest = np.full((n_panel, COLUMNS), -np.inf, np.float32)
    n_row = multiple(d_head, height)
    weighted = np.zeros((n_panel, n_row, COLUMNS), np.float32)
    scores = np.empty((KEYS, COLUMNS), np.float32)
    weights = np.empty((KEYS // 2, COLUMNS), np.uint32)
    key_words = np.zeros((KEYS, width), np.uint32)
    value_words = np.zeros((n_row, KEYS // 2), np.float32)
    pairs = np.empty((KEYS // 2, d_head), np.float32)
    first = max(0, first_key, n_past + start // group - band[1] + 1)
    last = min(n_ctx, n_past + (stop - 1) // group - band[0] + 1)
    for j in range(first - (slot + first) % KEYS, last, KEYS):
        n_block, n_unseen = min(KEYS, last - j), max(0, first - j)
        round_keys(keys, j, n_unseen, n_block, key_words)
        round_values(values, j, n_unseen, n_block, pairs, value_words)
        for p in range(n_panel):
            seen = (
                n_past + (start + (p + 1) * COLUMNS - 1) // group - band[0] + 1 - j
            )  # by the last query of the panel
            n_key = min(n_block, multiple(seen, TILE_ROWS))
            if n_key <= 0:
                continue
            scores[: multiple(n_key, height)] = 0
            n_word = multiple(d_head // 2, unit)
            multiply(tile, height, key_words, n_key, n_word, queries[p], scores)
            apply_band_mask(scores, n_key, start + p * COLUMNS, group, n_past - j, band)
            scores[:n_unseen] = -np.inf
            update_columns(scores, n_key, scale, largest[p], sums[p], weighted[p])
            n_word = multiple((n_key + 1) // 2, unit)
            scores[n_key : 2 * n_word] = 0
            call_address(rounding, (scores.ctypes.data, 2 * n_word, weights.ctypes.data, 0))
            multiply(tile, height, value_words, d_head, n_word, weights, weighted[p])
    for p in range(n_panel):
        write_rows(weighted[p, :d_head], sums[p], group, h, start + p * COLUMNS, stop, y)


@kernel(nogil=True)
def multiple(n: int, unit: int) -> int:
    """The least multiple of a unit that is not below n."""
    return (n + unit - 1) // unit * unit


@kernel(nogil=True)
def multiply(
    tile: int, height: int, rows: Array, n_row: int, n_word: int, panel: Array, y: Array
) -> None:
    """Add the product of rows of words and a panel to y [at least n_row, 64], tile by tile."""
    row_bytes = rows.shape[1] * WORD
    for r in range(0, n_row, height):
        codes, to = rows.ctypes.data + r * row_bytes - NUMBERS, y.ctypes.data + r * PANEL
        call_address(tile, (codes, row_bytes, n_word, panel.ctypes.data, 0, to))


@kernel(nogil=True)
def round_keys(keys: Array, j: int, first: int, stop: int, words: Array) -> None:
    """Write keys j + first ... j + stop - 1 as rows first ... stop - 1 of words, a pair of channels
    each; 0 before and behind them.
    """
    d_head, zeros = keys.shape[1], np.zeros(LANES, np.float32)
    nothing = np.int64(zeros.ctypes.data)
    words[:first] = 0
    for k in range(first, stop):
        at, to = flat_memory(keys).ctypes.data + (j + k) * keys.strides[0], words[k].ctypes.data
        for c in range(0, d_head, STEP):
            x = at + c * WORD
            other = x + LANES * WORD if c + LANES < d_head else nothing
            round_pairs(True, x, other, to + c // 2 * WORD)
    words[stop:] = 0


@kernel(nogil=True)
def round_values(values: Array, j: int, first: int, stop: int, pairs: Array, words: Array) -> None:
    """Write values of keys j + first ... j + stop - 1 as a row of words for each channel, a pair of
    keys each, the first one j and j + 1; 0 for other keys.  `pairs` is a buffer [KEYS / 2, d_head].
    """
    d_head, zeros = values.shape[1], np.zeros(values.shape[1], np.float32)
    n_pair, nothing = len(pairs), np.int64(zeros.ctypes.data)
    for k in range(n_pair):
        a = flat_memory(values).ctypes.data + (j + 2 * k) * values.strides[0]
        b = a + values.strides[0] if first <= 2 * k + 1 < stop else nothing
        a, to = a if first <= 2 * k < stop else nothing, pairs[k].ctypes.data
        for c in range(0, d_head * WORD, LANES * WORD):
            round_pairs(False, a + c, b + c, to + c)
    for c in range(0, d_head, LANES):
        for k in range(0, n_pair, LANES):
            transpose_block(False, pairs, k * d_head + c, d_head, words, c * n_pair + k, n_pair)
