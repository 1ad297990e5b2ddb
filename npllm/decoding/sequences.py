"""The sequences of a decoding loop: prompts and what has been added, in one place."""

from typing import Any

import numpy as np

__all__ = ["Sequences", "seen_tokens"]

Array = Any


class Sequences:
    """Sequences that grow together, one token each at a step.

    Parameters
    ----------
    ids : int64 array [n_batch, n_prompt]
        NumPy; padded on the left where the prompts differ in length.
    valid : bool array [n_batch, n_prompt]
        NumPy; False where `ids` is padding.
    n_vocab : int
    n_new : int
        How many tokens may be appended.

    Attributes
    ----------
    seen : bool array [n_batch, n_vocab]
        Which tokens a sequence holds, padding left out.
    """

    def __init__(self, ids: Array, valid: Array, n_vocab: int, n_new: int):
        self.n_prompt = self.n_ctx = ids.shape[1]
        self.n_max = self.n_ctx + n_new
        self.seen = seen_tokens(ids, valid, n_vocab)
        self._ids = np.zeros((len(ids), self.n_max), dtype=np.int64)
        self._valid = np.ones(self._ids.shape, dtype=bool)
        self._ids[:, : self.n_ctx] = ids
        self._valid[:, : self.n_ctx] = valid
        self._ends = np.full(len(ids), self.n_max)

    @property
    def ids(self) -> Array:
        """Token ids so far: int64 [n_batch, n_ctx], a view."""
        return self._ids[:, : self.n_ctx]

    @property
    def valid(self) -> Array:
        """Which slots hold tokens: bool [n_batch, n_ctx], a view."""
        return self._valid[:, : self.n_ctx]

    @property
    def new_ids(self) -> Array:
        """The tokens that were appended: int64 [n_batch, n_new], a view."""
        return self._ids[:, self.n_prompt : self.n_ctx]

    @property
    def n_new(self) -> int:
        """How many tokens were appended to each sequence."""
        return self.n_ctx - self.n_prompt

    def append(self, tokens: Array) -> None:
        """Append one token to each sequence: integers [n_batch]."""
        self._ids[:, self.n_ctx] = tokens
        self.seen[np.arange(len(tokens)), tokens] = True
        self.n_ctx += 1

    def select(self, rows: Array) -> None:
        """Let row r hold what row rows[r] holds now."""
        self._ids, self._valid = self._ids[rows], self._valid[rows]
        self.seen, self._ends = self.seen[rows], self._ends[rows]

    def end(self, rows: Array) -> None:
        """Note that the sequences named by a bool array [n_batch] end here."""
        self._ends[rows] = np.minimum(self._ends[rows], self.n_ctx)

    def n_new_of_each(self) -> list[int]:
        """How many tokens each sequence gained until its end."""
        return (np.minimum(self._ends, self.n_ctx) - self.n_prompt).tolist()

    def filled(self, fill: int) -> Array:
        """Return all ids, those behind the end of a sequence replaced: int64 [n_batch, n_ctx]."""
        return np.where(np.arange(self.n_ctx) < self._ends[:, None], self.ids, fill)


def seen_tokens(ids: Array, valid: Array, n_vocab: int) -> Array:
    """Mark the tokens of each prompt, padding left out: bool [n_batch, n_vocab]."""
    seen = np.zeros((ids.shape[0], n_vocab), dtype=bool)
    rows, columns = np.nonzero(valid)
    seen[rows, ids[rows, columns]] = True
    return seen
