"""Search the tensors of a checkpoint for NaN and infinity, without loading it."""

from os import PathLike
from typing import NamedTuple

import numpy as np

from npllm.checkpoints.safetensors import TensorEntry, read_entries
from npllm.config.regular_file import open_regular
from npllm.errors import NpllmOSError

__all__ = ["find_nonfinite"]

BLOCK = 2**22  # numbers to read at a time


class _Format(NamedTuple):
    """A float type, as the unsigned integer that its bits are read as."""

    integer: str  # NumPy dtype of the same width, little-endian
    exponent: int  # all bits of the exponent set


FORMATS = {
    "BF16": _Format("<u2", 0x7F80),
    "F16": _Format("<u2", 0x7C00),
    "F32": _Format("<u4", 0x7F800000),
    "F64": _Format("<u8", 0x7FF0000000000000),
}


def find_nonfinite(folder: str | PathLike[str]) -> dict[str, tuple[int, int]]:
    """Find the tensors that hold NaN or infinity, without loading the checkpoint.

        infinite: all bits of the exponent are 1, all bits of the fraction 0
        NaN: all bits of the exponent are 1, some bit of the fraction is 1

    Parameters
    ----------
    folder : str or Path

    Returns
    -------
    counts : dict of str to tuple of int
        Tensor name -> (number of NaN, number of infinities), in the order of names; empty where
        every number is finite.

    Raises
    ------
    NpllmOSError, NpllmValueError
        As `read_entries`.

    Notes
    -----
    Reads blocks of 2**22 numbers.  Tensors of dtypes that `load_params` refuses are left out.

    Source: IEEE 754-2019, section 3.4.
    """
    counts = {}
    for name, entry in sorted(read_entries(folder).items()):
        if entry.dtype in FORMATS:
            n_nan, n_infinite = _count_nonfinite(entry)
            if n_nan or n_infinite:
                counts[name] = n_nan, n_infinite
    return counts


def _count_nonfinite(entry: TensorEntry) -> tuple[int, int]:
    """Count (NaN, infinities) of one tensor in its file."""
    integer, exponent = FORMATS[entry.dtype]
    dtype = np.dtype(integer)
    all_but_sign = np.array(2 ** (8 * dtype.itemsize - 1) - 1, dtype)
    n_left = (entry.stop - entry.start) // dtype.itemsize
    n_nan = n_infinite = 0
    with open_regular(entry.file) as file:
        file.seek(entry.start)
        while n_left:
            bits = np.fromfile(file, dtype, min(n_left, BLOCK))
            if not len(bits):
                raise NpllmOSError(f"{entry.file}: ends within a tensor; did it change meanwhile?")
            bits &= all_but_sign
            n_nan += int(np.count_nonzero(bits > exponent))
            n_infinite += int(np.count_nonzero(bits == exponent))
            n_left -= len(bits)
    return n_nan, n_infinite
