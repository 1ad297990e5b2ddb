"""What the blocks of GGUF hold, as vectors: codes, scales and minimums of 64 entries at a time.

A step is 64 adjacent entries of a row.  Lane L of a vector of codes has the codes of the entries
4 L ... 4 L + 3 in its four bytes, so that vector k of x, of the entries 4 L + k, meets byte k.  A
unit is what is decoded at once: two blocks of 32 entries (one step), or one block of 256 (four).

    w[4 L + k] = scale[L] * (code - zero) + minimum[L]

The functions emit LLVM's vector code; `npllm.quantized` has the formulas.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llvmlite import ir

from npllm.kernels.cpu.simd import F32, FLOATS, I8, I32, INTS, LANES, all_lanes

__all__ = ["Pair", "STEP", "UNITS", "Step", "Unit", "constants", "spread"]

Builder = Any  # llvmlite's IRBuilder
Value = Any  # an LLVM value

STEP = 4 * LANES  # entries
I16, I64, HALF = ir.IntType(16), ir.IntType(64), ir.HalfType()
BYTES = ir.VectorType(I8, 4 * LANES)
UPPER = [0] * 8 + [1] * 8  # 1 in the lanes of the upper half


class Step(NamedTuple):
    """Sixty-four entries."""

    codes: Value  # sixteen int32; unsigned 4-bit codes in the low half of each byte, else signed
    scale: Value
    minimum: Value | None


class Pair(NamedTuple):
    """Two blocks of 32 entries, or one block of 256."""

    starts: tuple[Value, Value]  # pointers; one block has no second one
    n_bytes: int  # of a block where they are adjacent, else 0


class Unit(NamedTuple):
    """How the entries of a unit are decoded."""

    n_entries: int
    n_bytes: int
    is_nibble: bool  # 4-bit codes, whose bytes have other bits above; else bytes less the zero
    zero: int
    decode: Callable[[Builder, Pair], tuple[list[Step], Value | None]]


def constants(values: Sequence[float], kind: Any = INTS) -> Any:
    """A vector constant, lane by lane."""
    return ir.Constant(kind, list(values))


def spread(builder: Builder, values: Value, lanes: Sequence[int], other: Value = None) -> Value:
    """A vector whose lanes are the given ones of one or two vectors."""
    other = ir.Constant(values.type, ir.Undefined) if other is None else other
    return builder.shuffle_vector(
        values, other, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
    )


def loaded(builder: Builder, start: Value, offset: int, kind: Any) -> Value:
    """A value at some bytes from an address, aligned in no way."""
    pointer = builder.gep(start, [ir.Constant(ir.IntType(64), offset)])
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=1)


def both(builder: Builder, blocks: Pair, offset: int, n_word: int) -> Value:
    """Words of two blocks, those of the first in the lower eight lanes, repeated to fill them."""
    kind = I32 if n_word == 1 else ir.VectorType(I32, n_word)
    parts = [loaded(builder, block, offset, kind) for block in blocks.starts]
    if n_word == 1:
        parts = [builder.bitcast(part, ir.VectorType(I32, 1)) for part in parts]
    lanes = [n_word * (lane // 8) + lane % n_word for lane in range(LANES)]
    return spread(builder, parts[0], lanes, parts[1])


def halves(builder: Builder, blocks: Pair, offset: int) -> Value:
    """A float16 of each of two blocks, in the lanes of their entries, as float32.

    Of adjacent blocks one vector is loaded that has both numbers.
    """
    n_bytes = blocks.n_bytes
    if n_bytes:
        words = loaded(builder, blocks.starts[0], 0, ir.VectorType(I16, 16 if n_bytes < 32 else 32))
        return widened_halves(
            builder, spread(builder, words, [(offset + u * n_bytes) // 2 for u in UPPER])
        )
    parts = [
        builder.bitcast(loaded(builder, block, offset, I16), ir.VectorType(I16, 1))
        for block in blocks.starts
    ]
    return widened_halves(builder, spread(builder, parts[0], UPPER, parts[1]))


def widened_halves(builder: Builder, bits: Value) -> Value:
    """Bits of sixteen float16 as float32."""
    return builder.fpext(builder.bitcast(bits, ir.VectorType(HALF, LANES)), FLOATS)


def masked(builder: Builder, words: Value, byte: int) -> Value:
    """The bits of a mask in every byte."""
    return builder.and_(words, all_lanes(byte * 0x01010101, INTS))


def less(builder: Builder, words: Value, byte: int) -> Value:
    """Every byte less a number."""
    zero = ir.Constant(BYTES, [byte] * 4 * LANES)
    return builder.bitcast(builder.sub(builder.bitcast(words, BYTES), zero), INTS)


def shifted(builder: Builder, words: Value, left: int) -> Value:
    """Every word shifted to the left, or to the right."""
    shift = builder.shl if left > 0 else builder.lshr
    return shift(words, all_lanes(abs(left), INTS)) if left else words


# --------------------------------------------------------------------- blocks of 32 entries


def nibbles_of_two(builder: Builder, blocks: Pair, offset: int) -> Value:
    """Nibbles of two blocks: low ones in the lower lanes of a block's eight, then high ones."""
    words = both(builder, blocks, offset, 4)
    return builder.lshr(words, constants(([0] * 4 + [4] * 4) * 2))


