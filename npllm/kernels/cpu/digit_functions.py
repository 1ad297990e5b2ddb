"""Compiled functions of rows of x as digits, which the kernels of blocks call at their address.

They take the same arguments as those of `block_functions` for rows of floats.
"""

from functools import cache
from typing import Any

from numba import types

from npllm.kernels.cpu.digit_codes import DIGIT_UNITS, SPAN
from npllm.kernels.cpu.digit_rows import pack_span
from npllm.kernels.cpu.digit_units import SPAN_BYTES, add_digits
from npllm.kernels.cpu.numba_internals import c_function
from npllm.kernels.cpu.simd_addresses import (
    float_at,
    load_vectors,
    prefetch_far,
    set_float,
    stack_floats,
    store_vectors,
)

__all__ = ["add_digits_function", "pack_digits_function"]

FLOAT, VECTOR, LINE = 4, 64, 64  # bytes
AHEAD = 16384  # bytes by which weights are prefetched, at least: rows of one or two spans are short


@cache
def add_digits_function(name: str, n: int, uses: bool) -> Any:
    """Compile the function that adds a run of products of rows of a weight with n rows of digits.

    The formula is in `digit_units`; two rows of the weight meet rows of x that are loaded once.

    Parameters
    ----------
    name : str
        A format.
    n : int
    uses : bool
        Bytes are multiplied by VPDPBUSD, else by plain vectors: the same bits.

    Returns
    -------
    function : with an `address`
        Of w, row_bytes, n_rows, n_units, ahead, x, x_bytes, totals, left, sums, as that of
        `block_functions.add_rows_function`; `ahead` and `totals` are not used.  n_units 0: a span
        of `left` blocks of 32 entries is left.
    """
    n_bytes, n_line = DIGIT_UNITS[name].n_bytes, -(-DIGIT_UNITS[name].n_bytes // LINE)
    most, span_bytes, both = 2, SPAN_BYTES, 2 * n

    def add_rows(
        w: int,
        row_bytes: int,
        n_rows: int,
        n_units: int,
        _ahead: int,
        x: int,
        x_bytes: int,
        _totals: int,
        left: int,
        sums: int,
    ) -> None:
        far = (AHEAD + row_bytes - 1) // row_bytes * row_bytes
        for o in range(0, n_rows - most + 1, most):
            p, at, y = w + o * row_bytes, x, load_vectors(both, sums + o * n * VECTOR)
            for _ in range(n_units):
                for k in range(most):
                    for line in range(n_line):
                        prefetch_far(p + k * row_bytes + far + line * LINE)
                y = add_digits(name, uses, most, True, p, row_bytes, left, at, x_bytes, y)
                p, at = p + n_bytes, at + span_bytes
            if n_units == 0:
                y = add_digits(name, uses, most, False, p, row_bytes, left, at, x_bytes, y)
            store_vectors(sums + o * n * VECTOR, y)
        for o in range(n_rows // most * most, n_rows):
            p, at, z = w + o * row_bytes, x, load_vectors(n, sums + o * n * VECTOR)
            for _ in range(n_units):
                z = add_digits(name, uses, 1, True, p, row_bytes, left, at, x_bytes, z)
                p, at = p + n_bytes, at + span_bytes
            if n_units == 0:
                z = add_digits(name, uses, 1, False, p, row_bytes, left, at, x_bytes, z)
            store_vectors(sums + o * n * VECTOR, z)

    return c_function(add_rows, types.void(*[types.intp] * 10))


@cache
def pack_digits_function(uses: bool) -> Any:
    """Compile the function that stores rows of x as `digit_rows` describes, zeros at the end.

    Parameters
    ----------
    uses : bool
        See `add_digits_function`.

    Returns
    -------
    function : with an `address`
        Of x, d, n, target, target_bytes: addresses of rows [n, d], and of rows that are
        target_bytes apart.
    """
    span_bytes = SPAN_BYTES

    def pack(x: int, d: int, n: int, target: int, target_bytes: int) -> None:
        last = stack_floats(SPAN)
        for k in range(n):
            source, to = x + k * d * FLOAT, target + k * target_bytes
            for i in range(SPAN):
                at = d // SPAN * SPAN + i
                set_float(last + i * FLOAT, float_at(source + at * FLOAT) if at < d else 0.0)
            for s in range((d + SPAN - 1) // SPAN):
                start = source + s * SPAN * FLOAT if (s + 1) * SPAN <= d else last
                pack_span(uses, start, to + s * span_bytes)

    return c_function(pack, types.void(*[types.intp] * 5))
