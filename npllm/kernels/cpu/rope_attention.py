"""Rotation, append and attention in the compiled set: which kernel a call takes.

A few tokens with a cache take one kernel, which writes into the cache itself.  Many tokens take one
kernel where the mask is a band of distances, else the blocks of the tiled set.
"""

import math
from typing import Any

import numpy as np

from npllm import ops
from npllm.arrays import round_to
from npllm.kernels import FEW_ROWS
from npllm.kernels.cpu import gemm
from npllm.kernels.cpu.attention import PANELS, attend_many
from npllm.kernels.cpu.attention_step import attend_rows, attend_step
from npllm.kernels.cpu.fits import is_float32
from npllm.kernels.cpu.launching import launch, n_workers
from npllm.kernels.cpu.layout import row_major, row_major_copy
from npllm.kernels.cpu.rotation import rotate_all
from npllm.kernels.cpu.softmax import softmax_update
from npllm.kernels.cpu.tiled_attention import attend, no_bound
from npllm.ops import Step
from npllm.ops.attention import evaluate_mask
from npllm.ops.mask.rule import ALL, FAR
from npllm.threads import run_blocks, scratch

__all__ = [
    "attend_band",
    "attend_by_blocks",
    "decode_inputs",
    "fits_rope",
    "rope_attention",
    "rope_attention_many",
    "slots_first",
]

Array = Any


def rope_attention(qkv: Array, step: Step) -> Any:
    """Compute rotation, append and attention; a few tokens take one kernel, which writes into the
    cache itself.
    """
    if hasattr(step.cache, "drafts"):
        return rows_attention(qkv, step)
    cos, sin, n_head, n_kv_head = step[:4]
    if not (is_float32(qkv) and fits_rope(qkv.shape, cos, sin, n_head, n_kv_head)):
        return NotImplemented
    n_batch, n_seq, d_qkv = qkv.shape
    if n_batch * n_seq > FEW_ROWS or step.cache is None:
        return rope_attention_many(qkv, step)
    d_head = d_qkv // (n_head + 2 * n_kv_head)
    tokens = decode_inputs(step, n_batch, n_seq, d_head)
    if tokens is None:
        return NotImplemented
    y = np.empty((n_batch, n_seq, n_head * d_head), np.float32)
    launch(attend_step, row_major_copy(qkv), *tokens, n_head, y)
    return y


rope_attention.takes_rows = True  # type: ignore[attr-defined]  # npllm.models.row_caches asks


def rows_attention(qkv: Array, step: Step) -> Any:
    """Compute `rope_attention` of one token of each row, where each row has a cache of its own, in
    one kernel.
    """
    cos, sin, n_head, n_kv_head = step[:4]
    if not (is_float32(qkv) and qkv.shape[1] == 1 and fits_rope(qkv.shape, *step[:4])):
        return NotImplemented
    n_row, _, d_qkv = qkv.shape
    shape = 1, n_kv_head, 1, d_qkv // (n_head + 2 * n_kv_head)
    held = [reserve_slots(draft, step.layer, shape) for draft in step.cache.drafts]
    first = first_keys(step, [slots for *_, slots in held])
    keys, values, _ = max(held, key=lambda row: len(row[2]))
    if first is None or not all(
        fits_cache_arrays(k, v) and (k.strides[0], v.strides[0]) == (keys.strides[0],) * 2
        for k, v, _ in held
    ):
        return NotImplemented
    table = [
        (_address(k), _address(v), k.strides[2], v.strides[2], len(k), at)
        for (k, v, _), at in zip(held, first, strict=True)
    ]
    y = np.empty((n_row, 1, n_head * shape[-1]), np.float32)
    rows = (row_major(x.reshape(n_row, x.shape[-1])) for x in (qkv, cos, sin))
    launch(attend_rows, *rows, keys, values, np.array(table), NO_ROW, n_head, y[:, 0])
    return y


NO_ROW = np.zeros((0, 1, 0), bool)


