"""Attention of many queries and of one, and the rotation that comes before, which writes into the cache."""

from math import prod
from typing import Any

import numpy as np

from npllm.arrays import array_namespace
from npllm.kernels.cuda import launching
from npllm.kernels.cuda.launching import aligned, entry, pointer, steps
from npllm.kernels.cuda.rows import MOST
from npllm.ops import blockwise
from npllm.ops.attention import check_attention
from npllm.ops.fusions import compose_rope_attention
from npllm.ops.linear import merge_heads
from npllm.ops.mask.rule import FAR

__all__ = ["GROUPS", "HEADS", "WIDEST", "attention", "rope_attention"]

Array = Any

HEADS = (64, 96, 128)  # widths for many queries; for one, every multiple of 32 up to WIDEST
WIDEST = 256
QUERIES, THREADS = 16, 128  # WARPS * ROWS and WARPS * 32 of attention.cu
SPLIT, ONE_THREADS, MERGE_THREADS = 128, 128, 256  # of attend_one.cu and attend_merge.cu
GROUPS = (1, 4)  # query heads of a block of attend_one.cu; a larger group takes several blocks


def attention(q: Array, k: Array, v: Array, *, mask: Any = None, bias: Array | None = None, scale: float | None = None,
              softcap: float | None = None, q_slots: Any = None, k_slots: Any = None, return_lse: bool = False) -> Any:
    """Attend block by block: the twin of `npllm.ops.attention`, for heads of 64, 96 or 128 channels; for one query up to 256.

    Masks that are a band of distances (causal, sliding window), behind padding on the left or not, are evaluated in the kernel.
    Other rules, tables, biases, softcap and `return_lse` go to the blockwise definition.  A key that is not visible counts for
    nothing, whatever it holds; the definition, which multiplies its value by 0, gives NaN where that is infinite or NaN.
    """
    options = {"mask": mask, "bias": bias, "scale": scale, "softcap": softcap, "return_lse": return_lse}
    band = (-FAR, FAR, None) if mask is None else getattr(mask, "left_band", None)
    plain = bias is None and softcap is None and not return_lse and band is not None
    if not (plain and _fits(q, k, v) and _start_fits(band[2], q)):
        return blockwise.attention(q, k, v, q_slots=q_slots, k_slots=k_slots, **options)
    xp = array_namespace(q, k, v)
    q_range, k_range = check_attention(xp, q, k, v, None, None, q_slots, k_slots)
    if not all(isinstance(slots, range) and slots.step == 1 for slots in (q_range, k_range)):
        return blockwise.attention(q, k, v, q_slots=q_slots, k_slots=k_slots, **options)
    run = _attend_one if q.shape[-2] == 1 else _attend_many
    return run(xp, q, k, v, q_range.start, k_range.start, band, q.shape[-1] ** -0.5 if scale is None else scale)


def rope_attention(qkv: Array, cos: Array, sin: Array, n_head: int, n_kv_head: int, *, mask: Any = None, cache: Any = None,
                   layer: int = 0) -> Array:
    """Cut into heads, rotate, append to the cache, attend: the twin of `npllm.ops.rope_attention`.

    Everything before the attention is one kernel, which writes keys and values straight into the cache.
    """
    fits = entry(qkv) == entry(cos) == entry(sin) == "float" and qkv.ndim == 3 and 0 < qkv.size < MOST and cos.shape == sin.shape
    if not (fits and _tables_fit(qkv, cos, n_head + 2 * n_kv_head)):
        return compose_rope_attention(blockwise.replace(attention=attention), qkv, cos, sin, n_head, n_kv_head, mask=mask, cache=cache,
                                      layer=layer)
    xp = array_namespace(qkv, cos, sin)
    n_batch, n_seq, width = qkv.shape
    d_head = width // (n_head + 2 * n_kv_head)
    q = xp.empty((n_batch, n_head, n_seq, d_head), dtype=xp.float32)
    slots = {}
    if cache is None:
        k, v = (xp.empty((n_batch, n_kv_head, n_seq, d_head), dtype=xp.float32) for _ in range(2))
    else:
        like = q[:, :n_kv_head]  # of the shape, dtype and library of new keys and values
        k, v, k_slots = cache.extend(layer, like, like)
        slots = {"q_slots": range(k_slots.stop - n_seq, k_slots.stop), "k_slots": k_slots}
    _rope_append(xp, qkv, cos, sin, q, k[..., -n_seq:, :], v[..., -n_seq:, :])
    return merge_heads(attention(q, k, v, mask=mask, **slots))


