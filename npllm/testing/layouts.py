"""Layouts of attention arrays, written like einops patterns: "b n h d", "(b h) n d"."""

import re
from typing import Any

import numpy as np

from npllm.errors import NpllmValueError

__all__ = ["Layout"]

Array = Any

AXES = ("b", "h", "n", "d")


class Layout:
    """A way to order the axes batch b, heads h, positions n and channels d.

    Parameters
    ----------
    pattern : str
        The four letters, each once; letters in brackets share an axis, the last one running
        fastest.  Without b the function takes one sequence at a time.

    Raises
    ------
    NpllmValueError
        For a pattern that does not name h, n and d once each, and b at most once.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.groups = [
            tuple(group.strip("()").split())
            for group in re.findall(r"\([^()]*\)|[^\s()]+", pattern)
        ]
        self.letters = [letter for group in self.groups for letter in group]
        self.batched = "b" in self.letters
        if sorted(self.letters) != sorted(AXES if self.batched else AXES[1:]):
            raise NpllmValueError(
                "layout must name each of b, h, n, d once (b may be left out), such as "
                f"'b n h d', got {pattern!r}"
            )

    def pack(self, x: Array) -> Array:
        """Bring [b, h, n, d] into this layout; without b, [h, n, d].  A view if possible."""
        axes = AXES if self.batched else AXES[1:]
        size = dict(zip(axes, x.shape, strict=True))
        moved = np.transpose(x, [axes.index(letter) for letter in self.letters])
        if all(len(group) == 1 for group in self.groups):
            return moved
        return moved.reshape(
            [int(np.prod([size[letter] for letter in group])) for group in self.groups]
        )

    def unpack(self, y: Array, shape: tuple[int, ...], what: str) -> Array:
        """Bring a result in this layout back to [b, h, n, d] = shape; without b, [h, n, d].

        Raises
        ------
        NpllmValueError
            When the result does not have the shape that the layout says.
        """
        axes = AXES if self.batched else AXES[1:]
        size = dict(zip(axes, shape, strict=True))
        wanted = [int(np.prod([size[letter] for letter in group])) for group in self.groups]
        if list(y.shape) != wanted:
            raise NpllmValueError(
                f'{what} must return "{self.pattern}" = {wanted}, got {list(y.shape)}'
            )
        split = y.reshape([size[letter] for letter in self.letters])
        return np.transpose(split, [self.letters.index(letter) for letter in axes])
