"""Weights in 8 bits: symmetric, with one scale for each group of adjacent entries of a row."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from npllm.arrays import array_namespace, asarray, expect_shape, widen
from npllm.errors import NpllmValueError
from npllm.quantized.packed import PackedMatrix
from npllm.threads import run_blocks

__all__ = ["GROUP", "Int8Weight", "quantize"]

Array = Any

GROUP = 64  # entries that share a scale; with a float16 scale a weight takes 8.25 bits
SMALLEST = 2.0**-14  # normal float16 number
BLOCK = 2**20  # entries to quantize at a time


@dataclass(frozen=True, eq=False, repr=False)
class Int8Weight(PackedMatrix):
    """A matrix in 8 bits, which `linear` and `embed` take in place of a float one.

        weight[o, i] = scales[o, i // GROUP] * values[o, i]

    Parameters
    ----------
    values : int8 array [d_out, d_in]
        In -127 ... 127.
    scales : array [d_out, ceil(d_in / GROUP)]
        float16 (8.25 bits a weight), or float32 (8.5 bits) where the largest scale is no normal
        float16 number; kernels read either.

    Raises
    ------
    NpllmValueError
        When the shapes do not fit.

    Notes
    -----
    Immutable.  It has the shape, dtype and row slices of a matrix, and no arithmetic:
    `npllm.arrays.widen` returns its float32 values.

    Source: "LLM.int8()" (Dettmers et al. 2022), section 2.1, absmax quantization.  Q8_0 of
    llama.cpp has groups of 32 with a float16 scale, 8.5 bits.
    """

    activation_group = GROUP
    values: Array
    scales: Array

    def __post_init__(self) -> None:
        expect_shape("values", self.values, d_out=None, d_in=None)
        d_out, d_in = self.values.shape
        expect_shape("scales", self.scales, d_out=d_out, n_group=_count_groups(d_in))

    @property
    def shape(self) -> tuple[int, ...]:
        """[d_out, d_in]."""
        return self.values.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the values, int8."""
        return self.values.dtype

    @property
    def arrays(self) -> tuple[Any, ...]:  # type: ignore[override]
        """Values and scales."""
        return self.values, self.scales

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes

    @cached_property
    def in_whole_groups(self) -> "Int8Weight":
        """The same matrix with columns of zeros more, so that no group is shorter: what kernels
        that read a group at a time take.
        """
        n_more = -self.shape[1] % GROUP
        if not n_more:
            return self
        xp = array_namespace(self.values, self.scales)
        zeros = xp.zeros((self.shape[0], n_more), dtype=xp.int8)
        return Int8Weight(xp.concat([self.values, zeros], axis=1), self.scales)

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        """Return the library that the values belong to."""
        return array_namespace(self.values, self.scales)

    def rows(self, span: slice) -> "Int8Weight":
        """Return the rows of a slice."""
        return Int8Weight(self.values[span, :], self.scales[span, :])

    def take(self, numbers: Array) -> "Int8Weight":
        """Return the rows with the given numbers, a 1-D integer array."""
        xp = array_namespace(self.values, numbers)
        return Int8Weight(
            xp.take(self.values, numbers, axis=0), xp.take(self.scales, numbers, axis=0)
        )

    def widened(self) -> Array:
        """Return the float32 values of all rows; slice first to widen a block of rows."""
        xp = array_namespace(self.values, self.scales)
        scales = xp.repeat(widen(self.scales), GROUP, axis=-1)[:, : self.shape[1]]
        return xp.astype(self.values, xp.float32) * scales

    def to(self, xp: Any) -> "Int8Weight":
        """Return the same weight in another array library.

        Scales are widened to float32 on the way: the kernels of a device read those, and not every
        library has float16.
        """
        if array_namespace(self.values, self.scales) is xp:
            return self
        return Int8Weight(asarray(self.values, xp), asarray(widen(self.scales), xp))


def _count_groups(d_in: int) -> int:
    """Return the number of groups of a row, the last of which may be shorter."""
    return -(-d_in // GROUP)


def quantize(weight: Array) -> Int8Weight:
    """Round a matrix to 8 bits, group by group.

        scale = float16(max_i |weight[o, i]| / 127), to nearest, over the group
        values[o, i] = round(weight[o, i] / scale)

    Parameters
    ----------
    weight : array [d_out, d_in]
        NumPy, of a float type; finite.

    Returns
    -------
    quantized : Int8Weight
        The error of an entry is at most half the scale of its group.  Scales are float16; float32
        where the largest scale of the matrix is neither 0 nor a normal float16 number (2**-14 to
        65504).

    Raises
    ------
    NpllmValueError
        When `weight` is no matrix, or holds NaN or infinity, which int8 cannot represent.

    Notes
    -----
    The largest entry of a group is at most 127 (1 + 2**-11) = 127.06 rounded scales, which rounds
    to 127: nothing is cut off.  A scale that is rounded up instead makes every step longer; the
    error of docs/quantisation.md's matrices is 0.05 % larger then.  Scales below 2**-14 are
    multiples of 2**-24, and rounded up: such a step is longer by 2**-10 of the matrix's largest one
    at most.
    """
    expect_shape("weight", weight, d_out=None, d_in=None)
    quantized = _quantized(weight, np.float16)
    largest = quantized.scales.max(initial=0)
    is_normal = largest == 0 or SMALLEST <= largest < np.inf
    return quantized if is_normal else _quantized(weight, np.float32)


def _quantized(weight: np.ndarray, dtype: Any) -> Int8Weight:
    """Round a matrix with scales of a type."""
    d_out, d_in = weight.shape
    values = np.empty((d_out, d_in), np.int8)
    scales = np.empty((d_out, _count_groups(d_in)), dtype)
    n_rows = max(1, BLOCK // max(1, d_in))

    def quantize_block(start: int) -> None:
        rows = slice(start, start + n_rows)
        _quantize_rows(weight[rows], values[rows], scales[rows])

    run_blocks(quantize_block, range(0, d_out, n_rows))
    return Int8Weight(values, scales)


def _quantize_rows(weight: np.ndarray, values: np.ndarray, scales: np.ndarray) -> None:
    """Write values and scales of some rows."""
    n_rows, d_in = weight.shape
    padded = np.zeros((n_rows, scales.shape[1] * GROUP), np.float32)
    padded[:, :d_in] = weight
    groups = padded.reshape(n_rows, -1, GROUP)
    exact = np.abs(groups).max(axis=-1) / 127
    if not np.isfinite(exact).all():
        raise NpllmValueError(
            "a weight that holds NaN or infinity cannot be rounded to int8; "
            "`npllm inspect --check-finite` names every such tensor"
        )
    _round_scales(exact, scales)
    divisors = widen(scales)[..., None]
    steps = np.divide(groups, divisors, out=np.zeros_like(groups), where=divisors > 0)
    np.rint(steps, out=steps)
    np.clip(steps, -127, 127, out=steps)  # where a scale is subnormal, a step may exceed 127
    values[...] = steps.reshape(n_rows, -1)[:, :d_in]


def _round_scales(exact: np.ndarray, scales: np.ndarray) -> None:
    """Round scales to their type: to nearest, and up where they are subnormal in float16."""
    with np.errstate(over="ignore"):
        scales[...] = exact
    is_low = (exact < SMALLEST) & (widen(scales) < exact)
    scales[is_low] = np.nextafter(scales[is_low], scales.dtype.type(np.inf))
