"""Sixteen floats at a time: the few vector operations that the compiled kernels are written in.

Numba compiles loops over single numbers and leaves it to LLVM to find the vectors in them, which
fails where a loop also fetches ahead or widens 16-bit numbers.  Here a vector is a type of its own,
so that a kernel says what it wants: `acc = fma(load(weight, p), load(x, i), acc)`.  LLVM turns
sixteen floats into one register with AVX-512, two with AVX2, four with NEON.

An array of 16-bit floats comes as its bits (Numba knows neither type): uint16 stands for bfloat16,
int16 for float16.
"""

import contextlib
import importlib
import os
import time
from pathlib import Path

from llvmlite import ir
from numba import get_num_threads, njit, types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.errors import TypingError
from numba.extending import intrinsic, register_model
from numba.np.arrayobj import populate_array

__all__ = [
    "LANES",
    "exp",
    "fma",
    "is_int8",
    "kernel",
    "like",
    "load",
    "load_pairs",
    "maximum",
    "memory",
    "pairs",
    "prefetch",
    "prefetch_pairs",
    "silu",
    "single",
    "splat",
    "store",
    "take",
    "total",
]

SPINS = "30000"  # about a tenth of a millisecond: longer than the Python between two kernels takes


def _start_threads():
    """Start OpenMP's threads, which soon stop spinning when they have nothing to do: their own
    choice takes cores from others.

    Numba starts them where it compiles or loads a parallel function, but not where it loads another
    that calls one: that one would end in a segmentation fault.
    """
    before = os.environ.get("GOMP_SPINCOUNT")
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # is read when the library is loaded
    with contextlib.suppress(ImportError):  # another of Numba's threading layers then serves
        importlib.import_module("numba.np.ufunc.omppool")
    get_num_threads()
    if before is None:
        del os.environ["GOMP_SPINCOUNT"]


_start_threads()

LANES = 16
LINE = 64  # bytes of the cache that come together
_F32, _I32, _I8 = ir.FloatType(), ir.IntType(32), ir.IntType(8)
_FLOATS, _INTS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
SOURCES = sorted(
    (path.name, path.stat().st_mtime, path.stat().st_size)
    for path in Path(__file__).parent.glob("*.py")
)


def kernel(**options):
    """Compile a function with Numba when it is first called, and keep the code for later processes.

    Numba numbers the files of its cache by what the index lists, so that two processes which
    compile at the same time may write the code of different argument types under one name, and a
    third would run the wrong one.  Here every process has names of its own.
    """

    def decorate(function):
        compiled = njit(cache=True, error_model="numpy", **options)(
            function
        )  # x / 0 is no exception
        file = getattr(compiled._cache, "_cache_file", None)
        if file is not None:
            own = f"{os.getpid()}-{time.time_ns()}-{{number:d}}"
            file._data_name_pattern = file._data_name_pattern.replace("{number:d}", own)
            file._source_stamp = (
                file._source_stamp,
                *SOURCES,
            )  # kernels call each other across files
        return compiled

    return decorate


_STORED = {
    types.uint16: ir.IntType(16),
    types.int16: ir.HalfType(),
    types.int8: _I8,
    types.float32: _F32,
}


class _Vector(types.Type):
    def __init__(self):
        super().__init__("float32x16")


vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _FLOATS)


def _row_major(array):
    """Raise, while compiling, unless entry i of an array is entry i of its memory."""
    if not (isinstance(array, types.Array) and array.layout == "C" and array.aligned):
        raise TypingError(
            f"a kernel counts the entries of an array in row-major order, got {array}; use row_major or memory"
        )


