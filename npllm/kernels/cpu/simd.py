"""Sixteen floats at a time: the few vector operations that the compiled kernels are written in.

LLVM does not vectorise a loop over single numbers that also prefetches or widens 16-bit numbers.
Here a vector is a type of its own, so that a kernel says what it wants: `acc = fma(load(weight, p),
load(x, i), acc)`.  LLVM turns sixteen floats into one register with AVX-512, two with AVX2, four
with NEON.

Arrays of 16-bit floats are passed as their bits (Numba knows neither type): bfloat16 as uint16,
float16 as int16.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.errors import TypingError
from numba.extending import intrinsic, register_model

__all__ = [
    "LANES",
    "fma",
    "load",
    "load_pairs",
    "load_scalar",
    "maximum",
    "prefetch",
    "prefetch_far",
    "prefetch_pairs",
    "reduce_add",
    "splat",
    "store",
]

Array = Any
Vector = Any  # sixteen float32

LANES = 16
LINE = 64  # bytes of a cache line
NEAREST, SECOND = 3, 2  # LLVM's numbers of the caches into which a line is prefetched
F32, I32, I8 = ir.FloatType(), ir.IntType(32), ir.IntType(8)
FLOATS, INTS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)

STORED = {
    types.uint16: ir.IntType(16),
    types.int16: ir.HalfType(),
    types.int8: I8,
    types.float32: F32,
}


class _Vector(types.Type):
    """Numba's type of sixteen float32."""

    def __init__(self) -> None:
        super().__init__("float32x16")


vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, FLOATS)


def require_row_major(array: Any) -> None:
    """Raise, while compiling, unless entry i of an array is entry i of its memory."""
    if not (isinstance(array, types.Array) and array.layout == "C" and array.aligned):
        raise TypingError(
            f"a kernel loads by index and needs an array in row-major order, got {array}; use "
            "row_major or flat_memory"
        )


def entry_pointer(context: Any, builder: Any, kind: Any, array: Array, index: Any) -> Any:
    """Pointer to entry `index` of an array's memory, strides left aside."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def call(builder: Any, name: str, result: Any, arguments: Any, **options: Any) -> Any:
    """Call a function of LLVM by its name."""
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, [x.type for x in arguments]), name
    )
    return builder.call(function, arguments, **options)


def all_lanes(value: Any, kind: Any = FLOATS) -> Any:
    """A vector constant: one value in every lane."""
    return ir.Constant(kind, [value] * LANES)


def widen(builder: Any, value: Any, stored: Any, floats: Any) -> Any:
    """Exact conversion of stored numbers, one or sixteen of them, to float32."""
    if stored == types.uint16:
        wide = INTS if floats is FLOATS else I32
        shift = all_lanes(16, INTS) if floats is FLOATS else ir.Constant(I32, 16)
        return builder.bitcast(builder.shl(builder.zext(value, wide), shift), floats)
    if stored == types.int16:
        return builder.fpext(value, floats)
    return builder.sitofp(value, floats) if stored == types.int8 else value


def _load(context: Any, builder: Any, kind: Any, array: Array, index: Any) -> Any:
    """Load sixteen entries and widen them."""
    stored = kind.dtype
    pointer = entry_pointer(context, builder, kind, array, index)
    pointer = builder.bitcast(pointer, ir.VectorType(STORED[stored], LANES).as_pointer())
    return widen(builder, builder.load(pointer, align=stored.bitwidth // 8), stored, FLOATS)


@intrinsic
def load(_typing: Any, array: Array, index: Any) -> Any:
    """Sixteen neighbouring entries, in float32."""
    require_row_major(array)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _load(context, builder, signature.args[0], *arguments)

    return vector(array, types.intp), generate


@intrinsic
def load_scalar(_typing: Any, array: Array, index: Any) -> Any:
    """One entry, in float32."""
    require_row_major(array)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        stored = signature.args[0].dtype
        pointer = entry_pointer(context, builder, signature.args[0], *arguments)
        pointer = builder.bitcast(pointer, STORED[stored].as_pointer())
        return widen(builder, builder.load(pointer, align=stored.bitwidth // 8), stored, F32)

    return types.float32(array, types.intp), generate


@intrinsic
def load_pairs(_typing: Any, array: Array, index: Any) -> Any:
    """Thirty-two neighbouring entries as two vectors, in the order of `deinterleave`.

    Of bfloat16 the even entries are the lower halves of 32-bit words and the odd ones the upper
    halves: a shift and a mask widen them in place.  Of other types the first sixteen come first.
    """
    require_row_major(array)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        stored = signature.args[0].dtype
        if stored == types.uint16:
            pointer = entry_pointer(context, builder, signature.args[0], *arguments)
            words = builder.load(builder.bitcast(pointer, INTS.as_pointer()), align=2)
            halves = (
                builder.shl(words, all_lanes(16, INTS)),
                builder.and_(words, all_lanes(0xFFFF0000, INTS)),
            )
            both = [builder.bitcast(half, FLOATS) for half in halves]
        else:
            array, index = arguments
            second = builder.add(index, ir.Constant(index.type, LANES))
            both = [_load(context, builder, signature.args[0], array, at) for at in (index, second)]
        return context.make_tuple(builder, signature.return_type, both)

    return types.UniTuple(vector, 2)(array, types.intp), generate


@intrinsic
def store(_typing: Any, array: Array, index: Any, value: Any) -> Any:
    """Write a vector to sixteen neighbouring entries of a float32 array."""
    require_row_major(array)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = entry_pointer(context, builder, signature.args[0], *arguments[:2])
        builder.store(arguments[2], builder.bitcast(pointer, FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@intrinsic
def splat(_typing: Any, value: Any) -> Any:
    """One number in every lane."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        first = builder.insert_element(all_lanes(0.0), arguments[0], ir.Constant(I32, 0))
        return builder.shuffle_vector(first, all_lanes(0.0), all_lanes(0, INTS))

    return vector(types.float32), generate


