"""What the blocks of GGUF hold, as unsigned bytes for products of integers, 256 entries at a time.

A span is 256 adjacent entries of a row: eight blocks or sub-blocks of 32.  Quarter j of a span is a
vector of 64 codes, a byte each: lane 2 b + i has the entries 32 b + 8 j + 4 i + (0 ... 3).  So the
two lanes of a block have its scale in all quarters, and the products of sixteen entries are added
up in a lane before one conversion, of Q8_0 two, and one scale.

    w = scale * (code - zero) + minimum

The functions emit LLVM's vector code; `npllm.quantized` has the formulas.
"""

from collections.abc import Callable, Mapping
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
from npllm.kernels.cpu.simd import F32, FLOATS, I8, I32, INTS, LANES, all_lanes, call

__all__ = ["DIGIT_UNITS", "N_BLOCK", "SPAN", "DigitUnit", "Term"]

Builder = Any  # llvmlite's IRBuilder
Value = Any  # an LLVM value
Starts = list[Value]  # pointers to eight blocks of 32, or to one of 256
Decoded = tuple[list["Term"], Value | None]

SPAN, N_BLOCK = 256, 8  # entries; blocks of 32
I64 = ir.IntType(64)
EIGHT = ir.VectorType(I64, N_BLOCK)
WORDS = ir.VectorType(I16, 2 * LANES)
BLOCK_OF = [lane // 2 for lane in range(LANES)]


class Term(NamedTuple):
    """Products that have one scale in each lane."""

    quarters: Mapping[int, Callable[[], Value]]  # emits sixteen int32, four unsigned bytes each
    scale: Value


class DigitUnit(NamedTuple):
    """How the entries of a span are decoded."""

    n_bytes: int  # of a span
    has_blocks: bool  # of 32 entries
    zero: int
    decode: Callable[[Builder, Starts, int], Decoded]  # terms and minimum
    is_wide: bool = False  # products of sixteen entries do not fit 32 bits


# --------------------------------------------------------------------- blocks of 32 entries


def joined(builder: Builder, parts: list[Value]) -> Value:
    """Vectors one behind the other, a power of two of them."""
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [spread(builder, a, range(2 * a.type.count), b) for a, b in pairs]
    return parts[0]


def chunks(builder: Builder, starts: Starts, offset: int, n_bytes: int) -> list[Value]:
    """Bytes 0 ... 7 and 8 ... 15 of each of eight blocks.

    Of adjacent blocks of 18 bytes, each chunk of four blocks lies in one vector.
    """
    if n_bytes == 18:
        lanes = [9 * block + offset // 2 + at for block in range(4) for at in range(4)]
        return [four_and_four(builder, starts[0], at, 4 * n_bytes, lanes) for at in (0, 8)]
    kind = ir.VectorType(I64, 2)
    low, high = (
        joined(builder, [loaded(builder, start, offset, kind) for start in half])
        for half in (starts[:4], starts[4:])
    )
    return [builder.bitcast(spread(builder, low, range(k, LANES, 2), high), INTS) for k in (0, 1)]


def four_and_four(
    builder: Builder, start: Value, offset: int, distance: int, lanes: list[int]
) -> Value:
    """Some 16-bit words of the 64 bytes at an offset, and of those some distance behind them."""
    first = loaded(builder, start, offset, WORDS)
    second = loaded(builder, start, offset + distance, WORDS)
    lanes = [*lanes, *(2 * LANES + lane for lane in lanes)]
    words = spread(builder, first, lanes, second)
    return builder.bitcast(words, INTS) if len(lanes) == 2 * LANES else words


def each(builder: Builder, starts: Starts, offset: int, kind: Any) -> Value:
    """A number of each of eight blocks."""
    numbers = ir.Constant(ir.VectorType(kind, N_BLOCK), ir.Undefined)
    for b, start in enumerate(starts):
        number = loaded(builder, start, offset, kind)
        numbers = builder.insert_element(numbers, number, ir.Constant(I32, b))
    return numbers


def halves(builder: Builder, starts: Starts, offset: int, n_bytes: int) -> Value:
    """A float16 of each of eight blocks in the lanes of the block, as float32.

    Of adjacent blocks of at most 20 bytes, those of four lie in one vector.
    """
    if 0 < n_bytes <= 20:
        lanes = [(offset + b * n_bytes) // 2 for b in BLOCK_OF[:8]]
        return widened_halves(builder, four_and_four(builder, starts[0], 0, 4 * n_bytes, lanes))
    return widened_halves(builder, spread(builder, each(builder, starts, offset, I16), BLOCK_OF))


def fifth_bits(builder: Builder, starts: Starts, offset: int) -> Value:
    """Bit i of a byte of each of eight blocks as bit 4 of byte i of the block's two lanes."""
    at = range(4 * LANES)
    bits = spread(builder, each(builder, starts, offset, I8), [byte // 8 for byte in at])
    one = ir.Constant(BYTES, [1 << byte % 8 for byte in at])
    none, sixteen = (ir.Constant(BYTES, [value for _ in at]) for value in (0, 16))
    is_set = builder.icmp_unsigned("!=", builder.and_(bits, one), none)
    return builder.bitcast(builder.select(is_set, sixteen, none), INTS)


def small(n_bits: int, offset: int, has_minimum: bool) -> Callable[..., Decoded]:
    """Decoder of Q4_0, Q4_1, Q5_0 and Q5_1; their codes begin at `offset`."""

    def decode(builder: Builder, starts: Starts, n_bytes: int) -> Decoded:
        words = chunks(builder, starts, offset, n_bytes)

        def quarter(j: int) -> Value:
            nibbles = words[j % 2] if j < 2 else builder.lshr(words[j % 2], all_lanes(4, INTS))
            codes = masked(builder, nibbles, 15)
            if n_bits == 4:
                return codes
            return builder.or_(codes, fifth_bits(builder, starts, offset - 4 + j))

        scale = halves(builder, starts, 0, n_bytes)
        minimum = halves(builder, starts, 2, n_bytes) if has_minimum else None
        return [Term({j: partial(quarter, j) for j in (0, 2, 1, 3)}, scale)], minimum

    return decode


def of_eight(builder: Builder, start: Value, offset: int, lanes: list[int]) -> Value:
    """Some 16-bit words of the 64 bytes at an offset in every second of eight adjacent blocks of 34
    bytes.
    """
    parts = [four_and_four(builder, start, offset + at, 68, lanes) for at in (0, 136)]
    return joined(builder, parts)


def decode_q8_0(builder: Builder, starts: Starts, n_bytes: int) -> Decoded:
    """Decode eight blocks of Q8_0, whose bytes are signed."""

    def quarter(j: int) -> Value:
        if n_bytes:
            start = 0 if j < 3 else 4  # bytes of two blocks that have the quarter, and no byte more
            lanes = [1 + 4 * j - start // 2 + 17 * b + at for b in (0, 1) for at in range(4)]
            words = of_eight(builder, starts[0], start, lanes)
        else:
            words = each(builder, starts, 2 + 8 * j, I64)
        return builder.xor(builder.bitcast(words, INTS), all_lanes(0x80808080, INTS))

    if n_bytes:
        scale = widened_halves(builder, of_eight(builder, starts[0], 0, [0, 0, 17, 17]))
    else:
        scale = halves(builder, starts, 0, n_bytes)
    return [Term({j: partial(quarter, j) for j in range(4)}, scale)], None


# -------------------------------------------------------------------- blocks of 256 entries


def quarter_at(builder: Builder, parts: list[Value], starts: list[int], j: int) -> Value:
    """Bytes 8 j ... 8 j + 7 of each sub-block of one or two loaded vectors; where it starts there,
    a multiple of 8.
    """
    lanes = [start // 8 + j for start in starts]
    return builder.bitcast(spread(builder, parts[0], lanes, parts[-1]), INTS)


def rotated(builder: Builder, words: Value, left: list[int]) -> Value:
    """Every word rotated to the left, by a number of bits for each block."""
    bits = constants([left[b] % 32 for b in BLOCK_OF])
    return call(builder, "llvm.fshl.v16i32", INTS, [words, words, bits])


def affine_k(n_bits: int) -> Callable[..., Decoded]:
    """Decoder of Q4_K and Q5_K: low nibbles are of even sub-blocks, high ones of odd ones."""

    def decode(builder: Builder, starts: Starts, _n_bytes: int) -> Decoded:
        block, first = starts[0], 16 if n_bits == 4 else 48
        parts = [loaded(builder, block, first + at, EIGHT) for at in (0, 64)]
        nibble = constants([4 * (b % 2) for b in BLOCK_OF])

        def quarter(j: int) -> Value:
            low = quarter_at(builder, parts, [32 * (b // 2) for b in range(N_BLOCK)], j)
            codes = masked(builder, builder.lshr(low, nibble), 15)
            if n_bits == 4:
                return codes
            bits = loaded(builder, block, 16 + 8 * j, ir.VectorType(I32, 2))
            bits = spread(builder, bits, [lane % 2 for lane in range(LANES)])
            fifth = rotated(builder, bits, [4 - b for b in range(N_BLOCK)])
            return builder.or_(codes, masked(builder, fifth, 16))

        numbers = scales_and_minimums(builder, block)
        scale, minimum = (spread(builder, numbers, [at + b for b in BLOCK_OF]) for at in (0, 8))
        return [Term({j: partial(quarter, j) for j in range(4)}, scale)], builder.fneg(minimum)

    return decode


def decode_q6_k(builder: Builder, starts: Starts, _n_bytes: int) -> Decoded:
    """Decode a block of Q6_K, which has a scale for 16 entries."""
    block = starts[0]
    parts = [loaded(builder, block, at, EIGHT) for at in (0, 64)]
    upper = [loaded(builder, block, 128, EIGHT)]
    nibble = constants([4 * (b % 4 // 2) for b in BLOCK_OF])

    def quarter(j: int) -> Value:
        low = quarter_at(builder, parts, [0, 32, 0, 32, 64, 96, 64, 96], j)
        high = quarter_at(builder, upper, [0] * 4 + [32] * 4, j)
        high = rotated(builder, high, [4 - 2 * (b % 4) for b in range(N_BLOCK)])
        low = masked(builder, builder.lshr(low, nibble), 15)
        return builder.or_(low, masked(builder, high, 48))

    integers = builder.sext(loaded(builder, block, 192, ir.VectorType(I8, LANES)), INTS)
    d = builder.bitcast(loaded(builder, block, 208, I16), ir.VectorType(HALF, 1))
    d = spread(builder, builder.fpext(d, ir.VectorType(F32, 1)), [0] * LANES)
    numbers = builder.fmul(d, builder.sitofp(integers, FLOATS))
    terms = []
    for half in (0, 1):
        quarters = {j: partial(quarter, j) for j in (2 * half, 2 * half + 1)}
        terms.append(Term(quarters, spread(builder, numbers, [2 * b + half for b in BLOCK_OF])))
    return terms, None


DIGIT_UNITS = {
    "Q4_0": DigitUnit(144, True, 8, small(4, 2, False)),
    "Q4_1": DigitUnit(160, True, 0, small(4, 4, True)),
    "Q5_0": DigitUnit(176, True, 16, small(5, 6, False)),
    "Q5_1": DigitUnit(192, True, 16, small(5, 8, True)),
    "Q8_0": DigitUnit(272, True, 128, decode_q8_0, True),
    "Q4_K": DigitUnit(144, False, 0, affine_k(4)),
    "Q5_K": DigitUnit(176, False, 16, affine_k(5)),
    "Q6_K": DigitUnit(210, False, 32, decode_q6_k),
}
"""Name of a format to how it is decoded for products of integers."""
