"""Between the first projection and attention: heads, rotation, and the append to the cache."""

from typing import Any

import numpy as np

from npllm.arrays import array_namespace
from npllm.kernels.cuda import launching
from npllm.kernels.cuda.attention import attention_in_parts, head_steps
from npllm.kernels.cuda.gemm import PARTS
from npllm.kernels.cuda.launching import entry, pointer
from npllm.kernels.cuda.rows import MOST
from npllm.ops import Step, merge_heads

__all__ = ["launch_rope", "rope_attention"]

Array = Any

THREADS = 256
MANY, MOST_EACH = 64, 4  # rows from which on a thread has so many entries


def rope_attention(qkv: Array, step: Step, n_parts: int = PARTS) -> Array:
    """Cut into heads, rotate, append to the cache, and attend.

    Everything before the attention is one kernel, which writes keys and values into the cache, and
    rounds them to its dtype.  n_parts: see `attention_in_parts`.
    """
    cos, sin, n_head, n_kv_head = step[:4]
    fits = entry(qkv) == entry(cos) == entry(sin) == "float" and cos.shape == sin.shape
    fits = fits and qkv.ndim == 3 and 0 < qkv.size < MOST
    if not (fits and _tables_fit(qkv, cos, n_head + 2 * n_kv_head)):
        return NotImplemented
    xp = array_namespace(qkv, cos, sin)
    n_batch, n_seq, width = qkv.shape
    d_head = width // (n_head + 2 * n_kv_head)
    q = xp.empty((n_batch, n_head, n_seq, d_head), dtype=xp.float32)
    slots = {}
    if step.cache is None:
        k, v = (xp.empty((n_batch, n_kv_head, n_seq, d_head), dtype=xp.float32) for _ in range(2))
    else:
        like = q[:, :n_kv_head]  # of the shape, dtype and library of new keys and values
        k, v, k_slots = step.cache.reserve_slots(step.layer, like, like)
        if entry(k) is None or entry(k) != entry(v):
            return NotImplemented
        slots = {"q_slots": range(k_slots.stop - n_seq, k_slots.stop), "k_slots": k_slots}
    _rope_append(xp, qkv, cos, sin, q, k[..., -n_seq:, :], v[..., -n_seq:, :])
    return merge_heads(attention_in_parts(n_parts, q, k, v, mask=step.mask, **slots))


def _rope_append(xp: Any, qkv: Array, cos: Array, sin: Array, q: Array, k: Array, v: Array) -> None:
    """Launch the kernel that fills q, k and v."""
    qkv, cos, sin = (xp.ascontiguousarray(x) for x in (qkv, cos, sin))
    launch_rope(qkv, cos, sin, q, k, v)


def launch_rope(
    qkv: Array,
    cos: Array,
    sin: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    slots: Array | None = None,
    table_rows: Array | None = None,
    k_slot: int = 0,
) -> None:
    """Launch rope_append.cu, which writes q, k and v; nothing is allocated.

    Parameters
    ----------
    qkv : float32 array [n_batch, n_seq, (n_head + 2*n_kv_head)*d_head]
        Contiguous.
    cos, sin : float32 array [n_seq, d_rope] or [n_batch, n_seq, d_rope]
        Contiguous; with `slots` [n, d_rope].
    q : float32 array [n_batch, n_head, n_seq, d_head]
        Contiguous.
    k, v : array [n_batch, n_kv_head, n_seq, d_head]
        float32, bfloat16 or float16, both alike.  With `slots` all columns of the cache, from slot
        `k_slot` on.
    slots, table_rows : int64 array [n_batch], optional
        Device memory: the slot of each row's one token, and its row of the tables.
    k_slot : int
    """
    n_batch, n_head, n_seq, d_head = q.shape
    d_rope = cos.shape[-1]
    table_batch = n_seq * d_rope if cos.ndim == 3 and cos.shape[0] == n_batch > 1 else 0
    width, n_rows = qkv.shape[-1], n_batch * n_seq
    n_each = 1 if n_rows < MANY else MOST_EACH  # entries of a thread
    sizes = n_each, n_seq, n_head, k.shape[1], d_head, d_rope
    launching.launch(
        "rope_append",
        (("ENTRY", entry(k)),),
        n_rows * -(-width // (n_each * THREADS)),
        THREADS,
        qkv,
        cos,
        sin,
        q,
        k,
        v,
        *map(pointer, (slots, table_rows)),
        np.int64(k_slot),
        *map(np.uint32, sizes),
        *map(np.int64, (table_batch, *head_steps(k), *head_steps(v))),
    )


def _tables_fit(qkv: Array, cos: Array, n_heads: int) -> bool:
    """Tell whether the tables are [n_seq, d_rope] or [n_batch, n_seq, d_rope], and fit a head."""
    d_head, d_rope = qkv.shape[-1] // n_heads, cos.shape[-1]
    even = qkv.shape[-1] % n_heads == 0 and d_rope % 2 == 0 and 0 < d_rope <= d_head
    shape = (qkv.shape[-2], d_rope)
    return even and cos.shape in (shape, (1, *shape), (qkv.shape[0], *shape))
