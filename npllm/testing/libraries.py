"""NumPy arrays to and from other array libraries, 16-bit floats included."""

import importlib
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from npllm.errors import MissingExtraError, NpllmTypeError, NpllmValueError

__all__ = ["LIBRARIES", "from_numpy", "on_host", "to_host", "torch_to_numpy"]

Array = Any

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def _import(library: str) -> Any:
    """Import a library, or say that it is missing."""
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise MissingExtraError(
            f'library="{library}" needs {library}, which cannot be imported ({error}); '
            "install it, or "
            "adapt a function of another library"
        ) from error


def _to_torch(x: Array) -> Array:
    """A torch tensor; a copy of read-only memory and of negative strides, else a view."""
    torch = _import("torch")
    x = x if x.flags.writeable and all(step >= 0 for step in x.strides) else x.copy()
    if x.dtype == BFLOAT16:
        return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def torch_to_numpy(x: Array) -> Array:
    """A NumPy array of a tensor on any device; bfloat16 by its bits."""
    torch = _import("torch")
    x = x.detach().cpu()
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.uint16).numpy().view(BFLOAT16)
    return x.numpy()


def _to_jax(x: Array) -> Array:
    """A JAX array of a contiguous copy; raises where JAX makes float32 of float64."""
    jax = _import("jax")
    y = jax.numpy.asarray(np.ascontiguousarray(x).reshape(x.shape))
    if str(y.dtype) != str(x.dtype):
        raise NpllmTypeError(
            f"JAX made {y.dtype} of {x.dtype}; call "
            'jax.config.update("jax_enable_x64", True) first, or adapt '
            'with dtype="float32"'
        )
    return y


def _to_cupy(x: Array) -> Array:
    """A copy on the device."""
    return _import("cupy").asarray(x)


def _to_strict(x: Array) -> Array:
    """An array of array-api-strict, which has no 16-bit floats."""
    if x.dtype in (BFLOAT16, np.dtype(np.float16)):
        raise NpllmTypeError(f'array_api_strict has no {x.dtype}; adapt with dtype="float32"')
    return _import("array_api_strict").asarray(x.copy())


def _to_dlpack(x: Array) -> Array:
    """A writeable NumPy array, which exports DLPack; NumPy exports no bfloat16."""
    if x.dtype == BFLOAT16:
        raise NpllmTypeError(
            'NumPy exports no bfloat16 through DLPack; adapt with library="torch" or "jax", '
            "or with "
            'dtype="float32"'
        )
    return x if x.flags.writeable else x.copy()


def _from_dlpack(x: Array) -> Array:
    return torch_to_numpy(x) if _module(x) == "torch" else np.from_dlpack(x)


def _strict_to_numpy(x: Array) -> Array:
    return np.asarray(np.from_dlpack(x))


def _module(x: Any) -> str:
    """Name of the library that a value comes from; JAX's arrays are made by jaxlib."""
    return (
        "jax" if type(x).__module__.startswith("jaxlib") else type(x).__module__.partition(".")[0]
    )


LIBRARIES: dict[str, tuple[Callable, Callable]] = {
    "numpy": (lambda x: x, np.asarray),
    "torch": (_to_torch, torch_to_numpy),
    "jax": (_to_jax, np.asarray),
    "cupy": (_to_cupy, lambda x: x.get()),
    "dlpack": (_to_dlpack, _from_dlpack),
    "array_api_strict": (_to_strict, _strict_to_numpy),
}
"""Name -> (from NumPy, to NumPy)."""


def from_numpy(x: Array, library: str) -> Array:
    """Hand a NumPy array to a library.

    Parameters
    ----------
    x : array
        NumPy: any strides, also read-only, bfloat16 of ml_dtypes included.
    library : str
        "numpy", "torch", "jax", "cupy", "dlpack" or "array_api_strict".

    Returns
    -------
    y : array
        Of that library, with the same dtype; a view of the same memory where the library takes one.

    Raises
    ------
    NpllmTypeError
        When the library does not have the dtype.
    NpllmValueError
        For an unknown library.
    MissingExtraError
        When it is not installed.
    """
    if library not in LIBRARIES:
        raise NpllmValueError(f"library must be one of {', '.join(LIBRARIES)}, got {library!r}")
    return LIBRARIES[library][0](x)


def to_host(x: Any, library: str, what: str = "the function") -> Array:
    """Bring a result back to NumPy; raise unless it is an array of the library.

    Parameters
    ----------
    x : array
    library : str
    what : str
        What returned it, for the error.

    Returns
    -------
    y : array
        NumPy.

    Raises
    ------
    NpllmTypeError
        For a value of another library.
    """
    got = _module(x)
    fits = (
        hasattr(x, "__dlpack__") if library == "dlpack" else got == library and hasattr(x, "shape")
    )
    if not fits:
        wanted = "an array that exports DLPack" if library == "dlpack" else f"an array of {library}"
        raise NpllmTypeError(
            f"{what} must return {wanted}, got {type(x).__module__}.{type(x).__qualname__}"
        )
    return LIBRARIES[library][1](x)


def on_host(x: Array) -> Array:
    """Bring an array of any library to NumPy; bfloat16 of torch by its bits."""
    if type(x).__module__.partition(".")[0] == "torch":
        return torch_to_numpy(x)
    return np.asarray(x.get() if hasattr(x, "get") else x) if hasattr(x, "dtype") else x