def _attend_many(xp: Any, q: Array, k: Array, v: Array, q_slot: int, k_slot: int, band: tuple, scale: float) -> Array:
    """Launch attention.cu.  `q_slot`, `k_slot`: where the first query and the first key stand."""
    k, v = _whole_rows(k, xp), _whole_rows(v, xp)
    *lead, n_head, n_seq, d_head = q.shape
    q, y = xp.ascontiguousarray(q), _heads_side_by_side(xp, q)
    n_tiles, (low, high, start) = -(-n_seq // QUERIES), band
    sizes = (n_tiles, n_head, k.shape[-3], n_seq, k.shape[-2], *_steps(k), *_steps(v), *_steps(y), q_slot, k_slot, low, high)
    launching.launch("attention", (("ENTRY", entry(k)), ("HEAD", d_head)), n_tiles * n_head * prod(lead), THREADS, q, k, v,
                     pointer(start), y, *map(np.int64, sizes), np.float32(scale))
    return y


def _attend_one(xp: Any, q: Array, k: Array, v: Array, q_slot: int, k_slot: int, band: tuple, scale: float) -> Array:
    """Launch attend_one.cu, and attend_merge.cu where there is more than one split."""
    k, v, q = _packed_rows(k, xp), _packed_rows(v, xp), xp.ascontiguousarray(q)
    *lead, n_head, _, d_head = q.shape
    n_kv_head, n_ctx, n_batch, (low, high, start) = k.shape[-3], k.shape[-2], prod(lead), band
    n_seen = min(n_ctx, q_slot - low + 1 - k_slot) - max(0, q_slot - high + 1 - k_slot)
    n_split, group = max(1, -(-n_seen // SPLIT)), GROUPS[n_head > n_kv_head]
    n_blocks = n_batch * n_kv_head * -(-n_head // n_kv_head // group) * n_split
    y = xp.empty(q.shape, dtype=xp.float32)
    parts = xp.empty((n_batch * n_head * n_split * (d_head + 2),), dtype=xp.float32) if n_split > 1 else None
    sizes = (n_batch, n_head, n_kv_head, n_ctx, n_split, *_steps(k), *_steps(v), q_slot, k_slot, low, high)
    launching.launch("attend_one", (("ENTRY", entry(k)), ("GROUP", group), ("HEAD", d_head)), n_blocks, ONE_THREADS, q, k, v,
                     pointer(start), y, pointer(parts), *map(np.int64, sizes), np.float32(scale))
    if parts is not None:
        launching.launch("attend_merge", (("HEAD", d_head),), n_batch * n_head, MERGE_THREADS, parts, y,
                         np.int64(n_batch * n_head), np.int64(n_split))
    return y


def _rope_append(xp: Any, qkv: Array, cos: Array, sin: Array, q: Array, k: Array, v: Array) -> None:
    """Launch the kernel that fills q, k and v."""
    qkv, cos, sin = (xp.ascontiguousarray(x) for x in (qkv, cos, sin))
    n_batch, n_head, n_seq, d_head = q.shape
    d_rope = cos.shape[-1]
    table_batch = n_seq * d_rope if cos.ndim == 3 and cos.shape[0] == n_batch > 1 else 0
    sizes = qkv.size, n_seq, n_head, k.shape[1], d_head, d_rope
    launching.launch("rope_append", (), -(-qkv.size // 256), 256, qkv, cos, sin, q, k, v,
                     *map(np.uint32, sizes), *map(np.int64, (table_batch, *_steps(k), *_steps(v))))


def _fits(q: Array, k: Array, v: Array) -> bool:
    """Tell whether a kernel takes these: float32 queries, and keys and values of one shape and type."""
    if entry(q) != "float" or entry(k) is None or k.dtype != v.dtype or k.shape != v.shape or not (q.ndim in (3, 4) and q.size):
        return False
    n_seq, d_head = q.shape[-2:]
    return d_head in HEADS or (n_seq == 1 and d_head % 32 == 0 and d_head <= WIDEST)


def _start_fits(start: Array | None, q: Array) -> bool:
    """Tell whether there is no padding, or a first slot for each row of the batch."""
    return start is None or (q.ndim == 4 and start.shape == q.shape[:1] and start.dtype == np.int64)


def _tables_fit(qkv: Array, cos: Array, n_heads: int) -> bool:
    """Tell whether the tables are [n_seq, d_rope] or [n_batch, n_seq, d_rope], of an even width that a head has room for."""
    d_head, d_rope = qkv.shape[-1] // n_heads, cos.shape[-1]
    return (qkv.shape[-1] % n_heads == 0 and cos.ndim in (2, 3) and cos.shape[-2] == qkv.shape[-2] and d_rope % 2 == 0
            and 0 < d_rope <= d_head and (cos.ndim == 2 or cos.shape[0] in (1, qkv.shape[0])))


def _heads_side_by_side(xp: Any, q: Array) -> Array:
    """Return a new array of the shape of `q` [..., n_head, n_seq, d_head], laid out so that `merge_heads` is a view."""
    *lead, n_head, n_seq, d_head = q.shape
    y = xp.empty((*lead, n_seq, n_head, d_head), dtype=xp.float32)
    n = len(lead)
    return xp.permute_dims(y, (*range(n), n + 1, n, n + 2))


def _whole_rows(x: Array, xp: Any) -> Array:
    """Return `x` [..., n_ctx, d_head] where each of its rows is in one piece, else a copy."""
    return x if steps(x)[-1] == 1 else xp.ascontiguousarray(x)


def _packed_rows(x: Array, xp: Any) -> Array:
    """Return `x` where each of its rows is in one piece that begins at a multiple of 16 bytes, else a copy."""
    *lead, last = x.strides
    fits = last == x.dtype.itemsize and x.data.ptr % launching.ALIGNMENT == 0
    return x if fits and all(stride % launching.ALIGNMENT == 0 for stride in lead) else aligned(x, xp)


def _steps(x: Array) -> tuple[int, ...]:
    """Return the steps of `x` [n_head, n, d_head] or [n_batch, n_head, n, d_head] by batch, head and row, in entries."""
    return (0, *steps(x))[-4:-1]
