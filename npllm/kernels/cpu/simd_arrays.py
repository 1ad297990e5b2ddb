"""Arrays inside compiled kernels: their type, their memory, their order, a shared counter."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload
from numba.np.arrayobj import populate_array

from npllm.kernels.cpu.launching import kernel
from npllm.kernels.cpu.numba_internals import struct_value
from npllm.kernels.cpu.simd import LANES

__all__ = [
    "array_at",
    "atomic_fetch_add",
    "channels_of_weight",
    "deinterleave",
    "flat_memory",
    "is_bfloat16",
    "is_int8",
    "rows_of_weight",
]

Array = Any

N_ROWS, D_IN = 2, 3  # columns of the table of a weight in blocks, whose last row is no part of it


@intrinsic
def is_bfloat16(_typing: Any, array: Array) -> Any:
    """Tell, while compiling, whether an array holds the bits of bfloat16."""

    def generate(_context: Any, _builder: Any, signature: Any, _arguments: Any) -> Any:
        return ir.Constant(ir.IntType(1), int(signature.args[0].dtype == types.uint16))

    return types.boolean(array), generate


@intrinsic
def is_int8(_typing: Any, array: Array) -> Any:
    """Tell, while compiling, whether an array holds 8-bit integers."""

    def generate(_context: Any, _builder: Any, signature: Any, _arguments: Any) -> Any:
        return ir.Constant(ir.IntType(1), int(signature.args[0].dtype == types.int8))

    return types.boolean(array), generate


def rows_of_weight(weight: Array) -> int:
    """d_out of a weight as kernels take it: an array of entries, or the table of one in blocks."""
    return int(weight[:-1, N_ROWS].sum()) if weight.dtype == np.int64 else len(weight)


@overload(rows_of_weight, strict=False)
def _rows_of_weight(weight: Array) -> Any:
    if weight.dtype == types.int64:
        return lambda weight: weight[:-1, N_ROWS].sum()
    return lambda weight: len(weight)


def channels_of_weight(weight: Array) -> int:
    """d_in of a weight as kernels take it."""
    return int(weight[0, D_IN]) if weight.dtype == np.int64 else weight.shape[1]


@overload(channels_of_weight, strict=False)
def _channels_of_weight(weight: Array) -> Any:
    if weight.dtype == types.int64:
        return lambda weight: weight[0, D_IN]
    return lambda weight: weight.shape[1]


@intrinsic
def array_at(_typing: Any, array: Array, address: Any) -> Any:
    """The array of the same type, shape and strides at an address; the caller keeps it alive."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (kind, _), (array, address) = signature.args, arguments
        new = context.make_array(kind)(context, builder, array)
        new.meminfo, new.parent = (ir.Constant(x.type, None) for x in (new.meminfo, new.parent))
        new.data = builder.inttoptr(address, new.data.type)
        return struct_value(new)

    return array(array, types.int64), generate


@intrinsic
def flat_memory(_typing: Any, array: Array) -> Any:
    """The memory of a strided array, from its first entry on, for a kernel that counts its strides;
    its length says nothing.
    """
    row = types.Array(array.dtype, 1, "C", readonly=not array.mutable, aligned=array.aligned)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        old = context.make_array(signature.args[0])(context, builder, arguments[0])
        new = context.make_array(row)(context, builder)
        populate_array(new, old.data, [old.nitems], [old.itemsize], old.itemsize, None)
        return struct_value(new)

    return row(array), generate


@intrinsic
def atomic_fetch_add(_typing: Any, counter: Array) -> Any:
    """Return counter[0] and add one to it, atomically: the next task of a shared list."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw("add", array.data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), generate


@kernel()
def deinterleave(weight: Array, x: Array) -> None:
    """Put x in place into the order of `load_pairs(weight, ...)`: of every 32 entries the even
    ones, then the odd ones.
    """
    if is_bfloat16(weight):
        half = x[:LANES].copy()
        for start in range(0, len(x) // (2 * LANES) * 2 * LANES, 2 * LANES):
            for i in range(LANES):
                half[i] = x[start + 2 * i + 1]
                x[start + i] = x[start + 2 * i]
            for i in range(LANES):
                x[start + LANES + i] = half[i]