def fifth_bits_of_two(builder: Builder, blocks: Pair, offset: int) -> Value:
    """Bit i of a word belongs to entry i; here it is bit 4 of the entry's byte.

    Times 1 + 2**7 + 2**14 + 2**21, bit k of four comes to be bit 8 k, among others.
    """
    words = both(builder, blocks, offset, 1)
    four = builder.lshr(words, constants([4 * lane for lane in range(8)] * 2))
    four = builder.and_(four, all_lanes(15, INTS))
    return masked(builder, builder.mul(four, all_lanes(0x00204081 << 4, INTS)), 16)


def small(
    n_bits: int, offset: int, has_minimum: bool
) -> Callable[[Builder, Pair], tuple[list[Step], None]]:
    """Decoder of Q4_0, Q4_1, Q5_0 and Q5_1; their codes begin at `offset`."""

    def decode(builder: Builder, blocks: Pair) -> tuple[list[Step], None]:
        codes = nibbles_of_two(builder, blocks, offset)
        if n_bits == 5:
            fifth = fifth_bits_of_two(builder, blocks, offset - 4)
            codes = builder.or_(masked(builder, codes, 15), fifth)
            codes = less(builder, codes, 16)
        minimum = halves(builder, blocks, 2) if has_minimum else None
        return [Step(codes, halves(builder, blocks, 0), minimum)], None

    return decode


def decode_q8_0(builder: Builder, blocks: Pair) -> tuple[list[Step], None]:
    """Decode two blocks of Q8_0."""
    return [Step(both(builder, blocks, 2, 8), halves(builder, blocks, 0), None)], None


# -------------------------------------------------------------------- blocks of 256 entries


def scales_and_minimums(builder: Builder, block: Value) -> Value:
    """Compute d * sc[0 ... 7] in the lower lanes, d_min * m[0 ... 7] in the upper ones.

    Integers of eight bytes hold the scales and, above, the minimums: the units of vectors are busy.
    """
    both = loaded(builder, block, 4, I64)
    rest = builder.zext(loaded(builder, block, 12, I32), I64)

    def part(value: Value, right: int, mask: int) -> Value:
        shifted = builder.lshr(value, ir.Constant(I64, right)) if right else value
        return builder.and_(shifted, ir.Constant(I64, mask * 0x0101010101010101))

    rest = builder.or_(rest, builder.shl(rest, ir.Constant(I64, 28)))
    low, high = part(both, 0, 63), builder.or_(part(both, 2, 48), part(rest, 0, 15))
    pair = ir.VectorType(I32, 2)
    lanes = [0, 2, 1, 3]
    words = spread(builder, builder.bitcast(low, pair), lanes, builder.bitcast(high, pair))
    integers = builder.bitcast(words, ir.VectorType(I8, LANES))
    d = builder.bitcast(loaded(builder, block, 0, I32), ir.VectorType(HALF, 2))
    d = spread(builder, builder.fpext(d, ir.VectorType(F32, 2)), UPPER)
    return builder.fmul(d, builder.uitofp(builder.zext(integers, INTS), FLOATS))