def first_keys(step: Step, slots: list[range]) -> list[int] | None:
    """The first key that the newest token of each row sees, of those to the last; None where some
    between are hidden.

    It is the same in all layers that share a mask: found once a step.
    """
    known = step.cache.known
    if id(step.mask) not in known:
        found = [visible_keys(step.mask, row, 1, 1, step.n_head) for row in slots]
        plain = [
            int(x[0][0, 0, 0])
            for x, row in zip(found, slots, strict=True)
            if x is not None and not len(x[1]) and x[0][0, 0, 1] == len(row)
        ]
        known[id(step.mask)] = plain if len(plain) == len(slots) else None
    return known[id(step.mask)]


def _address(x: Array) -> int:
    return x.__array_interface__["data"][0]


def decode_inputs(step: Step, n_batch: int, n_seq: int, d_head: int) -> tuple[Array, ...] | None:
    """What attention of a few new tokens needs, as `attend_step` takes it: their rotation, keys and
    values with room for their own, and which keys they see.

    None where keys are not float32, or heads see different ones.
    """
    shape = n_batch, step.n_kv_head, n_seq, d_head
    keys, values, slots = reserve_slots(step.cache, step.layer, shape)
    visible = visible_keys(step.mask, slots, n_batch, n_seq, step.n_head)
    return (
        (table_of_tokens(step.cos), table_of_tokens(step.sin), keys, values, *visible)
        if fits_cache_arrays(keys, values) and visible is not None
        else None
    )


def table_of_tokens(x: Array) -> Array:
    """A table of a few tokens: [n_batch or 1, n_seq, d_rope]."""
    return row_major(x.reshape(-1, *x.shape[-2:]))


def reserve_slots(cache: Any, layer: int, shape: tuple[int, ...]) -> tuple[Array, Array, range]:
    """Reserve cache slots for new keys of a shape [n_batch, n_kv_head, n_seq, d_head]; return keys,
    values and slots.
    """
    k = np.empty(shape, np.float32)  # its shape is asked for
    keys, values, slots = cache.reserve_slots(layer, k, k)
    return slots_first(keys), slots_first(values), slots


def fits_cache_arrays(*arrays: Any) -> bool:
    """Tell whether cached keys and values are what the kernels are made for: float32, the channels
    of a head side by side.
    """
    for x in arrays:
        if not (x.strides[-1] == 4 and x.flags.aligned and x.flags.writeable):
            return False
    return is_float32(*arrays)


def slots_first(x: Array) -> Array:
    """A view [n_ctx, n_batch, n_kv_head, d_head] of keys or values: contiguous at no length, so
    that Numba knows one type of it.

    A single head of a single sequence is contiguous always, which is another type.
    """
    return x.transpose(2, 0, 1, 3)


def fits_rope(shape: tuple[int, ...], cos: Array, sin: Array, n_head: int, n_kv_head: int) -> bool:
    """Tell whether tables fit float32 tokens of a shape [n_batch, n_seq,
    (n_head+2*n_kv_head)*d_head].
    """
    n_all = n_head + 2 * n_kv_head
    return (
        is_float32(cos, sin)
        and len(shape) == 3
        and math.prod(shape) > 0
        and min(n_head, n_kv_head) > 0
        and shape[-1] % n_all == 0
        and n_head % n_kv_head == 0
        and cos.shape == sin.shape
        and cos.ndim in (2, 3)
        and cos.shape[-2] == shape[1]
        and cos.shape[-1] % 2 == 0
        and 0 < cos.shape[-1] <= shape[-1] // n_all
        and (cos.ndim == 2 or cos.shape[0] in (1, shape[0]))
    )


def rope_attention_many(qkv: Array, step: Step, attend: Any = None) -> Any:
    """Rotate, append and attend, many tokens, by a function like `attend_band`."""
    cos, sin, n_head, n_kv_head = step[:4]
    mask, cache = step.mask, step.cache
    n_batch, n_seq, _ = qkv.shape
    k = ops.split_qkv(qkv, n_head, n_kv_head)[1]
    if cache is None:
        keys, values, slots = (
            np.empty(k.shape, np.float32),
            np.empty(k.shape, np.float32),
            range(n_seq),
        )
    else:
        keys, values, slots = cache.reserve_slots(step.layer, k, k)
    if not fits_cache_arrays(keys, values):
        return NotImplemented
    qkv = row_major(qkv)
    cos, sin = (row_major(np.broadcast_to(x, (n_batch, *x.shape[-2:]))) for x in (cos, sin))
    attend = attend or attend_band
    return attend(qkv, cos, sin, n_head, n_kv_head, mask, keys, values, slots)


