"""What the blocks of GGUF hold, as unsigned bytes for products of integers, 256 entries at a time.

A span is 256 adjacent entries of a row: eight blocks or sub-blocks of 32.  Quarter j of a span is a
vector of 64 codes, a byte each: lane 2 b + i has the entries 32 b + 8 j + 4 i + (0 ... 3).  So the
two lanes of a block meet its scale in all quarters, and products of up to sixteen entries are
added up in a lane before one conversion, one scale and one addition.

    w = scale * (code - zero) + minimum
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from llvmlite import ir

from npllm.kernels.cpu.block_codes import (
    BYTES,
    HALF,
    I16,
    constants,
    loaded,
    masked,
    scales_and_minimums,
    spread,
    widened_halves,
)
from npllm.kernels.cpu.simd import FLOATS, I8, I32, INTS, LANES, call

__all__ = ["DIGIT_UNITS", "SPAN", "DigitUnit", "Term"]

Builder = Any  # llvmlite's IRBuilder
Value = Any  # an LLVM value
Starts = tuple[Value, ...]  # pointers to eight blocks of 32, or to one of 256
Decoded = tuple[list["Term"], Value | None]

SPAN = 256  # entries
N_BLOCK = 8  # of a span
I64 = ir.IntType(64)
WORDS = ir.VectorType(I16, 2 * LANES)
BLOCK_OF = [lane // 2 for lane in range(LANES)]


class Term(NamedTuple):
    """Products that one scale multiplies, lane by lane."""

    codes: dict[int, Value]  # quarter -> sixteen int32, four unsigned bytes each
    scale: Value


class DigitUnit(NamedTuple):
    """How the entries of a span are decoded."""

    n_bytes: int  # of a span
    has_blocks: bool  # of 32 entries
    zero: int
    decode: Callable[[Builder, Starts, int], Decoded]  # terms; minimum


# --------------------------------------------------------------------- blocks of 32 entries


def chunks(builder: Builder, starts: Starts, offset: int, n_bytes: int) -> list[Value]:
    """Bytes 0 ... 7 and 8 ... 15 of each of eight blocks.

    Of adjacent blocks of 18 bytes, each chunk of four blocks lies in one vector.
    """
    if n_bytes == 18:
        lanes = [9 * block + offset // 2 + at for block in range(4) for at in range(4)]
        return [
            builder.bitcast(
                spread(
                    builder,
                    loaded(builder, starts[0], at, WORDS),
                    [*lanes, *(2 * LANES + lane for lane in lanes)],
                    loaded(builder, starts[0], 4 * n_bytes + at, WORDS),
                ),
                INTS,
            )
            for at in (0, 8)
        ]
    pairs = [loaded(builder, start, offset, ir.VectorType(I64, 2)) for start in starts]
    while len(pairs) > 2:
        both = zip(pairs[::2], pairs[1::2], strict=True)
        pairs = [spread(builder, a, range(2 * a.type.count), b) for a, b in both]
    even = range(0, LANES, 2)
    return [
        builder.bitcast(spread(builder, pairs[0], [at + k for at in even], pairs[1]), INTS)
        for k in (0, 1)
    ]


def halves(builder: Builder, starts: Starts, offset: int, n_bytes: int) -> Value:
    """A float16 of each of eight blocks in the lanes of the block, as float32."""
    if 0 < n_bytes <= 20:
        lanes = [(offset + block * n_bytes) // 2 for block in range(4) for _ in (0, 1)]
        parts = [loaded(builder, starts[0], at, WORDS) for at in (0, 4 * n_bytes)]
        lanes += [2 * LANES + lane for lane in lanes]
        return widened_halves(builder, spread(builder, parts[0], lanes, parts[1]))
    words = ir.Constant(ir.VectorType(I16, N_BLOCK), ir.Undefined)
    for number, start in enumerate(starts):
        part = loaded(builder, start, offset, I16)
        words = builder.insert_element(words, part, ir.Constant(I32, number))
    return widened_halves(builder, spread(builder, words, BLOCK_OF))


def small(n_bits: int, offset: int, has_minimum: bool) -> Callable[..., Decoded]:
    """Decoder of Q4_0, Q4_1, Q5_0 and Q5_1; their codes begin at `offset`."""

    def decode(builder: Builder, starts: Starts, n_bytes: int) -> Decoded:
        words = chunks(builder, starts, offset, n_bytes)
        four = constants([4] * LANES)

        def quarter(j: int) -> Value:
            low = words[j % 2] if j < 2 else builder.lshr(words[j % 2], four)
            low = masked(builder, low, 15)
            return builder.or_(low, fifth_bits(builder, starts, offset - 4 + j)) if n_bits == 5 else low

        codes = {j: partial(quarter, j) for j in (0, 2, 1, 3)}
        minimum = halves(builder, starts, 2, n_bytes) if has_minimum else None
        return [Term(codes, halves(builder, starts, 0, n_bytes))], minimum

    return decode


def fifth_bits(builder: Builder, starts: Starts, offset: int) -> Value:
    """Bit i of a byte of each of eight blocks as bit 4 of byte i of the block's two lanes."""
    bits = ir.Constant(ir.VectorType(I8, N_BLOCK), ir.Undefined)
    for number, start in enumerate(starts):
        part = loaded(builder, start, offset, I8)
        bits = builder.insert_element(bits, part, ir.Constant(I32, number))
    n = 4 * LANES
    bits = spread(builder, bits, [byte // 8 for byte in range(n)])
    one = ir.Constant(BYTES, [1 << byte % 8 for byte in range(n)])
    none, sixteen = (ir.Constant(BYTES, [value] * n) for value in (0, 16))
    is_set = builder.icmp_unsigned("!=", builder.and_(bits, one), none)
    return builder.bitcast(builder.select(is_set, sixteen, none), INTS)


# -------------------------------------------------------------------- blocks of 256 entries


def quarters(
    builder: Builder, block: Value, offset: int, starts: list[int], shifts: list[int]
) -> list[Value]:
    """Vectors of which quarter j has, for each sub-block, bytes 8 j ... 8 j + 7 from its start on,
    relative to `offset`, shifted to the right; the starts are below 128.
    """
    kind = ir.VectorType(I64, N_BLOCK)
    n_load = max(starts) // 64 + 1
    parts = [loaded(builder, block, offset + 64 * k, kind) for k in range(n_load)]
    shift = constants([shifts[b] for b in BLOCK_OF])
    def quarter(j: int) -> Value:
        words = spread(builder, parts[0], [start // 8 + j for start in starts], parts[-1])
        words = builder.bitcast(words, INTS)
        return builder.lshr(words, shift) if any(shifts) else words

    return quarter


def affine_k(n_bits: int) -> Callable[..., Decoded]:
    """Decoder of Q4_K and Q5_K."""

    def decode(builder: Builder, starts: Starts, _n_bytes: int) -> Decoded:
        block, odd = starts[0], [0, 4] * 4
        at = [32 * (b // 2) for b in range(N_BLOCK)]
        low = quarters(builder, block, 16 if n_bits == 4 else 48, at, odd)

        def quarter(j: int) -> Value:
            code = masked(builder, low(j), 15)
            return builder.or_(code, fifth_bit_k(builder, block, 16 + 8 * j)) if n_bits == 5 else code

        codes = {j: partial(quarter, j) for j in range(4)}
        numbers = scales_and_minimums(builder, block)
        scale = spread(builder, numbers, BLOCK_OF)
        minimum = spread(builder, numbers, [N_BLOCK + b for b in BLOCK_OF])
        return [Term(codes, scale)], builder.fneg(minimum)

    return decode


def fifth_bit_k(builder: Builder, block: Value, offset: int) -> Value:
    """Bit b of eight bytes as bit 4 of the bytes of sub-block b: the words are rotated."""
    eight = loaded(builder, block, offset, ir.VectorType(I32, 2))
    words = spread(builder, eight, [lane % 2 for lane in range(LANES)])
    left = constants([(4 - b) % 32 for b in BLOCK_OF])
    return masked(builder, call(builder, "llvm.fshl.v16i32", INTS, [words, words, left]), 16)


def decode_q6_k(builder: Builder, starts: Starts, _n_bytes: int) -> Decoded:
    """Decode a block of Q6_K."""
    block = starts[0]
    low = quarters(builder, block, 0, [0, 32, 0, 32, 64, 96, 64, 96], [0, 0, 4, 4] * 2)
    high = quarters(builder, block, 128, [0] * 4 + [32] * 4, [0] * N_BLOCK)
    left = constants([(4 - 2 * (b % 4)) % 32 for b in BLOCK_OF])

    def quarter(j: int) -> Value:
        words = high(j)
        upper = call(builder, "llvm.fshl.v16i32", INTS, [words, words, left])
        return builder.or_(masked(builder, low(j), 15), masked(builder, upper, 48))

    integers = builder.sext(loaded(builder, block, 192, ir.VectorType(I8, LANES)), INTS)
    d = builder.bitcast(loaded(builder, block, 208, I16), ir.VectorType(I16, 1))
    d = builder.fpext(builder.bitcast(d, ir.VectorType(HALF, 1)), ir.VectorType(FLOATS.element, 1))
    numbers = builder.fmul(spread(builder, d, [0] * LANES), builder.sitofp(integers, FLOATS))
    return [
        Term(
            {j: partial(quarter, j) for j in (2 * half, 2 * half + 1)},
            spread(builder, numbers, [2 * b + half for b in BLOCK_OF]),
        )
        for half in (0, 1)
    ], None


DIGIT_UNITS = {
    "Q4_0": DigitUnit(144, True, 8, small(4, 2, False)),
    "Q4_1": DigitUnit(160, True, 0, small(4, 4, True)),
    "Q5_0": DigitUnit(176, True, 16, small(5, 6, False)),
    "Q5_1": DigitUnit(192, True, 0, small(5, 8, True)),
    "Q4_K": DigitUnit(144, False, 0, affine_k(4)),
    "Q5_K": DigitUnit(176, False, 0, affine_k(5)),
    "Q6_K": DigitUnit(210, False, 32, decode_q6_k),
}
"""Name of a format to how it is decoded for products of integers."""
