"""Many sequences in one row as a tree: each common prefix is stored once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from npllm.arrays import array_namespace
from npllm.ops.mask.rule import ALL, NONE, SOME, Rule

__all__ = ["PrefixTree", "Tree", "trees"]

Array = Any


class Tree(NamedTuple):
    """Sequences as the paths of a tree, its nodes in the order of a walk from the root."""

    ids: Array  # int64 [n_seq]: the token of each node
    positions: Array  # int64 [n_seq]: number of nodes before it on its path
    stop: Array  # int64 [n_seq]: the slot after the last node of its subtree
    paths: dict[int, Array]  # number of a sequence -> the slots of its tokens, int64 [n]

    @property
    def is_chain(self) -> bool:
        """Whether no two sequences part: the tree is the longest of them."""
        return max(map(len, self.paths.values())) == len(self.ids)


@dataclass(frozen=True, eq=False, repr=False)
class PrefixTree(Rule):
    """Let a query see the nodes on its own path only.

        visible(i, j) = j <= i < stop[j]  and  positions[i] - positions[j] < window

    In the order of a walk the subtree of node j fills the slots j ... stop[j] - 1, so that the
    nodes whose subtree holds i are those on the path to i.

    Parameters
    ----------
    stop, positions : integer array [n_seq]
        Of a `Tree`.
    window : int or None
        Of a sliding window; None: no limit.
    """

    stop: Array
    positions: Array
    window: int | None = None

    def visible(self, i: Array, j: Array) -> Array:
        """Evaluate the rule on slots."""
        inside = (j <= i) & (i < _at(self.stop, j))
        if self.window is None:
            return inside
        return inside & (_at(self.positions, i) - _at(self.positions, j) < self.window)

    def bound(self, i_low: int, i_high: int, j_low: int, j_high: int) -> int:
        """Say what holds for a whole block."""
        if j_low > i_high:
            return NONE
        if not isinstance(self.stop, np.ndarray) or j_high >= len(self.stop):
            return SOME
        stop = self.stop[j_low : j_high + 1]
        if i_low >= stop.max():
            return NONE
        sees_all = j_high <= i_low and i_high < stop.min() and self.window is None
        return ALL if sees_all else SOME


def _at(x: Array, slots: Array) -> Array:
    """Entries of x [n_seq] at slots of any shape."""
    xp = array_namespace(x)
    return xp.reshape(xp.take(x, xp.reshape(slots, (-1,)), axis=0), slots.shape)


def trees(sequences: Sequence[Sequence[int]], capacity: int) -> Iterator[Tree]:
    """Arrange sequences in trees of at most `capacity` tokens, in sorted order.

    Parameters
    ----------
    sequences : list of list of int
        Each of 1 ... capacity tokens.
    capacity : int

    Yields
    ------
    tree : Tree
        Each sequence is a path of one of them.
    """
    order = sorted(range(len(sequences)), key=lambda number: list(sequences[number]))
    builder = _Builder()
    for number in order:
        if not builder.fits(sequences[number], capacity):
            yield builder.tree()
            builder = _Builder()
        builder.add(number, sequences[number])
    if builder.paths:
        yield builder.tree()


class _Builder:
    """A tree that sequences are added to, in sorted order."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.stop: list[int] = []
        self.paths: dict[int, Array] = {}
        self._last: Sequence[int] = ()
        self._path: list[int] = []

    def fits(self, sequence: Sequence[int], capacity: int) -> bool:
        """Tell whether there is room for the tokens of a sequence that are new."""
        n_new = len(sequence) - _n_common(self._last, sequence)
        return not self.paths or len(self.ids) + n_new <= capacity

    def add(self, number: int, sequence: Sequence[int]) -> None:
        """Add a path; what it shares with the last one is there already."""
        n_common, n = _n_common(self._last, sequence), len(self.ids)
        for slot in self._path[n_common:]:
            self.stop[slot] = n
        n_new = len(sequence) - n_common
        self._path = [*self._path[:n_common], *range(n, n + n_new)]
        self.ids += list(sequence[n_common:])
        self.positions += range(n_common, len(sequence))
        self.stop += [0] * n_new
        self._last = sequence
        self.paths[number] = np.array(self._path)

    def tree(self) -> Tree:
        """Return what was built."""
        for slot in self._path:
            self.stop[slot] = len(self.ids)
        ids, positions, stop = map(np.array, (self.ids, self.positions, self.stop))
        return Tree(ids, positions, stop, self.paths)


def _n_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens that two sequences begin with alike."""
    n = min(len(one), len(other))
    return next((k for k in range(n) if one[k] != other[k]), n)
