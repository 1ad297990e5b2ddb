"""Compiled functions that the kernels of blocks call at their address.

What calls them knows no format: all kernels of a step are compiled once, whatever the formats of a
model's weights are, and what a thread does with its rows is compiled once for all kernels.
Arguments are integers: addresses, and distances in bytes.
"""

from functools import cache
from typing import Any

import llvmlite.binding
import numpy as np
from numba import config, types

from npllm.kernels.cpu.block_codes import STEP, UNITS
from npllm.kernels.cpu.block_units import add_unit, widen_unit
from npllm.kernels.cpu.launching import kernel
from npllm.kernels.cpu.numba_internals import c_function
from npllm.kernels.cpu.simd_addresses import (
    call_address,
    float_at,
    integer_at,
    load_vectors,
    pack_step,
    prefetch_at,
    set_float,
    stack_floats,
    store_vectors,
    sum_of_vector,
)

__all__ = [
    "COLUMNS",
    "MOST_ROWS",
    "add_rows_function",
    "has_lookup",
    "multiply_function",
    "pack_function",
    "widen_function",
]

FLOAT, VECTOR, LINE, LANES = 4, 64, 64, 16  # bytes; floats of a vector
STEP_BYTES = 5 * VECTOR  # of x as it is stored
AHEAD = 4096  # bytes by which weights are prefetched, for one row of x
RUN = 6144  # entries of rows of x, all together, that stay in a nearest cache of 32 KiB
MOST_ROWS = 32  # of a weight that are multiplied at a time
# columns of a table that describes a weight, one integer each: what it is, and what multiplies it
# with 1, 2, 4 or 8 rows of x, 0 where nothing does
COLUMNS = range(12)
ADDRESS, ROW_BYTES, N_ROWS, D_IN, ENTRIES, UNIT_BYTES, X_UNIT, WIDEN, ADD, *_ = COLUMNS
MOST_DOUBLED = 3  # columns of ADD behind the first


@cache
def has_lookup() -> bool:
    """Tell whether this processor looks up sixteen floats in a register, and Numba may use it."""
    is_host = config.CPU_NAME is None and config.CPU_FEATURES is None and config.ENABLE_AVX
    return bool(is_host and llvmlite.binding.get_host_cpu_features().get("avx512f"))


@cache
def add_rows_function(name: str, n: int, looks_up: bool) -> Any:
    """Compile the function that adds a run of products of rows of a weight with n rows of x.

        sums[o, r, L] += sum_j scale[o, j, L] * (sum_k (code[o, j, L, k] - zero) * x[r, j, 4 L + k])
                       + minimum'[o, j, L] * (sum_k x[r, j, 4 L + k])
        minimum' = minimum + zero * scale

    over the steps j of the run: a block's products are added up, then scaled.

    Parameters
    ----------
    name : str
        A format.
    n : int
    looks_up : bool
        4-bit codes are widened by a table in a register, else by conversion: the same numbers.

    Returns
    -------
    function : with an `address`
        Of w, row_bytes, n_rows, n_units, ahead, x, x_bytes, totals, left, sums: addresses of the
        run in the first row of the weight and of x, and of sums [n_rows, n, 16].  n_units 0: one
        block of 32 entries is left.  `ahead`: bytes by which weights are prefetched.
    """
    unit = UNITS[name]
    n_bytes, n_step = unit.n_bytes, unit.n_entries // STEP
    half, many = n_bytes // 2 if n_step == 1 else 0, n_bytes > LINE
    x_unit = n_step * STEP_BYTES

    def add_rows(
        w: int,
        row_bytes: int,
        n_rows: int,
        n_units: int,
        ahead: int,
        x: int,
        x_bytes: int,
        totals: int,
        _left: int,
        sums: int,
    ) -> None:
        for o in range(n_rows):
            p, at, t, y = w + o * row_bytes, x, totals, load_vectors(n, sums + o * n * VECTOR)
            for _ in range(n_units):
                prefetch_at(p + ahead)
                if many:
                    prefetch_at(p + ahead + LINE)
                    prefetch_at(p + ahead + 2 * LINE)
                y = add_unit(name, looks_up, half, p, at, x_bytes, t, y)
                p, at, t = p + n_bytes, at + x_unit, t + VECTOR
            if n_units == 0:
                y = add_unit(name, looks_up, 0, p, at, x_bytes, t, y)
            store_vectors(sums + o * n * VECTOR, y)

    return c_function(add_rows, types.void(*[types.intp] * 10))


