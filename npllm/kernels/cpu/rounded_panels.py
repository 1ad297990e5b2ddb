"""Panels of x rounded as `npllm.quantized.activations` defines, as `rounded_tiles` takes them.

A lane is a row of x, so that a group's largest entry is found lane by lane.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import prange, types
from numba.extending import intrinsic

from npllm.kernels.cpu.block_codes import spread
from npllm.kernels.cpu.launching import kernel
from npllm.kernels.cpu.numba_internals import c_function
from npllm.kernels.cpu.rounded_tiles import COLUMNS, VECTOR, WORD
from npllm.kernels.cpu.simd import FLOATS, INTS, LANES, all_lanes, call
from npllm.kernels.cpu.simd_addresses import call_address, fused, pointer_to
from npllm.quantized.activations import LIMITS, SMALLEST

__all__ = ["bfloat16_function", "integer_function", "round_bfloat16", "round_pairs", "round_panels"]

Array = Any
Builder = Any  # llvmlite's IRBuilder
Value = Any  # an LLVM value

ROW = COLUMNS * WORD  # bytes of a channel of a panel


def channel(builder: Builder, x: Value, i: int) -> Value:
    """Sixteen rows of x at a channel."""
    return builder.load(pointer_to(builder, x, FLOATS, ROW * i), align=4)


def largest_entry(builder: Builder, entries: list[Value]) -> Value:
    """The largest absolute value, lane by lane; NaN where an entry is infinite or NaN."""
    largest, special = all_lanes(0.0), all_lanes(0.0)
    for x in entries:
        size = call(builder, "llvm.fabs.v16f32", FLOATS, [x])
        largest = call(builder, "llvm.maxnum.v16f32", FLOATS, [largest, size])
        special = fused(builder, size, all_lanes(0.0), special)
    return builder.fadd(largest, special)


def scale_and_factor(builder: Builder, largest: Value, limit: int) -> tuple[Value, Value]:
    """The scale of a group, and what an entry is multiplied by; 0 where all entries are small."""
    is_small = builder.fcmp_ordered("<", largest, all_lanes(SMALLEST))
    zero = all_lanes(0.0)
    scale = builder.fdiv(largest, all_lanes(limit))
    factor = builder.fdiv(all_lanes(limit), largest)
    is_number = builder.fcmp_ordered("==", largest, largest)
    scale = builder.select(is_small, zero, scale)
    factor = builder.select(builder.or_(is_small, builder.not_(is_number)), zero, factor)
    return scale, factor


def rounded(builder: Builder, x: Value, factor: Value) -> Value:
    """The codes of sixteen entries, as integers; 0 where the factor is."""
    code = call(builder, "llvm.nearbyint.v16f32", FLOATS, [builder.fmul(x, factor)])
    is_number = builder.fcmp_ordered("==", code, code)
    return builder.fptosi(builder.select(is_number, code, all_lanes(0.0)), INTS)


def joined(builder: Builder, parts: list[Value], n_bits: int) -> Value:
    """Words of parts that have no bits above n_bits, the first one lowest."""
    word = parts[0]
    for number, part in enumerate(parts[1:], start=1):
        word = builder.or_(word, builder.shl(part, all_lanes(number * n_bits, INTS)))
    return word


def word_bytes(builder: Builder, codes: list[Value], n_bytes: int) -> list[Value]:
    """Bytes of four channels' codes without their sign, upper bytes first, as words."""
    plus = [builder.add(code, all_lanes(128 << 8 * (n_bytes - 1), INTS)) for code in codes]
    if n_bytes == 1:
        return [joined(builder, plus, 8)]
    high = [builder.lshr(code, all_lanes(8, INTS)) for code in plus]
    low = [builder.and_(code, all_lanes(255, INTS)) for code in plus]
    return [joined(builder, high, 8), joined(builder, low, 8)]


