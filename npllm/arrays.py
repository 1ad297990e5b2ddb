"""The backend switch: the only file that knows that more than one array library exists.

An op never names a library.  It asks its inputs, `xp = array_namespace(x, weight)`, and computes
with what they are made of: NumPy on the CPU, CuPy on a GPU, or any other library of the Python
array API standard.  The switch itself is one argument where arrays are made:
`npllm.load(path, backend="cupy")`.

16-bit floats are for storage only.  `widen` is the only place that knows about bfloat16, which is
no NumPy type (`ml_dtypes` adds it) and which `isdtype`, `finfo` and type promotion do not
understand.
"""

import importlib
import math
import sys
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from npllm.errors import MissingExtraError, NpllmTypeError, NpllmValueError, install_extra

__all__ = [
    "BACKENDS",
    "array_namespace",
    "as_index",
    "asarray",
    "backend_name",
    "backend_namespace",
    "compute_dtype",
    "dtype_named",
    "entries_at_once",
    "expect_entries",
    "expect_shape",
    "host_range",
    "ieee_semantics",
    "is_array",
    "is_integer",
    "is_packed",
    "largest",
    "native",
    "round_to",
    "stable_argsort",
    "to_numpy",
    "widen",
    "widest",
]

Array = Any

BACKENDS = ("numpy", "cupy", "auto")

# name in a config.json or a safetensors header -> NumPy dtype (CuPy uses the same objects)
DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
HOST_ENTRIES, DEVICE_ENTRIES = 2**19, 2**26
_FLOATS = frozenset(DTYPES)
_BYTES = {
    "bool": 1,
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
}


ieee_semantics = np.errstate(all="ignore")
"""Decorator: 0 / 0 is NaN, 1 / 0 and overflow are infinity, without a warning or error of NumPy."""


def array_namespace(*arrays: Any) -> Any:
    """Return the array library that every given array belongs to.

    Parameters
    ----------
    *arrays : array or None
        None is an argument that was left out, and is ignored.

    Returns
    -------
    xp : module
        The namespace the arrays name themselves, `x.__array_namespace__()`.

    Raises
    ------
    NpllmTypeError
        For a mixture of libraries, for what is no array (a list, a number, a torch tensor), and for
        NumPy arrays in another byte order than the machine's.

    Notes
    -----
    CuPy 14's functions follow the standard, but its arrays do not name their library, so they are
    known by their type.

    Source: Python array API standard 2023.12, `__array_namespace__`.
    """
    namespaces = {}
    for x in arrays:
        if x is None:
            continue
        if not is_array(x):
            raise NpllmTypeError(
                f"{_argument_name(x)} must be an array of NumPy, CuPy or another array API "
                f"library, got {_type_name(x)}; convert it first, e.g. with numpy.asarray"
            )
        if isinstance(x, np.ndarray) and not x.dtype.isnative:
            raise NpllmTypeError(
                f"{_argument_name(x)} of dtype {x.dtype} has another byte order than this "
                "machine; convert the array once, with npllm.arrays.native(x)"
            )
        xp = sys.modules["cupy"] if _is_cupy(x) else x.__array_namespace__()
        namespaces[xp.__name__] = xp
    if not namespaces:
        raise NpllmTypeError("a call must have at least one array, got None for each")
    if len(namespaces) != 1:
        raise NpllmTypeError(
            f"all arrays of one call must come from one library, got {_libraries(arrays)}; "
            "move one side first (npllm.arrays.asarray, npllm.arrays.to_numpy)"
        )
    return next(iter(namespaces.values()))


def _libraries(arrays: Iterable[Any]) -> str:
    """Say which argument is of which library: "q of numpy and k of cupy"."""
    found: dict[str, str] = {}
    for x in arrays:
        if x is not None:
            library = type(x).__module__.partition(".")[0]
            found.setdefault(library, _argument_name(x))
    return " and ".join(f"{name} of {library}" for library, name in sorted(found.items()))


