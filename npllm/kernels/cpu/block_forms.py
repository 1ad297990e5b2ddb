"""In which of several forms products of blocks are computed, and the functions of each.

"digits": products of bytes by VPDPBUSD, rows of x as integers of three digits.
"plain digits": the same bits by plain vectors, to test them on any processor.
"looked up": float32 products; 4-bit codes are widened by a table in a register.
"converted": the same bits; codes are widened by conversion.
"""

from collections.abc import Callable
from typing import NamedTuple

from npllm.kernels.cpu.block_codes import STEP, UNITS
from npllm.kernels.cpu.block_functions import (
    STEP_BYTES,
    VECTOR,
    add_rows_function,
    has_lookup,
    pack_function,
)
from npllm.kernels.cpu.digit_codes import DIGIT_UNITS, SPAN
from npllm.kernels.cpu.digit_functions import add_digits_function, pack_digits_function
from npllm.kernels.cpu.digit_units import SPAN_BYTES
from npllm.kernels.cpu.dot_products import has_instruction

__all__ = ["FORMS", "BlockFunctions", "default_form", "form_of_format"]

FORMS = "digits", "plain digits", "looked up", "converted"
ROWS = 1, 2, 4, 8  # of x that are multiplied at a time
OF_DIGITS = 1, 2, 4  # two calls of four rows were faster than one of eight


class BlockFunctions(NamedTuple):
    """How a format is multiplied: addresses of functions, and sizes."""

    n_entries: int  # of a unit
    n_bytes: int
    x_bytes: int  # of a unit of x as it is stored
    fill: int  # several rows of x are filled up with zeros to a multiple of this
    row_bytes: Callable[[int], int]  # of so many entries of x as they are stored
    pack: int
    add: tuple[int, ...]  # for 1, 2, 4 and 8 rows of x, 0 where there is none


def bytes_of_digits(d: int) -> int:
    """Bytes of a row of x in spans of digits."""
    return (d + SPAN - 1) // SPAN * SPAN_BYTES


def bytes_of_steps(d: int) -> int:
    """Bytes of a row of x in steps of 64 entries, with the sums of its 32s."""
    n_step = (d + STEP - 1) // STEP
    return n_step * STEP_BYTES + (n_step + 3) // 4 * VECTOR


def default_form() -> str:
    """Say which form is the fastest of this processor."""
    if has_instruction("int8"):
        return "digits"
    return "looked up" if has_lookup() else "converted"


def form_of_format(name: str, form: str | None = None) -> BlockFunctions:
    """Return the functions of a format in a form, by default that of `default_form`."""
    form = default_form() if form is None else form
    if form in ("digits", "plain digits"):
        unit, uses = DIGIT_UNITS[name], form == "digits"
        add = [add_digits_function(name, n, uses).address if n in OF_DIGITS else 0 for n in ROWS]
        pack = pack_digits_function(uses).address
        return BlockFunctions(SPAN, unit.n_bytes, SPAN_BYTES, 1, bytes_of_digits, pack, tuple(add))
    step = UNITS[name]
    add = [add_rows_function(name, n, form == "looked up").address for n in ROWS]
    sizes = step.n_entries, step.n_bytes, step.n_entries // STEP * STEP_BYTES
    return BlockFunctions(*sizes, 4, bytes_of_steps, pack_function().address, tuple(add))
