"""Sparse patterns: rules that leave most of the score table out."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from npllm.arrays import array_namespace
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.ops.mask.dense import at_least, causal, check_slots
from npllm.ops.mask.rule import ALL, NONE, SOME, DerivedRule, Rule

__all__ = [
    "band",
    "block_local",
    "dilated_window",
    "fixed",
    "global_tokens",
    "longformer_window",
    "random_blocks",
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


def fixed(stride: int, c: int) -> Rule:
    """Let a query see its own block so far, and the last `c` slots of every earlier block.

        visible(i, j) = j <= i and (j // stride = i // stride or j mod stride >= stride - c)

    Parameters
    ----------
    stride : int
        Slots of a block.
    c : int
        Slots at the end of a block that summarise it, 1 <= c <= stride.

    Returns
    -------
    rule : Rule
        Both parts of the factorised pattern, merged into one head.

    Notes
    -----
    Source: "Generating Long Sequences with Sparse Transformers" (Child et al. 2019), section 4.2,
    fixed attention.
    """
    at_least("stride", stride, 1)
    at_least("c", c, 1)
    if c > stride:
        raise NpllmValueError(f"c must be at most stride = {stride}, got {c}")
    return Fixed(int(stride), int(c))


@dataclass(frozen=True, eq=False, repr=False)
class Fixed(DerivedRule):
    """The rule of `fixed`."""

    stride: int
    c: int

    def definition(self) -> Rule:
        """Return the rules that define this one, combined."""
        return causal() & (block_local(self.stride) | BlockEnds(self.stride, self.c))


@dataclass(frozen=True, eq=False, repr=False)
class BlockEnds(Rule):
    """Let every query see the last `c` slots of every block of `stride`."""

    stride: int
    c: int

    def visible(self, i: Array, j: Array) -> Array:
        """Evaluate the rule on slots."""
        return (j % self.stride >= self.stride - self.c) & (i == i)

    def bound(self, _: int, __: int, j_low: int, j_high: int) -> int:
        """Say what holds for a whole block."""
        first_end = self.stride - self.c  # within a block
        starts_in_end = j_low % self.stride >= first_end
        if self.c == self.stride:
            return ALL
        if starts_in_end:
            return ALL if j_low // self.stride == j_high // self.stride else SOME
        next_end = j_low - j_low % self.stride + first_end
        return NONE if next_end > j_high else SOME


def block_local(block: int) -> Rule:
    """Let a query see the keys of its own block.

        visible(i, j) = i // block = j // block

    Parameters
    ----------
    block : int

    Returns
    -------
    rule : Rule

    Notes
    -----
    Source: "Generating Wikipedia by Summarizing Long Sequences" (Liu et al. 2018), section 4.2.5,
    local attention.
    """
    at_least("block", block, 1)
    return BlockLocal(int(block))


@dataclass(frozen=True, eq=False, repr=False)
class BlockLocal(Rule):
    """The rule of `block_local`."""

    block: int

    def visible(self, i: Array, j: Array) -> Array:
        """Evaluate the rule on slots."""
        return i // self.block == j // self.block

    def bound(self, i_low: int, i_high: int, j_low: int, j_high: int) -> int:
        """Say what holds for a whole block."""
        queries = i_low // self.block, i_high // self.block
        keys = j_low // self.block, j_high // self.block
        if queries[1] < keys[0] or keys[1] < queries[0]:
            return NONE
        return ALL if queries == keys and queries[0] == queries[1] else SOME


def global_tokens(slots: Sequence[int]) -> Rule:
    """Let chosen slots see everything, and be seen by everything.

        visible(i, j) = i in slots or j in slots

    Parameters
    ----------
    slots : sequence of int

    Returns
    -------
    rule : Rule
        To be combined: `longformer_window(512) | global_tokens([0])`, in a causal model `causal() &
        (...)`.

    Raises
    ------
    NpllmTypeError
        When the slots are not integers.

    Notes
    -----
    Source: "Longformer" (Beltagy et al. 2020), section 3.1, global attention.
    """
    chosen = np.unique(np.asarray(slots))
    if chosen.size and chosen.dtype.kind not in "iu":
        raise NpllmTypeError(f"slots must be integers, got {slots!r}")
    return GlobalTokens(tuple(chosen.tolist()))


@dataclass(frozen=True, eq=False, repr=False)
class GlobalTokens(Rule):
    """The rule of `global_tokens`."""

    slots: tuple[int, ...]  # ascending, each once

    def visible(self, i: Array, j: Array) -> Array:
        """Evaluate the rule on slots."""
        return self._is_chosen(i) | self._is_chosen(j)

    def bound(self, i_low: int, i_high: int, j_low: int, j_high: int) -> int:
        """Say what holds for a whole block."""
        counts = []
        for low, high in ((i_low, i_high), (j_low, j_high)):
            n = bisect_left(self.slots, high + 1) - bisect_left(self.slots, low)
            counts.append((n, high - low + 1))
        if any(n == size for n, size in counts):
            return ALL
        return SOME if any(n for n, _ in counts) else NONE

    def _is_chosen(self, slots: Array) -> Array:
        """Tell for each slot whether it is one of the chosen."""
        found = slots != slots
        for slot in self.slots:
            found = found | (slots == slot)
        return found


def random_blocks(block: int, n_blocks: int, n_random: int, seed: int) -> Rule:
    """Let every block of queries see a few blocks of keys drawn at random, the same on every call.

        visible(i, j) = j // block is one of the n_random blocks drawn for i // block

    Parameters
    ----------
    block : int
        Slots of a block.
    n_blocks : int
        Blocks of the longest sequence.
    n_random : int
        Blocks drawn for each block of queries, 0 <= n_random <= n_blocks.
    seed : int

    Returns
    -------
    rule : Rule
        To be combined: `longformer_window(w) | global_tokens(g) | random_blocks(...)`.

    Raises
    ------
    NpllmValueError
        For a count out of range; and when the rule is asked about a slot on the host beyond the
        n_blocks.

    Notes
    -----
    Source: "Big Bird" (Zaheer et al. 2020), section 2.
    """
    at_least("block", block, 1)
    at_least("n_blocks", n_blocks, 1)
    at_least("n_random", n_random, 0)
    at_least("seed", seed, 0)
    if n_random > n_blocks:
        raise NpllmValueError(f"n_random must be at most n_blocks = {n_blocks}, got {n_random}")
    return RandomBlocks(int(block), int(n_blocks), int(n_random), int(seed))


@dataclass(frozen=True, eq=False, repr=False)
class RandomBlocks(Rule):
    """The rule of `random_blocks`."""

    block: int
    n_blocks: int
    n_random: int
    seed: int

    @cached_property
    def _drawn(self) -> Array:
        """Which blocks of keys are drawn for each block of queries: bool [n_blocks, n_blocks]."""
        rng = np.random.Generator(np.random.Philox(key=self.seed))
        order = np.argsort(rng.random((self.n_blocks, self.n_blocks)), axis=1, kind="stable")
        return order < self.n_random

    def visible(self, i: Array, j: Array) -> Array:
        """Evaluate the rule on slots."""
        xp = array_namespace(i, j)
        for slots in (i, j):
            check_slots(slots, self.n_blocks * self.block)
        flat = xp.reshape(xp.asarray(self._drawn), (-1,))
        pairs = (i // self.block) * self.n_blocks + j // self.block
        return xp.reshape(xp.take(flat, xp.reshape(pairs, (-1,))), pairs.shape)

    def bound(self, i_low: int, i_high: int, j_low: int, j_high: int) -> int:
        """Say what holds for a whole block."""
        if min(i_low, j_low) < 0 or max(i_high, j_high) >= self.n_blocks * self.block:
            return SOME
        rows = slice(i_low // self.block, i_high // self.block + 1)
        columns = slice(j_low // self.block, j_high // self.block + 1)
        part = self._drawn[rows, columns]
        return ALL if part.all() else SOME if part.any() else NONE
