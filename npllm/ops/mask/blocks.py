"""Sparse patterns of blocks and of chosen slots."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from npllm.arrays import array_namespace
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.ops.mask.causal_and_window import at_least, causal, check_slots
from npllm.ops.mask.rule import ALL, NONE, SOME, DerivedRule, Rule

__all__ = ["block_local", "fixed", "global_tokens", "random_blocks"]

Array = Any


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
