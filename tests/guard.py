"""A stand-in for CuPy that needs no GPU: arrays that refuse what CuPy's refuse, and what would
silently stall or go wrong there.

`Array` wraps a NumPy array and is no NumPy array.  `xp` is its library, with CuPy's function names
and CuPy's argument names only.  `installed(monkeypatch)` puts it in the place of CuPy, so that
`npllm.load(path, backend="cupy")` runs on it.

Refused as CuPy does: conversion to NumPy behind the caller's back (`__array__`), lists and NumPy
arrays in operations, batched products of 16-bit types, argument names that CuPy does not have.
Refused although CuPy would do it, since it waits for the device or gives another answer than NumPy:
`float(x)`, `int(x)`, `bool(x)`, iteration, `item`, `tolist` outside an explicit `get`; indexing
with a bool array; NumPy scalars, whose float64 widens float32; arithmetic on bfloat16, which is for
storage.  Copied although it is a trap: an index out of range wraps around instead of raising; a
reduction gives a 0-d array.

`OPERATIONS` counts what a device would have to do, by name: every launch of a kernel, function,
operator, `astype`, assignment, and copy to or from the host.  Views (slices, `permute_dims`,
`reshape` of what is contiguous) and `empty`, which hand out memory, are none.  `empty` is full of
NaN, so that nobody gets by with what a kernel forgot to write.
"""

import ctypes
import sys
import types
import weakref
from collections import Counter

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SIXTEEN = (BFLOAT16, np.dtype(np.float16))


class Refused(TypeError):
    """What CuPy refuses, or would wait for."""


class Gets:
    """Counts the explicit crossings to the host."""

    n = 0


OPERATIONS = Counter()


def operation(name):
    """Count one operation of the device; none but a kernel goes into a graph."""
    not_captured(name)
    OPERATIONS[name] += 1


def launched(name, run):
    """Launch a kernel: count and run it, or put it into the graph that is being captured."""
    if CAPTURED:
        CAPTURED[-1].append((name, run))
    else:
        operation(name)
        run()


CAPTURED = []  # the launches of the graph that is being captured


def not_captured(name):
    """Refuse what must not happen while a stream captures: anything but a launch."""
    if CAPTURED:
        raise Refused(
            f"{name} while a graph is captured: only kernels may be launched, and no memory allocated"
        )


def _made(name, x, *operands):
    """What an operation gives, counted unless it is a view of an operand."""
    x = np.asarray(x)
    if not any(
        isinstance(operand, np.ndarray) and np.may_share_memory(x, operand) for operand in operands
    ):
        operation(name)
    return Array(x)


class Array:
    """An array of the stand-in.  `_x` is what a device would hold."""

    __array_ufunc__ = None
    __array_priority__ = 100
    __hash__ = None

    def __init__(self, x):
        self._x = np.asarray(x)

    shape = property(lambda self: self._x.shape)
    dtype = property(lambda self: self._x.dtype)
    ndim = property(lambda self: self._x.ndim)
    size = property(lambda self: self._x.size)
    nbytes = property(lambda self: self._x.nbytes)
    strides = property(lambda self: self._x.strides)
    data = property(lambda self: Pointer(self._x.ctypes.data, self))

    def get(self):
        """Copy to the host: the one crossing."""
        Gets.n += 1
        operation("get")
        return self._x.copy()

    def set(self, arr):
        """Copy from the host, into the same memory."""
        operation("set")
        if type(arr) is not np.ndarray or arr.shape != self.shape or arr.dtype != self.dtype:
            raise Refused(f"set takes a NumPy array of {self.dtype} {list(self.shape)}")
        self._x[...] = arr

    def __len__(self):
        return len(self._x)

    def __getitem__(self, index):
        return _made("index", self._x[_index(index, self._x.shape)], self._x)

    def __setitem__(self, index, value):
        operation("assign")
        self._x[_index(index, self._x.shape)] = _in(value)

    def __matmul__(self, other):
        a, b = _in(self), _in(other, only_arrays=True)
        if any(x.dtype in SIXTEEN for x in (a, b)) and max(a.ndim, b.ndim) > 2:
            raise Refused(
                f"matmul of {a.dtype} and {b.dtype} with {max(a.ndim, b.ndim)} dimensions: 16-bit products are 2-D only"
            )
        if a.dtype in SIXTEEN and a.dtype == b.dtype:  # accumulates in float32, rounds the result
            return _made("matmul", (a.astype(np.float32) @ b.astype(np.float32)).astype(a.dtype))
        return _made("matmul", _no_bfloat16("matmul", a, b, call=np.matmul))

    def __repr__(self):
        return f"guard.Array({self.dtype}, {list(self.shape)})"


Array.__module__, Array.__name__, Array.__qualname__ = "cupy", "ndarray", "ndarray"


