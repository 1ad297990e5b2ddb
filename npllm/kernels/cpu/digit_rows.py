"""A row of x as integers of three digits, for products of bytes.

The sixteen entries of lane L of the quarters of a span (`digit_codes`) have one unit, a power of 2:

    unit = 2**(e - 22),  2**e <= max |x[i]| < 2**(e + 1)
    integer[i] = round(x[i] / unit) = 65536 * d2[i] + 256 * d1[i] + d0[i],  -128 <= d < 128

The magnitude of three digits is at most 127 * (65536 + 256 + 1) = 8355711; the unit is twice as
large where the largest entry would exceed that.  Rounding costs an entry at most half a unit:

    |integer[i] * unit - x[i]| <= 2**-23 * max of its sixteen |x|;  0 where both have few bits

which is as much as float32's rounding of one sum of that size.  The unit is infinite where an
entry is not finite or beyond 1.992 * 2**127: no product is finite then, and it is computed in
another way.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from npllm.kernels.cpu.block_codes import spread
from npllm.kernels.cpu.digit_units import (
    LESS,
    LESS_HIGH,
    LESS_LOW,
    TOTAL,
    UNIT,
    digit_sums,
    shifted_sum,
)
from npllm.kernels.cpu.simd import F32, FLOATS, I8, INTS, LANES, all_lanes, call
from npllm.kernels.cpu.simd_addresses import pointer_to

__all__ = ["pack_span"]

Builder = Any  # llvmlite's IRBuilder
Value = Any  # an LLVM value

SMALL = ir.VectorType(I8, LANES)


def largest_of_sixteen(builder: Builder, quarters: list[Value]) -> Value:
    """The largest |x| of four lanes of four vectors, in each of the four, as bits."""
    most, *others = [
        builder.and_(builder.bitcast(x, INTS), all_lanes(0x7FFFFFFF, INTS)) for x in quarters
    ]
    for other in others:
        most = call(builder, "llvm.umax.v16i32", INTS, [most, other])
    for distance in (1, 2):
        other = spread(builder, most, [lane ^ distance for lane in range(LANES)])
        most = call(builder, "llvm.umax.v16i32", INTS, [most, other])
    return most


def units_of(builder: Builder, most: Value) -> tuple[Value, Value, Value]:
    """The unit, and two factors that divide by it, since 2**149 is no float32.

    Below 2**-126 the largest entry has no exponent of its own, and the unit is 2**-149.
    """
    e = builder.lshr(builder.add(most, all_lanes(0x010101, INTS)), all_lanes(23, INTS))
    is_small = builder.icmp_unsigned("<", e, all_lanes(1, INTS))
    e = call(builder, "llvm.umax.v16i32", INTS, [e, all_lanes(1, INTS)])
    power = builder.bitcast(builder.shl(e, all_lanes(23, INTS)), FLOATS)  # 2**(e - 127)
    e = builder.sub(all_lanes(255, INTS), e)
    inverse = builder.bitcast(builder.shl(e, all_lanes(23, INTS)), FLOATS)  # 2**(128 - e)
    unit = builder.fmul(power, all_lanes(2.0**-22))
    unit = builder.select(is_small, all_lanes(2.0**-149), unit)
    second = builder.select(is_small, all_lanes(2.0**22), all_lanes(2.0**21))
    return unit, inverse, second


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
                builder.lshr(builder.add(part, all_lanes(rounding, INTS)), all_lanes(shift, INTS)),
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


def quarter_vectors(builder: Builder, source: Value) -> list[list[Value]]:
    """Quarter j of 256 floats, as four vectors: of lanes 0 ... 3, 4 ... 7, and so on."""
    eight = ir.VectorType(F32, 8)
    parts = [builder.load(pointer_to(builder, source, eight, 32 * at), align=4) for at in range(32)]
    return [
        [spread(builder, parts[8 * v + j], range(LANES), parts[8 * v + 4 + j]) for v in range(4)]
        for j in range(4)
    ]


def digits_and_unit(builder: Builder, source: Value) -> tuple[list[list[Value]], Value]:
    """The digits of the quarters of a span, and the unit of each lane."""
    quarters = quarter_vectors(builder, source)
    integers: list[list[Value]] = [[], [], [], []]
    units = []
    for v in range(4):
        four = [quarter[v] for quarter in quarters]
        unit, first, second = units_of(builder, largest_of_sixteen(builder, four))
        units.append(unit)
        for part, target in zip(four, integers, strict=True):
            target.append(integers_of(builder, part, (first, second)))
    return [digits_of(builder, quarter) for quarter in integers], first_of_four(builder, units)


def store_sums(
    builder: Builder, uses: bool, target: Value, digits: list[list[Value]], unit: Value
) -> None:
    """Store what zeros and minimums multiply: sums of the integers of a lane, and of its x."""
    ones = ir.Constant(INTS, [0x01010101] * LANES)

    def digit(j: int, k: int) -> Value:
        return digits[j][k]

    none = ir.Constant(INTS, [0] * LANES)
    for quarters, (number, factor) in LESS.items():
        codes = dict.fromkeys(quarters, lambda: ones)
        (three,) = digit_sums(builder, uses, [codes], [digit], [[none] * 3])
        high = shifted_sum(builder, three[0], three[1])
        total = shifted_sum(builder, high, three[2])
        store_at(builder, target, number, builder.mul(total, all_lanes(factor, INTS)))
        if len(quarters) == 4:
            for at, part in ((LESS_HIGH, high), (LESS_LOW, three[2])):
                store_at(builder, target, at, builder.mul(part, all_lanes(-128, INTS)))
            sums = builder.fmul(builder.sitofp(total, FLOATS), unit)
            store_at(builder, target, TOTAL, sums)


@intrinsic(prefer_literal=True)
def pack_span(
    _typing: Any,
    uses: Any,
    source: Any,  # noqa: ARG001 - Numba matches arguments by number
    target: Any,  # noqa: ARG001
) -> Any:
    """Store 256 floats as a span of digits, at a multiple of 64."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        source, target = arguments[1:]
        digits, unit = digits_and_unit(builder, source)
        for j, quarter in enumerate(digits):
            for k, digit in enumerate(quarter):
                store_at(builder, target, 3 * j + k, digit)
        store_at(builder, target, UNIT, unit)
        store_sums(builder, uses.literal_value, target, digits, unit)
        return context.get_dummy_value()

    return types.void(uses, types.intp, types.intp), generate
