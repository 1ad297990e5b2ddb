"""The names of weight types that are no floats: how a matrix is rounded to each, and its bytes."""

from collections.abc import Callable
from typing import Any

import numpy as np

from npllm.arrays import DTYPES, dtype_named, is_packed, widen
from npllm.errors import NpllmValueError
from npllm.quantized.block_formats import FORMATS
from npllm.quantized.block_packing import quantize_blocks
from npllm.quantized.block_weight import BlockWeight
from npllm.quantized.int8 import GROUP, quantize

__all__ = [
    "NAMES",
    "QUANTIZERS",
    "check_dtype",
    "convert",
    "int4_format",
    "matrix_bytes",
    "quantize_int4",
]

Array = Any

BAND = 2**22  # entries to widen and round at a time


def int4_format(d_in: int) -> str | None:
    """Return the format of dtype="int4" for rows of d_in entries: 4 bits, groups of 32.

    Q4_K where a row is whole blocks of 256, else Q4_1; None, which means int8, where a row is no
    whole groups of 32.

    Notes
    -----
    Both have a scale and a minimum for each group.  Q4_1 takes 5 bits an entry and Q4_K 4.5, for an
    error that is 1 % larger; Q4_0, which takes 4.5 as well, has one 15 to 29 % larger: see
    docs/quantisation.md.
    """
    return next((x for x in ("Q4_K", "Q4_1") if d_in % FORMATS[x].n_entries == 0), None)


def quantize_int4(weight: Array) -> Any:
    """Round a matrix to 4 bits in groups of 32, with scale and minimum of least squared error.

    Parameters
    ----------
    weight : array [d_out, d_in] or PackedMatrix
        NumPy, of a float type; finite.

    Returns
    -------
    quantized : BlockWeight, or Int8Weight
        In `int4_format(d_in)`.  One that has this format already is returned as it is.

    Raises
    ------
    NpllmValueError
        When `weight` is no matrix, or holds NaN, infinity, or numbers whose scale exceeds float16.
    """
    name = int4_format(weight.shape[-1])
    if name is None:
        return quantize(np.asarray(widen(weight, np.float32)))
    if isinstance(weight, BlockWeight) and weight.format == name:
        return weight
    return quantize_blocks(weight, name)


def _quantize_int8(weight: Array) -> Any:
    """Round a matrix, also a packed one, to 8 bits."""
    return quantize(np.asarray(widen(weight, np.float32)))


QUANTIZERS: dict[str, Callable[[Array], Any]] = {"int8": _quantize_int8, "int4": quantize_int4}
"""Name of a weight type -> the function that rounds a matrix to it; vectors stay as they are."""

NAMES = (*DTYPES, *QUANTIZERS)
"""Every weight type that can be asked for."""


def check_dtype(dtype: Any) -> None:
    """Raise `NpllmValueError` unless a weight type is one of `NAMES`, or None: as stored."""
    if dtype is not None and (not isinstance(dtype, str) or dtype not in NAMES):
        raise NpllmValueError(f"dtype must be one of {', '.join(NAMES)}, got {str(dtype)[:40]!r}")


def convert(x: Array, dtype: str | None) -> Array:
    """Convert to a named weight type, a band of rows at a time.

    Parameters
    ----------
    x : array [...] or PackedMatrix
        NumPy.
    dtype : str, optional
        One of `NAMES`; None: as stored.  int8 and int4 leave vectors as they are.

    Returns
    -------
    y : array [...] or PackedMatrix
        `x` itself where nothing changes.
    """
    if dtype is None or (dtype in QUANTIZERS and x.ndim == 1):
        return x
    if dtype in QUANTIZERS:
        return QUANTIZERS[dtype](x)
    target = dtype_named(dtype)
    if not is_packed(x):
        return x.astype(target, copy=False)
    y = np.empty(x.shape, target)
    n_rows = max(1, BAND // max(1, x.shape[1]))
    for start in range(0, len(x), n_rows):
        y[start : start + n_rows] = x[start : start + n_rows].widened()
    return y


def matrix_bytes(d_out: int, d_in: int, dtype: str) -> int:
    """Count the bytes of a matrix in a weight type of `NAMES`; of int8 with float16 scales, which
    all but a few have.
    """
    if dtype in DTYPES:
        return d_out * d_in * dtype_named(dtype).itemsize
    name = int4_format(d_in) if dtype == "int4" else None
    if name is None:
        return d_out * (d_in + 2 * -(-d_in // GROUP))
    return d_out * d_in // FORMATS[name].n_entries * FORMATS[name].n_bytes
