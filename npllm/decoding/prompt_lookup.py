"""Prompt lookup decoding: what followed the last tokens earlier is proposed, and verified in one
pass.

Each token is chosen from its own logits, with its own random number, so that the text depends on
the logits alone.  The compiled set gives the same bits for up to 16 tokens in a pass as for each
alone, so there the text is the same.  Other sets sum in another order: there another token can be
chosen at a near tie.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["PromptLookup", "continuation"]

Array = Any

LONGEST = 10  # tokens at the end that are looked for earlier in the sequence
# tokens that are proposed where so many match at the end: passes of 2, 4, 8 and 16 rows
PROPOSED = (0, 1, 1, 3, 3, 7, 7, 7, 7, 7, 15)
MOST_PROPOSED = PROPOSED[LONGEST]
SECONDS_DECAY = 0.8  # weight of the average so far, of the seconds of passes without proposals
BALANCE_DECAY = 0.9  # weight of the balance so far
LEAST_BALANCE = -0.5  # in passes without proposals; below it, a number of tokens pauses
FIRST_PAUSE, MOST_WAITING = 4, 64  # passes
MEASURE_EVERY = 64  # after so many passes with proposals, one without is measured
MOST_PLACES = 4096  # earlier places of the last token that are compared, the latest ones


def continuation(ids: Array, n_tokens: int) -> tuple[int, Array]:
    """Return the tokens that followed an earlier occurrence of the last tokens of a sequence.

        the largest n <= 10 with an i < n_ctx where ids[i-n:i] = ids[-n:];  of these i the last one
        that n_tokens follow, else the first  ->  n, ids[i:i+n_tokens]

    Of the earlier places of the last token, the latest 4,096 are compared.

    Parameters
    ----------
    ids : integer array [n_ctx]
        NumPy.
    n_tokens : int

    Returns
    -------
    n : int
        0 where the last token does not occur earlier.
    proposed : integer array [at most n_tokens]

    Notes
    -----
    Source: "Prompt Lookup Decoding" (Saxena 2023); `PromptLookupCandidateGenerator` in
    Transformers, which takes the first place always.
    """
    n, starts = 0, np.flatnonzero(ids[:-1] == ids[-1]) + 1
    longer = starts[-MOST_PLACES:]
    while len(longer) and n < LONGEST:
        n, starts = n + 1, longer
        longer = starts[starts > n]
        longer = longer[ids[longer - n - 1] == ids[len(ids) - n - 1]]
    if not n:
        return 0, ids[:0]
    enough = starts[starts + n_tokens <= len(ids)]
    start = enough[-1] if len(enough) else starts[0]
    return n, ids[start : start + n_tokens]


@dataclass
class Account:
    """What proposals of one number of tokens have saved, in passes without proposals.

    balance = 0.9 balance + max(-1, n_kept + 1 - cost)
    """

    balance: float = 0.0
    pause: int = 0  # passes of the last pause; 0 since proposals paid again
    left: int = 0  # passes of it that are still to come

    def note(self, n_proposed: int, n_kept: int, cost: float) -> None:
        """Take note of a pass that cost as much as `cost` passes without proposals, more than 0."""
        if cost >= n_proposed + 1:  # it would not pay if all were kept
            self._wait(4)
            return
        self.balance = BALANCE_DECAY * self.balance + max(-1.0, n_kept + 1 - cost)
        if self.balance > 0:
            self.pause = 0
        elif self.balance < LEAST_BALANCE:
            self.balance = LEAST_BALANCE / 2
            self._wait(2)

    def _wait(self, factor: int) -> None:
        self.pause = min(MOST_WAITING, max(FIRST_PAUSE, factor * self.pause))
        self.left = self.pause


class PromptLookup:
    """Proposes tokens for one sequence: more of them where more tokens match, and none where that
    does not pay.

    Parameters
    ----------
    n_tokens : int
        Proposed at most, and never more than MOST_PROPOSED.

    Notes
    -----
    What a pass of several tokens costs depends on the machine, the set and the weights: where
    reading the weights takes all the time it costs as much as one of a single token.  So the
    seconds of passes are measured.  They decide what is proposed, and never the text.

        cost = seconds of the pass / seconds of a pass without proposals
    """

    def __init__(self, n_tokens: int):
        self.n_tokens = min(n_tokens, MOST_PROPOSED)
        self._seconds = 0.0  # of a pass without proposals; 0 while nothing is known of one
        self._accounts: dict[int, Account] = defaultdict(Account)
        self._n = self._n_pass = 0  # passes with proposals since one without

    def propose(self, ids: Array, n_most: int) -> Array:
        """Return tokens that may follow ids [n_ctx]: at most n_most, and none during a pause; none
        either where a pass without proposals is to be measured.
        """
        n_matched, proposed = continuation(ids, MOST_PROPOSED)
        self._n = min(PROPOSED[n_matched], self.n_tokens)
        account = self._accounts[self._n]
        waits = account.left > 0
        account.left -= waits
        measures = not self._seconds or self._n_pass >= MEASURE_EVERY
        return proposed[: 0 if waits or measures else max(0, min(self._n, n_most))]

    def learn(self, n_proposed: int, n_kept: int, seconds: float) -> None:
        """Take note of how many of the proposed tokens were kept, and how long the pass took."""
        if seconds <= 0:  # the clock stood still, or another thread has compiled meanwhile
            return
        if n_proposed:
            self._n_pass += 1
            if n_proposed == self._n:  # else the end of the context, or of a table of RoPE, cut it
                self._accounts[self._n].note(n_proposed, n_kept, seconds / self._seconds)
            return
        before, self._n_pass = self._seconds or seconds, 0
        self._seconds = SECONDS_DECAY * before + (1 - SECONDS_DECAY) * seconds
