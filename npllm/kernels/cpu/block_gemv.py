"""Products of 1 to 16 rows with weights in blocks, which are read as they lie in the file.

A weight is a table: a row for each matrix of which it is the rows, and the addresses of the
functions of its format.  Its dtype, int64, is what tells it from an array of entries.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numba import prange

from npllm.kernels.cpu.block_forms import form_of_format
from npllm.kernels.cpu.block_functions import (
    ADDRESS,
    COLUMNS,
    MOST_ROWS,
    N_ROWS,
    ROW_BYTES,
    WIDEN,
    multiply_function,
    widen_function,
)
from npllm.kernels.cpu.launching import kernel
from npllm.kernels.cpu.layout import frozen, is_row_major
from npllm.kernels.cpu.simd_addresses import call_address
from npllm.quantized.block_formats import FORMATS
from npllm.quantized.block_weight import BlockWeight
from npllm.quantized.stacked import StackedWeight

__all__ = ["add_product_blocks", "block_table", "fits_blocks", "widen_row", "widen_rows"]

Array = Any

MOST_PARTS = 3  # q, k and v
MOST_TABLES = 4096  # that are kept: they are numbers, and keep no weight alive
MULTIPLY, PACK, WIDTH, FILL = range(4)  # of the table's last row, which are the same for all parts
VECTOR, FLOAT = 64, 4  # bytes


def fits_blocks(weight: Any) -> bool:
    """Tell whether a weight in blocks, or a stack of such, is one that the kernels are made for."""
    parts = weight.parts if isinstance(weight, StackedWeight) else (weight,)
    one_width = len({part.shape[1] for part in parts}) == 1
    return len(parts) <= MOST_PARTS and one_width and all(map(_fits_part, parts))


def _fits_part(part: Any) -> bool:
    return (
        isinstance(part, BlockWeight)
        and type(part.blocks) is np.ndarray
        and part.blocks.dtype == np.uint8
        and part.blocks.ndim == 2
        and part.blocks.shape[1] % part.layout.n_bytes == 0
        and part.blocks.size > 0
        and is_row_major(part.blocks)
    )


def block_table(weight: Any, form: str | None = None) -> Array:
    """Describe a weight in blocks to the kernels; the caller keeps the weight alive.

    Parameters
    ----------
    weight : BlockWeight or StackedWeight
        For which `fits_blocks` holds.
    form : str, optional
        One of `block_forms.FORMS`; None: the fastest of this processor.

    Returns
    -------
    table : int64 array [4, 12]
        A row for each part, zeros where there are fewer than three; then what is the same for all:
        the addresses of two functions, the bytes of a row of x as it is stored, and to a multiple
        of what rows of x are filled up.
    """
    parts = weight.parts if isinstance(weight, StackedWeight) else (weight,)
    return _table(
        tuple(
            (part.format, part.blocks.__array_interface__["data"][0], *part.blocks.shape)
            for part in parts
        ),
        form,
    )


@lru_cache(maxsize=MOST_TABLES)
def _table(parts: tuple[tuple[str, int, int, int], ...], form: str | None) -> Array:
    """The table of parts: format, address, rows, bytes of a row."""
    table = np.zeros((MOST_PARTS + 1, len(COLUMNS)), np.int64)
    for row, (name, address, n_rows, row_bytes) in zip(table, parts, strict=False):
        functions, layout = form_of_format(name, form), FORMATS[name]
        d_in = row_bytes // layout.n_bytes * layout.n_entries
        row[:] = (
            address,
            row_bytes,
            n_rows,
            d_in,
            functions.n_entries,
            functions.n_bytes,
            functions.x_bytes,
            widen_function(name).address,
            *functions.add,
        )
    shared = multiply_function().address, functions.pack, functions.row_bytes(d_in), functions.fill
    table[MOST_PARTS, [MULTIPLY, PACK, WIDTH, FILL]] = shared
    return frozen(table)


@kernel(nogil=True)
def widen_row(table: Array, row: int, start: int, depth: int, wide: int, ahead: int) -> None:
    """Write entries start ... start + depth - 1 of a row to an address, both multiples of 16; the
    row some rows ahead is prefetched.
    """
    p = 0
    while row >= table[p, N_ROWS]:
        row, p = row - table[p, N_ROWS], p + 1
    w = table[p, ADDRESS] + row * table[p, ROW_BYTES]
    call_address(table[p, WIDEN], (w, start, depth, wide, ahead * table[p, ROW_BYTES]))


@kernel(nogil=True)
def widen_rows(table: Array, numbers: Array, y: Array) -> None:
    """Write the rows with some numbers to those of y."""
    n, d_in = y.shape
    to = y.ctypes.data
    for k in range(n):
        widen_row(table, numbers[k], 0, d_in, to + k * d_in * FLOAT, 0)


@kernel()
def multiply_task(
    table: Array,
    task: int,
    rows: int,
    n: int,
    packed: int,
    width: int,
    y: int,
    d_out: int,
    n_y: int,
) -> None:
    """Add the products with the weight's rows of a task to their columns of y."""
    p, at, first = 0, 0, task * MOST_ROWS
    while first >= table[p, N_ROWS]:
        n_task = (table[p, N_ROWS] + MOST_ROWS - 1) // MOST_ROWS
        p, at, first = p + 1, at + table[p, N_ROWS], first - n_task * MOST_ROWS
    n_rows = min(MOST_ROWS, table[p, N_ROWS] - first)
    part, column = table.ctypes.data + p * table.strides[0], y + (at + first) * FLOAT
    call_address(
        table[MOST_PARTS, MULTIPLY],
        (part, first, n_rows, rows, n, packed, width, column, d_out * FLOAT, n_y),
    )


@kernel(parallel=True)
def multiply_tasks(table: Array, rows: Array, memory: Array, n: int, width: int, y: Array) -> None:
    """Compute y [n_y, d_out] += rows [n_y, d_in] @ weight.T; tasks of all parts on all threads.

    The rows stand in `memory` as well, packed, n of them, `width` bytes each.  The caller keeps the
    arrays: here they are addresses.
    """
    n_y, d_out = y.shape
    source, packed, sums = rows.ctypes.data, aligned(memory), y.ctypes.data
    n_task = 0
    for p in range(MOST_PARTS):
        n_task += (table[p, N_ROWS] + MOST_ROWS - 1) // MOST_ROWS
    for task in prange(n_task):
        # unsigned in the loop: one type, one compilation
        multiply_task(table, np.int64(task), source, n, packed, width, sums, d_out, n_y)


@kernel()
def aligned(memory: Array) -> int:
    """The first address in an array that is a multiple of 64."""
    return (memory.ctypes.data + VECTOR - 1) // VECTOR * VECTOR


@kernel()
def add_product_blocks(table: Array, rows: Array, y: Array) -> None:
    """Compute y [n, d_out] += rows [n, d_in] @ weight.T; rows of zeros fill three rows or
    more up to the multiple that the table names.
    """
    n, d = rows.shape
    width, fill = table[MOST_PARTS, WIDTH], table[MOST_PARTS, FILL]
    n_x = n if n <= 2 else (n + fill - 1) // fill * fill
    memory = np.zeros((n_x * width + VECTOR) // FLOAT, np.float32)
    call_address(table[MOST_PARTS, PACK], (rows.ctypes.data, d, n, aligned(memory), width))
    multiply_tasks(table, rows, memory, n_x, width, y)
