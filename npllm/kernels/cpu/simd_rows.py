"""Tuples of vectors, one for each of several rows: one operation on all of them.

A kernel that is written with these is compiled once for each length of the tuples, and computes
each row in the same order whatever the length is.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from npllm.kernels.cpu.simd import FLOATS, LANES, _load, call, require_row_major, sum_lanes, vector

__all__ = ["add_each", "fma_each", "load_each", "reduce_each"]

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
