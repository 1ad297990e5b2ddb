"""Attention of many queries, and of one."""

from math import prod
from typing import Any, NamedTuple

import numpy as np

from npllm.arrays import array_namespace
from npllm.kernels.cuda import launching
from npllm.kernels.cuda.gemm import PARTS
from npllm.kernels.cuda.launching import aligned, entry, pointer, steps
from npllm.ops import blockwise
from npllm.ops.mask.rule import FAR

__all__ = [
    "GROUPS",
    "HEADS",
    "WIDEST",
    "Place",
    "attention",
    "attention_in_parts",
    "count_splits",
    "head_steps",
    "launch_attend",
    "parts_shape",
]

Array = Any

HEADS = (64, 96, 128)  # widths for many queries; for one, every multiple of 32 up to WIDEST
WIDEST = 256
QUERIES, THREADS = 16, 128  # WARPS * ROWS and WARPS * 32 of attention.cu
MMA_QUERIES, MMA_THREADS = 128, 256  # the same of attention_mma.cu
SPLIT, ONE_THREADS, MERGE_THREADS = 128, 128, 256  # of attend_one.cu and attend_merge.cu
GROUPS = (1, 4)  # query heads of a block of attend_one.cu; a larger group takes several blocks


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Any = None,
    bias: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    q_slots: Any = None,
    k_slots: Any = None,
    return_lse: bool = False,
) -> Any:
    """Attend block by block: the twin of `npllm.ops.attention`, with all bits of float32."""
    options = {"scale": scale, "softcap": softcap, "q_slots": q_slots, "k_slots": k_slots}
    return attention_in_parts(
        PARTS, q, k, v, mask=mask, bias=bias, return_lse=return_lse, **options
    )


def attention_in_parts(
    n_parts: int,
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Any = None,
    bias: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    q_slots: Any = None,
    k_slots: Any = None,
    return_lse: bool = False,
) -> Any:
    """Attend block by block, many queries on the tensor cores where the device has them.

    n_parts = 3: in three bfloat16 parts of each number, as near as float32.  n_parts = 1: queries,
    keys, values and weights are rounded to bfloat16; one query is not.

    Heads have 64, 96 or 128 channels; for one query any multiple of 32 up to 256.  Masks that are a
    band of distances (causal, sliding window), behind padding on the left or not, are evaluated in
    the kernel.  Other rules, tables, biases, softcap and `return_lse` go to the definition.

    A key that is not visible counts for nothing, whatever it holds.  The definition multiplies its
    value by 0, and gives NaN where that is infinite or NaN.
    """
    band: Any = (-FAR, FAR, None) if mask is None else getattr(mask, "left_band", None)
    plain = bias is None and softcap is None and not return_lse and band is not None
    if plain and _fits(q, k, v) and _start_fits(band[2], q):
        n_seq, n_ctx = q.shape[-2], k.shape[-2]
        q_slot, k_slot = _first_slot(q_slots, n_seq, n_ctx - n_seq), _first_slot(k_slots, n_ctx, 0)
        if q_slot is not None and k_slot is not None:
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            place = Place(band[0], band[1], q_slot, k_slot)
            if n_seq == 1:
                return _attend_one(q, k, v, place, band[2], scale)
            return _attend_many(q, k, v, place, band[2], scale, n_parts)
    return blockwise.attention(
        q,
        k,
        v,
        mask=mask,
        bias=bias,
        scale=scale,
        softcap=softcap,
        q_slots=q_slots,
        k_slots=k_slots,
        return_lse=return_lse,
    )


