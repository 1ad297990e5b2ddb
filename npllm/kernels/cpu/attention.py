"""Attention in the compiled set: rotation, the cache, scores, softmax and weighted sum in one
kernel.

Many queries: a task is some queries of one key/value head, those of all its query heads side by
side: 64 columns (16 without AVX-512) are a panel, as in `gemm`.  For each block of keys, S = K Q
[n_key, columns] and Y += V^T P [d_head, columns] are the tiles of `gemm`, and the softmax between
them runs down the columns, so that nothing is ever summed across a vector.

Source: "FlashAttention-2" (Dao 2023), section 3.1: queries outside, keys inside.
"""

import numpy as np
from numba import prange

from npllm.kernels.cpu.gemm import TALL, multiply
from npllm.kernels.cpu.simd import (
    LANES,
    exp,
    fma,
    kernel,
    load,
    maximum,
    memory,
    splat,
    store,
    take,
    total,
)

__all__ = ["attend_many", "attend_step", "fold_scores", "rotate_all"]

KEYS = 16 * TALL  # of a block
PANELS = 8  # of a task


@kernel(nogil=True)
def rotate(x, cos, sin, y):
    """Rotary position embedding of one head of one token, channel i with channel i + d_rope/2; y
    may be x.
    """
    half = len(cos) // 2
    for i in range(half):
        first, second = x[i], x[i + half]
        y[i] = first * cos[i] - second * sin[i]
        y[i + half] = second * cos[i + half] + first * sin[i + half]
    for i in range(2 * half, len(x)):
        y[i] = x[i]


@kernel(parallel=True)
def attend_many(qkv, cos, sin, keys, values, n_head, band, panels, y, counter):
    """Write the keys and values of new tokens into the last columns, and attend; whichever thread
    is free takes the next task.

    qkv [n_batch, n_seq, (n_head+2*n_kv_head)*d_head], cos and sin [n_batch, n_seq, d_rope], keys
    and values [n_ctx, n_batch, n_kv_head, d_head], the first n_ctx - n_seq filled; a query sees the
    keys at distances band[0] <= i - j < band[1]; panels [n_thread, PANELS, d_head, columns] are
    room for queries; y [n_batch, n_seq, n_head*d_head].
    """
    n_ctx, n_batch, n_kv_head = keys.shape[:3]
    n_seq, group, columns = qkv.shape[1], n_head // n_kv_head, panels.shape[3]
    for at in prange(n_batch * n_seq):
        b, n = at // n_seq, at % n_seq
        append(
            qkv[b, n],
            cos[b, n],
            sin[b, n],
            n_head,
            keys[n_ctx - n_seq + n, b],
            values[n_ctx - n_seq + n, b],
        )
    size = PANELS * columns
    n_part = (group * n_seq + size - 1) // size
    for thread in prange(len(panels)):
        task = take(counter)
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
                panels[thread],
                y[b],
            )
            task = take(counter)


@kernel(nogil=True)
def append(token, cos, sin, n_head, keys, values):
    """Write the keys of one token, rotated, and its values, [n_kv_head, d_head]."""
    n_kv_head, d_head = keys.shape
    for h in range(n_kv_head):
        start = (n_head + h) * d_head
        rotate(token[start : start + d_head], cos, sin, keys[h])
        start += n_kv_head * d_head
        values[h] = token[start : start + d_head]


