"""Search the tensors of a GGUF file for NaN and infinity, without loading it."""

from pathlib import Path

import numpy as np

from npllm.arrays import widen
from npllm.checkpoints.gguf.reader import GGUFFile
from npllm.errors import NpllmValueError

__all__ = ["find_nonfinite_blocks"]

BAND = 2**20  # entries to widen at a time


def find_nonfinite_blocks(path: Path) -> dict[str, tuple[int, int]]:
    """Find the tensors that hold NaN or infinity, also by a scale of a block.

    Parameters
    ----------
    path : Path
        A GGUF file.

    Returns
    -------
    counts : dict of str to tuple of int
        Tensor name -> (number of NaN, number of infinities), in the order of names.

    Raises
    ------
    NpllmOSError, NpllmValueError
        As `GGUFFile`; for a tensor of a type that has no definition.

    Notes
    -----
    A scale of infinity gives NaN where the integer is 0.
    """
    counts = {}
    for name, tensor in sorted(GGUFFile(path).tensors.items()):
        try:
            n_nan, n_infinite = _count(tensor.stored)
        except NpllmValueError as error:
            raise NpllmValueError(f"{path}: {error}") from None
        if n_nan or n_infinite:
            counts[name] = n_nan, n_infinite
    return counts


def _count(x: np.ndarray) -> tuple[int, int]:
    """Count (NaN, infinities), a band of rows at a time."""
    n_rows = max(1, BAND // x.shape[-1]) if x.ndim == 2 else max(1, len(x))
    n_nan = n_infinite = 0
    for start in range(0, len(x), n_rows):
        wide = widen(x[start : start + n_rows])
        n_nan += int(np.isnan(wide).sum())
        n_infinite += int(np.isinf(wide).sum())
    return n_nan, n_infinite
