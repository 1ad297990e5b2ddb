"""Sparse patterns: rules that leave most of the score table out."""

from dataclasses import dataclass
from typing import Any

from npllm.ops.mask.causal_and_window import at_least, causal
from npllm.ops.mask.rule import ALL, NONE, SOME, DerivedRule, Rule

__all__ = [
    "band",
    "dilated_window",
    "longformer_window",
    "strided",
]

Array = Any


def band(before: int, after: int) -> Rule:
    """Let a query see a band around its own slot.

        visible(i, j) = -after <= i - j <= before

    Parameters
    ----------
    before, after : int
        Number of slots before and after the query's own.

    Returns
    -------
    rule : Rule

    Notes
    -----
    Source: "Generating Long Sequences with Sparse Transformers" (Child et al. 2019), section 4;
    local attention.
    """
    at_least("before", before, 0)
    at_least("after", after, 0)
    return Band(int(before), int(after))


@dataclass(frozen=True, eq=False, repr=False)
class Band(Rule):
    """The rule of `band`."""

    before: int
    after: int

    def visible(self, i: Array, j: Array) -> Array:
        """Evaluate the rule on slots."""
        return (i - j <= self.before) & (i - j >= -self.after)

    def bound(self, i_low: int, i_high: int, j_low: int, j_high: int) -> int:
        """Say what holds for a whole block."""
        farthest, nearest = i_high - j_low, i_low - j_high  # the range of i - j in the block
        if farthest < -self.after or nearest > self.before:
            return NONE
        return ALL if farthest <= self.before and nearest >= -self.after else SOME


def longformer_window(w: int) -> Rule:
    """Let a query see w // 2 slots on either side of its own.

        visible(i, j) = |i - j| <= w // 2

    Parameters
    ----------
    w : int

    Returns
    -------
    rule : Rule

    Notes
    -----
    Source: "Longformer" (Beltagy et al. 2020), section 3.1, sliding window.
    """
    at_least("w", w, 0)
    return band(w // 2, w // 2)


def dilated_window(w: int, dilation: int) -> Rule:
    """Let a query see w // 2 slots on either side, with gaps of `dilation` between them.

        visible(i, j) = |i - j| <= dilation * (w // 2) and (i - j) mod dilation = 0

    Parameters
    ----------
    w : int
    dilation : int

    Returns
    -------
    rule : Rule

    Notes
    -----
    Source: "Longformer" (Beltagy et al. 2020), section 3.1, dilated sliding window.
    """
    at_least("w", w, 0)
    at_least("dilation", dilation, 1)
    return DilatedWindow(int(w), int(dilation))


@dataclass(frozen=True, eq=False, repr=False)
class DilatedWindow(DerivedRule):
    """The rule of `dilated_window`."""

    w: int
    dilation: int

    def definition(self) -> Rule:
        """Return the rules that define this one, combined."""
        reach = self.dilation * (self.w // 2)
        return band(reach, reach) & Every(self.dilation)


@dataclass(frozen=True, eq=False, repr=False)
class Every(Rule):
    """Let a query see the keys at distances that are multiples of `step`."""

    step: int

    def visible(self, i: Array, j: Array) -> Array:
        """Evaluate the rule on slots."""
        return (i - j) % self.step == 0

    def bound(self, *_: int) -> int:
        """Say what holds for a whole block."""
        return ALL if self.step == 1 else SOME


def strided(stride: int) -> Rule:
    """Let a query see its last `stride` slots, and every `stride`-th slot before them.

        visible(i, j) = j <= i and (i - j <= stride or (i - j) mod stride = 0)

    Parameters
    ----------
    stride : int
        Near the square root of the length.

    Returns
    -------
    rule : Rule
        Both parts of the factorised pattern, merged into one head.

    Notes
    -----
    Source: "Generating Long Sequences with Sparse Transformers" (Child et al. 2019), section 4.2,
    strided attention.
    """
    at_least("stride", stride, 1)
    return Strided(int(stride))


@dataclass(frozen=True, eq=False, repr=False)
class Strided(DerivedRule):
    """The rule of `strided`."""

    stride: int

    def definition(self) -> Rule:
        """Return the rules that define this one, combined."""
        return band(self.stride, 0) | (causal() & Every(self.stride))