@kernel(nogil=True)
def attend_part(qkv, cos, sin, keys, values, group, h, start, stop, band, q, y):
    """One task: columns start ... stop - 1, of which column c is token c // group with head c %
    group of the group.
    """
    n_ctx, d_head = keys.shape
    columns, n_past = q.shape[2], n_ctx - len(qkv)
    n_panel = (stop - start + columns - 1) // columns
    pack_queries(qkv, cos, sin, group, h, start, stop, q)
    sums, largest = (
        np.zeros((n_panel, columns), np.float32),
        np.full((n_panel, columns), -np.inf, np.float32),
    )
    weighted, scores = (
        np.zeros((n_panel, d_head, columns), np.float32),
        np.empty((KEYS, columns), np.float32),
    )
    first = max(0, n_past + start // group - band[1] + 1)
    last = min(n_ctx, n_past + (stop - 1) // group - band[0] + 1)
    for j in range(first, last, KEYS):
        for p in range(n_panel):
            seen = (
                n_past + (start + (p + 1) * columns - 1) // group - band[0] + 1 - j
            )  # by the last query of the panel
            n_key = min(KEYS, last - j, (seen + TALL - 1) // TALL * TALL)
            if n_key <= 0:
                continue
            at, step = p * d_head * columns, keys.strides[0] // 4
            multiply(memory(keys), j * step, step, 1, n_key, q, at, d_head, scores, 0, False, at)
            hide(scores, n_key, start + p * columns, group, n_past - j, band)
            fold(scores, n_key, largest[p], sums[p], weighted[p])
            step = values.strides[0] // 4
            multiply(
                memory(values), j * step, 1, step, d_head, scores, 0, n_key, weighted, at, True, 0
            )
    for c in range(start, stop):
        p, k = (c - start) // columns, (c - start) % columns
        to = (h * group + c % group) * d_head
        for i in range(d_head):
            y[c // group, to + i] = (
                weighted[p, i, k] / sums[p, k] if sums[p, k] != 0 else np.float32(0)
            )


@kernel(nogil=True)
def pack_queries(qkv, cos, sin, group, h, start, stop, q):
    """Rotate queries, scale them by 1 / sqrt(d_head), and write them into panels; columns without a
    query are 0.
    """
    d_head, columns = q.shape[1:]
    row, scale = np.empty(d_head, np.float32), np.float32(1 / np.sqrt(d_head))
    q[(stop - start) // columns :] = 0
    for c in range(start, stop):
        n, at = c // group, (h * group + c % group) * d_head
        rotate(qkv[n, at : at + d_head], cos[n], sin[n], row)
        for i in range(d_head):
            q[(c - start) // columns, i, (c - start) % columns] = scale * row[i]


@kernel(nogil=True)
def hide(scores, n_key, start, group, shift, band):
    """Set the scores of pairs outside the band to -inf; column c is token (start + c) // group,
    whose slot - j is `shift` more.
    """
    columns = scores.shape[1]
    for c in range(columns):
        distance = (start + c) // group + shift  # to the first key of the block
        for k in range(min(n_key, distance - band[1] + 1)):
            scores[k, c] = -np.inf
        for k in range(max(0, distance - band[0] + 1), n_key):
            scores[k, c] = -np.inf


@kernel(nogil=True)
def fold(scores, n_key, largest, sums, weighted):
    """Turn a block of scores into exp(s - maximum), and bring maximum, sum and weighted sum of
    every column up to date.
    """
    columns, one, zero = scores.shape[1], splat(np.float32(1)), splat(np.float32(0))
    shift, decay = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for c in range(0, columns, LANES):
        top = load(largest, c)
        for k in range(n_key):
            top = maximum(top, load(scores, k * columns + c))
        store(shift, 0, top)
        for i in range(LANES):
            new = shift[i]
            if new == -np.inf:  # nothing is seen yet: any finite number will do
                shift[i] = 0
            decay[i], shift[i], largest[c + i] = np.exp(largest[c + i] - shift[i]), -shift[i], new
        minus, part = load(shift, 0), zero
        for k in range(n_key):
            e = exp(fma(one, load(scores, k * columns + c), minus))
            store(scores, k * columns + c, e)
            part = fma(one, e, part)
        store(sums, c, fma(load(sums, c), load(decay, 0), part))
        for i in range(len(weighted)):
            store(
                weighted,
                i * columns + c,
                fma(load(weighted, i * columns + c), load(decay, 0), zero),
            )


# -------------------------------------------------------------------------------------- many queries, any mask: parts of `tiled`


@kernel(nogil=True)
def rotate_all(x, cos, sin, y, turned):
    """Write one head of many tokens [n_seq, d_head] into y, rotated where `turned`."""
    for n in range(len(x)):
        y[n] = x[n]
        if turned:
            rotate(y[n], cos[n], sin[n], y[n])


@kernel(nogil=True)
def fold_scores(s, m, sums, a):
    """Turn a tile of scores into exp(s - m), and bring maximum m, sum and weighted sum a up to
    date, all in place.
    """
    for k in range(len(s)):
        largest = m[k, 0]
        for x in s[k]:
            largest = max(largest, x)
        if largest == -np.inf:  # nothing is seen: exp(-inf - 0) is 0
            s[k] = 0
            continue
        decay = np.exp(m[k, 0] - largest)
        m[k, 0] = largest
        sums[k, 0] = sums[k, 0] * decay + exponentials(s[k], largest)
        if decay != 1:
            a[k] *= decay


# ------------------------------------------------------------------------------------------------- one query of each sequence


@kernel(parallel=True)
def attend_step(qkv, cos, sin, keys, values, seen, n_head, y):
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
        append(qkv[b, 0], cos[row], sin[row], n_head, keys[n_ctx - 1, b], values[n_ctx - 1, b])
    for at in prange(n_batch * n_head):
        b, h = at // n_head, at % n_head
        q, row = np.empty(d_head, np.float32), b if len(cos) > 1 else 0
        rotate(qkv[b, 0, h * d_head : (h + 1) * d_head], cos[row], sin[row], q)
        p = weights_of(q, keys[:, b, h // group], seen, b)
        weighted_sum(p, values[:, b, h // group], y[b, 0, h * d_head : (h + 1) * d_head])


@kernel()
def weights_of(q, keys, seen, b):
    """softmax(scale * keys @ q) over the keys that are seen; zeros where none is."""
    n_ctx, d = keys.shape
    kept, stride, whole, scale = (
        memory(keys),
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
        score = total(s)
        for i in range(whole, d):
            score += q[i] * keys[j, i]
        p[j] = score * scale
        largest = max(largest, p[j])
    if largest == -np.inf:  # nothing is seen
        largest = np.float32(0)
    exponentials(p, largest)
    return p


@kernel(nogil=True)
def exponentials(p, largest):
    """Compute p = exp(p - largest) in place; returns the sum."""
    n = len(p)
    whole, minus, sums = n // LANES * LANES, splat(-largest), splat(np.float32(0))
    one = splat(np.float32(1))
    for j in range(0, whole, LANES):
        e = exp(fma(one, load(p, j), minus))
        store(p, j, e)
        sums = fma(one, e, sums)
    denominator = total(sums)
    for j in range(whole, n):
        p[j] = np.exp(p[j] - largest)
        denominator += p[j]
    return denominator


@kernel()
def weighted_sum(p, values, y):
    """Compute y = sum_j p[j] * values[j] / sum_j p[j]; zeros where the sum is."""
    n_ctx, d = values.shape
    kept, stride, whole = memory(values), values.strides[0] // 4, d // LANES * LANES
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