@intrinsic(prefer_literal=True)
def round_group(
    _typing: Any, n_bytes: Any, group: Any, flush: Any, x: Any, target: Any, scales: Any
) -> Any:
    """Round a group of sixteen rows: write words, and for each flush the scale and the sum."""
    n, size, step = (number.literal_value for number in (n_bytes, group, flush))

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        x, target, scales = arguments[3:]
        entries = [channel(builder, x, i) for i in range(size)]
        largest = largest_entry(builder, entries)
        scale, factor = scale_and_factor(builder, largest, LIMITS[n])
        for f in range(size // step):
            total = all_lanes(0, INTS)
            for k in range(0, step, WORD):
                part = entries[f * step + k : f * step + k + WORD]
                codes = [rounded(builder, entry, factor) for entry in part]
                for code in codes:
                    total = builder.add(total, code)
                for b, word in enumerate(word_bytes(builder, codes, n)):
                    at = ROW * ((f * n + b) * step + k) // WORD
                    builder.store(word, pointer_to(builder, target, INTS, at), align=4)
            both = scale, builder.fmul(scale, builder.sitofp(total, FLOATS))
            for number, value in enumerate(both):
                pointer = pointer_to(builder, scales, FLOATS, ROW * (2 * f + number))
                builder.store(value, pointer, align=4)
        return context.get_dummy_value()

    return types.void(n_bytes, group, flush, x, target, scales), generate


@cache
def integer_function(n_bytes: int, group: int, flush: int) -> Any:
    """Compile the function that rounds a panel to integers of 1 or 2 bytes.

    Returns
    -------
    function : with an `address`
        Of x, d, target, scales: addresses of a panel [d, 64], d a multiple of the group; of its
        words, for each flush those of the upper bytes, then those of the lower; of scales and sums
        of rounded entries [d / flush, 2, 64].
    """
    words, numbers = ROW * n_bytes * group // WORD, 2 * ROW * group // flush

    def round_panel(x: int, d: int, target: int, scales: int) -> None:
        for start in range(0, d, group):
            at = start // group
            for c in range(0, ROW, VECTOR):
                source = x + start * ROW + c
                to, scales_at = target + at * words + c, scales + at * numbers + c
                round_group(n_bytes, group, flush, source, to, scales_at)

    return c_function(round_panel, types.void(*[types.intp] * 4))


def bfloat16_bits(builder: Builder, entry: Value) -> Value:
    """Sixteen floats rounded to bfloat16, ties to even, as integers; NaN stays NaN."""
    bits = builder.bitcast(entry, INTS)
    high = builder.lshr(bits, all_lanes(16, INTS))
    odd = builder.and_(high, all_lanes(1, INTS))
    up = builder.add(bits, builder.add(odd, all_lanes(0x7FFF, INTS)))
    quiet = builder.or_(high, all_lanes(0x40, INTS))
    is_number = builder.fcmp_ordered("==", entry, entry)
    return builder.select(is_number, builder.lshr(up, all_lanes(16, INTS)), quiet)


@intrinsic(prefer_literal=True)
def round_pairs(_typing: Any, are_neighbours: Any, a: Any, b: Any, target: Any) -> Any:
    """Round sixteen floats at a and at b to bfloat16, and write sixteen words: of a[i] and b[i], or
    of neighbours of the 32 numbers.
    """

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        halves = [bfloat16_bits(builder, channel(builder, x, 0)) for x in arguments[1:3]]
        if are_neighbours.literal_value:
            lanes = range(0, 2 * LANES, 2), range(1, 2 * LANES, 2)
            halves = [spread(builder, halves[0], some, halves[1]) for some in lanes]
        word = joined(builder, halves, 16)
        builder.store(word, pointer_to(builder, arguments[3], INTS), align=4)
        return context.get_dummy_value()

    return types.void(are_neighbours, a, b, target), generate


@cache
def bfloat16_function() -> Any:
    """Compile the function that rounds a panel to bfloat16; arguments as `integer_function`."""

    def round_panel(x: int, d: int, target: int, scales: int) -> None:  # noqa: ARG001
        for i in range(0, d, 2):
            for c in range(0, ROW, VECTOR):
                at = x + i * ROW + c
                round_pairs(False, at, at + ROW, target + i // 2 * ROW + c)

    return c_function(round_panel, types.void(*[types.intp] * 4))


@kernel(parallel=True)
def round_panels(function: int, panels: Array, words: Array, scales: Array) -> None:
    """Round every panel [d, 64]."""
    for p in prange(len(panels)):
        x, target, to = panels[p].ctypes.data, words[p].ctypes.data, scales[p].ctypes.data
        call_address(function, (x, panels.shape[1], target, to))


@kernel(parallel=True)
def round_bfloat16(panels: Array) -> None:
    """Round every entry of panels to bfloat16, given as its bits, in place."""
    for p in prange(len(panels)):
        bits = panels[p].reshape(-1)
        for i in range(len(bits)):
            odd = (bits[i] >> np.uint32(16)) & np.uint32(1)
            is_nan = (bits[i] & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            up = bits[i] + np.uint32(0x7FFF) + odd
            quiet = bits[i] | np.uint32(0x400000)
            bits[i] = (quiet if is_nan else up) & np.uint32(0xFFFF0000)
