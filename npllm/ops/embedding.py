"""Embedding lookup: from token ids to vectors."""

from npllm.arrays import array_namespace, expect_shape, host_range, is_integer, widen
from npllm.errors import NpllmTypeError, NpllmValueError

__all__ = ["embed"]


def embed(ids, weight):
    """Look up the row of the embedding matrix that belongs to each token id.

        y[..., :] = weight[ids[...], :]

    Parameters
    ----------
    ids : integer array [...]
        Token ids, 0 <= id < n_vocab.
    weight : array [n_vocab, d_model]

    Returns
    -------
    y : array [..., d_model]
        A copy in the compute dtype: float32, or float64 when `weight` is.

    Raises
    ------
    NpllmTypeError
        When `ids` are not integers.
    NpllmValueError
        When an id on the host lies outside the vocabulary (negative ids too: they would silently count from the end), or
        `weight` is no matrix.

    Notes
    -----
    Gathers first and widens then, so that a 16-bit embedding matrix is never widened whole.
    Ids that live on a GPU are not looked at, since that would stall the stream; `Model` checks them on the host.

    Source: "Attention Is All You Need" (Vaswani et al. 2017), section 3.4, without its factor sqrt(d_model), which Phi-3 does not
    use; `embed_tokens` in Transformers' `Phi3Model`.
    """
    xp = array_namespace(ids, weight)
    expect_shape("weight", weight, n_vocab=None, d_model=None)
    if not is_integer(ids):
        raise NpllmTypeError(f"ids must be integers, got dtype {ids.dtype}")
    n_vocab, d_model = weight.shape
    lowest_highest = host_range(ids)
    if lowest_highest and not (lowest_highest[0] >= 0 and lowest_highest[1] < n_vocab):
        raise NpllmValueError(f"token ids must lie in 0 ... n_vocab - 1 = {n_vocab - 1}, got {lowest_highest[0]} ... "
                              f"{lowest_highest[1]}; is this the tokenizer of another model?")
    rows = xp.take(weight, xp.reshape(ids, (-1,)), axis=0)
    return xp.reshape(widen(rows), (*ids.shape, d_model))
