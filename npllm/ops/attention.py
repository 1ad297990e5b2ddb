"""Attention as it is defined, with the table of all weights.

The blockwise form (`npllm.ops.blockwise`) is derived independently and shares no arithmetic with
it, only the check of the arguments and the default slots.
"""

from typing import Any

from npllm.arguments import check_mask
from npllm.arrays import (
    array_namespace,
    compute_dtype,
    expect_shape,
    ieee_semantics,
    is_integer,
    widen,
)
from npllm.errors import NpllmTypeError, NpllmValueError

__all__ = ["attention", "attention_weights"]

Array = Any


@ieee_semantics
def attention_weights(
    q: Array,
    k: Array,
    *,
    mask: Any = None,
    bias: Array = None,
    scale: float | None = None,
    softcap: float | None = None,
    q_slots: Any = None,
    k_slots: Any = None,
) -> Array:
    """Give the weight of each key for each query: the softmax of the scaled scores.

        s[h, i, j] = scale * sum_c q[h, i, c] * k[h // group, j, c],   group = n_head / n_kv_head
        s = softcap * tanh(s / softcap), if a softcap is given;  s = s + bias, if one is given
        w[h, i, j] = exp(s[h, i, j]) / sum_(j' visible) exp(s[h, i, j']) where j is visible, else 0

    Parameters
    ----------
    q : array [..., n_head, n_seq, d_head]
    k : array [..., n_kv_head, n_ctx, d_head]
        Query head h reads key head h // group.
    mask : Rule, function or bool array, optional
        A rule `mask(i, j)` of slots (see `npllm.ops.mask`), or a bool array that broadcasts to
        [..., n_head, n_seq, n_ctx], True where visible.  None: every key is visible.
    bias : array, optional
        Added to the scores; broadcasts to [..., n_head, n_seq, n_ctx].  -inf excludes.
    scale : float, optional
        Default d_head ** -0.5, of the whole head also under partial RoPE.
    softcap : float, optional
        Bounds the scores to -softcap ... softcap.
    q_slots : integer array [n_seq], optional
        Place of each query in the sequence, for the rule; also a `range`.  Default: the last n_seq
        slots of the keys.
    k_slots : integer array [n_ctx], optional
        Place of each key; also a `range`.  Default: 0 ... n_ctx - 1.

    Returns
    -------
    w : array [..., n_head, n_seq, n_ctx]
        In the dtype of `q`.  A row sums to 1, or is all zeros where no key is visible.

    Raises
    ------
    NpllmValueError
        When the shapes do not fit, or n_head is no multiple of n_kv_head.

    Notes
    -----
    Computes in float32 (float64 when any input is), and rounds once.

    Source: "Attention Is All You Need" (Vaswani et al. 2017), equation 1; grouped heads: "GQA"
    (Ainslie et al. 2023); `eager_attention_forward` in Transformers, which gives a row without a
    visible key the mean of all values instead.
    """
    xp = array_namespace(q, k, bias)
    q_slots, k_slots = check_attention(xp, q, k, None, mask, bias, q_slots, k_slots)
    s = _scores(xp, q, k, scale, softcap, bias, compute_dtype(q, k, bias))
    weights, _ = _softmax_visible(xp, s, evaluate_mask(xp, mask, q, q_slots, k_slots))
    return weights if weights.dtype == q.dtype else xp.astype(weights, q.dtype)


