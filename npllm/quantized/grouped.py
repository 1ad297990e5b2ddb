"""Weights in integers with a scale for each group of columns, which may be any columns."""

from dataclasses import dataclass
from typing import Any

from npllm.arrays import array_namespace, asarray, expect_shape, ieee_semantics, widen
from npllm.errors import NpllmTypeError
from npllm.quantized.packed import PackedMatrix

__all__ = ["GroupedWeight"]

Array = Any


@dataclass(frozen=True, eq=False, repr=False)
class GroupedWeight(PackedMatrix):
    """A matrix in integers, which `linear` and `embed` take in place of a float one.

        weight[o, i] = scales[o, groups[i]] * values[o, i]

    Checkpoints store codes q and zero points z with w = scale * (q - z); `values` holds q - z,
    which is an integer as well.

    Parameters
    ----------
    values : int8 or int16 array [d_out, d_in]
        int16 where q - z exceeds 8 bits: codes of 8 bits with a zero point other than 128.
    scales : array [d_out, n_group]
        float16, bfloat16 or float32, as stored.
    groups : integer array [d_in]
        The group of each column, in 0 ... n_group - 1.  GPTQ with desc_act has groups of columns
        that are not adjacent.

    Raises
    ------
    NpllmTypeError
        When values or groups are no integers.
    NpllmValueError
        When the shapes do not fit.

    Notes
    -----
    Immutable.  The definition of what GPTQ and compressed-tensors store; kernels take the same
    matrix as a `BlockWeight` wherever `npllm.quantized.regrouping.pack_groups` finds one.

    Source: "GPTQ" (Frantar et al. 2022), section 4, grouping.
    """

    format = "grouped"
    values: Array
    scales: Array
    groups: Array

    def __post_init__(self) -> None:
        xp = array_namespace(self.values, self.groups)
        expect_shape("values", self.values, d_out=None, d_in=None)
        d_out, d_in = self.values.shape
        expect_shape("scales", self.scales, d_out=d_out, n_group=None)
        expect_shape("groups", self.groups, d_in=d_in)
        if self.values.dtype not in (xp.int8, xp.int16):
            raise NpllmTypeError(f"values must be int8 or int16, got {self.values.dtype}")
        if self.groups.dtype not in (xp.int32, xp.int64):
            raise NpllmTypeError(f"groups must be int32 or int64, got {self.groups.dtype}")

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """[d_out, d_in]."""
        return self.values.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the values."""
        return self.values.dtype

    @property
    def arrays(self) -> tuple[Any, ...]:  # type: ignore[override]
        """Values, scales and groups."""
        return self.values, self.scales, self.groups

    @property
    def nbytes(self) -> int:
        """Bytes of values, scales and groups."""
        return sum(x.nbytes for x in self.arrays)

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        """Return the library that the values belong to."""
        return array_namespace(self.values)

    def rows(self, span: slice) -> "GroupedWeight":
        """Return the rows of a slice."""
        return GroupedWeight(self.values[span, :], self.scales[span, :], self.groups)

    def take(self, numbers: Array) -> "GroupedWeight":
        """Return the rows with the given numbers, a 1-D integer array."""
        xp = array_namespace(self.values, numbers)
        values, scales = (xp.take(x, numbers, axis=0) for x in (self.values, self.scales))
        return GroupedWeight(values, scales, self.groups)

    @ieee_semantics
    def widened(self) -> Array:
        """Return the float32 values of all rows; slice first to widen a band of rows."""
        xp = array_namespace(self.values)
        scales = xp.take(widen(self.scales, xp.float32), self.groups, axis=1)
        return xp.astype(self.values, xp.float32) * scales

    def to(self, xp: Any) -> "GroupedWeight":
        """Return the same weight in another array library.

        Scales are widened to float32 on the way: not every library has the 16-bit types.
        """
        if array_namespace(self.values) is xp:
            return self
        values, groups = asarray(self.values, xp), asarray(self.groups, xp)
        return GroupedWeight(values, asarray(widen(self.scales), xp), groups)
