"""Linear maps, and the moves between one wide vector and its heads."""

from math import prod
from typing import Any

from npllm.arrays import (
    array_namespace,
    compute_dtype,
    entries_at_once,
    expect_shape,
    ieee_semantics,
    widen,
)
from npllm.errors import NpllmValueError

__all__ = ["linear", "mean_pool_kv_heads", "merge_heads", "split_heads"]

Array = Any


@ieee_semantics
def linear(x: Array, weight: Array, bias: Array = None) -> Array:
    """Multiply each row by the transposed weight matrix, and add a bias.

        y[..., o] = sum_i x[..., i] * weight[o, i] + bias[o]

    Parameters
    ----------
    x : array [..., d_in]
    weight : array [d_out, d_in]
        In the checkpoint's orientation: one row for each output.  Or a `PackedMatrix`.
    bias : array [d_out], optional

    Returns
    -------
    y : array [..., d_out]
        A new array in the dtype of `x`.

    Raises
    ------
    NpllmValueError
        When the shapes do not fit.

    Notes
    -----
    Computes and accumulates in float32, in float64 when `x` or `weight` is; rounds once, at the
    end.  A 16-bit or packed weight is widened block of rows by block of rows, never as a whole
    (`npllm.arrays.entries_at_once`).

    Source: `torch.nn.Linear`.
    """
    xp = array_namespace(x, weight, bias)
    expect_shape("weight", weight, d_out=None, d_in=None)
    d_out, d_in = weight.shape
    expect_shape("x", x, dots=None, d_in=d_in)
    dtype = compute_dtype(x, weight)
    rows = xp.reshape(widen(x, dtype), (prod(x.shape[:-1]), d_in))  # [..., d_in] -> [n, d_in]
    blocks = [
        rows @ xp.matrix_transpose(widen(block, dtype)) for block in _row_blocks(weight, dtype)
    ]
    y = blocks[0] if len(blocks) == 1 else xp.concat(blocks, axis=-1)
    if bias is not None:
        expect_shape("bias", bias, d_out=d_out)
        y = y + widen(bias, dtype)
    return xp.reshape(_round(y, x), (*x.shape[:-1], d_out))


def split_heads(x: Array, n_head: int) -> Array:
    """Cut each row into heads, and put the heads before the positions.

        y[..., h, n, i] = x[..., n, h * d_head + i]

    Parameters
    ----------
    x : array [..., n_seq, n_head*d_head]
    n_head : int

    Returns
    -------
    y : array [..., n_head, n_seq, d_head]
        A view where the library has views.

    Raises
    ------
    NpllmValueError
        When the width of `x` is no multiple of `n_head`.

    Notes
    -----
    Source: "Attention Is All You Need" (Vaswani et al. 2017), section 3.2.2; the `view` and
    `transpose` of `Phi3Attention`.
    """
    xp = array_namespace(x)
    expect_shape("x", x, dots=None, n_seq=None, width=None)
    *batch, n_seq, width = x.shape
    if n_head < 1 or width % n_head:
        raise NpllmValueError(
            f"the last axis of x must be n_head * d_head, a multiple of n_head = {n_head}, "
            f"got {width}"
        )
    y = xp.reshape(x, (*batch, n_seq, n_head, width // n_head))
    return _swap(y, xp)  # [..., n_seq, n_head, d_head] -> [..., n_head, n_seq, d_head]


def merge_heads(x: Array) -> Array:
    """Put the heads of each position side by side again: the inverse of `split_heads`.

        y[..., n, h * d_head + i] = x[..., h, n, i]

    Parameters
    ----------
    x : array [..., n_head, n_seq, d_head]

    Returns
    -------
    y : array [..., n_seq, n_head*d_head]

    Notes
    -----
    Source: "Attention Is All You Need" (Vaswani et al. 2017), section 3.2.2, the concatenation.
    """
    xp = array_namespace(x)
    expect_shape("x", x, dots=None, n_head=None, n_seq=None, d_head=None)
    *batch, n_head, n_seq, d_head = x.shape
    return xp.reshape(_swap(x, xp), (*batch, n_seq, n_head * d_head))


def mean_pool_kv_heads(weight: Array, n_kv_head: int, n_group: int) -> Array:
    """Average key or value heads in groups: the first step from MHA to GQA.

        y[g * d_head + i, :] = mean over the heads h of group g of weight[h * d_head + i, :]

    Parameters
    ----------
    weight : array [n_kv_head*d_head, d_model]
        Rows of k_proj or v_proj; a bias [n_kv_head*d_head] does as well.
    n_kv_head : int
        Heads that it has.
    n_group : int
        Heads that it will have; divides n_kv_head.  1 gives multi-query attention.

    Returns
    -------
    y : array [n_group*d_head, d_model]
        In the dtype of `weight`.

    Raises
    ------
    NpllmValueError
        When n_group does not divide n_kv_head, or n_kv_head the rows.

    Notes
    -----
    Computes the mean in float32 (float64 when `weight` is), and rounds once.

    Source: "GQA" (Ainslie et al. 2023), section 2.1.
    """
    xp = array_namespace(weight)
    n_rows = weight.shape[0]
    if n_kv_head < 1 or n_rows % n_kv_head:
        raise NpllmValueError(
            "the rows of weight must be n_kv_head * d_head, a multiple of n_kv_head = "
            f"{n_kv_head}, got {n_rows}"
        )
    if n_group < 1 or n_kv_head % n_group:
        raise NpllmValueError(f"n_group must divide n_kv_head = {n_kv_head}, got {n_group}")
    heads = xp.reshape(
        widen(weight), (n_group, n_kv_head // n_group, n_rows // n_kv_head, *weight.shape[1:])
    )
    y = xp.mean(heads, axis=1)
    return _round(xp.reshape(y, (n_group * (n_rows // n_kv_head), *weight.shape[1:])), weight)


def _swap(x: Array, xp: Any) -> Array:
    """Exchange axes -3 and -2."""
    axes = list(range(x.ndim))
    axes[-3], axes[-2] = axes[-2], axes[-3]
    return xp.permute_dims(x, tuple(axes))


def _row_blocks(weight: Array, dtype: Any) -> list[Array]:
    """Cut a weight that must be widened into blocks of rows; one that has the compute dtype already
    stays whole.
    """
    d_out, d_in = weight.shape
    if weight.dtype == dtype or d_out == 0:
        return [weight]
    n_rows = max(1, entries_at_once(weight) // max(1, d_in))
    return [weight[start : min(start + n_rows, d_out), :] for start in range(0, d_out, n_rows)]


def _round(y: Array, x: Array) -> Array:
    """Round a result to the dtype of the input it belongs to."""
    return y if y.dtype == x.dtype else array_namespace(y).astype(y, x.dtype)