@intrinsic
def fma(_typing: Any, a: Vector, b: Vector, c: Vector) -> Any:
    """A * b + c, rounded once."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return call(builder, f"llvm.fma.v{LANES}f32", FLOATS, arguments)

    return vector(vector, vector, vector), generate


@intrinsic
def maximum(_typing: Any, a: Vector, b: Vector) -> Any:
    """The larger of two, lane by lane; where one is NaN, the other."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return call(builder, f"llvm.maxnum.v{LANES}f32", FLOATS, arguments)

    return vector(vector, vector), generate


def sum_lanes(builder: Any, value: Any) -> Any:
    """The sum of the lanes: the lower half and the upper one are added, lane by lane, and so on."""
    for n in (8, 4, 2, 1):
        low, high = (
            builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(I32, n), lanes))
            for lanes in (list(range(n)), list(range(n, 2 * n)))
        )
        value = builder.fadd(low, high)
    return builder.extract_element(value, I32(0))


@intrinsic
def reduce_add(_typing: Any, a: Vector) -> Any:
    """The sum of the lanes, as `sum_lanes` has it."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return sum_lanes(builder, arguments[0])

    return types.float32(vector), generate


def _prefetch(
    context: Any, builder: Any, kind: Any, array: Array, index: Any, locality: int
) -> None:
    pointer = builder.bitcast(entry_pointer(context, builder, kind, array, index), I8.as_pointer())
    constants = [ir.Constant(I32, c) for c in (0, locality, 1)]  # to read; how near; data
    call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, *constants])


@intrinsic
def prefetch(_typing: Any, array: Array, index: Any) -> Any:
    """Ask for the cache line of an entry; harmless beyond the end."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, index = arguments
        _prefetch(context, builder, signature.args[0], array, index, NEAREST)
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def prefetch_far(_typing: Any, array: Array, index: Any) -> Any:
    """Ask for the cache line of an entry, into the second cache alone; harmless beyond the end."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, index = arguments
        _prefetch(context, builder, signature.args[0], array, index, SECOND)
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def prefetch_pairs(_typing: Any, array: Array, index: Any) -> Any:
    """Ask for every cache line of the thirty-two entries that `load_pairs` takes, into the second
    cache alone; harmless beyond the end.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind, (array, index) = signature.args[0], arguments
        for entry in range(0, 2 * LANES, LINE * 8 // kind.dtype.bitwidth):
            at = builder.add(index, ir.Constant(index.type, entry))
            _prefetch(context, builder, kind, array, at, SECOND)
        return context.get_dummy_value()

    return types.void(array, types.intp), generate