def _address(context, builder, kind, array, index):
    """Pointer to entry `index` of an array's memory, strides left aside."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def _call(builder, name, result, arguments, **options):
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, [x.type for x in arguments]), name
    )
    return builder.call(function, arguments, **options)


def _all(value, kind=_FLOATS):
    return ir.Constant(kind, [value] * LANES)


def _widen(builder, value, stored, floats):
    """Exact conversion of stored numbers, one or sixteen of them, to float32."""
    if stored == types.uint16:
        wide = _INTS if floats is _FLOATS else _I32
        shift = _all(16, _INTS) if floats is _FLOATS else ir.Constant(_I32, 16)
        return builder.bitcast(builder.shl(builder.zext(value, wide), shift), floats)
    if stored == types.int16:
        return builder.fpext(value, floats)
    return builder.sitofp(value, floats) if stored == types.int8 else value


@intrinsic
def load(_typing, array, index):
    """Sixteen neighbouring entries, in float32."""
    _row_major(array)

    def generate(context, builder, signature, arguments):
        stored = signature.args[0].dtype
        pointer = _address(context, builder, signature.args[0], *arguments)
        pointer = builder.bitcast(pointer, ir.VectorType(_STORED[stored], LANES).as_pointer())
        return _widen(builder, builder.load(pointer, align=stored.bitwidth // 8), stored, _FLOATS)

    return vector(array, types.intp), generate


@intrinsic
def single(_typing, array, index):
    """One entry, in float32."""
    _row_major(array)

    def generate(context, builder, signature, arguments):
        stored = signature.args[0].dtype
        pointer = _address(context, builder, signature.args[0], *arguments)
        pointer = builder.bitcast(pointer, _STORED[stored].as_pointer())
        return _widen(builder, builder.load(pointer, align=stored.bitwidth // 8), stored, _F32)

    return types.float32(array, types.intp), generate


@intrinsic
def load_pairs(_typing, array, index):
    """Thirty-two neighbouring entries as two vectors, in the order that `pairs` puts the other
    factor into.

    Of bfloat16 the even entries are the lower halves of 32-bit words and the odd ones the upper
    halves: a shift and a mask widen them in place.  Of other types the first sixteen come first.
    """
    _row_major(array)

    def generate(context, builder, signature, arguments):
        stored = signature.args[0].dtype
        if stored == types.uint16:
            pointer = _address(context, builder, signature.args[0], *arguments)
            words = builder.load(builder.bitcast(pointer, _INTS.as_pointer()), align=2)
            halves = (
                builder.shl(words, _all(16, _INTS)),
                builder.and_(words, _all(0xFFFF0000, _INTS)),
            )
            both = [builder.bitcast(half, _FLOATS) for half in halves]
        else:
            both = []
            for offset in (0, LANES):
                index = builder.add(arguments[1], ir.Constant(arguments[1].type, offset))
                pointer = _address(context, builder, signature.args[0], arguments[0], index)
                pointer = builder.bitcast(
                    pointer, ir.VectorType(_STORED[stored], LANES).as_pointer()
                )
                both.append(
                    _widen(
                        builder, builder.load(pointer, align=stored.bitwidth // 8), stored, _FLOATS
                    )
                )
        return context.make_tuple(builder, signature.return_type, both)

    return types.UniTuple(vector, 2)(array, types.intp), generate


@kernel()
def pairs(weight, x):
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


@intrinsic
def is_bfloat16(_typing, array):
    """Tell, while compiling, whether an array holds the bits of bfloat16."""

    def generate(_context, _builder, signature, _arguments):
        return ir.Constant(ir.IntType(1), int(signature.args[0].dtype == types.uint16))

    return types.boolean(array), generate


@intrinsic
def is_int8(_typing, array):
    """Tell, while compiling, whether an array holds 8-bit integers."""

    def generate(_context, _builder, signature, _arguments):
        return ir.Constant(ir.IntType(1), int(signature.args[0].dtype == types.int8))

    return types.boolean(array), generate


@intrinsic
def store(_typing, array, index, value):
    """Write a vector to sixteen neighbouring entries of a float32 array."""
    _row_major(array)

    def generate(context, builder, signature, arguments):
        pointer = _address(context, builder, signature.args[0], *arguments[:2])
        builder.store(arguments[2], builder.bitcast(pointer, _FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@intrinsic
def splat(_typing, value):
    """One number in every lane."""

    def generate(_context, builder, _signature, arguments):
        first = builder.insert_element(_all(0.0), arguments[0], ir.Constant(_I32, 0))
        return builder.shuffle_vector(first, _all(0.0), _all(0, _INTS))

    return vector(types.float32), generate


@intrinsic
def fma(_typing, a, b, c):
    """A * b + c, rounded once."""

    def generate(_context, builder, _signature, arguments):
        return _call(builder, f"llvm.fma.v{LANES}f32", _FLOATS, arguments)

    return vector(vector, vector, vector), generate


@intrinsic
def maximum(_typing, a, b):
    """The larger of two, lane by lane; where one is NaN, the other."""

    def generate(_context, builder, _signature, arguments):
        return _call(builder, f"llvm.maxnum.v{LANES}f32", _FLOATS, arguments)

    return vector(vector, vector), generate


@intrinsic
def total(_typing, a):
    """The sum of the lanes, in any order."""

    def generate(_context, builder, _signature, arguments):
        name = f"llvm.vector.reduce.fadd.v{LANES}f32"
        return _call(
            builder, name, _F32, [ir.Constant(_F32, 0.0), *arguments], fastmath=("reassoc",)
        )

    return types.float32(vector), generate


@intrinsic
def like(_typing, array, address):
    """The array of the same type, shape and strides that lies at an address; who calls keeps it
    alive.
    """

    def generate(context, builder, signature, arguments):
        (kind, _), (array, address) = signature.args, arguments
        new = context.make_array(kind)(context, builder, array)
        new.meminfo, new.parent = (ir.Constant(x.type, None) for x in (new.meminfo, new.parent))
        new.data = builder.inttoptr(address, new.data.type)
        return new._getvalue()

    return array(array, types.int64), generate


@intrinsic
def memory(_typing, array):
    """The memory of a strided array, from its first entry on, for a kernel that counts its strides;
    its length says nothing.
    """
    row = types.Array(array.dtype, 1, "C", readonly=not array.mutable, aligned=array.aligned)

    def generate(context, builder, signature, arguments):
        old = context.make_array(signature.args[0])(context, builder, arguments[0])
        new = context.make_array(row)(context, builder)
        populate_array(new, old.data, [old.nitems], [old.itemsize], old.itemsize, None)
        return new._getvalue()

    return row(array), generate


def _prefetch(context, builder, kind, array, index):
    pointer = builder.bitcast(_address(context, builder, kind, array, index), _I8.as_pointer())
    constants = [ir.Constant(_I32, c) for c in (0, 3, 1)]  # to read; into the nearest cache; data
    _call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, *constants])


@intrinsic
def prefetch(_typing, array, index):
    """Ask for the cache line of an entry; harmless beyond the end."""

    def generate(context, builder, signature, arguments):
        _prefetch(context, builder, signature.args[0], *arguments)
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def prefetch_pairs(_typing, array, index):
    """Ask for every cache line of the thirty-two entries that `load_pairs` takes; harmless beyond
    the end.
    """

    def generate(context, builder, signature, arguments):
        kind, (array, index) = signature.args[0], arguments
        for entry in range(0, 2 * LANES, LINE * 8 // kind.dtype.bitwidth):
            _prefetch(
                context, builder, kind, array, builder.add(index, ir.Constant(index.type, entry))
            )
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def take(_typing, counter):
    """Return counter[0] and add one to it, in one step that no other thread can divide: the next
    task of a shared list.
    """

    def generate(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw("add", array.data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), generate


LOG2_E, LN2_HIGH, LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4
TAYLOR = (
    1 / 5040,
    1 / 720,
    1 / 120,
    1 / 24,
    1 / 6,
    0.5,
    1.0,
    1.0,
)  # of exp on +-ln(2)/2: the next term is below 6e-9
EXP_LOWEST, EXP_HIGHEST = -87.33654, 88.72283  # between them e**x is a normal float32
SILU_LOWEST = -110.0  # below it x * e**x rounds to -0


def _fma(builder, a, b, c):
    return _call(builder, f"llvm.fma.v{LANES}f32", _FLOATS, [a, b, c])


def _exp_parts(builder, x, lowest, highest):
    """Return y in 0.7 ... 1.42 and the integer n of e**x = y * 2**n, for x cut to lowest ...
    highest; y is NaN where x is, and n 0.

    n = round(x / ln 2),   y = e**r,   r = x - n * ln 2
    """
    x = builder.select(builder.fcmp_ordered("<", x, _all(lowest)), _all(lowest), x)
    x = builder.select(builder.fcmp_ordered(">", x, _all(highest)), _all(highest), x)
    n = _call(builder, f"llvm.nearbyint.v{LANES}f32", _FLOATS, [builder.fmul(x, _all(LOG2_E))])
    r = x
    for part in (LN2_HIGH, LN2_LOW):
        r = _fma(builder, n, _all(-part), r)
    y = _all(TAYLOR[0])
    for coefficient in TAYLOR[1:]:
        y = _fma(builder, y, r, _all(coefficient))
    n = builder.select(builder.fcmp_ordered("==", n, n), n, _all(0.0))  # no integer stands for NaN
    return y, builder.fptosi(n, _INTS)


def _times_power(builder, y, n):
    """Compute y * 2**n of normal numbers whose product is normal: n is added to the exponent."""
    exponent = builder.shl(n, _all(23, _INTS))
    return builder.bitcast(builder.add(builder.bitcast(y, _INTS), exponent), _FLOATS)


@intrinsic
def exp(_typing, x):
    """e**x, lane by lane, to 2 units in the last place; below -87.33654, where it is no normal
    number, 0; NaN stays NaN.
    """

    def generate(_context, builder, _signature, arguments):
        (x,) = arguments
        y = _times_power(builder, *_exp_parts(builder, x, EXP_LOWEST, EXP_HIGHEST))
        y = builder.select(builder.fcmp_ordered(">", x, _all(EXP_HIGHEST)), _all(float("inf")), y)
        return builder.select(builder.fcmp_ordered("<", x, _all(EXP_LOWEST)), _all(0.0), y)

    return vector(vector), generate


@intrinsic
def silu(_typing, x):
    """Compute x / (1 + e**-x), lane by lane, to 4 units in the last place; -inf gives NaN, as the
    formula does.

    Below 0: x * e**x / (1 + e**x).  Far below, e**x is no normal number, while its product with x
    is: the power of two comes in two factors, the second of them last.
    """

    def generate(_context, builder, _signature, arguments):
        (x,) = arguments
        minus = _call(builder, f"llvm.fabs.v{LANES}f32", _FLOATS, [x])
        minus = builder.fsub(_all(-0.0), minus)
        y, n = _exp_parts(builder, minus, SILU_LOWEST, 0.0)
        half = builder.ashr(n, _all(1, _INTS))
        first = _times_power(builder, y, half)
        first = builder.select(
            builder.fcmp_ordered("<", minus, _all(SILU_LOWEST)), _all(0.0), first
        )
        second = _times_power(builder, _all(1.0), builder.sub(n, half))
        below = builder.fcmp_ordered("<", x, _all(0.0))
        top = builder.fmul(x, builder.select(below, first, _all(1.0)))
        ratio = builder.fdiv(top, builder.fadd(_all(1.0), builder.fmul(first, second)))
        return builder.select(below, builder.fmul(ratio, second), ratio)

    return vector(vector), generate