@ieee_semantics
def attention(
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
) -> Any:
    """Average the values for each query, weighted by softmax(q . k): the definition.

        y[h, i, :] = sum_j w[h, i, j] * v[h // group, j, :],   w = attention_weights(q, k, ...)

    Parameters
    ----------
    q : array [..., n_head, n_seq, d_head]
    k : array [..., n_kv_head, n_ctx, d_head]
    v : array [..., n_kv_head, n_ctx, d_value]
    mask, bias, scale, softcap, q_slots, k_slots
        As in `attention_weights`.
    return_lse : bool
        Also return the logarithm of each row's sum of exponentials.

    Returns
    -------
    y : array [..., n_head, n_seq, d_value]
        In the dtype of `q`.  A row that sees no key is zero.
    lse : array [..., n_head, n_seq]
        Only with `return_lse`: log sum_(j visible) exp(s[h, i, j]) in the compute dtype; -inf where
        no key is visible.

    Raises
    ------
    NpllmValueError
        When the shapes do not fit, or n_head is no multiple of n_kv_head.

    Notes
    -----
    Holds the table of all n_seq x n_ctx weights: for reading and for checking.  Computes in float32
    (float64 when any input is).

    Source: "Attention Is All You Need" (Vaswani et al. 2017), equation 1; `eager_attention_forward`
    in Transformers.
    """
    xp = array_namespace(q, k, v, bias)
    q_slots, k_slots = check_attention(xp, q, k, v, mask, bias, q_slots, k_slots)
    dtype = compute_dtype(q, k, v, bias)
    s = _scores(xp, q, k, scale, softcap, bias, dtype)
    weights, lse = _softmax_visible(xp, s, evaluate_mask(xp, mask, q, q_slots, k_slots))
    values = xp.repeat(widen(v, dtype), q.shape[-3] // v.shape[-3], axis=-3)
    y = weights @ values
    y = y if y.dtype == q.dtype else xp.astype(y, q.dtype)
    return (y, lse) if return_lse else y


def _scores(
    xp: Any, q: Array, k: Array, scale: float | None, softcap: float | None, bias: Array, dtype: Any
) -> Array:
    """Scale * q k^T for every head, capped and biased."""
    keys = xp.repeat(
        widen(k, dtype), q.shape[-3] // k.shape[-3], axis=-3
    )  # [..., n_kv_head, ...] -> [..., n_head, ...]
    s = (widen(q, dtype) @ xp.matrix_transpose(keys)) * (
        q.shape[-1] ** -0.5 if scale is None else scale
    )
    if softcap is not None:
        s = softcap * xp.tanh(s / softcap)
    return s if bias is None else s + widen(bias, dtype)


def _softmax_visible(xp: Any, s: Array, visible: Array) -> Any:
    """Softmax of each row over its visible keys, and the log of the row's sum of exponentials."""
    if visible is not None:
        s = xp.where(visible, s, xp.asarray(-xp.inf, dtype=s.dtype))
    largest = xp.max(s, axis=-1, keepdims=True)
    largest = xp.where(largest == -xp.inf, xp.zeros_like(largest), largest)
    e = xp.exp(s - largest)
    total = xp.sum(e, axis=-1, keepdims=True)
    nothing = total == 0
    total = xp.where(nothing, xp.ones_like(total), total)
    lse = xp.where(nothing, xp.asarray(-xp.inf, dtype=s.dtype), largest + xp.log(total))
    return e / total, lse[..., 0]


# ------------------------------------ shared with the blockwise form: slots, checks of arguments


def evaluate_mask(xp: Any, mask: Any, q: Array, q_slots: Any, k_slots: Any) -> Any:
    """Evaluate a rule on [n_seq, 1] and [1, n_ctx] slots; an array and None are returned as they
    are.
    """
    if not callable(check_mask(mask)):
        return mask
    i, j = (
        xp.arange(s.start, s.stop, s.step) if isinstance(s, range) else s
        for s in (q_slots, k_slots)
    )
    visible = mask(i[:, None], j[None, :])
    if not hasattr(visible, "shape"):
        raise NpllmTypeError(
            "mask(i, j) must return a bool array for integer arrays of slots i [n_seq, 1] and "
            f"j [1, n_ctx], got {type(visible).__name__}; `causal()` is such a rule"
        )
    _check_broadcast("mask", visible, (*q.shape[:-2], i.shape[0], j.shape[0]))
    return visible


def check_attention(
    xp: Any, q: Array, k: Array, v: Array, mask: Any, bias: Array, q_slots: Any, k_slots: Any
) -> Any:
    """Raise for arguments that do not fit; return the slots, the default ones where they were left
    out.
    """
    check_mask(mask)
    expect_shape("q", q, dots=None, n_head=None, n_seq=None, d_head=None)
    expect_shape("k", k, dots=None, n_kv_head=None, n_ctx=None, d_head=q.shape[-1])
    n_head, n_seq, n_kv_head, n_ctx = q.shape[-3], q.shape[-2], k.shape[-3], k.shape[-2]
    if v is not None:
        expect_shape("v", v, dots=None, n_kv_head=n_kv_head, n_ctx=n_ctx, d_value=None)
    if any(x.shape[:-3] != q.shape[:-3] for x in (k, v) if x is not None):
        raise NpllmValueError(
            "q, k and v must have the same axes in front of the heads, "
            f"got q {list(q.shape)}, k {list(k.shape)}"
            + (f", v {list(v.shape)}" if v is not None else "")
        )
    if q.shape[-1] < 1:
        raise NpllmValueError("a head must have at least one channel, got d_head = 0")
    if n_ctx < 1:
        raise NpllmValueError("k must hold at least one key, got n_ctx = 0")
    if n_kv_head == 0 or n_head % n_kv_head:
        raise NpllmValueError(
            "n_head must be a multiple of n_kv_head, "
            f"got n_head = {n_head} and n_kv_head = {n_kv_head}"
        )
    array_namespace(
        q, *(x for x in (mask, q_slots, k_slots) if not (callable(x) or isinstance(x, range)))
    )
    for name, x in (("mask", mask), ("bias", bias)):
        if x is not None and not callable(x):
            _check_broadcast(name, x, (*q.shape[:-1], n_ctx))
    if mask is not None and not callable(mask) and mask.dtype != xp.bool:
        raise NpllmTypeError(
            f"mask must be a rule or a bool array (True = visible), got dtype {mask.dtype}; "
            "additive masks go to bias"
        )
    return (
        resolve_slots(xp, "q_slots", q_slots, "n_seq", n_seq, n_ctx - n_seq),
        resolve_slots(xp, "k_slots", k_slots, "n_ctx", n_ctx, 0),
    )


def _check_broadcast(name: str, x: Array, shape: tuple[int, ...]) -> None:
    axes = x.shape[::-1]
    if len(axes) > len(shape) or any(
        got not in (1, want) for got, want in zip(axes, shape[::-1], strict=False)
    ):
        raise NpllmValueError(
            f"{name} must broadcast to [..., n_head, n_seq, n_ctx] = {list(shape)}, "
            f"got {list(x.shape)}"
        )


def resolve_slots(xp: Any, name: str, slots: Any, axis: str, n: int, first: int) -> Any:
    """Check given slots, and widen them to int64, in which a rule may subtract; without any, n of
    them from `first`.
    """
    if slots is None:
        return range(first, first + n)
    if not isinstance(slots, range) and not (is_integer(slots) and slots.ndim == 1):
        raise NpllmTypeError(
            f"{name} must be integers [{axis}] = [{n}], got {slots.dtype} {list(slots.shape)}"
        )
    got = len(slots) if isinstance(slots, range) else slots.shape[0]
    if got != n:
        raise NpllmValueError(f"{name} must be [{axis}] = [{n}], got [{got}]")
    return (
        slots if isinstance(slots, range) or slots.dtype == xp.int64 else xp.astype(slots, xp.int64)
    )
