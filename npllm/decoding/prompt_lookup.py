"""Prompt lookup decoding: what followed the last tokens earlier is proposed, and verified in one
pass.

Each token is chosen from its own logits, with its own random number, so that the text depends on
the logits alone.  The compiled set gives the same bits for up to 16 tokens in a pass as for each
alone, so there the text is the same.  Other sets, and weights in the blocks of GGUF, sum in another
order: there another token can be chosen at a near tie.
"""

from typing import Any

import numpy as np

__all__ = ["PromptLookup", "continuation"]

Array = Any

LONGEST, SHORTEST = 3, 2  # tokens at the end that are looked for earlier in the sequence
MOST_PROPOSED = 15  # which are 16 rows with the token before them
MOST_WAITING = 64  # tokens for which nothing is proposed after proposals that were of no use


def continuation(ids: Array, n_tokens: int) -> Array:
    """Return the tokens that followed where the sequence last stood as it stands now.

        the largest n in 3, 2 with an i < n_ctx where ids[i-n:i] = ids[-n:];  of these i the last
        one that n_tokens follow, else the first  ->  ids[i:i+n_tokens]

    Parameters
    ----------
    ids : integer array [n_ctx]
        NumPy.
    n_tokens : int

    Returns
    -------
    proposed : integer array [at most n_tokens]
        Empty where the last tokens do not stand there earlier.

    Notes
    -----
    Source: "Prompt Lookup Decoding" (Saxena 2023); `PromptLookupCandidateGenerator` in
    Transformers, which takes the first place always.
    """
    for n in range(LONGEST, SHORTEST - 1, -1):
        n_place = len(ids) - n
        if n_place < 1:
            continue
        found = np.ones(n_place, bool)
        for k in range(n):
            found &= ids[k : k + n_place] == ids[n_place + k]
        starts = np.flatnonzero(found) + n
        if len(starts):
            enough = starts[starts + n_tokens <= len(ids)]
            start = enough[-1] if len(enough) else starts[0]
            return ids[start : start + n_tokens]
    return ids[:0]


class PromptLookup:
    """Proposes tokens for one sequence, and fewer of them where few are kept.

    Parameters
    ----------
    n_tokens : int
        Proposed at most, and never more than MOST_PROPOSED.

    Notes
    -----
    As many are proposed as were kept the last time, and as many again and one.  When none is kept,
    nothing is proposed for a while, which doubles each time: a pass that verifies tokens costs more
    than one that does not.
    """

    def __init__(self, n_tokens: int):
        self.n_tokens = self._n = min(n_tokens, MOST_PROPOSED)
        self._pause = self._left = 0

    def propose(self, ids: Array, n_most: int) -> Array:
        """Return tokens that may follow ids [n_ctx]: at most n_most, and none during a pause."""
        if self._left > 0:
            self._left -= 1
            return ids[:0]
        return continuation(ids, max(0, min(self._n, n_most)))

    def learn(self, n_proposed: int, n_kept: int) -> None:
        """Take note of how many of the proposed tokens were kept."""
        if n_proposed == 0:
            return
        self._n = min(self.n_tokens, 2 * n_kept + 1)
        self._pause = 0 if n_kept else min(MOST_WAITING, 2 * self._pause + 1)
        self._left = self._pause
