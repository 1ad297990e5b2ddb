"""Arrays of a case: values in the target dtype, memory layouts, guard bands."""

from typing import Any

import numpy as np

from npllm.arrays import DTYPES
from npllm.testing.arithmetic import TINY

__all__ = ["LAYOUTS", "Array", "Guarded", "laid_out", "normal", "same_bits", "tiny_scale"]

Array = Any

GUARD = 64  # entries before and behind a guarded output

LAYOUTS = ("contiguous", "position-major", "every other", "inside a larger array")
"""Names of the memory layouts that `laid_out` makes."""


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    """Draw normal values, rounded to `dtype`."""
    return rng.standard_normal(shape).astype(DTYPES[dtype])


def tiny_scale(dtype: str) -> float:
    """Return a factor that makes values near 1 subnormal in `dtype`."""
    return TINY[dtype] / 8


def laid_out(x: Array, layout: str) -> Array:
    """Copy an array into another memory layout; NaN (or -1) fills the places between.

    Parameters
    ----------
    x : array [..., m, n]
    layout : str
        "contiguous"; "position-major": the axis before the last but one runs slower than it;
        "every other": the last axis has a stride of two entries; "inside a larger array": a view of
        the middle of a buffer.

    Returns
    -------
    y : array
        Equal to `x`, writeable.
    """
    if layout == "every other":
        buffer = _filled((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
        view = buffer[..., ::2]
    elif layout == "inside a larger array":
        buffer = _filled(tuple(n + 2 for n in x.shape), x.dtype)
        view = buffer[tuple(slice(1, n + 1) for n in x.shape)]
    elif layout == "position-major" and x.ndim > 1:
        axes = (-3, -2) if x.ndim > 2 else (-2, -1)
        view = np.swapaxes(np.empty_like(np.swapaxes(x, *axes), order="C"), *axes)
    else:
        view = np.empty_like(x, order="C")
    view[...] = x
    return view


def _filled(shape: tuple[int, ...], dtype: Any) -> Array:
    is_integer = np.dtype(dtype).kind in "iub"
    return (
        np.full(shape, -1 if is_integer and np.dtype(dtype).kind == "i" else 0, dtype=dtype)
        if (is_integer)
        else np.full(shape, np.nan, dtype=dtype)
    )


def same_bits(x: Any, y: Any) -> bool:
    """Tell whether two values are equal bit by bit, NaN and strides included."""
    if not hasattr(x, "dtype"):
        return bool(x == y)
    x, y = np.ascontiguousarray(x), np.ascontiguousarray(y)
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


class Guarded:
    """Memory for an output: NaN inside, and a band of known bits on each side.

    Parameters
    ----------
    shape : tuple of int
    dtype : str
    """

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        size = int(np.prod(shape))
        self.buffer = np.full(size + 2 * GUARD, np.nan, dtype=DTYPES[dtype])
        self.buffer[:GUARD] = self.buffer[GUARD + size :] = 1.5
        self.out = self.buffer[GUARD : GUARD + size].reshape(shape)

    def is_intact(self) -> bool:
        """Tell whether nothing was written beside the output."""
        size = self.out.size
        bands = self.buffer[:GUARD], self.buffer[GUARD + size :]
        return all(bool((band == 1.5).all()) for band in bands)
