"""Which arrays the kernels of both CPU sets are made for."""

from typing import Any

import numpy as np

from npllm.arrays import DTYPES
from npllm.kernels.cpu.layout import is_row_major

__all__ = ["STORED", "fits_bias", "fits_weight", "is_float32"]

Array = Any

FLOAT32 = np.dtype(np.float32)
STORED = frozenset(DTYPES[name] for name in ("bfloat16", "float16", "float32"))


def is_float32(*arrays: Any) -> bool:
    """Tell whether all are NumPy arrays of float32 with at least one axis."""
    for (
        x
    ) in arrays:  # called for every operation: a generator would take as long as the check itself
        if type(x) is not np.ndarray or x.dtype != FLOAT32 or x.ndim == 0:
            return False
    return True


def fits_weight(weight: Array, d_in: int, bias: Array = None) -> bool:
    """Tell whether a weight is one that the kernels are made for."""
    return (
        type(weight) is np.ndarray
        and weight.ndim == 2
        and is_row_major(weight)
        and weight.dtype in STORED
        and weight.shape[1] == d_in > 0
        and d_in % 2 == 0
        and len(weight) > 0
        and fits_bias(bias, weight)
    )


def fits_bias(bias: Array, weight: Array) -> bool:
    """Tell whether a bias, where there is one, goes with a weight."""
    return bias is None or (
        type(bias) is np.ndarray and bias.shape == weight.shape[:1] and bias.dtype in STORED
    )
