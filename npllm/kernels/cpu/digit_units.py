"""A unit of blocks times rows of x that are stored as digits: sums of integers, without an error.

    integer[L] = 65536 * s2[L] + 256 * s1[L] + s0[L] - zero * sum4,    sk[L] = sum_i code[i] * dk[i]
    sums[L] += integer[L] * scale[L] * unit[L]

over the entries i of lane L, d2, d1 and d0 the digits of x and `unit` their unit (`digit_rows`).
Below 2**31 in every format: at most eight entries of 31, or four of 63, times 8355711.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from npllm.kernels.cpu.digit_codes import DIGIT_UNITS, DigitUnit, Term
from npllm.kernels.cpu.dot_products import dot_bytes
from npllm.kernels.cpu.simd import FLOATS, I8, INTS, LANES, all_lanes
from npllm.kernels.cpu.simd_addresses import I64, floats_at, fused, pointer_to

__all__ = ["ROW_UNIT", "add_digits", "horner"]

Builder = Any  # llvmlite's IRBuilder
Value = Any  # an LLVM value

VECTOR = 4 * LANES  # bytes
SPAN_VECTORS = 9  # of a row of x
# vectors of a span: digits 2, 1, 0 of half A, then of half B; then
LESS = {32: (6, 6), 256: (6, 7)}  # -8 or -32 times the sum of a lane's integers, of A and of B
UNIT = {32: 7, 256: 8}  # what an integer 1 stands for
TOTALS = {32: 8, 256: 2 * SPAN_VECTORS}  # sums of x: see `digit_rows`
ROW_UNIT = {32: SPAN_VECTORS * VECTOR, 256: (2 * SPAN_VECTORS + 1) * VECTOR}  # bytes


def ints_at(builder: Builder, address: Value, number: int) -> Value:
    """Sixteen integers, vector `number` of those that begin at an address, a multiple of 64."""
    return builder.load(pointer_to(builder, address, INTS, VECTOR * number), align=64)


def horner(
    builder: Builder, uses: bool, codes: dict[int, Value], digits: list[list[Value]]
) -> Value:
    """Products of the codes of one half or both with integers of three digits, lane by lane."""
    sums = ir.Constant(INTS, [0] * LANES)
    for k in range(3):
        if k:
            sums = builder.shl(sums, all_lanes(8, INTS))
        for half, words in codes.items():
            sums = dot_bytes(builder, uses, sums, words, digits[half][k])
    return sums


def less_zero(builder: Builder, unit: DigitUnit, term: Term, row: Value, sums: Value) -> Value:
    """Subtract the zero of the codes times the sum of a lane's integers."""
    if not unit.zero:
        return sums
    stored = 8 if unit.order == 32 else 32
    number = SPAN_VECTORS * term.span + LESS[unit.order][min(term.codes)]
    less = ints_at(builder, row, number)
    if unit.zero != stored:
        less = builder.mul(less, all_lanes(unit.zero // stored, INTS))
    return builder.add(sums, less)


def term_product(builder: Builder, uses: bool, unit: DigitUnit, term: Term, row: Value) -> Value:
    """The products of a term in units of x: integer * scale."""
    first = SPAN_VECTORS * term.span
    digits = [[ints_at(builder, row, first + 3 * half + k) for k in range(3)] for half in (0, 1)]
    sums = less_zero(builder, unit, term, row, horner(builder, uses, term.codes, digits))
    return builder.fmul(builder.sitofp(sums, FLOATS), term.scale)


def starts_of(builder: Builder, unit: DigitUnit, first: Value, left: Value | None) -> list[Value]:
    """Where a unit's blocks begin; of a unit that has `left` blocks, the last stands for others."""
    if unit.order == 256:
        return [pointer_to(builder, first, I8)]
    numbers = [ir.Constant(I64, number) for number in range(4)]
    if left is not None:
        last = builder.sub(left, ir.Constant(I64, 1))
        numbers = [
            builder.select(builder.icmp_signed("<", number, last), number, last)
            for number in numbers
        ]
    n_bytes = ir.Constant(I64, unit.n_bytes // 4)
    return [
        pointer_to(builder, builder.add(first, builder.mul(number, n_bytes)), I8)
        for number in numbers
    ]


def _add_digits(
    builder: Builder,
    name: str,
    uses: bool,
    blocks: tuple[Value, Value | None],
    rows: list[Value],
    sums: list[Value],
) -> list[Value]:
    """Add a unit's products with some rows of x to their sums."""
    unit, (first, left) = DIGIT_UNITS[name], blocks
    starts = starts_of(builder, unit, first, left)
    terms, minimum = unit.decode(builder, starts, 0 if left else unit.n_bytes // 4)
    new = []
    for row, y in zip(rows, sums, strict=True):
        for span in sorted({term.span for term in terms}):
            parts = [
                term_product(builder, uses, unit, term, row) for term in terms if term.span == span
            ]
            total = parts[0] if len(parts) == 1 else builder.fadd(*parts)
            number = SPAN_VECTORS * span + UNIT[unit.order]
            y = fused(builder, total, floats_at(builder, row, number), y)
        if minimum is not None:
            y = fused(builder, minimum, floats_at(builder, row, TOTALS[unit.order]), y)
        new.append(y)
    return new


@intrinsic(prefer_literal=True)
def add_digits(
    _typing: Any,
    name: Any,
    uses: Any,
    n_w: Any,
    is_whole: Any,
    w: Any,  # noqa: ARG001 - Numba matches arguments by number
    row_bytes: Any,  # noqa: ARG001
    left: Any,  # noqa: ARG001
    x: Any,  # noqa: ARG001
    x_bytes: Any,  # noqa: ARG001
    sums: Any,
) -> Any:
    """Add the products of a unit of n_w rows of a weight with some rows of x to their sums.

    The unit of the first row lies at the address `w`, that of the next `row_bytes` behind it; the
    unit of the first row of x at `x`, of the next `x_bytes` behind it; sums [n_w, n] are vectors.
    Unless it is whole, it has `left` blocks of 32.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        w, row_bytes, left, x, x_bytes, old = arguments[4:]
        old, new = cgutils.unpack_tuple(builder, old), []
        n = len(old) // n_w.literal_value
        rows = [builder.add(x, builder.mul(x_bytes, ir.Constant(I64, r))) for r in range(n)]
        for o in range(n_w.literal_value):
            first = builder.add(w, builder.mul(row_bytes, ir.Constant(I64, o)))
            blocks = first, None if is_whole.literal_value else left
            literals = name.literal_value, uses.literal_value
            new += _add_digits(builder, *literals, blocks, rows, old[n * o : n * o + n])
        return context.make_tuple(builder, signature.return_type, new)

    places = [types.intp] * 5
    return sums(name, uses, n_w, is_whole, *places, sums), generate
