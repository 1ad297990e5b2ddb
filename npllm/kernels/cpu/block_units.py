"""A unit of blocks times rows of x, and a unit widened: what the formats have in common.

A row of x is stored in steps of 64 entries: vectors 0 ... 3, of which vector k has the entries
4 L + k, and a fifth with their sums; behind all steps there is a vector for every 256 entries, in
which lanes s and s + 8 have the sum of entries 32 s ... 32 s + 31.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from npllm.kernels.cpu.block_codes import STEP, UNITS, Pair, Step, Unit, constants, shifted, spread
from npllm.kernels.cpu.simd import FLOATS, I8, INTS, LANES, all_lanes, call
from npllm.kernels.cpu.simd_addresses import I64, floats_at, fused, pointer_to

__all__ = ["add_unit", "widen_unit"]

Builder = Any  # llvmlite's IRBuilder
Value = Any  # an LLVM value


def centred(builder: Builder, unit: Unit, step: Step, k: int, looks_up: bool) -> Value:
    """Codes of the entries 4 L + k, less the zero, as float32."""
    if unit.is_nibble and looks_up:
        table = constants([q - unit.zero for q in range(LANES)], FLOATS)
        at = shifted(builder, step.codes, -8 * k)  # the instruction reads the lowest four bits
        return call(builder, "llvm.x86.avx512.permvar.sf.512", FLOATS, [table, at])
    if unit.is_nibble:
        low = builder.and_(shifted(builder, step.codes, -8 * k), all_lanes(15, INTS))
        return builder.fsub(builder.sitofp(low, FLOATS), all_lanes(unit.zero))
    byte = shifted(builder, step.codes, 24 - 8 * k)
    return builder.sitofp(builder.ashr(byte, all_lanes(24, INTS)), FLOATS)


def unit_of(
    builder: Builder, name: str, first: Value, distance: int | Value
) -> tuple[list[Step], Value | None]:
    """Decode the blocks of a unit: its steps, and scales and minimums of a block of 256.

    The second block of 32 is `distance` bytes behind the first: a number where that is known.
    """
    unit = UNITS[name]
    is_known = isinstance(distance, int)
    second = builder.add(first, ir.Constant(I64, distance) if is_known else distance)
    starts = pointer_to(builder, first, I8), pointer_to(builder, second, I8)
    return unit.decode(builder, Pair(starts, distance if is_known else 0))


def _add_unit(
    builder: Builder,
    name: str,
    looks_up: bool,
    distance: int,
    places: list[Value],
    sums: list[Value],
) -> list[Value]:
    """Add a unit's products with some rows of x to their sums."""
    first, x, stride, totals = places
    unit = UNITS[name]
    steps, numbers = unit_of(builder, name, first, distance)
    rows = [builder.add(x, builder.mul(stride, ir.Constant(I64, r))) for r in range(len(sums))]
    for s, step in enumerate(steps):
        parts: list[Any] = [None] * len(sums)
        for k in range(4):
            w = centred(builder, unit, step, k, looks_up)
            for r, row in enumerate(rows):
                part = floats_at(builder, row, 5 * s + k)
                parts[r] = fused(builder, w, part, parts[r]) if k else builder.fmul(w, part)
        sums = [fused(builder, p, step.scale, y) for p, y in zip(parts, sums, strict=True)]
        if step.minimum is not None and numbers is None:
            least = fused(builder, step.scale, all_lanes(unit.zero), step.minimum)
            totals_of = [floats_at(builder, row, 5 * s + 4) for row in rows]
            sums = [fused(builder, least, t, y) for t, y in zip(totals_of, sums, strict=True)]
    if numbers is None:
        return sums
    factors = constants([unit.zero] * 8 + [-1] * 8, FLOATS)
    numbers = builder.fmul(numbers, factors)
    for r, y in enumerate(sums):
        at = builder.add(totals, builder.mul(stride, ir.Constant(I64, r)))
        sums[r] = fused(builder, numbers, floats_at(builder, at, 0), y)
    return sums


@intrinsic(prefer_literal=True)
def add_unit(
    _typing: Any,
    name: Any,
    looks_up: Any,
    distance: Any,
    first: Any,  # noqa: ARG001 - Numba matches arguments by number
    x: Any,  # noqa: ARG001
    stride: Any,  # noqa: ARG001
    totals: Any,  # noqa: ARG001
    sums: Any,
) -> Any:
    """Add the products of a unit with some rows of x, lane by lane, to their sums.

    The unit's blocks lie at the address `first` and `distance` bytes behind it; its steps of the
    first row of x at `x`, and the sums of its 32s at `totals`; rows of x are `stride` bytes apart.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *places, old = arguments[3:]
        old = cgutils.unpack_tuple(builder, old)
        literals = name.literal_value, looks_up.literal_value, distance.literal_value
        new = _add_unit(builder, *literals, places, old)
        return context.make_tuple(builder, signature.return_type, new)

    places = [types.intp] * 4
    return sums(name, looks_up, distance, *places, sums), generate


def widened(builder: Builder, unit: Unit, step: Step) -> list[Value]:
    """Four vectors of entries, rounded as the definition rounds them."""
    y = []
    for k in range(4):
        q = centred(builder, unit, step, k, False)
        if step.minimum is None:
            y.append(builder.fmul(step.scale, q))
        else:
            q = builder.fadd(q, all_lanes(unit.zero))
            y.append(builder.fadd(builder.fmul(step.scale, q), step.minimum))
    return y


def in_order(builder: Builder, parts: list[Value], g: int) -> Value:
    """Entries 16 g ... 16 g + 15 of a step whose entry 4 L + k is lane L of vector k."""
    lanes = [4 * g + lane // 4 for lane in range(LANES)]
    pairs = [
        spread(
            builder,
            parts[k],
            [at + LANES * (lane % 2) for lane, at in enumerate(lanes)],
            parts[k + 1],
        )
        for k in (0, 2)
    ]
    chosen = [lane + LANES * (lane % 4 // 2) for lane in range(LANES)]
    return spread(builder, pairs[0], chosen, pairs[1])


@intrinsic(prefer_literal=True)
def widen_unit(
    _typing: Any,
    name: Any,
    first: Any,  # noqa: ARG001 - Numba matches arguments by number
    distance: Any,  # noqa: ARG001
    target: Any,  # noqa: ARG001
    low: Any,  # noqa: ARG001
    high: Any,  # noqa: ARG001
) -> Any:
    """Write entries low ... high - 1 of a unit, multiples of 16, where `target` has its entry 0."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        first, distance, target, low, high = arguments[1:]
        steps, _ = unit_of(builder, name.literal_value, first, distance)
        for s, step in enumerate(steps):
            parts = widened(builder, UNITS[name.literal_value], step)
            for g in range(4):
                at = ir.Constant(I64, STEP * s + LANES * g)
                is_wanted = builder.and_(
                    builder.icmp_signed("<=", low, at), builder.icmp_signed("<", at, high)
                )
                with builder.if_then(is_wanted):
                    pointer = pointer_to(builder, target, FLOATS, 4 * (STEP * s + LANES * g))
                    builder.store(in_order(builder, parts, g), pointer, align=4)
        return context.get_dummy_value()

    return types.void(name, *[types.intp] * 5), generate
