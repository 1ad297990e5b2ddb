"""A matrix whose rows come from several matrices of different formats."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from npllm.arrays import array_namespace, asarray, is_packed, widen, widest
from npllm.errors import NpllmValueError
from npllm.quantized.block_weight import BlockWeight
from npllm.quantized.packed import PackedMatrix
from npllm.quantized.permuted import PermutedWeight

__all__ = ["StackedWeight", "stack"]

Array = Any


@dataclass(frozen=True, eq=False, repr=False)
class StackedWeight(PackedMatrix):
    """Rows of several matrices, one matrix below the other.

        weight = [parts[0]; parts[1]; ...]

    Files in mixed formats need it: Q4_K_M stores the value rows of some layers in more bits than
    the query and key rows, and `qkv_proj` has all three.

    Parameters
    ----------
    parts : tuple of PackedMatrix or array [d_out_i, d_in]
        At least one, each with rows; float arrays and formats may be mixed.

    Raises
    ------
    NpllmValueError
        When there is no part, or their widths differ.

    Notes
    -----
    Immutable; holds the parts without a copy.
    """

    parts: tuple[Any, ...]

    def __post_init__(self) -> None:
        array_namespace(*self.parts)
        widths = {part.shape[1] for part in self.parts}
        if len(widths) != 1:
            raise NpllmValueError(
                f"the parts of a stacked weight must have one width d_in, got {sorted(widths)}"
            )

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """[d_out, d_in]."""
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    def dtype(self) -> Any:
        """float64 where a part is, else uint8: the compute dtype of a product depends on it."""
        xp = array_namespace(*self.parts)
        return xp.float64 if any(part.dtype == xp.float64 for part in self.parts) else xp.uint8

    @property
    def arrays(self) -> tuple[Any, ...]:  # type: ignore[override]
        """The parts."""
        return self.parts

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        """Return the library that the parts belong to."""
        return array_namespace(*self.parts)

    def rows(self, span: slice) -> "StackedWeight":
        """Return the rows of a slice; each part that has some of them gives a slice."""
        start, stop, step = span.indices(len(self))
        if step != 1:
            raise NpllmValueError(f"rows of a stacked weight are sliced with step 1, got {step}")
        chosen, first = [], 0
        for part in self.parts:
            n = part.shape[0]
            low, high = max(0, start - first), min(n, stop - first)
            if low < high:
                chosen.append(part[low:high, :])
            first += n
        return StackedWeight(tuple(chosen) or (self.parts[0][:0, :],))

    def take(self, numbers: Array) -> Any:
        """Return the rows with the given numbers, a 1-D integer array, widened.

        Each part is asked for a row for every number: no number is looked at on the host.
        """
        xp = array_namespace(*self.parts, numbers)
        y, first = None, 0
        for part in self.parts:
            inside = (numbers >= first) & (numbers < first + part.shape[0])
            local = xp.where(inside, numbers - first, xp.zeros_like(numbers))
            rows = part.take(local) if is_packed(part) else xp.take(part, local, axis=0)
            wide = widen(rows, self._wide_dtype(xp))
            y = wide if y is None else xp.where(inside[:, None], wide, y)
            first += part.shape[0]
        return y

    def widened(self) -> Array:
        """Return the values of all rows: float32, or float64 where a part is."""
        xp = array_namespace(*self.parts)
        return xp.concat([widen(part, self._wide_dtype(xp)) for part in self.parts], axis=0)

    def _wide_dtype(self, xp: Any) -> Any:
        return xp.float64 if self.dtype == xp.float64 else xp.float32

    def to(self, xp: Any) -> "StackedWeight":
        """Return the same weight in another array library."""
        return StackedWeight(tuple(asarray(part, xp) for part in self.parts))


def stack(parts: list[Any]) -> Any:
    """Put matrices below each other, in one array where they are of one type.

    Parameters
    ----------
    parts : list of array [d_out_i, d_in] or PackedMatrix
        NumPy.

    Returns
    -------
    stacked : array, BlockWeight, PermutedWeight or StackedWeight [sum of d_out_i, d_in]
        Arrays of several types are widened to the widest.
    """
    if len(parts) == 1:
        return parts[0]
    if not any(map(is_packed, parts)):
        dtype = widest(part.dtype for part in parts)
        return np.concatenate([part.astype(dtype, copy=False) for part in parts])
    first = parts[0]
    if all(isinstance(x, PermutedWeight) and (x.order == first.order).all() for x in parts):
        return PermutedWeight(stack([part.base for part in parts]), first.order)
    formats = {part.format if isinstance(part, BlockWeight) else None for part in parts}
    if len(formats) == 1 and None not in formats:
        return BlockWeight(np.concatenate([part.blocks for part in parts]), parts[0].format)
    return StackedWeight(tuple(parts))
