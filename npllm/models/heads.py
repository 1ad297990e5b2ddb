"""Heads: logits of classes from hidden states."""

from typing import Any

from npllm.arrays import array_namespace
from npllm.models.adapted import linear
from npllm.ops import Ops

__all__ = ["classify_sequence", "classify_tokens", "last_token"]

Array = Any


def last_token(hidden: Array, last: Array) -> Array:
    """Pick one position of each sequence.

        y[b, :] = hidden[b, last[b], :]

    Parameters
    ----------
    hidden : array [n_batch, n_seq, d_model]
    last : integer array [n_batch]

    Returns
    -------
    y : array [n_batch, d_model]

    Notes
    -----
    Source: the pooling of `GenericForSequenceClassification` in Transformers.
    """
    xp = array_namespace(hidden, last)
    n_batch, n_seq, d_model = hidden.shape
    rows = xp.reshape(hidden, (n_batch * n_seq, d_model))
    return xp.take(rows, xp.arange(n_batch) * n_seq + last, axis=0)


def classify_sequence(hidden: Array, last: Array, params: Any, ops: Ops) -> Array:
    """Score each sequence by the hidden state of its last token that is no padding.

        logits[b, c] = sum_i hidden[b, last[b], i] * score[c, i]

    Parameters
    ----------
    hidden : array [n_batch, n_seq, d_model]
    last : integer array [n_batch]
    params : Params
    ops : Ops

    Returns
    -------
    logits : array [n_batch, n_label]

    Notes
    -----
    Source: `Phi3ForSequenceClassification` in Transformers.
    """
    return linear(ops, last_token(hidden, last), params.score)


def classify_tokens(hidden: Array, params: Any, ops: Ops) -> Array:
    """Score each position by itself.

        logits[b, n, c] = sum_i hidden[b, n, i] * score[c, i] + score_bias[c]

    Parameters
    ----------
    hidden : array [n_batch, n_seq, d_model]
    params : Params
    ops : Ops

    Returns
    -------
    logits : array [n_batch, n_seq, n_label]

    Notes
    -----
    Source: `Phi3ForTokenClassification` in Transformers.
    """
    return linear(ops, hidden, params.score, params.score_bias)