def attend_band(
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
    """One kernel where the mask is a band of distances, else the blocks of the tiled set."""
    n_batch, n_seq, _ = qkv.shape
    d_head = keys.shape[-1]
    band = (-FAR, FAR) if mask is None else getattr(mask, "band", None)
    if band is None or not gemm.panel_columns():
        return attend_by_blocks(qkv, cos, sin, n_head, n_kv_head, mask, keys, values, slots)
    y = np.empty((n_batch, n_seq, n_head * d_head), np.float32)
    panels = scratch("queries", (n_workers(), PANELS, d_head, gemm.panel_columns()), np.float32)
    launch(
        attend_many,
        qkv,
        cos,
        sin,
        slots_first(keys),
        slots_first(values),
        n_head,
        band,
        slots.start,
        panels,
        y,
        np.zeros(1, np.int64),
    )
    return y


def attend_by_blocks(
    qkv: Array,
    cos: Array,
    sin: Array,
    n_head: int,
    n_kv_head: int,
    mask: Any,
    keys: Array,
    values: Array,
    slots: range,
    is_rounded: bool = False,
) -> Array:
    """Rotate queries into an array of their own, write keys and values into the last columns, and
    attend; `is_rounded`: to all three rounded to bfloat16.
    """
    heads = ops.split_qkv(qkv, n_head, n_kv_head)
    n_batch, _, n_seq, _ = heads[0].shape
    q = np.empty(heads[0].shape, np.float32)
    parts = [
        (x[b, h], cos[b], sin[b], y[b, h, y.shape[-2] - n_seq :], y is not values)
        for x, y in zip(heads, (q, keys, values), strict=True)
        for b in range(n_batch)
        for h in range(x.shape[1])
    ]
    run_blocks(lambda part: rotate_all(*part), parts)
    operands = q, keys, values
    if is_rounded:
        operands = tuple(round_to(x, "bfloat16") for x in operands)
    q_slots = range(slots.stop - n_seq, slots.stop)
    y, _ = attend(*operands, mask, None, q_slots, slots, softmax_update)
    return ops.merge_heads(y)


def visible_keys(
    mask: Any, slots: range, n_batch: int, n_seq: int, n_head: int
) -> tuple[Array, Array] | None:
    """Which cached keys the queries in the last slots see: between which bounds, [n_batch or 1,
    n_seq, 2], and there, [n_batch or 1, n_seq, n_ctx]; no row where every one is.

    None where heads see different ones.
    """
    slot, n_ctx = slots.stop - 1, len(slots)
    if n_seq == 1:
        bound = getattr(mask, "bound", no_bound)(slot, slot, slots.start, slot)
        if mask is None or bound == ALL:
            return np.array([[[0, n_ctx]]]), np.zeros((0, 1, n_ctx), bool)
    q = np.broadcast_to(np.float32(0), (n_batch, n_head, n_seq, 1))  # its shape is asked for
    found = evaluate_mask(np, mask, q, range(slots.stop - n_seq, slots.stop), slots)
    seen = np.asarray(True if found is None else found)
    if seen.ndim > 2 and seen.shape[-3] != 1:
        return None
    seen = np.broadcast_to(seen, np.broadcast_shapes(seen.shape, (n_seq, n_ctx)))
    return bounds_of(np.array(seen.reshape(-1, n_seq, n_ctx), bool))


def bounds_of(seen: Array) -> tuple[Array, Array]:
    """The first key that each query sees and the one after the last, [..., 2], with what they leave
    open: `seen` itself, or no row of it.
    """
    n_ctx = seen.shape[-1]
    first = np.argmax(seen, axis=-1)
    stop = np.where(seen.any(-1), n_ctx - np.argmax(seen[..., ::-1], axis=-1), first)
    is_whole = np.array_equal(stop - first, np.count_nonzero(seen, axis=-1))
    return np.stack([first, stop], axis=-1), seen[:0] if is_whole else seen
