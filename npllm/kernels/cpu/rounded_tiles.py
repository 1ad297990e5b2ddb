"""A tile of a product whose operands are rounded: six rows of a weight times 64 or 32 rows of x.

A run of channels of the weight lies in a band.  A row of it has its `numbers`, for each flush an
integer, a scale and a minimum, and then its codes side by side; a row of bfloat16 has no numbers,
and may lie where it is stored, as if numbers stood before it.  A panel of x
has, for every word of a row's codes, the words of 64 rows of x side by side.  A flush is so many
channels, whose exact integer sums are scaled and added to y.

    y[o, c] += w_scale[o] * (x_scale[c] * float(sum_k code[o, k] * x_code[c, k]))
             + w_minimum[o] * x_sum[c]

x_code is stored as bytes without a sign, 128 or 32768 more than it is: sums begin at -128 times
the sum of a row's codes.  Of 16-bit codes the upper bytes are multiplied first; the lower bytes'
products are added to 256 times those sums.
"""

from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

from npllm.kernels.cpu.dot_products import dot_bfloat16, dot_bytes
from npllm.kernels.cpu.numba_internals import c_function
from npllm.kernels.cpu.simd import FLOATS, I32, INTS, LANES, all_lanes, vector
from npllm.kernels.cpu.simd_addresses import I64, fused, pointer_to

__all__ = [
    "COLUMNS",
    "HALF",
    "MOST_FLUSHES",
    "NUMBERS",
    "TILE_ROWS",
    "bfloat16_tile",
    "integer_tile",
]

Builder = Any  # llvmlite's IRBuilder
Value = Any  # an LLVM value

TILE_ROWS, VECTORS = 6, 4  # of a whole tile: 24 sums stay in registers
COLUMNS = VECTORS * LANES
HALF = COLUMNS // 2  # columns of a narrow tile
WORD, VECTOR = 4, 4 * LANES  # bytes
MOST_FLUSHES = 32  # of a run
SCALES, MINIMUMS = (
    WORD * MOST_FLUSHES,
    2 * WORD * MOST_FLUSHES,
)  # where they begin in a row's numbers
NUMBERS = 3 * WORD * MOST_FLUSHES  # bytes
SHORT = 32  # words of a run of bfloat16 that are summed in registers


class _Integers(types.Type):
    """Numba's type of sixteen int32."""

    def __init__(self) -> None:
        super().__init__("int32x16")


integers = _Integers()


@register_model(_Integers)
class _IntegersModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, INTS)


def repeated(builder: Builder, value: Value, kind: Any) -> Value:
    """One number in every lane."""
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undefined, all_lanes(0, INTS))


def repeated_at(builder: Builder, address: Value, row: int, row_bytes: Value, kind: Any) -> Value:
    """The number at an address some rows further, in every lane."""
    offset = builder.mul(row_bytes, ir.Constant(I64, row))
    value = builder.load(pointer_to(builder, address, kind.element, offset), align=1)
    return repeated(builder, value, kind)


def vectors_at(builder: Builder, address: Value, kind: Any, n: int, row: int = 0) -> list[Value]:
    """The first n vectors of a row of a tile, or of a panel."""
    offsets = [VECTOR * (VECTORS * row + c) for c in range(n)]
    return [builder.load(pointer_to(builder, address, kind, at), align=4) for at in offsets]


@intrinsic(prefer_literal=True)
def start_sums(_typing: Any, columns: Any, numbers: Any, row_bytes: Any) -> Any:
    """Six rows of so many sums: the integer at an address of each row."""
    n = columns.literal_value // LANES
    kind = types.UniTuple(integers, TILE_ROWS * n)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, numbers, row_bytes = arguments
        rows = [repeated_at(builder, numbers, r, row_bytes, INTS) for r in range(TILE_ROWS)]
        sums = [row for row in rows for _ in range(n)]
        return context.make_tuple(builder, signature.return_type, sums)

    return kind(columns, numbers, row_bytes), generate


