"""Memory layout of arrays: what a kernel that loads by index may be given.

Every array that such a kernel reads passes through here once, where the kernel is entered; `simd`
refuses others while it compiles.
"""

from typing import Any

import numpy as np

__all__ = [
    "EMPTY",
    "few_rows_of",
    "frozen",
    "is_row_major",
    "row_major",
    "row_major_copy",
    "rows_of",
]

Array = Any


def is_row_major(x: Array) -> bool:
    """Tell whether entry i of an array, counted row by row, is entry i of its memory, and each at a
    multiple of its size.
    """
    return x.flags.c_contiguous and x.flags.aligned


def row_major(x: Array) -> Array:
    """A view of the array where it `is_row_major`, else a copy that is.

    Read-only in any case: Numba would compile every kernel once more for arrays that are not.
    """
    return frozen(x.view() if is_row_major(x) else row_major_copy(x))


def frozen(x: Array) -> Array:
    """The same array object, read-only from now on."""
    x.flags.writeable = False
    return x


def row_major_copy(x: Array) -> Array:
    """A copy that `is_row_major`, for a kernel that adds to it in place."""
    return np.array(x, order="C")


def rows_of(x: Array) -> Array:
    """An array [..., d] as rows [n, d] in row-major order."""
    return row_major(x.reshape(-1, x.shape[-1]))


def few_rows_of(x: Array) -> Array:
    """A copy of an array [..., d] as rows [n, d] in row-major order.

    Writable, as are the rows that one kernel hands to the next, so that each is compiled once.
    """
    return row_major_copy(x.reshape(-1, x.shape[-1]))


EMPTY = frozen(np.zeros(0, np.float32))  # for no gain and no bias, in Python and inside kernels