def _argument_name(x: Any) -> str:
    """Find the name of an argument, for an error message: that in the outermost function of npllm.

    Looks through the frames of the call; "an argument" where no local variable is this object.
    """
    name, frame = "an argument", sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("npllm.") and module != __name__:
            names = (local for local, value in frame.f_locals.items() if value is x)
            name = next(names, name)
        frame = frame.f_back  # type: ignore[assignment]
    return name


def _type_name(x: Any) -> str:
    """The type of an object, with the module of one that is not built in."""
    kind = type(x)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def is_array(x: Any) -> bool:
    """Tell whether `x` is an array of NumPy, CuPy or another library of the array API standard."""
    return hasattr(x, "__array_namespace__") or _is_cupy(x)


def _is_cupy(x: Any) -> bool:
    return type(x).__module__.partition(".")[0] == "cupy" and type(x).__name__ == "ndarray"


def backend_namespace(backend: str) -> Any:
    """Import the library behind a backend name, and make sure that it can hold an array.

    Parameters
    ----------
    backend : str
        "numpy", "cupy", or "auto": CuPy where it is installed and finds a device, else NumPy.

    Returns
    -------
    xp : module

    Raises
    ------
    NpllmValueError
        For another name; for "cupy" where there is no driver or no device.
    MissingExtraError
        For "cupy" where CuPy cannot be imported.
    """
    if backend == "numpy":
        return np
    if backend == "auto":
        try:
            return _cupy()
        except (MissingExtraError, NpllmValueError):
            return np
    if backend != "cupy":
        raise NpllmValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return _cupy()


def backend_name(xp: Any) -> str:
    """Name the backend of a library: "numpy", or "cupy" for every other."""
    return "numpy" if xp is np else "cupy"


def _cupy() -> Any:
    """CuPy, or an error that says what was found and what to install."""
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        raise MissingExtraError(
            f'backend="cupy" needs CuPy, which cannot be imported ({error}); '
            f"{install_extra('cuda')} for "
            'CUDA 13, or cupy-cuda12x for an older driver, or use backend="numpy"'
        ) from error
    try:
        n_devices = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise NpllmValueError(
            'backend="cupy" needs a CUDA device; '
            f"CuPy {cupy.__version__} is installed but found no driver or "
            f"device ({error}); "
            'install an NVIDIA driver that nvidia-smi confirms, or use backend="numpy"'
        ) from error
    if n_devices < 1:
        raise NpllmValueError(
            'backend="cupy" needs a CUDA device; '
            f"CuPy {cupy.__version__} and a driver were found, but 0 devices "
            '(is CUDA_VISIBLE_DEVICES set?); use backend="numpy"'
        )
    return cupy


def dtype_named(name: str) -> np.dtype:
    """Look up a float dtype by its name: "bfloat16", "float16", "float32" or "float64"."""
    try:
        return DTYPES[name]
    except (KeyError, TypeError):
        raise NpllmValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}") from None


def widest(dtypes: Iterable[np.dtype]) -> np.dtype:
    """Find the narrowest float dtype that holds every value of all the given ones.

        bfloat16 and float16 -> float32: it alone has the exponent of the one and the fraction of
        the other

    Parameters
    ----------
    dtypes : iterable of NumPy dtypes
        bfloat16, float16, float32 or float64, in any byte order.

    Returns
    -------
    dtype : NumPy dtype
        In the byte order of the machine.

    Notes
    -----
    Source: `torch.promote_types`.
    """
    names = {dtype.name for dtype in dtypes}
    if len(names) == 1:
        return dtype_named(names.pop())
    return DTYPES["float64" if "float64" in names else "float32"]


def asarray(x: Any, xp: Any) -> Array:
    """Move a host array to library `xp`; no copy where it is there already."""
    if is_packed(x):
        return x if xp is np else x.to(xp)
    return x if xp is np else xp.asarray(x)


def is_packed(x: Any) -> bool:
    """Tell whether `x` is a `PackedMatrix`: a weight that is no array of floats."""
    return hasattr(x, "widened")


