"""What every weight that is no array of floats offers: a shape, rows, float32 values."""

from typing import Any, Self

from npllm.errors import NpllmValueError

__all__ = ["PackedMatrix"]

Array = Any


class PackedMatrix:
    """A matrix [d_out, d_in] that is stored in fewer bits and widened band by band.

    `npllm.ops.linear` and `embed` take one in place of an array.  A format defines `shape`,
    `dtype` (of what is stored), `arrays`, `nbytes`, `__array_namespace__`, and the four methods
    below.

    Notes
    -----
    It has no arithmetic: `npllm.arrays.widen` returns its float32 values.
    """

    ndim = 2
    activation_group = 32  # entries of x that share a scale, where a product rounds them
    shape: Any
    arrays: Any  # what is stored: a tuple of arrays and of packed matrices

    def rows(self, span: slice) -> Self:
        """Return the rows of a slice, without a copy where the library has views."""
        raise NotImplementedError

    def take(self, numbers: Array) -> Self:
        """Return the rows with the given numbers, a 1-D integer array."""
        raise NotImplementedError

    def widened(self) -> Array:
        """Return the float32 values of all rows; slice first to widen a band of rows."""
        raise NotImplementedError

    def to(self, xp: Any) -> Self:
        """Return the same weight in another array library."""
        raise NotImplementedError

    @property
    def facts(self) -> str:
        """What tells two matrices of a format apart besides their arrays."""
        return type(self).__name__

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Self:
        """Return some of the rows: a slice, or a slice and `:` for all columns."""
        rows = index[0] if isinstance(index, tuple) and index[1:] == (slice(None),) else index
        if not isinstance(rows, slice):
            raise NpllmValueError(
                f"{type(self).__name__} can be indexed by slices of rows only, got index {index!r}"
            )
        return self.rows(rows)
