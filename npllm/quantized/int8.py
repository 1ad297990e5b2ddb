"""Weights in 8 bits: symmetric, with one scale for each group of neighbouring entries of a row."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from npllm.arrays import array_namespace, asarray, expect_shape
from npllm.errors import NpllmValueError
from npllm.threads import run_blocks

__all__ = ["GROUP", "Int8Weight", "quantize"]

GROUP = 64  # entries that share a scale; with a float32 scale a weight takes 8.5 bits
BLOCK = 2**20  # entries to quantize at a time


@dataclass(frozen=True, eq=False, repr=False)
class Int8Weight:
    """A matrix in 8 bits, which `linear` and `embed` take in place of a float one.

        weight[o, i] = scales[o, i // GROUP] * values[o, i]

    Parameters
    ----------
    values : int8 array [d_out, d_in]
        In -127 ... 127.
    scales : float32 array [d_out, ceil(d_in / GROUP)]

    Raises
    ------
    NpllmValueError
        When the shapes do not fit.

    Notes
    -----
    Immutable.  It has the shape, dtype and row slices of a matrix and no arithmetic: `npllm.arrays.widen` gives its float32 values.

    Source: "LLM.int8()" (Dettmers et al. 2022), section 2.1, absmax quantisation; the group of Q8_0 in llama.cpp is 32, with a
    float16 scale, which takes the same 8.5 bits.
    """

    values: Any
    scales: Any

    def __post_init__(self):
        expect_shape("values", self.values, d_out=None, d_in=None)
        expect_shape("scales", self.scales, d_out=self.values.shape[0], n_group=-(-self.values.shape[1] // GROUP))

    ndim = 2
    shape = property(lambda self: self.values.shape)
    dtype = property(lambda self: self.values.dtype)

    def __array_namespace__(self, *, api_version=None):
        """The library that the values belong to."""
        return array_namespace(self.values, self.scales)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        """Some of the rows: a slice, or a slice and `:` for all columns."""
        rows = rows[0] if isinstance(rows, tuple) and rows[1:] == (slice(None),) else rows
        if not isinstance(rows, slice):
            raise NpllmValueError(f"an Int8Weight can be cut into slices of rows only, got index {rows!r}")
        return Int8Weight(self.values[rows, :], self.scales[rows, :])

    def take(self, rows):
        """The rows of the given numbers, a flat integer array."""
        xp = array_namespace(self.values, rows)
        return Int8Weight(xp.take(self.values, rows, axis=0), xp.take(self.scales, rows, axis=0))

    def widened(self):
        """The float32 values; whole, so ask a block of rows for them."""
        xp = array_namespace(self.values, self.scales)
        return xp.astype(self.values, xp.float32) * xp.repeat(self.scales, GROUP, axis=-1)[:, : self.shape[1]]

    def to(self, xp):
        """The same weight in another array library."""
        return Int8Weight(asarray(self.values, xp), asarray(self.scales, xp))

    @property
    def nbytes(self):
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes


def quantize(weight):
    """Round a matrix to 8 bits, group by group.

        scale = max_i |weight[o, i]| / 127 over the group;   values[o, i] = round(weight[o, i] / scale)

    Parameters
    ----------
    weight : array [d_out, d_in]
        NumPy, of any float type; finite.

    Returns
    -------
    quantized : Int8Weight
        No entry is off by more than half its group's scale.

    Raises
    ------
    NpllmValueError
        When `weight` is no matrix, or holds NaN or infinity, for which there is no scale.
    """
    expect_shape("weight", weight, d_out=None, d_in=None)
    d_out, d_in = weight.shape
    n_group = -(-d_in // GROUP)
    values, scales = np.empty((d_out, d_in), np.int8), np.empty((d_out, n_group), np.float32)
    n_rows = max(1, BLOCK // max(1, d_in))
    run_blocks(lambda start: _quantize_rows(weight[start : start + n_rows], values[start : start + n_rows],
                                            scales[start : start + n_rows]), range(0, d_out, n_rows))
    return Int8Weight(values, scales)


def _quantize_rows(weight, values, scales):
    """Fill in values and scales of some rows."""
    n_rows, d_in = weight.shape
    padded = np.zeros((n_rows, scales.shape[1] * GROUP), np.float32)
    padded[:, :d_in] = weight
    groups = padded.reshape(n_rows, -1, GROUP)
    scales[...] = np.abs(groups).max(axis=-1) / 127
    if not np.isfinite(scales).all():
        raise NpllmValueError("a weight that holds NaN or infinity cannot be rounded to int8; `npllm inspect --check-finite` names "
                              "every such tensor")
    steps = np.divide(groups, scales[..., None], out=np.zeros_like(groups), where=scales[..., None] > 0)
    np.clip(np.rint(steps, out=steps), -127, 127, out=steps)  # where a scale is denormal, a step may be above 127
    values[...] = steps.reshape(n_rows, -1)[:, :d_in]
