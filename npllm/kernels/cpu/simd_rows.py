"""Tuples of vectors, one for each of several rows: one operation on all of them.

A kernel that is written with these is compiled once for each length of the tuples, and computes
each row in the same order whatever the length is.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from npllm.kernels.cpu.simd import (
    FLOATS,
    INTS,
    LANES,
    _load,
    call,
    entry_pointer,
    require_row_major,
    sum_lanes,
    vector,
)

__all__ = [
    "add_each",
    "fma_each",
    "load_each",
    "reduce_each",
    "store_each",
    "sums_of_sixteen",
    "transpose_block",
]

Array = Any
Vector = Any  # sixteen float32
Vectors = Any  # tuple of them, one for each row


def for_each(context: Any, builder: Any, kind: Any, make: Callable[[int], Any]) -> Any:
    """Make a tuple of a type, entry by entry."""
    return context.make_tuple(builder, kind, [make(j) for j in range(kind.count)])


@intrinsic
def load_each(_typing: Any, array: Array, index: Any, stride: Any, like: Vectors) -> Any:
    """Vectors at index, index + stride, ...; as many as `like` has."""
    require_row_major(array)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, index, stride, _ = arguments

        def make(j: int) -> Any:
            at = builder.add(index, builder.mul(stride, ir.Constant(stride.type, j)))
            return _load(context, builder, signature.args[0], array, at)

        return for_each(context, builder, signature.return_type, make)

    return like(array, types.intp, types.intp, like), generate


@intrinsic
def store_each(_typing: Any, array: Array, index: Any, stride: Any, values: Vectors) -> Any:
    """Write vectors to index, index + stride, ..."""
    require_row_major(array)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, index, stride, values = arguments
        for j in range(signature.args[3].count):
            at = builder.add(index, builder.mul(stride, ir.Constant(stride.type, j)))
            pointer = entry_pointer(context, builder, signature.args[0], array, at)
            vector = builder.extract_value(values, j)
            builder.store(vector, builder.bitcast(pointer, FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, values), generate


@intrinsic
def fma_each(_typing: Any, a: Vector, b: Vectors, c: Vectors) -> Any:
    """A * b[j] + c[j], each rounded once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b, c = arguments

        def make(j: int) -> Any:
            parts = [a, builder.extract_value(b, j), builder.extract_value(c, j)]
            return call(builder, f"llvm.fma.v{LANES}f32", FLOATS, parts)

        return for_each(context, builder, signature.return_type, make)

    return c(vector, b, c), generate


@intrinsic
def add_each(_typing: Any, a: Vectors, b: Vectors) -> Any:
    """A[j] + b[j]."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b = arguments

        def make(j: int) -> Any:
            return builder.fadd(builder.extract_value(a, j), builder.extract_value(b, j))

        return for_each(context, builder, signature.return_type, make)

    return a(a, b), generate


@intrinsic
def reduce_each(_typing: Any, a: Vectors) -> Any:
    """The sum of the lanes of each vector."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def make(j: int) -> Any:
            return sum_lanes(builder, builder.extract_value(arguments[0], j))

        return for_each(context, builder, signature.return_type, make)

    return types.UniTuple(types.float32, a.count)(a), generate


@intrinsic
def sums_of_sixteen(_typing: Any, a: Vectors) -> Any:
    """The sums of the lanes of sixteen vectors, as `sum_lanes` has them, in the lanes of one.

    Pairs of vectors share one addition: a quarter of the instructions of sixteen sums apart.
    """

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        rows = [builder.extract_value(arguments[0], j) for j in range(LANES)]
        for n in (8, 4, 2, 1):  # lanes of each sum that are left
            low = [lane for at in range(0, LANES, 2 * n) for lane in pair_of(range(at, at + n))]
            masks = [ir.Constant(INTS, [lane + more for lane in low]) for more in (0, n)]
            rows = [
                builder.fadd(*(builder.shuffle_vector(rows[k], rows[k + n], m) for m in masks))
                for k in range(n)
            ]
        return rows[0]

    return vector(a), generate


def pair_of(lanes: range) -> list[int]:
    """Lanes of a first vector, then the same of a second one."""
    return [*lanes, *(LANES + lane for lane in lanes)]


def transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Sixteen vectors, of which vector i has lane i of each of sixteen others: each bit of the
    number of a row changes places with that of a lane.
    """
    for bit in (1, 2, 4, 8):
        low = ir.Constant(INTS, [i if not i & bit else i ^ bit | LANES for i in range(LANES)])
        high = ir.Constant(INTS, [i ^ bit if not i & bit else i | LANES for i in range(LANES)])
        new = list(rows)
        for i in range(LANES):
            if not i & bit:
                pair = rows[i], rows[i | bit]
                new[i], new[i | bit] = (builder.shuffle_vector(*pair, m) for m in (low, high))
        rows = new
    return rows


@intrinsic(prefer_literal=True)
def transpose_block(
    _typing: Any,
    add: Any,
    source: Array,
    at: Any,
    stride: Any,
    target: Array,
    to: Any,
    target_stride: Any,
) -> Any:
    """Write 16 x 16 float32, whose rows begin at entries at, at + stride, ..., transposed to
    entries to, to + target_stride, ..., or add them.
    """
    require_row_major(source)
    require_row_major(target)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        _, source, at, stride, target, to, target_stride = arguments

        def entry(start: Any, step: Any, i: int) -> Any:
            return builder.add(start, builder.mul(step, ir.Constant(step.type, i)))

        rows = [
            _load(context, builder, kinds[1], source, entry(at, stride, i)) for i in range(LANES)
        ]
        for i, row in enumerate(transposed(builder, rows)):
            index = entry(to, target_stride, i)
            if add.literal_value:
                row = builder.fadd(_load(context, builder, kinds[4], target, index), row)
            pointer = entry_pointer(context, builder, kinds[4], target, index)
            builder.store(row, builder.bitcast(pointer, FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    numbers = types.intp, types.intp
    return types.void(add, source, *numbers, target, *numbers), generate
