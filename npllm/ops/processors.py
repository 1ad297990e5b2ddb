"""Which tokens may not follow, and which must: functions that map logits to logits.

They follow the `LogitsProcessor` classes of Transformers and bear the names of the options of
generation_config.json.  An excluded token gets -inf; softmax renormalises what is left.
temperature, top_k, top_p, min_p and repetition_penalty, which shape the distribution that is
sampled, are in `npllm.ops.sampling`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from npllm.arrays import array_namespace, asarray, expect_shape
from npllm.errors import NpllmValueError

__all__ = [
    "bad_words_ids",
    "begin_suppress_tokens",
    "forced_eos_token_id",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "suppress_tokens",
]

Array = Any


def suppress_tokens(logits: Array, tokens: Sequence[int]) -> Array:
    """Exclude some tokens.

        y[..., i] = -inf where i is one of tokens, else logits[..., i]

    Parameters
    ----------
    logits : array [..., n_vocab]
    tokens : sequence of int
        Ids that the vocabulary does not have are ignored.

    Returns
    -------
    y : array [..., n_vocab]
        In the dtype of `logits`.

    Notes
    -----
    Source: `SuppressTokensLogitsProcessor` in Transformers.
    """
    return _exclude(logits, _is_one_of(logits, tokens))


def begin_suppress_tokens(logits: Array, tokens: Sequence[int], n_new: int) -> Array:
    """Exclude some tokens as the first one of the answer.

        y = suppress_tokens(logits, tokens) where n_new = 0, else logits

    Parameters
    ----------
    logits : array [..., n_vocab]
    tokens : sequence of int
        Ids that the vocabulary does not have are ignored.
    n_new : int
        How many tokens the answer has.

    Returns
    -------
    y : array [..., n_vocab]
        In the dtype of `logits`.

    Notes
    -----
    Source: `SuppressTokensAtBeginLogitsProcessor` in Transformers.
    """
    array_namespace(logits)
    return suppress_tokens(logits, tokens) if n_new == 0 else logits


def min_new_tokens(logits: Array, eos: Sequence[int], n_new: int, least: int) -> Array:
    """Exclude the stop ids until the answer has a number of tokens.

        y = suppress_tokens(logits, eos) where n_new < least, else logits

    Parameters
    ----------
    logits : array [..., n_vocab]
    eos : sequence of int
        The stop ids.
    n_new : int
        How many tokens the answer has.
    least : int
        How many it must have before a stop id may follow.

    Returns
    -------
    y : array [..., n_vocab]
        In the dtype of `logits`.

    Notes
    -----
    Source: `MinNewTokensLengthLogitsProcessor` in Transformers.
    """
    array_namespace(logits)
    return suppress_tokens(logits, eos) if n_new < least else logits


def forced_eos_token_id(logits: Array, tokens: Sequence[int], n_left: int) -> Array:
    """Let the last token of the answer be one of some stop ids.

        y[..., i] = 0 where i is one of tokens, else -inf     where n_left = 1
        y = logits                                            else

    Parameters
    ----------
    logits : array [..., n_vocab]
    tokens : sequence of int
    n_left : int
        How many tokens may still follow, this one included.

    Returns
    -------
    y : array [..., n_vocab]
        In the dtype of `logits`.

    Raises
    ------
    NpllmValueError
        When the vocabulary has none of the tokens.

    Notes
    -----
    Source: `ForcedEOSTokenLogitsProcessor` in Transformers.
    """
    xp = array_namespace(logits)
    if n_left != 1:
        return logits
    n_vocab = logits.shape[-1]
    if not any(0 <= token < n_vocab for token in tokens):
        raise NpllmValueError(
            f"forced_eos_token_id must be a token id below n_vocab = {n_vocab}, got {list(tokens)}"
        )
    return _exclude(xp.zeros_like(logits), ~_is_one_of(logits, tokens))


def no_repeat_ngram_size(logits: Array, ids: Array, size: int) -> Array:
    """Exclude each token that would complete a run of `size` tokens that was there before.

        y[..., i] = -inf where a j exists with
                    ids[..., j : j + size] = [*ids[..., n_ctx - size + 1 :], i], else logits[..., i]

    Parameters
    ----------
    logits : array [n_batch, n_vocab]
    ids : integer array [n_batch, n_ctx]
        The tokens so far, the prompt included; -1 for padding on the left, which is no token.
    size : int
        At least 1, which lets no token come twice.

    Returns
    -------
    y : array [n_batch, n_vocab]
        In the dtype of `logits`.

    Raises
    ------
    NpllmValueError
        When `size` is below 1.

    Notes
    -----
    Transformers takes padding for tokens.

    Source: "Get To The Point" (See et al. 2017) and "A Deep Reinforced Model for Abstractive
    Summarization" (Paulus et al. 2017), section 2.5, where runs of three are excluded;
    `NoRepeatNGramLogitsProcessor` in Transformers.
    """
    if size < 1:
        raise NpllmValueError(f"no_repeat_ngram_size must be at least 1, got {size}")
    xp = array_namespace(logits, ids)
    expect_shape("ids", ids, n_batch=logits.shape[0], n_ctx=None)
    n_window = ids.shape[1] - size + 1
    if n_window < 1:
        return logits
    matches = xp.ones((ids.shape[0], n_window), dtype=xp.bool)
    for place in range(size - 1):
        last = ids.shape[1] - size + 1 + place
        matches = matches & (ids[:, place : place + n_window] == ids[:, last, None])
    completing = xp.where(matches, ids[:, size - 1 :], -1)  # [n_batch, n_window]
    rows = [_named_by(logits, completing[row, :]) for row in range(ids.shape[0])]
    return _exclude(logits, xp.stack(rows))


def bad_words_ids(
    logits: Array, ids: Array, words: Sequence[Sequence[int]], eos: Sequence[int] = ()
) -> Array:
    """Exclude each token that would complete one of some sequences of tokens.

        y[..., i] = -inf where a word w = [*p, i] exists with p = ids[..., n_ctx - len(p) :],
                    else logits[..., i]

    Parameters
    ----------
    logits : array [n_batch, n_vocab]
    ids : integer array [n_batch, n_ctx]
        The tokens so far, the prompt included; -1 for padding on the left, which is no token.
    words : sequence of sequences of int
        A word of one token is excluded everywhere.
    eos : sequence of int
        Stop ids; a word that is one of them is left out.

    Returns
    -------
    y : array [n_batch, n_vocab]
        In the dtype of `logits`.

    Raises
    ------
    NpllmValueError
        When a word is empty, or holds an id that the vocabulary does not have.

    Notes
    -----
    Source: `NoBadWordsLogitsProcessor` in Transformers.
    """
    xp = array_namespace(logits, ids)
    n_vocab, n_ctx = logits.shape[-1], ids.shape[1]
    excluded = xp.zeros(logits.shape, dtype=xp.bool)
    for word in words:
        if not word or not all(0 <= token < n_vocab for token in word):
            raise NpllmValueError(
                f"bad_words_ids must hold token ids below n_vocab = {n_vocab}, got {list(word)}"
            )
        *prefix, last = word
        if len(prefix) > n_ctx or (not prefix and last in eos):
            continue
        follows = xp.ones((logits.shape[0], 1), dtype=xp.bool)
        for back, token in enumerate(reversed(prefix), start=1):
            follows = follows & (ids[:, n_ctx - back, None] == token)
        excluded = excluded | (follows & _is_one_of(logits, [last]))
    return _exclude(logits, excluded)


def _is_one_of(logits: Array, tokens: Sequence[int]) -> Array:
    """Which entries of the vocabulary are among some tokens: bool [n_vocab]."""
    xp = array_namespace(logits)
    known = [token for token in tokens if 0 <= token < logits.shape[-1]]
    return _named_by(logits, asarray(np.asarray([-1, *known], dtype=np.int64), xp))


def _named_by(logits: Array, tokens: Array) -> Array:
    """Which entries of the vocabulary an array of at least one token names: bool [n_vocab]."""
    xp = array_namespace(logits, tokens)
    vocabulary = xp.arange(logits.shape[-1], dtype=tokens.dtype)
    ordered = xp.sort(tokens)
    place = xp.searchsorted(ordered, vocabulary)
    place = xp.where(place < tokens.shape[0], place, tokens.shape[0] - 1)  # beyond all of them
    return xp.take(ordered, place, axis=0) == vocabulary


def _exclude(logits: Array, excluded: Array) -> Array:
    """Logits with -inf where `excluded` is true."""
    xp = array_namespace(logits)
    return xp.where(excluded, xp.asarray(-xp.inf, dtype=logits.dtype), logits)