def to_numpy(x: Any) -> Array:
    """Bring an array of any library to the host: the one crossing from a device.  A NumPy array is
    returned as it is.
    """
    if isinstance(x, np.ndarray):
        return x
    return x.get() if hasattr(x, "get") else np.asarray(x)


def native(x: Array) -> Array:
    """Bring a NumPy array into the byte order of the machine: itself, or a copy with the same
    values.
    """
    return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def compute_dtype(*arrays: Any) -> Any:
    """Name the dtype to compute in: float64 where any given array is float64, else float32."""
    xp = array_namespace(*arrays)
    return (
        xp.float64 if any(x is not None and x.dtype == xp.float64 for x in arrays) else xp.float32
    )


def widen(x: Array, dtype: Any = None) -> Array:
    """Convert a float array to the dtype to compute in.

    Parameters
    ----------
    x : array [...]
        bfloat16, float16, float32 or float64; or a `PackedMatrix`.
    dtype : dtype, optional
        float32 or float64; by default what `compute_dtype(x)` says.

    Returns
    -------
    y : array [...]
        `x` itself where it has that dtype already, else a copy.  Widening is exact; float64 to
        float32 rounds to nearest.

    Raises
    ------
    NpllmTypeError
        When `x` is not of a float type.
    """
    if is_packed(x):
        x = x.widened()
    if _dtype_name(x) not in _FLOATS:
        raise NpllmTypeError(
            f"expected an array of {', '.join(DTYPES)}, got dtype {_dtype_name(x)}"
        )
    dtype = compute_dtype(x) if dtype is None else dtype
    return x if x.dtype == dtype else array_namespace(x).astype(x, dtype)


def round_to(x: Array, dtype: str) -> Array:
    """Round each entry to the nearest value of a 16-bit float type, and keep it in float32.

        y = float32(dtype(x)),   of two nearest values the one whose last bit is 0

    Parameters
    ----------
    x : array [...]
        float32.
    dtype : str
        "bfloat16" (8 significant bits) or "float16" (11).

    Returns
    -------
    y : array [...]
        float32.  Beyond the largest finite value of the type plus half a step: infinity.  Below its
        smallest normal value the step stays fixed.  NaN stays NaN.

    Raises
    ------
    NpllmTypeError
        When `x` is not float32.  From float64 the step over float32, which some libraries take,
        would round twice.
    NpllmValueError
        For another `dtype`.

    Notes
    -----
    Source: IEEE 754-2019, section 4.3.1, roundTiesToEven.
    """
    xp = array_namespace(x)
    if dtype not in ("bfloat16", "float16"):
        raise NpllmValueError(f"dtype must be bfloat16 or float16, got {dtype!r}")
    if x.dtype != xp.float32:
        raise NpllmTypeError(f"expected float32 to round to {dtype}, got {_dtype_name(x)}")
    with np.errstate(over="ignore"):  # to infinity, as the type says
        return xp.astype(xp.astype(x, dtype_named(dtype)), xp.float32)


def stable_argsort(x: Array, xp: Any) -> Array:
    """Sort the last axis, ascending; return the order [..., n], equal entries in the order in which
    they stand.
    """
    if xp.__name__ == "cupy":  # every sort is stable; the keyword `stable` is missing
        return xp.argsort(x, axis=-1)
    return xp.argsort(x, axis=-1, stable=True)


def largest(x: Array, n: int, xp: Any) -> Array:
    """Find the n largest entries of the last axis.

    Returns
    -------
    indices : integer array [..., n]
        The largest first; equal entries in the order in which they stand, but for those that equal
        the n-th largest: which of them are among the n is left open.
    """
    if xp is not np or n == x.shape[-1]:
        return stable_argsort(-x, xp)[..., :n]
    some = np.sort(np.argpartition(-x, n - 1, axis=-1)[..., :n], axis=-1)
    return np.take_along_axis(
        some, stable_argsort(-np.take_along_axis(x, some, axis=-1), np), axis=-1
    )


