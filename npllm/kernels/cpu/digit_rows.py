"""A row of x as integers of three digits, for products of bytes.

Eight entries of a span, those of lane L of its halves A and B (`digit_codes`), have one unit, a
power of two:

    unit = 2**(e - 22),  2**e <= max |x[i]| < 2**(e + 1);    2**(e - 21) where an integer would exceed
    integer[i] = round(x[i] / unit) = 65536 * d2[i] + 256 * d1[i] + d0[i],    -128 <= d <= 127

An integer has at most the magnitude 127 * (65536 + 256 + 1) = 8355711, and 22 bits below the highest
of the largest of the eight.  So the error of an entry is at most half a unit:

    |integer[i] * unit - x[i]| <= 2**-23 * max of its eight |x|,    0 where x[i] has few enough bits

which is what one rounding of float32 costs a sum of that size.  The unit is NaN where an entry is
not finite or beyond 1.992 * 2**127: the product is NaN then, and is computed in another way.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from npllm.kernels.cpu.block_codes import spread
from npllm.kernels.cpu.digit_codes import SPAN
from npllm.kernels.cpu.digit_units import LESS, SPAN_VECTORS, TOTALS, UNIT, horner
from npllm.kernels.cpu.simd import F32, FLOATS, I8, INTS, LANES, all_lanes, call
from npllm.kernels.cpu.simd_addresses import pointer_to

__all__ = ["HALVES", "pack_span"]

Builder = Any  # llvmlite's IRBuilder
Value = Any  # an LLVM value

# where the four vectors of x begin of which each half consists
HALVES = {
    32: ([0, 32, 64, 96], [16, 48, 80, 112]),
    256: ([0, 16, 64, 80], [32, 48, 96, 112]),
}
SMALL = ir.VectorType(I8, LANES)


def largest_of_eight(builder: Builder, a: Value, b: Value) -> Value:
    """The largest |x| of four lanes of two vectors, in each of the four, as bits."""
    bits = [builder.bitcast(x, INTS) for x in (a, b)]
    most, other = [builder.and_(x, all_lanes(0x7FFFFFFF, INTS)) for x in bits]
    for distance in (0, 1, 2):
        if distance:
            other = spread(builder, most, [lane ^ distance for lane in range(LANES)])
        most = call(builder, "llvm.umax.v16i32", INTS, [most, other])
    return most


def units_of(builder: Builder, most: Value) -> tuple[Value, Value, Value]:
    """The unit, and two factors that divide by it: 1 / 2**-149 is not a float32."""
    e = builder.lshr(builder.add(most, all_lanes(0x010101, INTS)), all_lanes(23, INTS))
    known = builder.icmp_unsigned("<", e, all_lanes(255, INTS))
    e = call(builder, "llvm.umax.v16i32", INTS, [e, all_lanes(1, INTS)])
    power = builder.bitcast(builder.shl(e, all_lanes(23, INTS)), FLOATS)  # 2**(e - 127)
    e = builder.sub(all_lanes(255, INTS), e)
    inverse = builder.bitcast(builder.shl(e, all_lanes(23, INTS)), FLOATS)  # 2**(128 - e)
    unit = builder.fmul(power, all_lanes(2.0**-22))
    return builder.select(known, unit, all_lanes(float("nan"))), inverse, all_lanes(2.0**21)


def integers_of(builder: Builder, x: Value, factors: tuple[Value, Value]) -> Value:
    """Round x times two factors to integers; what is not a number gives any."""
    for factor in factors:
        x = builder.fmul(x, factor)
    x = call(builder, "llvm.nearbyint.v16f32", FLOATS, [x])
    return call(builder, "llvm.fptosi.sat.v16i32.v16f32", INTS, [x])


def digits_of(builder: Builder, parts: list[Value]) -> list[Value]:
    """Digits 2, 1 and 0 of 64 integers: sixteen words of four bytes each."""
    digits = []
    for rounding, shift in ((0x8080, 16), (0x80, 8), (0, 0)):
        small = [
            builder.trunc(
                builder.lshr(
                    builder.add(part, all_lanes(rounding, INTS)), all_lanes(shift, INTS)
                ),
                SMALL,
            )
            for part in parts
        ]
        low, high = (spread(builder, small[k], range(32), small[k + 1]) for k in (0, 2))
        digits.append(builder.bitcast(spread(builder, low, range(64), high), INTS))
    return digits


def first_of_four(builder: Builder, parts: list[Value]) -> Value:
    """Every fourth lane of four vectors."""
    fourth = range(0, 2 * LANES, 4)
    low, high = (spread(builder, parts[k], fourth, parts[k + 1]) for k in (0, 2))
    return spread(builder, low, range(LANES), high)


def store_at(builder: Builder, target: Value, number: int, value: Value) -> None:
    """Write vector `number` of those that begin at an address, a multiple of 64."""
    pointer = pointer_to(builder, target, value.type, 4 * LANES * number)
    builder.store(value, pointer, align=64)


def halves_of(builder: Builder, order: int, source: Value) -> tuple[list[list[Value]], Value]:
    """The digits of both halves of a span, and the units."""
    x = [
        [builder.load(pointer_to(builder, source, FLOATS, 4 * at), align=4) for at in half]
        for half in HALVES[order]
    ]
    both, units = [[], []], []
    for a, b in zip(*x, strict=True):
        unit, *factors = units_of(builder, largest_of_eight(builder, a, b))
        units.append(unit)
        for part, integers in zip((a, b), both, strict=True):
            integers.append(integers_of(builder, part, factors))
    return [digits_of(builder, half) for half in both], first_of_four(builder, units)


def sums_of_eight(builder: Builder, values: Value) -> Value:
    """The sum of the lower eight lanes, and of the upper ones, as two floats."""
    for n in (4, 2, 1):
        low = [*range(n), *range(2 * n, 3 * n)]
        values = builder.fadd(
            spread(builder, values, low), spread(builder, values, [at + n for at in low])
        )
    return values


def store_totals(
    builder: Builder, order: int, number: int, target: Value, sums: list[Value], unit: Value
) -> None:
    """Store what minimums multiply.

    Order 32: the sum of a lane's x.  Order 256: -1 times the sums of 32, in the upper lanes of a
    vector behind both spans; 0 in the lower ones.
    """
    totals = [builder.fmul(builder.sitofp(s, FLOATS), unit) for s in sums]
    if order == 32:
        store_at(builder, target, TOTALS[order], builder.fadd(*totals))
        return
    parts = [sums_of_eight(builder, total) for total in totals]
    four = builder.fneg(spread(builder, parts[0], [0, 2, 1, 3], parts[1]))
    vectors = TOTALS[order] - SPAN_VECTORS * number  # behind this span
    offset = 4 * (LANES * vectors + 8 + 4 * number)
    builder.store(four, pointer_to(builder, target, four.type, offset), align=16)
    zeros = ir.Constant(four.type, [0.0] * 4)
    builder.store(zeros, pointer_to(builder, target, four.type, offset - 32), align=16)


@intrinsic(prefer_literal=True)
def pack_span(
    _typing: Any,
    order: Any,
    number: Any,
    uses: Any,
    source: Any,  # noqa: ARG001 - Numba matches arguments by number
    target: Any,  # noqa: ARG001
) -> Any:
    """Store 128 floats as a span: which of a unit, 0 or 1, `number` says; `target` is the span's."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        (source, target), which = arguments[3:], order.literal_value
        digits, unit = halves_of(builder, which, source)
        ones = ir.Constant(INTS, [0x01010101] * LANES)
        sums = [horner(builder, uses.literal_value, {h: ones}, digits) for h in (0, 1)]
        for half in (0, 1):
            for k in range(3):
                store_at(builder, target, 3 * half + k, digits[half][k])
            zero = all_lanes(-8 if which == 32 else -32, INTS)
            added = builder.add(*sums) if which == 32 else sums[half]
            store_at(builder, target, LESS[which][half], builder.mul(added, zero))
        store_at(builder, target, UNIT[which], unit)
        store_totals(builder, which, number.literal_value, target, sums, unit)
        return context.get_dummy_value()

    return types.void(order, number, uses, types.intp, types.intp), generate


