"""Products on matrix units (Intel AMX): 96 rows of a weight times 64 or 32 rows of x.

A tile register holds 16 rows of 64 bytes.  Two tiles of the weight and two of x, in the layout of
`rounded_tiles`, give four tiles of sums, 32 rows by 32 columns:

    TDPBF16PS  sums[o, c] += sum_k w[o, 2 k] * x[c, 2 k] + sum_k w[o, 2 k + 1] * x[c, 2 k + 1]
    TDPBSUD    sums[o, c] += sum_k w[o, k] * x[c, k],   bytes of w with a sign, those of x without

over 32 channels of bfloat16, in float32; over the bytes of a flush, exactly, in 32 bits.  Both read
and return subnormal floats as 0.

A process asks the system for the tiles once (`dot_products.has_tiles`); each thread describes them
before it uses them.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18, and
volume 2, TDPBF16PS and TDPBSUD.
"""

from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from npllm.kernels.cpu.numba_internals import c_function
from npllm.kernels.cpu.rounded_tiles import (
    COLUMNS,
    MINIMUMS,
    NUMBERS,
    SCALES,
    VECTOR,
    WORD,
    repeated_at,
)
from npllm.kernels.cpu.simd import FLOATS, I8, INTS, all_lanes, call
from npllm.kernels.cpu.simd_addresses import I64, fused, pointer_to, stack_floats

__all__ = ["HEIGHT", "bfloat16_units", "integer_units"]

Builder = Any  # llvmlite's IRBuilder
Value = Any  # an LLVM value

HEIGHT = 96  # rows of a weight: a task of `rounded_gemm`
EDGE = 16  # rows of a tile, and columns of one of sums
BLOCK = 2 * EDGE  # rows and columns of what is summed at once
ROW = COLUMNS * WORD  # bytes of a row of y, and of a word of a panel
SUMS = BLOCK * WORD  # bytes of a row of a block's integer sums
BOTH = 2 * BLOCK * BLOCK  # sums of upper and of lower bytes
STEP = 64  # bytes of a row of a tile of bfloat16


# ------------------------------------------------------------------------ the tiles as functions

# numbers of the registers: four of sums, two of the weight, two of x
TOTALS, WEIGHTS, INPUTS = (0, 1, 2, 3), (4, 5), (6, 7)


def number(n: int) -> Value:
    """The number of a tile."""
    return ir.Constant(I8, n)


def on_tiles(builder: Builder, name: str, *arguments: Value) -> None:
    """Call an instruction on tiles by its name in LLVM."""
    call(builder, f"llvm.x86.{name}", ir.VoidType(), list(arguments))


def on_memory(
    builder: Builder, name: str, tile: int, address: Value, offset: Any, row: Any
) -> None:
    """Load or store a tile, whose rows are `row` bytes apart."""
    row = ir.Constant(I64, row) if isinstance(row, int) else row
    on_tiles(builder, name, number(tile), pointer_to(builder, address, I8, offset), row)