def _refuse(name, why):
    def refuse(*_, **__):
        raise Refused(f"{name} of a device array {why}; use npllm.arrays.to_numpy")

    return refuse


for _name in (
    "__array__",
    "__float__",
    "__int__",
    "__bool__",
    "__complex__",
    "__index__",
    "__iter__",
    "__contains__",
    "item",
    "tolist",
    "tobytes",
    "__array_function__",
    "__buffer__",
):
    setattr(
        Array,
        _name,
        _refuse(
            _name, "would wait for the device" if _name != "__array__" else "is refused by CuPy"
        ),
    )


def _in(x, only_arrays=False):
    """What stands behind an operand; raises for what is neither an `Array` nor a Python number."""
    if type(x) is Array:
        return x._x
    if not only_arrays and type(x) in (bool, int, float, complex):
        return x
    raise Refused(
        f"unsupported type {type(x).__module__}.{type(x).__qualname__}: operands must be device arrays or Python numbers"
    )


def _no_bfloat16(name, *operands, call, **options):
    """Call a NumPy function on arrays that are not of a storage type."""
    if any(getattr(x, "dtype", None) == BFLOAT16 for x in operands):
        raise Refused(f"{name} of bfloat16, which is a storage type: widen it first")
    return call(*operands, **options)


def _index(index, shape):
    """An index as CuPy takes it: numbers, slices, and integer arrays of its own, which wrap around."""
    parts = index if isinstance(index, tuple) else (index,)
    n_taken = sum(part is not None and part is not Ellipsis for part in parts)
    out, axis = [], 0
    for part in parts:
        if part is Ellipsis:
            axis += len(shape) - n_taken
        elif part is not None:
            if type(part) is Array:
                if part.dtype.kind not in "iu":
                    raise Refused("indexing with a bool array would wait for the device")
                part = part._x % shape[axis]
            elif not isinstance(part, int | slice) or isinstance(part, bool):
                raise Refused(
                    f"unsupported index {type(part).__module__}.{type(part).__qualname__}"
                )
            axis += 1
        out.append(part)
    return tuple(out)


def _operators():
    binary = {
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "truediv": np.divide,
        "pow": np.power,
        "mod": np.remainder,
        "floordiv": np.floor_divide,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "lshift": np.left_shift,
        "rshift": np.right_shift,
    }
    compare = {
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
        "eq": np.equal,
        "ne": np.not_equal,
    }
    for name, call in (binary | compare).items():
        setattr(
            Array,
            f"__{name}__",
            lambda a, b, name=name, call=call: _made(
                name, _no_bfloat16(name, _in(a), _in(b), call=call)
            ),
        )
        if name in binary:
            setattr(
                Array,
                f"__r{name}__",
                lambda a, b, name=name, call=call: _made(
                    name, _no_bfloat16(name, _in(b), _in(a), call=call)
                ),
            )
    for name, call in {"neg": np.negative, "abs": np.abs, "invert": np.invert}.items():
        setattr(
            Array,
            f"__{name}__",
            lambda a, name=name, call=call: _made(name, _no_bfloat16(name, a._x, call=call)),
        )


_operators()

# -------------------------------------------------------------------------------------------------------------------- the library

UFUNCS = {
    name: 1
    for name in ("exp", "log", "tanh", "sqrt", "sin", "cos", "abs", "isnan", "isfinite", "isinf")
} | {"maximum": 2, "minimum": 2, "where": 3}
# name -> the names of its arguments in CuPy, of which `npllm` uses some; the first is an array, of
# ARRAYS a sequence of them
FUNCTIONS = {
    "reshape": ("a", "newshape"),
    "permute_dims": ("a", "axes"),
    "matrix_transpose": ("x",),
    "expand_dims": ("a", "axis"),
    "squeeze": ("a", "axis"),
    "broadcast_to": ("array", "shape"),
    "repeat": ("a", "repeats", "axis"),
    "concat": ("tup", "axis"),
    "stack": ("tup", "axis"),
    "sum": ("a", "axis", "dtype", "keepdims"),
    "mean": ("a", "axis", "dtype", "keepdims"),
    "max": ("a", "axis", "keepdims"),
    "min": ("a", "axis", "keepdims"),
    "round": ("a", "decimals"),
    "all": ("a", "axis", "keepdims"),
    "any": ("a", "axis", "keepdims"),
    "argmax": ("a", "axis", "keepdims"),
    "sort": ("a", "axis", "kind"),
    "argsort": ("a", "axis", "kind"),
    "searchsorted": ("a", "v", "side"),
    "cumulative_sum": ("x", "axis", "dtype"),
    "zeros_like": ("a", "dtype"),
    "ones_like": ("a", "dtype"),
    "full_like": ("a", "fill_value", "dtype"),
    "real": ("val",),
    "imag": ("val",),
    "ascontiguousarray": ("a",),
}
ARRAYS = ("concat", "stack")
OF_TWO = ("searchsorted",)  # the second argument is an operand as well
MOVES = (
    "reshape",
    "permute_dims",
    "matrix_transpose",
    "expand_dims",
    "squeeze",
    "broadcast_to",
    "repeat",
    "concat",
    "stack",
    "zeros_like",
    "ones_like",
    "full_like",
    "ascontiguousarray",
)  # what only moves entries works for bfloat16 as well
BIRTHS = {
    "arange": ("start", "stop", "step", "dtype"),
    "zeros": ("shape", "dtype"),
    "ones": ("shape", "dtype"),
    "empty": ("shape", "dtype"),
    "full": ("shape", "fill_value", "dtype"),
    "eye": ("N", "M", "k", "dtype"),
}


