"""What the blocks of GGUF hold, as unsigned bytes for products of integers, 128 entries at a time.

A span is 128 adjacent entries of a row.  It has two halves of 64 codes, A and B: sixteen lanes of
four adjacent entries, one in each byte.  Lane L of A and lane L of B are entries that lie `apart`
each other, and have one scale of x (`digit_rows`).

    order 32     A: entries 0 ... 15 of each of four blocks of 32, B: entries 16 ... 31
    order 256    A: entries 0 ... 31 and 64 ... 95 of the span, B: entries 32 ... 63 and 96 ... 127

Both are the orders in which formats store low and high nibbles, so that one AND, and one shift and
one AND, unpack 128 codes of 4 bits.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir

from npllm.kernels.cpu.block_codes import (
    BYTES,
    HALF,
    I16,
    UPPER,
    constants,
    loaded,
    masked,
    scales_and_minimums,
    shifted,
    spread,
    twice,
    widened_halves,
)
from npllm.kernels.cpu.simd import FLOATS, I8, I32, INTS, LANES

__all__ = ["DIGIT_UNITS", "SPAN", "DigitUnit", "Term"]

Builder = Any  # llvmlite's IRBuilder
Value = Any  # an LLVM value
Starts = tuple[Value, ...]  # pointers to four blocks of 32, or to one of 256
Decoded = tuple[list["Term"], Value | None]

SPAN = 8 * LANES  # entries
WORDS = ir.VectorType(I32, 4)


class Term(NamedTuple):
    """Products that one scale multiplies, lane by lane."""

    span: int  # of the unit
    codes: dict[int, Value]  # half of the span (0, 1) -> sixteen int32, four unsigned bytes each
    scale: Value


class DigitUnit(NamedTuple):
    """How the entries of a unit are decoded: w = scale * (code - zero) + minimum."""

    order: int  # 32 or 256
    n_entries: int
    n_bytes: int
    zero: int
    decode: Callable[[Builder, Starts, int], Decoded]  # terms; minimums


# --------------------------------------------------------------------- blocks of 32 entries


def four(builder: Builder, starts: Starts, offset: int) -> Value:
    """Sixteen bytes of each of four blocks."""
    parts = [loaded(builder, start, offset, WORDS) for start in starts]
    low, high = (spread(builder, parts[k], range(8), parts[k + 1]) for k in (0, 2))
    return spread(builder, low, range(LANES), high)


def four_halves(builder: Builder, starts: Starts, offset: int, n_bytes: int) -> Value:
    """A float16 of each of four blocks in the four lanes of a block, as float32.

    Of adjacent blocks, n_bytes apart, one vector is loaded that has all of them.
    """
    if n_bytes:
        words = loaded(builder, starts[0], 0, ir.VectorType(I16, 2 * LANES))
        lanes = [(offset + lane // 4 * n_bytes) // 2 for lane in range(LANES)]
        return widened_halves(builder, spread(builder, words, lanes))
    words = ir.Constant(ir.VectorType(I16, LANES), ir.Undefined)
    for number, start in enumerate(starts):
        part = loaded(builder, start, offset, I16)
        words = builder.insert_element(words, part, ir.Constant(I32, number))
    return widened_halves(builder, spread(builder, words, [lane // 4 for lane in range(LANES)]))


def small(n_bits: int, offset: int, has_minimum: bool) -> Callable[..., Decoded]:
    """Decoder of Q4_0, Q4_1, Q5_0 and Q5_1; their codes begin at `offset`."""

    def decode(builder: Builder, starts: Starts, n_bytes: int) -> Decoded:
        words = four(builder, starts, offset)
        halves = {0: masked(builder, words, 15), 1: masked(builder, shifted(builder, words, -4), 15)}
        if n_bits == 5:
            for half in halves:
                fifth = fifth_bits(builder, starts, offset - 4 + 2 * half)
                halves[half] = builder.or_(halves[half], fifth)
        minimum = four_halves(builder, starts, 2, n_bytes) if has_minimum else None
        return [Term(0, halves, four_halves(builder, starts, 0, n_bytes))], minimum

    return decode


def fifth_bits(builder: Builder, starts: Starts, offset: int) -> Value:
    """Bit i of sixteen of each block as bit 4 of byte i."""
    bits = ir.Constant(ir.VectorType(I16, 4), ir.Undefined)
    for number, start in enumerate(starts):
        part = loaded(builder, start, offset, I16)
        bits = builder.insert_element(bits, part, ir.Constant(I32, number))
    chosen = builder.bitcast(bits, ir.VectorType(ir.IntType(1), 4 * LANES))
    sixteen, none = ir.Constant(BYTES, [16] * 4 * LANES), ir.Constant(BYTES, [0] * 4 * LANES)
    return builder.bitcast(builder.select(chosen, sixteen, none), INTS)


# -------------------------------------------------------------------- blocks of 256 entries


def affine_k(n_bits: int) -> Callable[..., Decoded]:
    """Decoder of Q4_K and Q5_K; the minimums are d_min * m[0 ... 7], in the upper lanes."""

    def decode(builder: Builder, starts: Starts, _n_bytes: int) -> Decoded:
        numbers, terms = scales_and_minimums(builder, starts[0]), []
        if n_bits == 5:
            fifth = builder.lshr(twice(builder, starts[0], 16), constants([2 * u for u in UPPER]))
        for s in range(2):
            words = loaded(builder, starts[0], (16 if n_bits == 4 else 48) + 64 * s, INTS)
            for half in (0, 1):
                codes = masked(builder, shifted(builder, words, -4 * half), 15)
                if n_bits == 5:
                    bit = shifted(builder, fifth, 4 - 4 * s - half)
                    codes = builder.or_(codes, masked(builder, bit, 16))
                lanes = [4 * s + half + 2 * u for u in UPPER]
                terms.append(Term(s, {half: codes}, spread(builder, numbers, lanes)))
        return terms, numbers

    return decode


def decode_q6_k(builder: Builder, starts: Starts, _n_bytes: int) -> Decoded:
    """Decode a block of Q6_K."""
    block, terms = starts[0], []
    integers = builder.sext(loaded(builder, block, 192, ir.VectorType(I8, LANES)), INTS)
    d = builder.bitcast(loaded(builder, block, 208, I16), ir.VectorType(I16, 1))
    d = builder.fpext(builder.bitcast(d, ir.VectorType(HALF, 1)), ir.VectorType(FLOATS.element, 1))
    numbers = builder.fmul(spread(builder, d, [0] * LANES), builder.sitofp(integers, FLOATS))
    for s in range(2):
        high = builder.lshr(twice(builder, block, 128 + 32 * s), constants([4 * u for u in UPPER]))
        for half in (0, 1):
            low = builder.lshr(
                twice(builder, block, 64 * s + 32 * half), constants([4 * u for u in UPPER])
            )
            upper = masked(builder, shifted(builder, high, 4 - 2 * half), 48)
            lanes = [8 * s + 2 * half + lane // 4 + 2 * (lane // 8) for lane in range(LANES)]
            codes = {half: builder.or_(masked(builder, low, 15), upper)}
            terms.append(Term(s, codes, spread(builder, numbers, lanes)))
    return terms, None


DIGIT_UNITS = {
    "Q4_0": DigitUnit(32, 128, 72, 8, small(4, 2, False)),
    "Q4_1": DigitUnit(32, 128, 80, 0, small(4, 4, True)),
    "Q5_0": DigitUnit(32, 128, 88, 16, small(5, 6, False)),
    "Q5_1": DigitUnit(32, 128, 96, 0, small(5, 8, True)),
    "Q4_K": DigitUnit(256, 256, 144, 0, affine_k(4)),
    "Q5_K": DigitUnit(256, 256, 176, 0, affine_k(5)),
    "Q6_K": DigitUnit(256, 256, 210, 32, decode_q6_k),
}
"""Name of a format to how it is decoded for products of integers."""
