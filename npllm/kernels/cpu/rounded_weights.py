"""Runs of a weight's rows as `rounded_tiles` takes them: codes, and numbers for each flush.

A format is one of GGUF's, or "int8" for `Int8Weight` with float16 scales and "int8_float32" for one
with float32 scales, or "bfloat16" for an array of that type.
"""

from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from npllm.kernels.cpu.block_codes import STEP, UNITS, Step, less, masked, spread
from npllm.kernels.cpu.block_units import unit_of
from npllm.kernels.cpu.dot_products import dot_bytes
from npllm.kernels.cpu.numba_internals import c_function
from npllm.kernels.cpu.rounded_tiles import MINIMUMS, NUMBERS, SCALES, WORD, repeated
from npllm.kernels.cpu.simd import F32, FLOATS, INTS, LANES, all_lanes
from npllm.kernels.cpu.simd_addresses import fused, pointer_to, prefetch_at

__all__ = ["FLUSHES", "SCALE_BYTES", "codes_function", "unit_size"]

Builder = Any  # llvmlite's IRBuilder
Value = Any  # an LLVM value

FLUSHES = {"int8": 64, "int8_float32": 64, "bfloat16": 64, "Q6_K": 16}
"""Channels that share a scale; else 32."""
SCALE_BYTES = {"int8": 2, "int8_float32": 4}
"""Of a scale that stands in an array of its own."""
MINIMUM = frozenset(("Q4_1", "Q5_1", "Q4_K", "Q5_K"))  # formats that have one


def unit_size(name: str) -> tuple[int, int]:
    """Channels and bytes of what is decoded at once."""
    if name in UNITS:
        return UNITS[name].n_entries, UNITS[name].n_bytes
    return STEP, STEP * (2 if name == "bfloat16" else 1)


def centred_bytes(builder: Builder, name: str, step: Step) -> Value:
    """The codes of a step, less the zero, one a byte."""
    unit = UNITS[name]
    return (
        less(builder, masked(builder, step.codes, 15), unit.zero) if unit.is_nibble else step.codes
    )


def sums_of_flushes(builder: Builder, uses: bool, codes: Value, flush: int) -> Value:
    """The sums of the codes of each flush of a step, a vector of so many integers."""
    ones = all_lanes(0x01010101, INTS)
    sums = dot_bytes(builder, uses, all_lanes(0, INTS), ones, codes)
    n_lanes = LANES
    while n_lanes > STEP // flush:
        halves = [spread(builder, sums, range(start, n_lanes, 2)) for start in (0, 1)]
        sums, n_lanes = builder.add(*halves), n_lanes // 2
    return sums


def store_step(builder: Builder, uses: bool, flush: int, step: Step, target: Value, s: int) -> None:
    """Write step s of a unit, its codes already centred, into a row of the band.

    `target` is the addresses of the unit's codes and of its numbers.
    """
    codes_at, numbers_at = target
    n = STEP // flush
    builder.store(step.codes, pointer_to(builder, codes_at, INTS, STEP * s), align=1)
    sums = sums_of_flushes(builder, uses, step.codes, flush)
    start = builder.mul(sums, ir.Constant(sums.type, [-128] * n))
    chosen = [LANES // n * g for g in range(n)]
    parts = [(0, start), (SCALES, spread(builder, step.scale, chosen))]
    if step.minimum is not None:
        parts.append((MINIMUMS, spread(builder, step.minimum, chosen)))
    for offset, value in parts:
        pointer = pointer_to(builder, numbers_at, value.type, offset + WORD * n * s)
        builder.store(value, pointer, align=4)


@intrinsic(prefer_literal=True)
def store_block_unit(
    _typing: Any, name: Any, uses: Any, flush: Any, w: Any, codes: Any, numbers: Any
) -> Any:
    """Write a unit of a format into a row of the band."""
    unit = UNITS[name.literal_value]

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        w, *target = arguments[3:]
        distance = unit.n_bytes // 2 if unit.n_entries == STEP else 0
        steps, _ = unit_of(builder, name.literal_value, w, distance)
        for s, step in enumerate(steps):
            minimum = all_lanes(0.0)  # of a format that has none: another part of a stack may
            if step.minimum is not None:
                minimum = fused(builder, step.scale, all_lanes(unit.zero), step.minimum)
            step = Step(centred_bytes(builder, name.literal_value, step), step.scale, minimum)
            store_step(builder, uses.literal_value, flush.literal_value, step, target, s)
        return context.get_dummy_value()

    return types.void(name, uses, flush, w, codes, numbers), generate


@intrinsic(prefer_literal=True)
def store_int8_unit(
    _typing: Any, n_bytes: Any, uses: Any, flush: Any, w: Any, scale: Any, codes: Any, numbers: Any
) -> Any:
    """Write 64 bytes of a row, whose scale of `n_bytes` is given by its address, into a row of the
    band.
    """
    stored = ir.HalfType() if n_bytes.literal_value == 2 else F32

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        w, scale, *target = arguments[3:]
        bytes_ = builder.load(pointer_to(builder, w, INTS), align=1)
        value = builder.load(pointer_to(builder, scale, stored), align=n_bytes.literal_value)
        value = value if stored is F32 else builder.fpext(value, F32)
        step = Step(bytes_, repeated(builder, value, FLOATS), None)
        store_step(builder, uses.literal_value, flush.literal_value, step, target, 0)
        return context.get_dummy_value()

    return types.void(n_bytes, uses, flush, w, scale, codes, numbers), generate


@intrinsic
def copy_bfloat16_unit(_typing: Any, w: Any, codes: Any) -> Any:
    """Copy 64 bfloat16."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        for offset in (0, 4 * LANES):
            value = builder.load(pointer_to(builder, arguments[0], INTS, offset), align=1)
            builder.store(value, pointer_to(builder, arguments[1], INTS, offset), align=1)
        return context.get_dummy_value()

    return types.void(w, codes), generate


@cache
def codes_function(name: str, flush: int, uses: bool) -> Any:
    """Compile the function that writes a run of a row into the band.

    Parameters
    ----------
    name : str
        A format.
    flush : int
        Channels for which numbers are written; a divisor of those that share a scale.
    uses : bool
        Sums of codes are those of the instruction, else plain vectors: the same bits.

    Returns
    -------
    function : with an `address`
        Of w, scales, n_units, target, ahead: addresses of the run, of its scales where it is int8,
        and of the band's row; by how many bytes integers are prefetched.
    """
    n_entries, n_bytes = unit_size(name)
    number_bytes, code_bytes = n_entries // flush * WORD, n_entries
    is_block, scale_bytes = name in UNITS, SCALE_BYTES.get(name, 0)

    def of_integers(w: int, scales: int, n_units: int, target: int, ahead: int) -> None:
        codes, numbers = target + NUMBERS, target
        for _ in range(n_units):
            for line in range(0, n_bytes, 4 * LANES):
                prefetch_at(w + ahead + line)
            if is_block:
                store_block_unit(name, uses, flush, w, codes, numbers)
            else:
                store_int8_unit(scale_bytes, uses, flush, w, scales, codes, numbers)
            w, scales = w + n_bytes, scales + scale_bytes
            codes, numbers = codes + code_bytes, numbers + number_bytes

    def of_bfloat16(w: int, scales: int, n_units: int, target: int, ahead: int) -> None:  # noqa: ARG001
        codes = target + NUMBERS
        for _ in range(n_units):
            copy_bfloat16_unit(w, codes)
            w, codes = w + n_bytes, codes + n_bytes

    function = of_bfloat16 if name == "bfloat16" else of_integers
    return c_function(function, types.void(*[types.intp] * 5))