def _plain(name, value):
    """An argument that is no operand: numbers, None, tuples of numbers, dtypes, words."""
    if isinstance(value, np.ndarray | np.generic | list | Array):
        raise Refused(
            f"{name}: unsupported argument {type(value).__module__}.{type(value).__qualname__}"
        )
    return value


def _ufunc(name, n):
    def call(*operands):
        if len(operands) != n:
            raise Refused(f"{name} takes {n} operands, got {len(operands)}")
        operands = [_in(x) for x in operands]
        if not any(isinstance(x, np.ndarray) for x in operands):
            raise Refused(f"{name} needs a device array")
        if name == "where":
            return _made(name, np.where(*operands))
        return _made(name, _no_bfloat16(name, *operands, call=getattr(np, name)))

    return call


def _function(name, parameters):
    def call(*args, **options):
        unknown = set(options) - set(parameters)
        if unknown:
            raise Refused(
                f"{name}() got unexpected arguments {sorted(unknown)}; CuPy knows {', '.join(parameters)}"
            )
        first = [_in(x, True) for x in args[0]] if name in ARRAYS else _in(args[0], True)
        rest = [_in(x, True) if name in OF_TWO else _plain(name, x) for x in args[1:]]
        options = {key: _plain(name, x) for key, x in options.items()}
        if name not in MOVES:
            _no_bfloat16(name, first, call=lambda _: None)
        if name in ("sort", "argsort"):
            options["kind"] = "stable"  # the only one that CuPy has
        return _made(name, getattr(np, name)(first, *rest, **options), first)

    return call


FILLS = True  # whether `empty` writes NaN; a test of counts, at real widths, needs no values
# What `empty` fills with, by the bytes of a unit: NaN in every float type, and of a pattern that no
# computation gives, so that tests/kernel_shim.py can tell what nobody has written.
UNWRITTEN = {2: 0x7FDD, 4: 0x7FC5DEAD, 8: 0x7FF8DEAD7FC5DEAD}


APART = False  # whether arrays lie apart, so that no place behind one is in another
GAP = 256  # bytes


def _apart(x):
    """A copy between two gaps that are in no array; `x` itself without APART."""
    if not APART or not x.size or not x.flags.c_contiguous:
        return x
    buffer = np.empty(x.nbytes + 2 * GAP, np.uint8)
    there = buffer[GAP:-GAP].view(x.dtype).reshape(x.shape)
    there[...] = x
    return there


def _birth(name, parameters):
    def call(*args, **options):
        unknown = set(options) - set(parameters)
        if unknown:
            raise Refused(f"{name}() got unexpected arguments {sorted(unknown)}")
        x = getattr(np, name)(
            *(_plain(name, x) for x in args), **{k: _plain(name, x) for k, x in options.items()}
        )
        not_captured(name)
        if name != "empty":
            return _made(name, _apart(x))
        if FILLS and x.dtype.kind not in "biu":
            x.view(f"u{x.dtype.itemsize}")[...] = UNWRITTEN[x.dtype.itemsize]
        return Array(_apart(x))

    return call


def _asarray(a, dtype=None):
    """A copy on the device: from the host only this, on purpose."""
    if isinstance(a, list | tuple):
        raise Refused("asarray of a list: make a NumPy array of it first")
    return (
        a
        if type(a) is Array and dtype in (None, a.dtype)
        else _made("asarray", _apart(np.array(a._x if type(a) is Array else a, dtype=dtype)))
    )


def _take(a, indices, axis=None):
    a, indices = _in(a, True), _in(indices, True)
    n = a.size if axis is None else a.shape[axis]
    return _made("take", np.take(a, indices % n, axis=axis))


def _take_along_axis(a, indices, axis):
    a, indices = _in(a, True), _in(indices, True)
    return _made("take_along_axis", np.take_along_axis(a, indices % a.shape[axis], axis=axis))


