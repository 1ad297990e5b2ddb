"""Attention block by block with an online softmax: the two schedules of FlashAttention, and the
merge of partial results.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

from npllm.arrays import (
    array_namespace,
    compute_dtype,
    expect_shape,
    ieee_semantics,
    n_bytes,
    to_numpy,
    widen,
)
from npllm.errors import NpllmValueError
from npllm.ops.attention import check_attention, evaluate_mask
from npllm.ops.mask.rule import ALL, NONE, SOME

__all__ = ["blockwise_attention", "merge_attention", "split_kv_attention"]

Array = Any


@ieee_semantics
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
    k_slots: Any = None,
    return_lse: bool = False,
    block_q: int = 256,
    block_k: int = 512,
    outer: str = "queries",
    moved: Callable[[int], Any] | None = None,
) -> Any:
    """Compute `attention` block by block, in memory that does not grow with n_seq x n_ctx.

    For each block of queries, visit the blocks of keys j and keep a running maximum m, sum l and
    weighted sum a:

        m' = max(m, max_j s_j),   l' = l * exp(m - m') + sum_j exp(s_j - m')
        a' = a * exp(m - m') + sum_j exp(s_j - m') * v_j;   at the end  y = a / l,  lse = m + log(l)

    Parameters
    ----------
    q : array [..., n_head, n_seq, d_head]
    k : array [..., n_kv_head, n_ctx, d_head]
    v : array [..., n_kv_head, n_ctx, d_value]
    mask, bias, scale, softcap, q_slots, k_slots, return_lse
        As in `attention`.
    block_q, block_k : int
        Queries and keys of a block; they change the order of summation only.
    outer : str
        Which blocks the outer loop runs over.  "queries" is the schedule of FlashAttention-2: the
        running state of a block of queries stays at hand until it is done.  "keys" is that of
        FlashAttention-1: a block of keys and values is fetched once, and the states of all queries
        come and go.  The result is the same.
    moved : function (n_bytes), optional
        Is told of every block that the schedule fetches from slow memory or puts back there; see
        `attention_io`.

    Returns
    -------
    y : array [..., n_head, n_seq, d_value]
        In the dtype of `q`.  A row that sees no key is zero.
    lse : array [..., n_head, n_seq]
        Only with `return_lse`.

    Raises
    ------
    NpllmValueError
        When the shapes do not fit, n_head is no multiple of n_kv_head, a block size is below 1, or
        `outer` is neither word.

    Notes
    -----
    Computes in float32 (float64 when any input is); 16-bit keys and values are widened block by
    block.  A block of which the rule excludes all is skipped; where the rule excludes nothing, no
    mask is made.  Slots on a GPU are read on the host for that: give a `range`, or leave them out,
    to spare the stream.

    Source: "Online normalizer calculation for softmax" (Milakov and Gimelshein 2018);
    "FlashAttention" (Dao et al. 2022), algorithm 1; "FlashAttention-2" (Dao 2023), algorithm 1.
    """
    xp = array_namespace(q, k, v, bias)
    q_slots, k_slots = check_attention(xp, q, k, v, mask, bias, q_slots, k_slots)
    if min(block_q, block_k) < 1:
        raise NpllmValueError(
            f"block_q and block_k must be at least 1, got {block_q} and {block_k}"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if outer not in SCHEDULES:
        raise NpllmValueError(f"outer must be one of {', '.join(SCHEDULES)}, got {outer!r}")
    tiles = _Tiles(
        xp, q, k, v, mask, bias, q_slots, k_slots, scale, softcap, compute_dtype(q, k, v, bias)
    )
    parts = SCHEDULES[outer](
        tiles, _spans(q.shape[-2], block_q), _spans(k.shape[-2], block_k), moved or _ignore
    )
    y, lse = (
        xp.concat(pieces, axis=-2) if len(pieces) > 1 else pieces[0]
        for pieces in zip(*parts, strict=True)
    )
    y = y if y.dtype == q.dtype else xp.astype(y, q.dtype)
    return (y, lse[..., 0]) if return_lse else y


@ieee_semantics
def merge_attention(y: Array, lse: Array) -> tuple[Array, Array]:
    """Merge attention over disjoint sets of keys into attention over all of them.

        y = sum_s exp(lse_s - lse) * y_s,   lse = log sum_s exp(lse_s)

    Parameters
    ----------
    y : array [n_split, ..., n_seq, d_value]
        Results over each set of keys.
    lse : array [n_split, ..., n_seq]
        Their log-sum-exp, from `return_lse`.

    Returns
    -------
    y : array [..., n_seq, d_value]
        In the dtype of `y`.
    lse : array [..., n_seq]

    Notes
    -----
    Source: "Flash-Decoding for long-context inference" (Dao et al. 2023); `merge_state` of other
    libraries.
    """
    xp = array_namespace(y, lse)
    expect_shape("lse", lse, **{f"axis_{n}": size for n, size in enumerate(y.shape[:-1])})
    dtype = compute_dtype(y, lse)
    lse = widen(lse, dtype)
    largest = xp.max(lse, axis=0)
    shift = xp.where(largest == -xp.inf, xp.zeros_like(largest), largest)
    weights = xp.exp(lse - shift)
    total = xp.sum(weights, axis=0)
    safe = xp.where(total == 0, xp.ones_like(total), total)
    merged = xp.sum(weights[..., None] * widen(y, dtype), axis=0) / safe[..., None]
    return merged if merged.dtype == y.dtype else xp.astype(merged, y.dtype), largest + xp.log(safe)


def split_kv_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    n_split: int,
    mask: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    q_slots: Any = None,
    k_slots: Any = None,
    return_lse: bool = False,
) -> Any:
    """Cut the keys into n_split parts, attend to each part alone, and merge (Flash-Decoding).

        y = merge_attention of blockwise_attention(q, k_s, v_s) over the runs s

    Parameters
    ----------
    q : array [..., n_head, n_seq, d_head]
    k : array [..., n_kv_head, n_ctx, d_head]
    v : array [..., n_kv_head, n_ctx, d_value]
    n_split : int
        At least 1; runs differ in length by at most one key, and more runs than keys are cut to one
        run a key.
    mask, scale, softcap, q_slots, k_slots, return_lse
        As in `attention`.

    Returns
    -------
    y : array [..., n_head, n_seq, d_value]
    lse : array [..., n_head, n_seq]
        Only with `return_lse`.

    Raises
    ------
    NpllmValueError
        When the shapes do not fit, or n_split is below 1.

    Notes
    -----
    Source: "Flash-Decoding for long-context inference" (Dao et al. 2023).
    """
    xp = array_namespace(q, k, v)
    q_slots, k_slots = check_attention(xp, q, k, v, mask, None, q_slots, k_slots)
    if n_split < 1:
        raise NpllmValueError(f"n_split must be at least 1, got {n_split}")
    n_ctx = k.shape[-2]
    cuts = [n_ctx * s // min(n_split, n_ctx) for s in range(min(n_split, n_ctx) + 1)]
    parts = []
    for columns in (slice(a, b) for a, b in pairwise(cuts)):
        seen = mask if mask is None or callable(mask) else _cut(mask, slice(None), columns)
        parts.append(
            blockwise_attention(
                q,
                k[..., columns, :],
                v[..., columns, :],
                mask=seen,
                scale=scale,
                softcap=softcap,
                q_slots=q_slots,
                k_slots=k_slots[columns],
                return_lse=True,
            )
        )
    y, lse = merge_attention(*(xp.stack(part) for part in zip(*parts, strict=True)))
    return (y, lse) if return_lse else y


class _State(NamedTuple):
    """What is known of a block of queries: maximum m, sum l and weighted sum a of the keys seen so
    far.
    """

    rows: Any  # [..., n_kv_head, n_rows, d_head]: the query heads of a group side by side
    m: Any  # [..., n_kv_head, n_rows, 1]
    l: Any  # noqa: E741 - the paper's letter
    a: Any  # [..., n_kv_head, n_rows, d_value]


class _Tiles(NamedTuple):
    """The arguments of one call, and what is done to a tile of them."""

    xp: Any
    q: Any
    k: Any
    v: Any
    mask: Any
    bias: Any
    q_slots: Any
    k_slots: Any
    scale: float
    softcap: float | None
    dtype: Any

    def start(self, rows: slice) -> _State:
        """The empty state of a block of queries."""
        xp, q = self.xp, self.q[..., rows, :]
        *batch, n_head, n_seq, d_head = q.shape
        lead = (*batch, self.k.shape[-3], n_head // self.k.shape[-3] * n_seq)
        m = xp.full((*lead, 1), -xp.inf, dtype=self.dtype)
        return _State(
            xp.reshape(widen(q, self.dtype), (*lead, d_head)),
            m,
            xp.zeros_like(m),
            xp.zeros((*lead, self.v.shape[-1]), dtype=self.dtype),
        )

    def visible(self, rows: slice, columns: slice) -> Any:
        """What the queries of a block see of a block of keys: NONE, ALL, or a mask."""
        i, j = self.q_slots[rows], self.k_slots[columns]
        if rows.stop == rows.start:
            return NONE
        if self.mask is None:
            return ALL
        bound = getattr(self.mask, "bound", _no_bound)(*_ends(self.xp, i), *_ends(self.xp, j))
        if bound != SOME:
            return bound
        return (
            evaluate_mask(self.xp, self.mask, self.q, i, j)
            if callable(self.mask)
            else _cut(self.mask, rows, columns)
        )

    def update(self, state: _State, rows: slice, columns: slice, visible: Any) -> _State:
        """Fold a block of keys and values into the state of a block of queries."""
        xp, (q, m, l, a) = self.xp, state  # noqa: E741
        s = (q @ xp.matrix_transpose(widen(self.k[..., columns, :], self.dtype))) * self.scale
        if self.softcap is not None:
            s = self.softcap * xp.tanh(s / self.softcap)
        if self.bias is not None or visible is not ALL:
            s = self.exclude(s, rows, columns, visible)
        m_new = xp.maximum(m, xp.max(s, axis=-1, keepdims=True))
        shift = xp.where(
            m_new == -xp.inf, xp.zeros_like(m_new), m_new
        )  # nothing seen yet: any finite number will do
        p, decay = xp.exp(s - shift), xp.exp(m - shift)
        a = a * decay + p @ widen(self.v[..., columns, :], self.dtype)
        return _State(q, m_new, l * decay + xp.sum(p, axis=-1, keepdims=True), a)

    def exclude(self, s: Array, rows: slice, columns: slice, visible: Any) -> Array:
        """Add the bias to the scores, and put -inf where nothing is to be seen; both know the query
        heads one by one.
        """
        xp, shape = self.xp, s.shape
        n_seq = rows.stop - rows.start
        s = xp.reshape(
            s, (*self.q.shape[:-2], n_seq, shape[-1])
        )  # [..., n_kv_head, n_rows, n_keys] -> heads
        if self.bias is not None:
            s = s + widen(_cut(self.bias, rows, columns), s.dtype)
        if visible is not ALL:
            s = xp.where(visible, s, xp.asarray(-xp.inf, dtype=s.dtype))
        return xp.reshape(s, shape)

    def finish(self, state: _State, rows: slice) -> tuple[Array, Array]:
        """Divide the sums: result and log-sum-exp [..., n_seq, 1] of a block of queries."""
        xp = self.xp
        l_safe = xp.where(state.l == 0, xp.ones_like(state.l), state.l)
        heads = (
            *self.q.shape[:-2],
            rows.stop - rows.start,
        )  # [..., n_kv_head, n_rows, d] -> [..., n_head, n_seq, d]
        return (
            xp.reshape(state.a / l_safe, (*heads, self.v.shape[-1])),
            xp.reshape(state.m + xp.log(l_safe), (*heads, 1)),
        )


def _outer_queries(
    tiles: _Tiles, q_blocks: list[slice], k_blocks: list[slice], moved: Callable[[int], Any]
) -> list[tuple[Array, Array]]:
    """FlashAttention-2: fetch a block of queries, run over the keys, put the result away."""
    parts = []
    for rows in q_blocks:
        state = tiles.start(rows)
        moved(n_bytes(tiles.q[..., rows, :]))
        for columns in k_blocks:
            visible = tiles.visible(rows, columns)
            if visible is not NONE:
                moved(n_bytes(tiles.k[..., columns, :]) + n_bytes(tiles.v[..., columns, :]))
                state = tiles.update(state, rows, columns, visible)
        parts.append(tiles.finish(state, rows))
        moved(sum(map(n_bytes, parts[-1])))
    return parts


def _outer_keys(
    tiles: _Tiles, q_blocks: list[slice], k_blocks: list[slice], moved: Callable[[int], Any]
) -> list[tuple[Array, Array]]:
    """FlashAttention-1: fetch a block of keys and values, and update the state of every block of
    queries with it.
    """
    states = [tiles.start(rows) for rows in q_blocks]
    for columns in k_blocks:
        moved(n_bytes(tiles.k[..., columns, :]) + n_bytes(tiles.v[..., columns, :]))
        for n, rows in enumerate(q_blocks):
            visible = tiles.visible(rows, columns)
            if visible is not NONE:
                _, m, l, a = states[n]  # noqa: E741
                moved(
                    n_bytes(tiles.q[..., rows, :]) + 2 * sum(map(n_bytes, (m, l, a)))
                )  # the state is read and written
                states[n] = tiles.update(states[n], rows, columns, visible)
    return [tiles.finish(state, rows) for state, rows in zip(states, q_blocks, strict=True)]


SCHEDULES = {"queries": _outer_queries, "keys": _outer_keys}


def _ignore(_: int) -> None:
    pass


def _no_bound(*_: int) -> int:
    return SOME


def _spans(n: int, size: int) -> list[slice]:
    """Cut 0 ... n - 1 into slices of at most `size`; one empty slice where n is 0."""
    return [slice(start, min(start + size, n)) for start in range(0, max(n, 1), size)]


def _cut(x: Array, rows: slice, columns: slice) -> Array:
    """Take a block of a mask or bias; an axis of size 1 broadcasts and stays."""
    x = x if x.ndim < 1 or x.shape[-1] == 1 else x[..., columns]
    return x if x.ndim < 2 or x.shape[-2] == 1 else x[..., rows, :]


def _ends(xp: Any, slots: Any) -> tuple[int, int]:
    """Smallest and largest slot of a block, as Python integers."""
    if isinstance(slots, range):
        return min(slots[0], slots[-1]), max(slots[0], slots[-1])
    return int(to_numpy(xp.min(slots))), int(to_numpy(xp.max(slots)))