@intrinsic(prefer_literal=True)
def zero_sums(_typing: Any, columns: Any) -> Any:
    """Six rows of so many sums: zeros."""
    kind = types.UniTuple(vector, TILE_ROWS * columns.literal_value // LANES)

    def generate(context: Any, builder: Any, signature: Any, _arguments: Any) -> Any:
        return context.make_tuple(builder, signature.return_type, [all_lanes(0.0)] * kind.count)

    return kind(columns), generate


@intrinsic
def shift_sums(_typing: Any, sums: Any) -> Any:
    """Every sum times 256."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        old = cgutils.unpack_tuple(builder, arguments[0])
        new = [builder.shl(x, all_lanes(8, INTS)) for x in old]
        return context.make_tuple(builder, signature.return_type, new)

    return sums(sums), generate


@intrinsic(prefer_literal=True)
def dot_step(
    _typing: Any,
    uses: Any,
    sums: Any,
    x: Any,
    codes: Any,
    row_bytes: Any,
) -> Any:
    """Add to sums the products of a word of six rows and of their columns: bytes or bfloat16."""
    n = sums.count // TILE_ROWS
    dot = dot_bytes if sums.dtype is integers else dot_bfloat16

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, old, x, codes, row_bytes = arguments
        old, new = cgutils.unpack_tuple(builder, old), []
        columns = vectors_at(builder, x, INTS, n)
        for r in range(TILE_ROWS):
            w = repeated_at(builder, codes, r, row_bytes, INTS)
            for c, column in enumerate(columns):
                new.append(dot(builder, uses.literal_value, old[n * r + c], column, w))
        return context.make_tuple(builder, signature.return_type, new)

    return sums(uses, sums, x, codes, row_bytes), generate


@intrinsic(prefer_literal=True)
def add_scaled(
    _typing: Any,
    has_minimum: Any,
    sums: Any,
    numbers: Any,
    row_bytes: Any,
    scales: Any,
    y: Any,
) -> Any:
    """Add the scaled sums of a flush, and the minimums, to a tile of y."""
    n = sums.count // TILE_ROWS

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        _, sums, numbers, row_bytes, scales, y = arguments
        sums = cgutils.unpack_tuple(builder, sums)
        x_scales, x_sums = (vectors_at(builder, scales, FLOATS, n, row) for row in (0, 1))
        places = [builder.add(numbers, ir.Constant(I64, at)) for at in (SCALES, MINIMUMS)]
        for r in range(TILE_ROWS):
            scale = repeated_at(builder, places[0], r, row_bytes, FLOATS)
            old = vectors_at(builder, y, FLOATS, n, r)
            for c in range(n):
                term = builder.fmul(builder.sitofp(sums[n * r + c], FLOATS), x_scales[c])
                old[c] = fused(builder, scale, term, old[c])
            if has_minimum.literal_value:
                least = repeated_at(builder, places[1], r, row_bytes, FLOATS)
                old = [fused(builder, least, x, v) for x, v in zip(x_sums, old, strict=True)]
            store_row(builder, y, r, old)
        return context.get_dummy_value()

    return types.void(has_minimum, sums, numbers, row_bytes, scales, y), generate


def store_row(builder: Builder, y: Value, row: int, values: list[Value]) -> None:
    """Write a row of a tile."""
    for c, value in enumerate(values):
        pointer = pointer_to(builder, y, FLOATS, VECTOR * (VECTORS * row + c))
        builder.store(value, pointer, align=4)


@intrinsic
def add_sums(_typing: Any, sums: Any, y: Any) -> Any:
    """Add sums to a tile of y."""
    n = sums.count // TILE_ROWS

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        sums, y = cgutils.unpack_tuple(builder, arguments[0]), arguments[1]
        for r in range(TILE_ROWS):
            new = [
                builder.fadd(v, sums[n * r + c])
                for c, v in enumerate(vectors_at(builder, y, FLOATS, n, r))
            ]
            store_row(builder, y, r, new)
        return context.get_dummy_value()

    return types.void(sums, y), generate


@cache
def integer_tile(n_bytes: int, flush: int, has_minimum: bool, uses: bool, columns: int) -> Any:
    """Compile the function that adds a run of integer products to a tile of y.

    Parameters
    ----------
    n_bytes : int
        Of a code of x: 1 or 2.
    flush : int
        Channels whose sums are scaled together.
    has_minimum : bool
    uses : bool
        Products are those of the instruction, else plain vectors: the same bits.
    columns : int
        Of a panel that are multiplied: COLUMNS, or the first HALF.

    Returns
    -------
    function : with an `address`
        Of codes, row_bytes, n_flush, x, scales, y: addresses of the codes of six rows, which are
        row_bytes apart with their numbers before them, of a panel's run, its scales and a tile.
    """

    def tile(codes: int, row_bytes: int, n_flush: int, x: int, scales: int, y: int) -> None:
        numbers = codes
        codes += NUMBERS
        for _ in range(n_flush):
            sums = start_sums(columns, numbers, row_bytes)
            for part in range(n_bytes):
                if part > 0:
                    sums = shift_sums(sums)
                for k in range(0, flush, WORD):
                    sums = dot_step(uses, sums, x, codes + k, row_bytes)
                    x += VECTORS * VECTOR
            add_scaled(has_minimum, sums, numbers, row_bytes, scales, y)
            codes, numbers, scales = codes + flush, numbers + WORD, scales + 2 * VECTORS * VECTOR

    return c_function(tile, types.void(*[types.intp] * 6))


@cache
def bfloat16_tile(uses: bool, columns: int) -> Any:
    """Compile the function that adds a run of bfloat16 products to a tile of y.

    As `integer_tile`, with two channels a word; instead of flushes words are counted, and `scales`
    is not used.
    """

    def tile(codes: int, row_bytes: int, n_words: int, x: int, scales: int, y: int) -> None:  # noqa: ARG001
        codes += NUMBERS
        for _ in range(n_words // SHORT):  # their number, known to the compiler, is 2 % of the time
            sums = zero_sums(columns)
            for _ in range(SHORT):
                sums = dot_step(uses, sums, x, codes, row_bytes)
                codes, x = codes + WORD, x + VECTORS * VECTOR
            add_sums(sums, y)
        if n_words % SHORT:
            sums = zero_sums(columns)
            for _ in range(n_words % SHORT):
                sums = dot_step(uses, sums, x, codes, row_bytes)
                codes, x = codes + WORD, x + VECTORS * VECTOR
            add_sums(sums, y)

    return c_function(tile, types.void(*[types.intp] * 6))
