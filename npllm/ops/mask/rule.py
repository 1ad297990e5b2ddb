"""What a mask rule is.

A rule is a function of two *slots*, the places of a query and of a key in the sequence: `rule(i,
j)` is True where the query in slot i sees the key in slot j.  Rules combine with `&`, `|` and `~`.
Attention asks a rule only about the block that it is working on, so no n x n array exists; and it
asks the rule's `bound` first, to skip a block of which nothing is visible and to drop the mask
where everything is.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from npllm.arrays import array_namespace

__all__ = ["ALL", "FAR", "NONE", "SOME", "Rule"]

NONE, SOME, ALL = 0, 1, 2
"""What a rule may say of a whole block: no pair is visible; some may be; every pair is."""

FAR = 2**40
"""Farther apart than any two slots are: the end of a band that has none."""


def _unknown(*_):
    return SOME


@dataclass(frozen=True)
class Rule:
    """Which key slot is visible from which query slot.

    Parameters
    ----------
    visible : function (i, j) -> bool array
        `i` and `j` are integer arrays of slots that broadcast against each other, usually [n_seq,
        1] and [1, n_ctx].  The result may have further axes in front: [n_batch, 1, n_seq, n_ctx]
        for a rule that differs by sequence.
    bound : function (i_low, i_high, j_low, j_high) -> NONE, SOME or ALL
        What holds for every query slot in i_low ... i_high and key slot in j_low ... j_high, both
        ends included.  SOME is always a correct answer, NONE and ALL are promises.
    band : tuple (low, high), optional
        What a kernel may evaluate instead: the rule is exactly low <= i - j < high.  None: it is no
        such band.
    left_band : tuple (low, high, start), optional
        The same for rows that are padded on the left: the rule is exactly low <= i - j < high and j
        >= start[batch].  `start` is an integer array [n_batch], or None where nothing is padded,
        which is what a `band` implies.
    """

    visible: Callable
    bound: Callable = _unknown
    band: tuple[int, int] | None = None
    left_band: tuple[int, int, Any] | None = field(default=None, compare=False)

    def __post_init__(self):
        if self.band and self.left_band is None:
            object.__setattr__(self, "left_band", (*self.band, None))

    def __call__(self, i, j):
        """Evaluate the rule on slots."""
        return self.visible(i, j)

    def __and__(self, other):
        left_band = (
            _both(self.left_band, other.left_band) if self.left_band and other.left_band else None
        )
        band = left_band[:2] if self.band and other.band else None
        return Rule(
            lambda i, j: self(i, j) & other(i, j),
            lambda *block: min(self.bound(*block), other.bound(*block)),
            band,
            left_band,
        )

    def __or__(self, other):
        return Rule(
            lambda i, j: self(i, j) | other(i, j),
            lambda *block: max(self.bound(*block), other.bound(*block)),
        )

    def __invert__(self):
        return Rule(lambda i, j: ~self(i, j), lambda *block: ALL - self.bound(*block))


def _both(one, other):
    """Intersect two bands behind padding."""
    starts = [band[2] for band in (one, other) if band[2] is not None]
    start = array_namespace(*starts).maximum(*starts) if len(starts) == 2 else (*starts, None)[0]
    return max(one[0], other[0]), min(one[1], other[1]), start