@intrinsic(prefer_literal=True)
def describe_tiles(_typing: Any, n_bytes: Any) -> Any:
    """Set the shapes: rows of the weight's tiles have so many bytes, and tiles of x a row for each
    word of them.
    """
    n = n_bytes.literal_value
    widths = dict.fromkeys((*TOTALS, *INPUTS), VECTOR) | dict.fromkeys(WEIGHTS, n)
    rows = dict.fromkeys((*TOTALS, *WEIGHTS), EDGE) | dict.fromkeys(INPUTS, n // WORD)
    palette = bytearray(64)
    palette[0] = 1
    for tile in (*TOTALS, *WEIGHTS, *INPUTS):
        palette[16 + 2 * tile], palette[48 + tile] = widths[tile], rows[tile]

    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        content = ir.Constant(ir.ArrayType(I8, 64), palette)
        kept = cgutils.global_constant(builder.module, f"npllm_tiles_{n}", content)
        on_tiles(builder, "ldtilecfg", builder.bitcast(kept, I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(n_bytes), generate


@intrinsic
def release_tiles(_typing: Any) -> Any:
    """Leave the tiles, so that the system need not keep them for this thread."""

    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        on_tiles(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def clear_sums(_typing: Any) -> Any:
    """Set the tiles of sums to 0."""

    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        for tile in TOTALS:
            on_tiles(builder, "tilezero", number(tile))
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic(prefer_literal=True)
def move_sums(_typing: Any, name: Any, address: Any, row: Any) -> Any:
    """Load the sums from rows at an address, or store them there."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        _, address, row = arguments
        below = builder.mul(row, ir.Constant(I64, EDGE))
        for tile in TOTALS:
            start = builder.add(address, below) if tile >= 2 else address
            on_memory(builder, name.literal_value, tile, start, VECTOR * (tile % 2), row)
        return context.get_dummy_value()

    return types.void(name, address, row), generate


@intrinsic(prefer_literal=True)
def add_products(_typing: Any, name: Any, w: Any, w_row: Any, x: Any) -> Any:
    """Add to the sums the products of 32 rows of codes at w and of 32 columns of words at x."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        _, w, w_row, x = arguments
        below = builder.add(w, builder.mul(w_row, ir.Constant(I64, EDGE)))
        for half, start in enumerate((w, below)):
            on_memory(builder, "tileloadd64", WEIGHTS[half], start, 0, w_row)
            on_memory(builder, "tileloadd64", INPUTS[half], x, VECTOR * half, ROW)
        for tile in TOTALS:
            operands = number(tile), number(WEIGHTS[tile // 2]), number(INPUTS[tile % 2])
            on_tiles(builder, name.literal_value, *operands)
        return context.get_dummy_value()

    return types.void(name, w, w_row, x), generate


@intrinsic(prefer_literal=True)
def add_scaled_row(
    _typing: Any, n: Any, has_minimum: Any, sums: Any, w_numbers: Any, scales: Any, y: Any
) -> Any:
    """Add a flush's sums of a row and 32 columns to y, scaled as in `rounded_tiles`.

    `sums`: those of the upper bytes; of the lower ones BLOCK rows further.
    """

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        *_, sums, numbers, scales, y = arguments
        none = ir.Constant(I64, 0)
        start = repeated_at(builder, numbers, 0, none, INTS)
        scale = repeated_at(
            builder, builder.add(numbers, ir.Constant(I64, SCALES)), 0, none, FLOATS
        )
        places = builder.add(numbers, ir.Constant(I64, MINIMUMS))
        for at in (0, VECTOR):
            total = builder.add(start, loaded(builder, sums, INTS, at))
            if n.literal_value == 2:
                low = loaded(builder, sums, INTS, at + BLOCK * SUMS)
                total = builder.add(builder.shl(total, all_lanes(8, INTS)), low)
            term = builder.fmul(builder.sitofp(total, FLOATS), loaded(builder, scales, FLOATS, at))
            new = fused(builder, scale, term, loaded(builder, y, FLOATS, at))
            if has_minimum.literal_value:
                least = repeated_at(builder, places, 0, none, FLOATS)
                new = fused(builder, least, loaded(builder, scales, FLOATS, at + ROW), new)
            builder.store(new, pointer_to(builder, y, FLOATS, at), align=4)
        return context.get_dummy_value()

    return types.void(n, has_minimum, sums, w_numbers, scales, y), generate


def loaded(builder: Builder, address: Value, kind: Any, offset: int) -> Value:
    """A vector at some bytes from an address."""
    return builder.load(pointer_to(builder, address, kind, offset), align=4)


# --------------------------------------------------------------------------------- the products


@cache
def bfloat16_units(columns: int) -> Any:
    """Compile the function that adds a run of bfloat16 products to 96 rows of y.

    Parameters
    ----------
    columns : int
        Of a panel that are multiplied: COLUMNS, or the first HALF.

    Returns
    -------
    function : with an `address`
        Of the arguments of `rounded_tiles.bfloat16_tile`, for 96 rows and a multiple of 16 words.

    Notes
    -----
    The sum of a step of 32 channels is that of the even ones plus that of the odd ones, each begun
    at 0; steps are added to y one after the other.
    """

    def units(codes: int, row_bytes: int, n_words: int, x: int, scales: int, y: int) -> None:  # noqa: ARG001
        codes += NUMBERS
        describe_tiles(STEP)
        for c in range(0, columns, BLOCK):  # of x, which stay in the nearest cache
            for r in range(0, HEIGHT, BLOCK):
                to = y + r * ROW + c * WORD
                move_sums("tileloadd64", to, ROW)
                for k in range(n_words // EDGE):
                    w, at = codes + r * row_bytes + k * STEP, x + k * EDGE * ROW + c * WORD
                    add_products("tdpbf16ps", w, row_bytes, at)
                move_sums("tilestored64", to, ROW)
        release_tiles()

    return c_function(units, types.void(*[types.intp] * 6))


@cache
def integer_units(n_bytes: int, flush: int, has_minimum: bool, columns: int) -> Any:
    """Compile the function that adds a run of integer products to 96 rows of y.

    Parameters
    ----------
    n_bytes, flush, has_minimum, columns
        As in `rounded_tiles.integer_tile`, whose numbers y has, bit for bit.

    Returns
    -------
    function : with an `address`
        Of the arguments of `rounded_tiles.integer_tile`, for 96 rows.
    """
    part, step = flush // WORD * ROW, n_bytes * flush // WORD * ROW

    def units(codes: int, row_bytes: int, n_flush: int, x: int, scales: int, y: int) -> None:
        sums = stack_floats(BOTH)
        describe_tiles(flush)
        for c in range(0, columns, BLOCK):  # of x, which stay in the nearest cache
            for r in range(0, HEIGHT, BLOCK):
                for k in range(n_flush):
                    w, at = codes + r * row_bytes, x + k * step + c * WORD
                    for b in range(n_bytes):
                        clear_sums()
                        add_products("tdpbsud", w + NUMBERS + k * flush, row_bytes, at + b * part)
                        move_sums("tilestored64", sums + b * BLOCK * SUMS, SUMS)
                    for i in range(BLOCK):
                        add_scaled_row(
                            n_bytes,
                            has_minimum,
                            sums + i * SUMS,
                            w + i * row_bytes + k * WORD,
                            scales + k * 2 * ROW + c * WORD,
                            y + (r + i) * ROW + c * WORD,
                        )
        release_tiles()

    return c_function(units, types.void(*[types.intp] * 6))