class Runtime:
    """`cupy.cuda.runtime` with one device."""

    class CUDARuntimeError(RuntimeError):
        """As CuPy's."""

    @staticmethod
    def getDeviceCount():
        return 1


class Device:
    """`cupy.cuda.Device` of an architecture without tensor cores for bfloat16: T4."""

    compute_capability = "75"


class Pointer:
    """`cupy.cuda.MemoryPointer`: a place in an array.  Copies from the host are queued and happen
    late, when they are waited for.
    """

    def __init__(self, ptr, owner):
        self.ptr, self.owner = ptr, owner

    def __add__(self, n_bytes):
        return Pointer(self.ptr + n_bytes, self.owner)

    def copy_from_host_async(self, mem, size, stream=None):
        (stream or STREAM).queue.append(lambda: ctypes.memmove(self.ptr, mem, size))


class Stream:
    """`cupy.cuda.Stream`: what is queued on it runs when somebody waits.

    While it captures, launches are recorded and do not run, and everything else is refused.
    """

    def __init__(self, null=False, non_blocking=False):
        self.queue, self.may_capture = [], non_blocking and not null

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if CAPTURED:
            CAPTURED.pop()

    def begin_capture(self):
        if not self.may_capture:
            raise Refused("a capture needs a stream that is not the default one")
        CAPTURED.append([])

    def end_capture(self):
        return Graph(CAPTURED.pop())

    def run(self, n):
        for copy in self.queue[:n]:
            copy()
        self.queue[:n] = []
        for event in EVENTS:
            event.n = max(0, event.n - n)

    def synchronize(self):
        self.run(len(self.queue))


class Graph:
    """`cupy.cuda.graph.Graph`: launches that were captured; `names` lists their kernels."""

    def __init__(self, launches):
        self.launches, self.names = launches, [name for name, _ in launches]

    def launch(self, stream=None):  # noqa: ARG002 - as CuPy's
        operation("graph")
        for _, run in self.launches:
            run()


STREAM = Stream()
EVENTS = weakref.WeakSet()


class Event:
    """`cupy.cuda.Event`: remembers how much of the stream's queue came before it."""

    def __init__(self, **_):
        self.n = 0
        EVENTS.add(self)

    def record(self, stream=None):
        self.n = len((stream or STREAM).queue)

    def synchronize(self):
        STREAM.run(self.n)


class PinnedMemory(bytearray):
    """`cupy.cuda.PinnedMemoryPointer`: memory that NumPy can view, with an address; counts what is
    alive at a time.
    """

    alive = 0
    most = 0

    def __init__(self, n):
        super().__init__(n)
        self.ptr = ctypes.addressof((ctypes.c_char * n).from_buffer(self))
        PinnedMemory.alive += n
        PinnedMemory.most = max(PinnedMemory.most, PinnedMemory.alive)

    def __del__(self):
        PinnedMemory.alive -= len(self)


def _library():
    xp = types.ModuleType("cupy")
    for name, n in UFUNCS.items():
        setattr(xp, name, _ufunc(name, n))
    for name, parameters in FUNCTIONS.items():
        setattr(xp, name, _function(name, parameters))
    for name, parameters in BIRTHS.items():
        setattr(xp, name, _birth(name, parameters))
    xp.asarray, xp.take, xp.take_along_axis = _asarray, _take, _take_along_axis
    xp.astype = lambda x, dtype: _made("astype", _in(x, True).astype(dtype))
    xp.ndarray, xp.inf, xp.nan, xp.newaxis = Array, np.inf, np.nan, None
    xp.__version__ = "guard"
    for name in (
        "bool",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "float16",
        "float32",
        "float64",
        "complex64",
        "complex128",
    ):
        setattr(xp, name, getattr(np, name))
    xp.cuda = types.SimpleNamespace(
        runtime=Runtime,
        Device=Device,
        is_available=lambda: True,
        alloc_pinned_memory=PinnedMemory,
        Event=Event,
        Stream=Stream,
        get_current_stream=lambda: STREAM,
    )
    xp.get_default_pinned_memory_pool = lambda: types.SimpleNamespace(free_all_blocks=lambda: None)
    return xp


xp = _library()


def installed(monkeypatch):
    """Put the stand-in in the place of CuPy, installed or not; return its library."""
    monkeypatch.setitem(sys.modules, "cupy", xp)
    return xp


def moved(x):
    """Turn NumPy arrays, also those in a dict, list or tuple, into arrays of the stand-in; leave
    the rest.
    """
    if isinstance(x, dict):
        return {name: moved(value) for name, value in x.items()}
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*map(moved, x))
    if isinstance(x, tuple | list):
        return type(x)(map(moved, x))
    return xp.asarray(x) if isinstance(x, np.ndarray | np.generic) else x
