"""Vector operations on memory that is given by its address.

An address is an integer; distances are in bytes, and every number may lie at any of them.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from npllm.kernels.cpu.block_codes import STEP, spread
from npllm.kernels.cpu.simd import F32, FLOATS, I8, I32, LANES, NEAREST, SECOND, call, vector

__all__ = [
    "call_address",
    "float_at",
    "integer_at",
    "load_vectors",
    "pack_step",
    "prefetch_at",
    "prefetch_far",
    "set_float",
    "stack_floats",
    "store_vectors",
    "sum_of_vector",
]

Builder = Any  # llvmlite's IRBuilder
Value = Any  # an LLVM value

I64 = ir.IntType(64)


def pointer_to(builder: Builder, address: Value, kind: Any, offset: Any = 0) -> Value:
    """A pointer to a value at some bytes from an address."""
    if not isinstance(offset, int) or offset:
        offset = ir.Constant(I64, offset) if isinstance(offset, int) else offset
        address = builder.add(address, offset)
    return builder.inttoptr(address, kind.as_pointer())


def floats_at(builder: Builder, address: Value, number: int) -> Value:
    """Vector `number` of those that begin at an address."""
    pointer = pointer_to(builder, address, FLOATS, 4 * LANES * number)
    return builder.load(pointer, align=4)


def fused(builder: Builder, a: Value, b: Value, c: Value) -> Value:
    """A * b + c, rounded once."""
    return call(builder, f"llvm.fma.v{LANES}f32", FLOATS, [a, b, c])


@intrinsic(prefer_literal=True)
def load_vectors(_typing: Any, n: Any, address: Any) -> Any:
    """As many vectors that lie at an address."""
    kind = types.UniTuple(vector, n.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        loaded = [floats_at(builder, arguments[1], number) for number in range(n.literal_value)]
        return context.make_tuple(builder, signature.return_type, loaded)

    return kind(n, types.intp), generate


@intrinsic
def store_vectors(_typing: Any, address: Any, vectors: Any) -> Any:
    """Write vectors to an address."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        for number, value in enumerate(cgutils.unpack_tuple(builder, arguments[1])):
            pointer = pointer_to(builder, arguments[0], FLOATS, 4 * LANES * number)
            builder.store(value, pointer, align=4)
        return context.get_dummy_value()

    return types.void(types.intp, vectors), generate


@intrinsic
def sum_of_vector(_typing: Any, address: Any) -> Any:
    """The sum of sixteen floats at an address: those 8 apart are added, then 4, 2, 1 apart."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        y = floats_at(builder, arguments[0], 0)
        for n in (8, 4, 2, 1):
            low, high = range(n), range(n, 2 * n)
            y = builder.fadd(spread(builder, y, low), spread(builder, y, high))
        return builder.extract_element(y, ir.Constant(I32, 0))

    return types.float32(types.intp), generate


def _prefetch(builder: Builder, address: Value, locality: int) -> None:
    constants = [ir.Constant(I32, c) for c in (0, locality, 1)]  # to read; how near; data
    pointer = pointer_to(builder, address, I8)
    call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, *constants])


@intrinsic
def prefetch_at(_typing: Any, address: Any) -> Any:
    """Ask for the cache line at an address; harmless anywhere."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        _prefetch(builder, arguments[0], NEAREST)
        return context.get_dummy_value()

    return types.void(types.intp), generate


@intrinsic
def prefetch_far(_typing: Any, address: Any) -> Any:
    """Ask for the cache line at an address, into the second cache alone; harmless anywhere."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        _prefetch(builder, arguments[0], SECOND)
        return context.get_dummy_value()

    return types.void(types.intp), generate


@intrinsic
def call_address(_typing: Any, function: Any, arguments: Any) -> Any:
    """Call a compiled function of integers, which returns nothing, at its address."""

    def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        address, packed = values
        numbers = cgutils.unpack_tuple(builder, packed)
        kind = ir.FunctionType(ir.VoidType(), [n.type for n in numbers])
        builder.call(builder.inttoptr(address, kind.as_pointer()), numbers)
        return context.get_dummy_value()

    return types.void(types.intp, arguments), generate


@intrinsic
def pack_step(_typing: Any, source: Any, target: Any) -> Any:
    """Write 64 floats as a step; return the sum of the first 32, and of the last."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target = arguments
        wide = ir.VectorType(F32, STEP)
        x = builder.load(pointer_to(builder, source, wide), align=4)
        parts = [spread(builder, x, range(k, STEP, 4)) for k in range(4)]
        total = builder.fadd(builder.fadd(parts[0], parts[1]), builder.fadd(parts[2], parts[3]))
        for number, part in enumerate([*parts, total]):
            pointer = pointer_to(builder, target, FLOATS, 4 * LANES * number)
            builder.store(part, pointer, align=4)
        for n in (4, 2, 1):  # of the eight lanes of each half
            low = [*range(n), *range(2 * n, 3 * n)]
            total = builder.fadd(
                spread(builder, total, low), spread(builder, total, [at + n for at in low])
            )
        halves = [builder.extract_element(total, ir.Constant(I32, at)) for at in (0, 1)]
        return context.make_tuple(builder, signature.return_type, halves)

    return types.UniTuple(types.float32, 2)(types.intp, types.intp), generate


@intrinsic
def integer_at(_typing: Any, address: Any, number: Any) -> Any:
    """Integer `number` of those of 64 bits that begin at an address."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        offset = builder.mul(arguments[1], ir.Constant(I64, 8))
        return builder.load(pointer_to(builder, arguments[0], I64, offset), align=8)

    return types.intp(types.intp, types.intp), generate


@intrinsic
def float_at(_typing: Any, address: Any) -> Any:
    """The float32 at an address."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.load(pointer_to(builder, arguments[0], F32), align=4)

    return types.float32(types.intp), generate


@intrinsic
def set_float(_typing: Any, address: Any, value: Any) -> Any:
    """Write a float32 to an address."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        builder.store(arguments[1], pointer_to(builder, arguments[0], F32), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, types.float32), generate


@intrinsic(prefer_literal=True)
def stack_floats(_typing: Any, n: Any) -> Any:
    """The address, a multiple of 64, of n float32 that the function has for itself."""

    def generate(_context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        with builder.goto_entry_block():
            memory = builder.alloca(ir.ArrayType(F32, n.literal_value))
            memory.align = 64
        return builder.ptrtoint(memory, I64)

    return types.intp(n), generate
