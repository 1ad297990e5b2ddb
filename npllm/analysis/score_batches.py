"""Scores of many texts: texts of about one length go through the model together."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from npllm.analysis.score import WINDOW, Score, score, token_log_probs
from npllm.errors import NpllmError
from npllm.kernels import FEW_ROWS
from npllm.models import rope

__all__ = ["score_batches"]

Array = Any
Ids = Sequence[int]

TOKENS = 512  # of a pass, padding included
LEAST_SHARE = 0.75  # of the longest text of a pass: so little of it is padding


def score_batches(model: Any, texts: Sequence[Ids]) -> Iterator[tuple[int, Score | NpllmError]]:
    """Compute `score` of many texts, several in a forward pass.

    Parameters
    ----------
    model : Model
    texts : list of list of int
        Token ids, at least two of each.

    Yields
    ------
    number, scored : int, Score or NpllmError
        Of each text, the longest first; the error where one cannot be scored, as `score` raises it.

    Notes
    -----
    Texts are padded on the right, where causal attention does not see it.  Under a mask of the
    caller's, which may be another one, only texts of one length share a pass; so do only texts of
    the same RoPE frequencies.  A text that is longer than a window of `score` is scored by itself.

    On the compiled set a text has the bits that it has alone: at most 16 rows go together, or
    more than 16 with texts that have more than 16 by themselves.  Where the array library
    multiplies (other sets, float64), products of other sizes round differently.
    """
    order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
    for group in _groups(model, texts, order):
        scores = _scores(model, [texts[number] for number in group])
        yield from zip(group, scores, strict=True)


def _groups(model: Any, texts: Sequence[Ids], order: list[int]) -> Iterator[list[int]]:
    """Numbers of texts that go together, in their order."""
    group: list[int] = []
    for number in order:
        if group and not _goes_with(model, texts[group[0]], texts[number], len(group) + 1):
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def _goes_with(model: Any, longest: Ids, text: Ids, n_texts: int) -> bool:
    """Whether a text can be read as one of so many, of which the first is the longest."""
    most, n = len(longest) - 1, len(text) - 1  # tokens that are read: the last one is scored only
    if most >= min(WINDOW, model.config.context_length):
        return False
    is_few = most <= FEW_ROWS
    if is_few != (n <= FEW_ROWS) or most * n_texts > (FEW_ROWS if is_few else TOKENS):
        return False
    if model.mask is not None and n != most:
        return False
    choices = [rope.frequency_choice(model.config, length) for length in (most, n)]
    return choices[0] == choices[1] and n >= LEAST_SHARE * most


def _scores(model: Any, texts: list[Ids]) -> Iterator[Score | NpllmError]:
    """The score of each text of a group, or what is wrong with it."""
    hidden = _hidden(model, texts) if len(texts) > 1 else None
    for row, text in enumerate(texts):
        try:
            if hidden is None:
                yield score(model, list(text))
                continue
            ids = np.asarray(text, np.int64)
            states = hidden[row : row + 1, : len(ids) - 1, :]
            yield Score(ids, np.concatenate(token_log_probs(model, states, ids[1:])))
        except NpllmError as error:
            yield error


def _hidden(model: Any, texts: list[Ids]) -> Array | None:
    """Hidden states of texts, padded on the right; None where one of them is no input."""
    n_seq = len(texts[0]) - 1
    ids = np.zeros((len(texts), n_seq), np.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text) - 1] = text[:-1]
    try:
        return model.model(ids)
    except NpllmError:
        return None
