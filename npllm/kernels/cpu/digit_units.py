"""A span of blocks times rows of x that are stored as digits: sums of integers, without an error.

    integer[L] = sum_i (code[i] - zero) * (65536 * d2[i] + 256 * d1[i] + d0[i])
    sums[L] += integer[L] * scale[L] * unit[L]  +  (minimum[L] + zero * scale[L]) * total[L]

over the entries i of a lane L; d2, d1 and d0 are the digits of x, `unit` their unit and `total` the
sum of x (`digit_rows`); the second term where a format has minimums.  The integer is below 2**31 in
magnitude: sixteen entries of 15 or, less a zero, of 16, or eight of 32, times 8355711.  What is
larger in between wraps around, and back.  Of codes of 8 bits it is larger: the sums of two digits,
below 2**27, and of the third become floats apart.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from npllm.kernels.cpu.digit_codes import DIGIT_UNITS, N_BLOCK, Decoded, DigitUnit, Term
from npllm.kernels.cpu.dot_products import dot_bytes
from npllm.kernels.cpu.simd import FLOATS, I8, INTS, LANES, all_lanes
from npllm.kernels.cpu.simd_addresses import I64, floats_at, fused, pointer_to

__all__ = [
    "LESS",
    "LESS_HIGH",
    "LESS_LOW",
    "SPAN_BYTES",
    "TOTAL",
    "UNIT",
    "add_digits",
    "digit_sums",
    "shifted_sum",
]

Builder = Any  # llvmlite's IRBuilder
Value = Any  # an LLVM value

VECTOR = 4 * LANES  # bytes
MOST_X = 2  # rows of x at a time
# vectors of a span of x: digits 2, 1 and 0 of quarter 0, of quarter 1, ...; then
UNIT, TOTAL = 12, 13
# and, for the quarters of a term, the sum of a lane's integers times a negative factor
LESS = {(0, 1, 2, 3): (14, -8), (0, 1): (15, -32), (2, 3): (16, -32)}
# of two digits, and of the third, times -128
LESS_HIGH, LESS_LOW = 17, 18
SPAN_BYTES = 19 * VECTOR


def ints_at(builder: Builder, address: Value, number: int) -> Value:
    """Sixteen integers, vector `number` of those that begin at an address, a multiple of 64."""
    return builder.load(pointer_to(builder, address, INTS, VECTOR * number), align=64)


def digit_sums(
    builder: Builder,
    uses: bool,
    codes: Sequence[Mapping[int, Callable[[], Value]]],
    digits: Sequence[Callable[[int, int], Value]],
    first: Sequence[Sequence[Value]],
) -> list[Value]:
    """Products of codes with digits 2, 1 and 0 of integers, pair by pair, added to `first`.

    Digit k of quarter j is digits(j, k).  All pairs take each step together: an instruction takes
    four cycles, and one begins in each.
    """
    sums = [list(three) for three in first]
    for j in codes[0]:
        words = [quarters[j]() for quarters in codes]
        for k in range(3):
            for s, word, digit in zip(sums, words, digits, strict=True):
                s[k] = dot_bytes(builder, uses, s[k], word, digit(j, k))
    return sums


def shifted_sum(builder: Builder, high: Value, low: Value) -> Value:
    """256 * high + low."""
    return builder.add(builder.shl(high, all_lanes(8, INTS)), low)


def floats_of(builder: Builder, unit: DigitUnit, sums: list[Value]) -> Value:
    """The integer of the sums of three digits, as float32."""
    high = shifted_sum(builder, sums[0], sums[1])
    if unit.is_wide:
        high, low = (builder.sitofp(part, FLOATS) for part in (high, sums[2]))
        return fused(builder, high, all_lanes(256.0), low)
    return builder.sitofp(shifted_sum(builder, high, sums[2]), FLOATS)


def less_zero(builder: Builder, unit: DigitUnit, term: Term, row: Value) -> list[Value]:
    """The zero of the codes times the sums of a lane's digits, negative: where sums begin."""
    none = ir.Constant(INTS, [0] * LANES)
    if unit.is_wide:
        return [none, ints_at(builder, row, LESS_HIGH), ints_at(builder, row, LESS_LOW)]
    if not unit.zero:
        return [none] * 3
    number, factor = LESS[tuple(sorted(term.quarters))]
    n_bit = (unit.zero // -factor).bit_length() - 1
    less = ints_at(builder, row, number)
    return [none, none, builder.shl(less, all_lanes(n_bit, INTS)) if n_bit else less]


def starts_of(builder: Builder, unit: DigitUnit, first: Value, left: Value | None) -> list[Value]:
    """Where a span's blocks begin; of a span that has `left` blocks, the last stands for others."""
    if not unit.has_blocks:
        return [pointer_to(builder, first, I8)]
    numbers = [ir.Constant(I64, number) for number in range(N_BLOCK)]
    if left is not None:
        last = builder.sub(left, ir.Constant(I64, 1))
        numbers = [
            builder.select(builder.icmp_signed("<", number, last), number, last)
            for number in numbers
        ]
    n_bytes = ir.Constant(I64, unit.n_bytes // N_BLOCK)
    return [
        pointer_to(builder, builder.add(first, builder.mul(number, n_bytes)), I8)
        for number in numbers
    ]


def scaled_products(
    builder: Builder, unit: DigitUnit, uses: bool, terms: list[Term], rows: list[Value]
) -> list[Value]:
    """The products of a term of some rows of a weight with as many rows of x, scaled."""

    def digit(row: Value, j: int, k: int) -> Value:
        return ints_at(builder, row, 3 * j + k)

    codes, digits = [term.quarters for term in terms], [partial(digit, row) for row in rows]
    pairs = list(zip(terms, rows, strict=True))
    less = [less_zero(builder, unit, *pair) for pair in pairs]
    sums = digit_sums(builder, uses, codes, digits, less)
    return [
        builder.fmul(floats_of(builder, unit, three), term.scale)
        for three, term in zip(sums, terms, strict=True)
    ]


def _add_digits(
    builder: Builder,
    unit: DigitUnit,
    uses: bool,
    decoded: list[Decoded],
    rows: list[Value],
    sums: list[Value],
) -> None:
    """Add the products of a span of some rows of a weight with some rows of x to their sums, [row
    of the weight, row of x]; as many rows of x at a time as have their sums of digits in registers.
    """
    for first in range(0, len(rows), MOST_X):
        some = range(first, min(first + MOST_X, len(rows)))
        pairs = [(one, rows[r], o * len(rows) + r) for o, one in enumerate(decoded) for r in some]
        parts = [
            scaled_products(
                builder,
                unit,
                uses,
                [terms[t] for (terms, _), _, _ in pairs],
                [row for _, row, _ in pairs],
            )
            for t in range(len(decoded[0][0]))
        ]
        for number, ((terms, minimum), row, at) in enumerate(pairs):
            both = [part[number] for part in parts]
            total = both[0] if len(both) == 1 else builder.fadd(*both)
            sums[at] = fused(builder, total, floats_at(builder, row, UNIT), sums[at])
            if minimum is not None:
                if unit.zero:
                    minimum = fused(builder, terms[0].scale, all_lanes(unit.zero), minimum)
                sums[at] = fused(builder, minimum, floats_at(builder, row, TOTAL), sums[at])


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
    """Add the products of a span of n_w rows of a weight with some rows of x to their sums.

    The span of the first row lies at the address `w`, that of the next `row_bytes` behind it; the
    span of the first row of x at `x`, of the next `x_bytes` behind it; sums [n_w, n] are vectors.
    Unless it is whole, it has `left` blocks of 32.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        w, row_bytes, left, x, x_bytes, old = arguments[4:]
        old, unit = cgutils.unpack_tuple(builder, old), DIGIT_UNITS[name.literal_value]
        n = len(old) // n_w.literal_value
        rows = [builder.add(x, builder.mul(x_bytes, ir.Constant(I64, r))) for r in range(n)]
        whole, decoded = is_whole.literal_value, []
        for o in range(n_w.literal_value):
            first = builder.add(w, builder.mul(row_bytes, ir.Constant(I64, o)))
            starts = starts_of(builder, unit, first, None if whole else left)
            n_bytes = unit.n_bytes // N_BLOCK if whole else 0
            decoded.append(unit.decode(builder, starts, n_bytes))
        sums = list(old)
        _add_digits(builder, unit, uses.literal_value, decoded, rows, sums)
        return context.make_tuple(builder, signature.return_type, sums)

    places = [types.intp] * 5
    return sums(name, uses, n_w, is_whole, *places, sums), generate
