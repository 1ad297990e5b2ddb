"""A packed matrix whose columns are stored in another order."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from npllm.arrays import array_namespace, asarray, expect_shape, is_packed
from npllm.quantized.packed import PackedMatrix

__all__ = ["PermutedWeight"]

Array = Any


@dataclass(frozen=True, eq=False, repr=False)
class PermutedWeight(PackedMatrix):
    """A matrix whose columns are those of a packed one, in another order.

        weight[o, order[i]] = base[o, i]
        sum_i x[i] * weight[o, i] = sum_i x[order[i]] * base[o, i]

    GPTQ with desc_act has groups of columns that are not adjacent.  Sorted by their groups, they
    are blocks, which kernels read; the entries of x take the same order.

    Parameters
    ----------
    base : PackedMatrix [d_out, d_in]
    order : integer array [d_in]
        A permutation of 0 ... d_in - 1.

    Raises
    ------
    NpllmValueError
        When the shapes do not fit.

    Notes
    -----
    Immutable.

    Source: `make_q4` of ExLlama and `gptq_shuffle` of vLLM sort the columns at load as well.
    """

    format = "permuted"
    base: Any
    order: Array

    def __post_init__(self) -> None:
        array_namespace(self.base, self.order)
        expect_shape("base", self.base, d_out=None, d_in=None)
        expect_shape("order", self.order, d_in=self.base.shape[1])

    @cached_property
    def inverse(self) -> Array:
        """Where each column lies in the base."""
        return array_namespace(self.order).argsort(self.order)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """[d_out, d_in]."""
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the base."""
        return self.base.dtype

    @property
    def arrays(self) -> tuple[Any, ...]:  # type: ignore[override]
        """The base, and the order."""
        return self.base, self.order

    @property
    def nbytes(self) -> int:
        """Bytes of the base and of the order."""
        return self.base.nbytes + self.order.nbytes

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        """Return the library that the base belongs to."""
        return array_namespace(self.base)

    def rows(self, span: slice) -> "PermutedWeight":
        """Return the rows of a slice."""
        return PermutedWeight(self.base[span, :], self.order)

    def take(self, numbers: Array) -> Any:
        """Return the rows with the given numbers, a 1-D integer array."""
        rows = self.base.take(numbers)
        return PermutedWeight(rows, self.order) if is_packed(rows) else self._unsorted(rows)

    def widened(self) -> Array:
        """Return the float32 values of all rows; slice first to widen a band of rows."""
        return self._unsorted(self.base.widened())

    def _unsorted(self, rows: Array) -> Array:
        """Bring columns of the base into the order of the matrix."""
        return array_namespace(rows).take(rows, self.inverse, axis=1)

    def to(self, xp: Any) -> "PermutedWeight":
        """Return the same weight in another array library."""
        return PermutedWeight(asarray(self.base, xp), asarray(self.order, xp))
