"""Embedding lookup: from token ids to vectors; and absolute positions, which are added to them."""

from typing import Any

from npllm.arrays import (
    array_namespace,
    as_index,
    expect_shape,
    host_range,
    ieee_semantics,
    is_integer,
    is_packed,
    widen,
)
from npllm.errors import NpllmTypeError, NpllmValueError

__all__ = ["add_positions", "embed", "sinusoidal_positions"]

Array = Any


@ieee_semantics
def embed(ids: Array, weight: Array) -> Array:
    """Look up the row of the embedding matrix that belongs to each token id.

        y[..., :] = weight[ids[...], :]

    Parameters
    ----------
    ids : integer array [...]
        Token ids, 0 <= id < n_vocab.
    weight : array [n_vocab, d_model]
        Or a `PackedMatrix`, such as an `Int8Weight`.

    Returns
    -------
    y : array [..., d_model]
        A copy in the compute dtype: float32, or float64 when `weight` is.

    Raises
    ------
    NpllmTypeError
        When `ids` are not integers.
    NpllmValueError
        When an id on the host lies outside the vocabulary (negative ids too: they would silently
        count from the end), or `weight` is no matrix.

    Notes
    -----
    Gathers first and widens then, so that a 16-bit embedding matrix is never widened whole.  Ids
    that live on a GPU are not looked at, since that would stall the stream; `Model` checks them on
    the host.

    Source: "Attention Is All You Need" (Vaswani et al. 2017), section 3.4, without its factor
    sqrt(d_model), which Phi-3 does not use; `embed_tokens` in Transformers' `Phi3Model`.
    """
    xp = require_ids(ids, weight)
    flat = xp.reshape(as_index(ids), (-1,))
    rows = weight.take(flat) if is_packed(weight) else xp.take(weight, flat, axis=0)
    return xp.reshape(widen(rows), (*ids.shape, weight.shape[1]))


def require_ids(ids: Array, weight: Array) -> Any:
    """Raise unless `ids` are numbers of rows of an embedding matrix, as `embed` says; return the
    library of both.
    """
    xp = array_namespace(ids, weight)
    expect_shape("weight", weight, n_vocab=None, d_model=None)
    if not is_integer(ids):
        raise NpllmTypeError(f"ids must be integers, got dtype {ids.dtype}")
    n_vocab, lowest_highest = weight.shape[0], host_range(ids)
    if lowest_highest and not (lowest_highest[0] >= 0 and lowest_highest[1] < n_vocab):
        raise NpllmValueError(
            f"token ids must lie in 0 ... n_vocab - 1 = {n_vocab - 1}, got {lowest_highest[0]} ... "
            f"{lowest_highest[1]}; is this the tokenizer of another model?"
        )
    return xp


def sinusoidal_positions(positions: Array, d_model: int, base: float = 10000.0) -> Array:
    """Give each position a vector of sines and cosines of falling frequency.

        p[n, 2i] = sin(n / base ** (2i / d_model)),   p[n, 2i + 1] = cos(n / base ** (2i / d_model))

    Parameters
    ----------
    positions : integer array [..., n_seq]
    d_model : int
        Even.
    base : float

    Returns
    -------
    p : array [..., n_seq, d_model]
        float32; the angles are taken in float64 and rounded at the end.

    Raises
    ------
    NpllmValueError
        When `d_model` is odd or not positive.

    Notes
    -----
    Source: "Attention Is All You Need" (Vaswani et al. 2017), section 3.5.
    """
    xp = array_namespace(positions)
    if d_model < 2 or d_model % 2:
        raise NpllmValueError(f"d_model must be even and at least 2, got {d_model}")
    exponent = xp.arange(0, d_model, 2, dtype=xp.float64) / d_model
    angle = (
        xp.astype(positions, xp.float64)[..., None] / base**exponent
    )  # [..., n_seq] -> [..., n_seq, d_model/2]
    pairs = xp.stack([xp.sin(angle), xp.cos(angle)], axis=-1)
    return xp.astype(xp.reshape(pairs, (*angle.shape[:-1], d_model)), xp.float32)


@ieee_semantics
def add_positions(x: Array, positions: Array, weight: Array) -> Array:
    """Add to each token's vector the learned vector of its position.

        y[..., n, :] = x[..., n, :] + weight[positions[..., n], :]

    Parameters
    ----------
    x : array [..., n_seq, d_model]
    positions : integer array [n_seq]
        Below n_pos; a longer sequence has no vector, and raises.
    weight : array [n_pos, d_model]

    Returns
    -------
    y : array [..., n_seq, d_model]
        In the dtype of `x`.

    Raises
    ------
    NpllmTypeError
        When the positions are not integers.
    NpllmValueError
        When a position on the host lies outside the table, or the shapes do not fit.

    Notes
    -----
    Source: "Convolutional Sequence to Sequence Learning" (Gehring et al. 2017), section 3.1;
    `BertEmbeddings` in Transformers.
    """
    xp = array_namespace(x, positions, weight)
    expect_shape("x", x, dots=None, n_seq=None, d_model=weight.shape[-1])
    expect_shape("positions", positions, dots=None, n_seq=x.shape[-2])
    if not is_integer(positions):
        raise NpllmTypeError(f"positions must be integers, got dtype {positions.dtype}")
    lowest_highest = host_range(positions)
    if lowest_highest and not (lowest_highest[0] >= 0 and lowest_highest[1] < weight.shape[0]):
        raise NpllmValueError(
            f"positions must lie in 0 ... n_pos - 1 = {weight.shape[0] - 1}, "
            f"got {lowest_highest[0]} ... "
            f"{lowest_highest[1]}"
        )
    y = widen(x) + embed(positions, weight)
    return y if y.dtype == x.dtype else xp.astype(y, x.dtype)