def entries_at_once(x: Array) -> int:
    """Say how many entries of a stored weight to widen to float32 at a time: what fits a fast
    memory, and is worth a call.

    2**19 on the host, 2 MiB, which stays in a core's cache; 2**26 on a device, 256 MiB, so that the
    product of a block fills it.
    """
    return HOST_ENTRIES if array_namespace(x) is not sys.modules.get("cupy") else DEVICE_ENTRIES


def is_integer(x: Array) -> bool:
    """Tell whether an array holds integers (bool is not one)."""
    return _dtype_name(x).startswith(("int", "uint"))


def as_index(ids: Array) -> Array:
    """Turn uint64, which NumPy does not take for an index, into int64; return other integers as
    they are.
    """
    if _dtype_name(ids) != "uint64":
        return ids
    xp = array_namespace(ids)
    return xp.astype(ids, xp.int64)


def n_bytes(x: Array) -> int:
    """Count the bytes of an array's entries, in any library."""
    return math.prod(x.shape) * _BYTES[_dtype_name(x)]


def host_range(x: Array) -> tuple[int, int] | None:
    """Return (smallest, largest) of an integer array on the host; None for an empty one, and for
    one on a device.

    Looking at a value on a device would stall the stream, so ids are checked before they are moved
    there.
    """
    if not isinstance(x, np.ndarray) or x.size == 0:
        return None
    return int(x.min()), int(x.max())


def expect_shape(name: str, x: Array, **axes: int | None) -> None:
    """Raise unless the last axes of `x` have the given sizes, naming them: `weight must be
    [d_model] = [3072], got [3071]`.

    Parameters
    ----------
    name : str
        What the caller calls the array.
    x : array
    **axes : int or None
        Axis name to size, in order; None accepts any size.  A leading `dots=None` accepts any
        further axes in front.
    """
    more = "dots" in axes
    sizes = [size for axis, size in axes.items() if axis != "dots"]
    if x is None:
        raise NpllmTypeError(f"{name} must be an array, got None")
    shape = tuple(x.shape)
    tail = shape[len(shape) - len(sizes) :]
    fits = len(shape) >= len(sizes) if more else len(shape) == len(sizes)
    if fits and all(want is None or want == got for want, got in zip(sizes, tail, strict=True)):
        return
    names = ["..."] * more + [axis for axis in axes if axis != "dots"]
    known = {axis: size for axis, size in axes.items() if size is not None}
    wanted = [str(known.get(axis, axis)) for axis in names]
    sizes_text = f" = [{', '.join(wanted)}]" if known else ""
    raise NpllmValueError(
        f"{name} must be [{', '.join(names)}]{sizes_text}, got [{', '.join(map(str, shape))}]"
    )


def expect_entries(name: str, x: Array, axis: int = -1) -> None:
    """Raise unless `x` has the axis, and an entry along it: nothing is the largest of nothing.

    Parameters
    ----------
    name : str
        What the caller calls the array.
    x : array
        A number without axes passes with the axis -1, as in NumPy.
    axis : int
    """
    n_axis = max(len(x.shape), 1)
    if not -n_axis <= axis < n_axis:
        raise NpllmValueError(
            f"axis must lie in {-n_axis} ... {n_axis - 1} for {name} {list(x.shape)}, got {axis}"
        )
    if x.shape and x.shape[axis] == 0:
        raise NpllmValueError(
            f"{name} must have at least one entry along axis {axis}, got {list(x.shape)}"
        )


def _dtype_name(x: Array) -> str:
    """Name of an array's dtype, alike in NumPy ("float32"), CuPy and libraries that write
    "array_api_strict.float32".
    """
    return _name_of_dtype(x.dtype)


@lru_cache(typed=True)  # NumPy takes seven Python calls to name a dtype
def _name_of_dtype(dtype: Any) -> str:
    return str(dtype).rsplit(".", 1)[-1]
