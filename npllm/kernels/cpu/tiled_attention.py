"""Blockwise attention in plain NumPy: a tile of scores in one buffer, changed in place."""

from collections.abc import Callable, Iterator
from itertools import product
from math import prod
from typing import Any

import numpy as np

from npllm import ops
from npllm.arrays import ieee_semantics
from npllm.kernels.cpu.fits import is_float32
from npllm.kernels.cpu.tiled_linear import dot_into_scratch, spans
from npllm.ops.attention import check_attention, evaluate_mask
from npllm.ops.mask.rule import ALL, NONE, SOME
from npllm.threads import run_blocks, scratch

__all__ = ["attend", "blockwise_attention", "no_bound"]

Array = Any

BLOCK_Q, BLOCK_K = 256, 512  # a tile of scores is half a MiB


def blockwise_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Any = None,
    bias: Array = None,
    scale: float | None = None,
    softcap: float | None = None,
    q_slots: Any = None,
    k_slots: Array = None,
    return_lse: bool = False,
) -> Any:
    """Compute `npllm.ops.blockwise_attention`: a tile of scores in one buffer, changed in place,
    the heads on all threads.
    """
    if not fits_attention(q, k, v, mask, bias, softcap):
        return ops.blockwise_attention(
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
    y, lse = attend(q, k, v, mask, scale, q_slots, k_slots)
    return (y, lse) if return_lse else y


def fits_attention(
    q: Array, k: Array, v: Array, mask: Any, bias: Array, softcap: float | None
) -> bool:
    """Tell whether this is attention that the kernels are made for; the definition does the others,
    and raises the errors.
    """
    return (
        bias is None
        and softcap is None
        and is_float32(q, k, v)
        and q.size > 0
        and (mask is None or callable(mask))
    )


@ieee_semantics
def attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Any,
    scale: float | None,
    q_slots: Any,
    k_slots: Any,
    update: Callable | None = None,
) -> tuple[Array, Array]:
    """Attention over blocks of queries and keys; `update` replaces `softmax_update`."""
    q_slots, k_slots = check_attention(np, q, k, v, mask, None, q_slots, k_slots)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    n_batch, n_head, n_seq, n_kv_head = prod(q.shape[:-3]), q.shape[-3], q.shape[-2], k.shape[-3]
    group = n_head // n_kv_head
    y, lse = (
        np.empty((*q.shape[:-1], v.shape[-1]), np.float32),
        np.empty((*q.shape[:-1], 1), np.float32),
    )
    lead = (n_batch, n_kv_head, group, n_seq)
    heads = [x.reshape(*lead, x.shape[-1]) for x in (q, y, lse)]
    keys, values = (x.reshape(n_batch, n_kv_head, *x.shape[-2:]) for x in (k, v))
    at_all = list(product(range(n_batch), range(n_kv_head)))
    for rows in spans(n_seq, max(1, BLOCK_Q // group)):
        seen = list(_visible(mask, q, q_slots[rows], k_slots, lead))

        def one_head(at: tuple[int, int], rows: slice = rows, seen: list = seen) -> None:
            mine = [(columns, see if see is None else see[at]) for columns, see in seen]
            q_at, y_at, lse_at = (x[at][:, rows] for x in heads)
            _attend(q_at, y_at, lse_at, keys[at], values[at], scale, mine, update or softmax_update)

        run_blocks(one_head, at_all)
    return y, lse[..., 0]


def _visible(
    mask: Any, q: Array, i: Any, k_slots: Any, lead: tuple[int, ...]
) -> Iterator[tuple[slice, Array | None]]:
    """For a block of queries: the blocks of keys that any of them sees, and which of those; None
    where all see all.
    """
    n_batch, n_kv_head, group, _ = lead
    for columns in spans(len(k_slots), BLOCK_K):
        j = k_slots[columns]
        bound = ALL if mask is None else getattr(mask, "bound", no_bound)(*_ends(i), *_ends(j))
        if bound == ALL:
            yield columns, None
        elif bound != NONE:
            see = np.asarray(evaluate_mask(np, mask, q, i, j), bool)
            if see.ndim > 2:  # it differs by sequence or by head
                see = np.broadcast_to(see, (*q.shape[:-2], len(i), len(j))).reshape(
                    n_batch, n_kv_head, group, len(i), len(j)
                )
            yield (
                columns,
                np.broadcast_to(
                    see, (n_batch, n_kv_head, see.shape[2] if see.ndim > 2 else 1, len(i), len(j))
                ),
            )


def no_bound(*_: int) -> int:
    """Bound of a mask that has none: some pairs may be visible."""
    return SOME


def _ends(slots: Any) -> tuple[int, int]:
    """Smallest and largest slot."""
    return (
        (min(slots[0], slots[-1]), max(slots[0], slots[-1]))
        if isinstance(slots, range)
        else (slots.min(), slots.max())
    )


def _attend(
    q: Array,
    y: Array,
    lse: Array,
    k: Array,
    v: Array,
    scale: float,
    seen: list[tuple[slice, Array | None]],
    update: Callable,
) -> None:
    """One key/value head, one block of queries of its group: q [group, n_rows, d_head] -> y [group,
    n_rows, d_value].
    """
    group, n_rows, d_head = q.shape
    rows = scratch("q", (group * n_rows, d_head), np.float32)
    np.multiply(q, np.float32(scale), out=rows.reshape(q.shape))
    m = np.full((len(rows), 1), -np.inf, np.float32)
    sums, a = np.zeros_like(m), np.zeros((len(rows), v.shape[-1]), np.float32)
    for columns, see in seen:
        s = dot_into_scratch(rows, k[columns].T, "scores")
        if see is not None:
            np.copyto(s.reshape(group, n_rows, -1), np.float32(-np.inf), where=~see)
        update(s, m, sums, a)
        a += dot_into_scratch(s, v[columns], "values")
    sums[sums == 0] = 1
    np.divide(a.reshape(y.shape), sums.reshape(group, n_rows, 1), out=y)
    lse[...] = (m + np.log(sums)).reshape(lse.shape)


def softmax_update(s: Array, m: Array, sums: Array, a: Array) -> None:
    """Turn a tile of scores into exp(s - m), and bring maximum m, sum and weighted sum a up to
    date, all in place.
    """
    m_new = np.maximum(m, s.max(axis=1, keepdims=True))
    shift = np.where(
        m_new == -np.inf, np.float32(0), m_new
    )  # nothing seen yet: any finite number will do
    s -= shift
    np.exp(s, out=s)
    decay = np.exp(m - shift)
    sums *= decay
    sums += s.sum(axis=1, keepdims=True)
    a *= decay
    m[...] = m_new