def _attend_many(
    q: Array, k: Array, v: Array, place: "Place", start: Array | None, scale: float, n_parts: int
) -> Array:
    """Launch attention_mma.cu where the device has tensor cores, and attention.cu for what that
    leaves: without them everything, else queries with numbers that are not finite.
    """
    xp = array_namespace(q, k, v)
    q, y, failed = xp.ascontiguousarray(q), _heads_side_by_side(xp, q), None
    n_heads, n_seq, d_head = prod(q.shape[:-2]), q.shape[-2], q.shape[-1]
    if launching.has_tensor_cores():
        k, v = _packed_rows(k, xp), _packed_rows(v, xp)
        failed = xp.empty(n_heads * -(-n_seq // QUERIES), dtype=xp.int32)
    else:
        k, v = _whole_rows(k, xp), _whole_rows(v, xp)
    variant = (("ENTRY", entry(k)), ("HEAD", d_head))
    sizes = (
        *(q.shape[-3], k.shape[-3], n_seq, k.shape[-2]),
        *(*head_steps(k), *head_steps(v), *head_steps(y)),
        *(place.q_slot, place.k_slot, place.low, place.high),
    )

    def run(kernel: str, variant: tuple, n_queries: int, n_threads: int) -> None:
        n_tiles = -(-n_seq // n_queries)
        numbers = *map(np.int64, (n_tiles, *sizes)), np.float32(scale)
        launching.launch(
            kernel,
            variant,
            n_tiles * n_heads,
            n_threads,
            q,
            k,
            v,
            pointer(start),
            pointer(failed),
            y,
            *numbers,
        )

    if failed is not None:
        run("attention_mma", (*variant, ("PARTS", n_parts)), MMA_QUERIES, MMA_THREADS)
    run("attention", variant, QUERIES, THREADS)
    return y


def _attend_one(
    q: Array, k: Array, v: Array, place: "Place", start: Array | None, scale: float
) -> Array:
    """Launch attend_one.cu, and attend_merge.cu where there is more than one split."""
    xp = array_namespace(q, k, v)
    k, v, q = _packed_rows(k, xp), _packed_rows(v, xp), xp.ascontiguousarray(q)
    low, high, q_slot, k_slot = place
    n_seen = min(k.shape[-2], q_slot - low + 1 - k_slot) - max(0, q_slot - high + 1 - k_slot)
    y, n_split = xp.empty(q.shape, dtype=xp.float32), count_splits(n_seen)
    parts = None if n_split == 1 else xp.empty(parts_shape(q, n_split), dtype=xp.float32)
    launch_attend(q, k, v, y, parts, place, scale=scale, n_split=n_split, start=start)
    return y


class Place(NamedTuple):
    """Which keys the one query of each row sees: low <= q_slot - slot of the key < high."""

    low: int
    high: int
    q_slot: int  # of the query; not used where slots are read from device memory
    k_slot: int  # of the first key


def count_splits(n_seen: int) -> int:
    """Return into how many splits n_seen keys are cut."""
    return max(1, -(-n_seen // SPLIT))


def parts_shape(q: Array, n_split: int) -> tuple[int]:
    """Shape of what the splits leave for the merge: sums, maxima and weights of every head."""
    d_head = q.shape[-1]
    return (q.size // d_head * n_split * (d_head + 2),)


def launch_attend(
    q: Array,
    k: Array,
    v: Array,
    y: Array,
    parts: Array | None,
    place: Place,
    *,
    scale: float,
    n_split: int,
    start: Array | None = None,
    slots: Array | None = None,
) -> None:
    """Launch attend_one.cu and attend_merge.cu, which write y; nothing is allocated.

    Parameters
    ----------
    q, y : float32 array [..., n_head, 1, d_head]
        Contiguous.
    k, v : array [..., n_kv_head, n_ctx, d_head]
        Rows in one piece at multiples of 16 bytes.
    parts : float32 array of `parts_shape`, or None
        None: one split.
    place : Place
    scale : float
    n_split : int
    start : int64 array [n_batch], optional
        Device memory: the first slot that a row sees.
    slots : int64 array [n_batch], optional
        Device memory: the slot of each row's query, which is the last key.
    """
    *lead, n_head, _, d_head = q.shape
    n_kv_head, n_ctx, n_batch = k.shape[-3], k.shape[-2], prod(lead)
    group, n_rows = GROUPS[n_head > n_kv_head], n_batch * n_head
    n_blocks = n_batch * n_kv_head * -(-n_head // n_kv_head // group)
    sizes = (n_batch, n_head, n_kv_head, n_ctx, n_split, *head_steps(k), *head_steps(v))
    band = (place.q_slot, place.k_slot, place.low, place.high)
    launching.launch(
        "attend_one",
        (("ENTRY", entry(k)), ("GROUP", group), ("HEAD", d_head)),
        n_blocks * n_split,
        ONE_THREADS,
        q,
        k,
        v,
        *map(pointer, (start, slots)),
        y,
        pointer(parts),
        *map(np.int64, (*sizes, *band)),
        np.float32(scale),
    )
    if parts is not None:
        launching.launch(
            "attend_merge",
            (("HEAD", d_head),),
            n_rows,
            MERGE_THREADS,
            parts,
            y,
            *map(np.int64, (n_rows, n_split)),
        )


def _fits(q: Array, k: Array, v: Array) -> bool:
    """Tell whether a kernel takes these: float32 queries, keys and values that are alike."""
    if entry(q) != "float" or entry(k) is None or q.ndim != k.ndim or not q.size:
        return False
    *lead, n_head, n_seq, d_head = q.shape
    *k_lead, n_kv_head, n_ctx, width = k.shape
    known = d_head in HEADS or (n_seq == 1 and d_head % 32 == 0 and d_head <= WIDEST)
    alike = k.dtype == v.dtype and k.shape == v.shape and d_head == width and lead == k_lead
    return known and alike and len(lead) < 2 and n_ctx > 0 < n_kv_head and n_head % n_kv_head == 0


def _first_slot(slots: Any, n: int, first: int) -> int | None:
    """Return where n slots in a row begin, `first` by default; None for other slots."""
    if slots is None:
        return first
    return slots.start if isinstance(slots, range) and slots.step == 1 and len(slots) == n else None


def _start_fits(start: Array | None, q: Array) -> bool:
    """Tell whether there is no padding, or a first slot for each row of the batch."""
    return start is None or (q.ndim == 4 and start.shape == q.shape[:1] and start.dtype == np.int64)


def _heads_side_by_side(xp: Any, q: Array) -> Array:
    """Return an array of the shape of `q`, laid out so that `merge_heads` of it is a view."""
    *lead, n_head, n_seq, d_head = q.shape
    y = xp.empty((*lead, n_seq, n_head, d_head), dtype=xp.float32)
    n = len(lead)
    return xp.permute_dims(y, (*range(n), n + 1, n, n + 2))


def _whole_rows(x: Array, xp: Any) -> Array:
    """Return `x` [..., n_ctx, d_head] where each of its rows is in one piece, else a copy."""
    return x if steps(x)[-1] == 1 else xp.ascontiguousarray(x)


def _packed_rows(x: Array, xp: Any) -> Array:
    """Return `x` where each row is in one piece at a multiple of 16 bytes, else a copy."""
    *lead, last = x.strides
    fits = last == x.dtype.itemsize and x.data.ptr % launching.ALIGNMENT == 0
    if fits and all(stride % launching.ALIGNMENT == 0 for stride in lead):
        return x
    return aligned(x, xp)


def head_steps(x: Array) -> tuple[int, ...]:
    """Return the steps of `x` [..., n_head, n, d_head] by batch, head and row, in entries."""
    return (0, *steps(x))[-4:-1]