@cache
def widen_function(name: str) -> Any:
    """Compile the function that widens a run of a row: the numbers of the format's definition.

    Parameters
    ----------
    name : str
        A format.

    Returns
    -------
    function : with an `address`
        Of w, start, n, target, ahead: addresses of the row and of n floats, which become its
        entries start ... start + n - 1; both are multiples of 16.
    """
    unit = UNITS[name]
    n_entries, n_bytes = unit.n_entries, unit.n_bytes
    half = n_bytes // 2 if n_entries == STEP else 0

    def widen(w: int, start: int, n: int, target: int, ahead: int) -> None:
        for u in range(start // n_entries, (start + n - 1) // n_entries + 1):
            p, low, high = w + u * n_bytes, start - u * n_entries, start + n - u * n_entries
            for line in range(0, n_bytes, LINE):
                prefetch_at(p + ahead + line)
            distance = half if high > n_entries // 2 else 0
            widen_unit(name, p, distance, target - FLOAT * low, low, high)

    return c_function(widen, types.void(*[types.intp] * 5))


@cache
def pack_function() -> Any:
    """Compile the function that stores rows of x as `block_units` describes, zeros at the end.

    Returns
    -------
    function : with an `address`
        Of x, d, n, target, target_bytes: addresses of rows [n, d], and of rows that are
        target_bytes apart.
    """

    def pack(x: int, d: int, n: int, target: int, target_bytes: int) -> None:
        n_step, last = (d + STEP - 1) // STEP, stack_floats(STEP)
        for k in range(n):
            source, to = x + k * d * FLOAT, target + k * target_bytes
            for i in range(STEP):
                at = d // STEP * STEP + i
                set_float(last + i * FLOAT, float_at(source + at * FLOAT) if at < d else 0.0)
            for s in range(n_step):
                start = source + s * STEP * FLOAT if (s + 1) * STEP <= d else last
                low, high = pack_step(start, to + s * STEP_BYTES)
                at = to + n_step * STEP_BYTES + s // 4 * VECTOR + s % 4 * 2 * FLOAT
                set_float(at, low)
                set_float(at + FLOAT, high)
                set_float(at + 8 * FLOAT, low)
                set_float(at + 9 * FLOAT, high)

    return c_function(pack, types.void(*[types.intp] * 5))


@cache
def multiply_function() -> Any:
    """Compile the function that adds the products of rows of a weight with all rows of x.

    Returns
    -------
    function : with an `address`
        Of part, first, n_rows, rows, n, packed, packed_bytes, y, y_bytes, n_y: the address of a
        row of a table; which rows of the weight, at most 32; addresses of the rows of x [n_y,
        d_in], and of n rows as `pack` stores them; that of n_y rows of sums, y_bytes apart, to
        whose columns 0 ... n_rows - 1 is added.

    Notes
    -----
    Lanes are added up at the end, so that no sum depends on the runs.  A sum that is not finite is
    computed anew.
    """
    n_sum = MOST_ROWS * (1 << MOST_DOUBLED) * LANES

    def multiply(
        part: int,
        first: int,
        n_rows: int,
        rows: int,
        n: int,
        packed: int,
        packed_bytes: int,
        y: int,
        y_bytes: int,
        n_y: int,
    ) -> None:
        row_bytes, d = integer_at(part, ROW_BYTES), integer_at(part, D_IN)
        w, sums = integer_at(part, ADDRESS) + first * row_bytes, stack_floats(n_sum)
        k, doubled = 0, MOST_DOUBLED
        while k < n:
            while 1 << doubled > n - k or integer_at(part, ADD + doubled) == 0:
                doubled -= 1
            group = 1 << doubled
            add_runs(part, w, n_rows, doubled, packed + k * packed_bytes, packed_bytes, sums)
            for r in range(min(group, n_y - k)):
                for o in range(n_rows):
                    total = sum_of_vector(sums + (o * group + r) * VECTOR)
                    if not np.isfinite(total):
                        total = exact_product(part, w + o * row_bytes, rows + (k + r) * d * FLOAT)
                    at = y + (k + r) * y_bytes + o * FLOAT
                    set_float(at, float_at(at) + total)
            k += group

    return c_function(multiply, types.void(*[types.intp] * 10))


@kernel(nogil=True)
def add_runs(part: int, w: int, n_rows: int, doubled: int, x: int, x_bytes: int, sums: int) -> None:
    """Compute sums [n_rows, group, 16] of rows of a weight from w on with a group of rows of x, of
    which there are 2**doubled.

    Runs are of one length, and of as many entries at most as stay in the nearest cache.
    """
    d, entries, group = integer_at(part, D_IN), integer_at(part, ENTRIES), 1 << doubled
    row_bytes, function = integer_at(part, ROW_BYTES), integer_at(part, ADD + doubled)
    units, totals = d // entries, x + (d + STEP - 1) // STEP * STEP_BYTES
    most, ahead = max(RUN // group // entries, 1), AHEAD if group == 1 else 2 * row_bytes
    n_run = max((units + most - 1) // most, 1)
    run = (units + n_run - 1) // n_run
    for i in range(n_rows * group * LANES):
        set_float(sums + i * FLOAT, np.float32(0))
    u, left = 0, d % entries // 32
    while u < units or (u == units and d % entries > 0):
        n_units = min(run, units - u)
        at, x_at = w + u * integer_at(part, UNIT_BYTES), x + u * integer_at(part, X_UNIT)
        t = totals + u * VECTOR
        arguments = at, row_bytes, n_rows, n_units, ahead, x_at, x_bytes, t, left, sums
        call_address(function, arguments)
        u += max(n_units, 1)


@kernel(nogil=True)
def exact_product(part: int, w: int, x: int) -> Any:
    """The product of a row at w with a row at x, entry by entry, as the definition has it.

    Of a block whose scale is infinite, entries may be infinite of either sign or NaN: their sum
    is not that of the block's codes times the scale.
    """
    d, wide, y = integer_at(part, D_IN), stack_floats(STEP), np.float32(0)
    for start in range(0, d, STEP):
        n = min(STEP, d - start)
        call_address(integer_at(part, WIDEN), (w, start, n, wide, 0))
        for i in range(n):
            y += float_at(wide + i * FLOAT) * float_at(x + (start + i) * FLOAT)
    return y