def twice(builder: Builder, block: Value, offset: int) -> Value:
    """Thirty-two bytes in the lower lanes and again in the upper ones."""
    words = loaded(builder, block, offset, ir.VectorType(I32, 8))
    return spread(builder, words, list(range(8)) * 2)


def affine_k(n_bits: int) -> Callable[[Builder, Pair], tuple[list[Step], Value]]:
    """Decoder of Q4_K and Q5_K."""

    def decode(builder: Builder, blocks: Pair) -> tuple[list[Step], Value]:
        block = blocks.starts[0]
        numbers = scales_and_minimums(builder, block)
        steps = []
        if n_bits == 5:
            fifth = builder.lshr(twice(builder, block, 16), constants(UPPER))
        for s in range(4):
            at = (16 if n_bits == 4 else 48) + 32 * s
            codes = builder.lshr(twice(builder, block, at), constants([4 * u for u in UPPER]))
            if n_bits == 5:
                bit = masked(builder, shifted(builder, fifth, 4 - 2 * s), 16)
                codes = less(builder, builder.or_(masked(builder, codes, 15), bit), 16)
            scale = spread(builder, numbers, [2 * s + u for u in UPPER])
            minimum = spread(builder, numbers, [8 + 2 * s + u for u in UPPER])
            steps.append(Step(codes, scale, builder.fsub(all_lanes(-0.0), minimum)))
        return steps, numbers

    return decode


def decode_q6_k(builder: Builder, blocks: Pair) -> tuple[list[Step], None]:
    """Decode a block of Q6_K."""
    block = blocks.starts[0]
    integers = builder.sitofp(
        builder.sext(loaded(builder, block, 192, ir.VectorType(I8, LANES)), INTS), FLOATS
    )
    d = builder.bitcast(loaded(builder, block, 208, I16), ir.VectorType(I16, 1))
    numbers = builder.fmul(widened_halves(builder, spread(builder, d, [0] * LANES)), integers)
    steps = []
    for s in range(4):
        low = loaded(builder, block, 64 * (s // 2), INTS)
        high = builder.lshr(
            twice(builder, block, 128 + 32 * (s // 2)), constants([2 * u for u in UPPER])
        )
        codes = builder.or_(
            masked(builder, shifted(builder, low, -4 * (s % 2)), 15),
            masked(builder, shifted(builder, high, 4 - 4 * (s % 2)), 48),
        )
        scale = spread(builder, numbers, [4 * s + lane // 4 for lane in range(LANES)])
        steps.append(Step(less(builder, codes, 32), scale, None))
    return steps, None


UNITS = {
    "Q4_0": Unit(64, 36, True, 8, small(4, 2, False)),
    "Q4_1": Unit(64, 40, True, 8, small(4, 4, True)),
    "Q5_0": Unit(64, 44, False, 16, small(5, 6, False)),
    "Q5_1": Unit(64, 48, False, 16, small(5, 8, True)),
    "Q8_0": Unit(64, 68, False, 0, decode_q8_0),
    "Q4_K": Unit(256, 144, True, 8, affine_k(4)),
    "Q5_K": Unit(256, 176, False, 16, affine_k(5)),
    "Q6_K": Unit(256, 210, False, 32, decode_q6_k),
}
"""Name of a format to how it is decoded."""
