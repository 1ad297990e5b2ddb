"""Checks of what a replaced operation returns: library, dtype and shape."""

import inspect
from collections.abc import Callable
from functools import update_wrapper
from typing import Any

from npllm.arrays import array_namespace, compute_dtype, is_array
from npllm.errors import NpllmTypeError, NpllmValueError

__all__ = ["check_result", "checked", "expected_result", "replaced_ops"]

Array = Any

SAME = ("add", "apply_rope", "gelu", "layer_norm", "relu", "rms_norm", "silu", "softmax", "swiglu")
"""Operations whose result has the shape and the dtype of their first argument."""


def expected_result(op: str, arguments: dict[str, Any]) -> tuple[Any, tuple[int, ...]] | None:
    """Return the dtype and shape that an operation must return; None where none is known."""
    first = next(iter(arguments.values()))
    if op in SAME:
        return first.dtype, tuple(first.shape)
    if op == "linear":
        return first.dtype, (*first.shape[:-1], arguments["weight"].shape[0])
    if op == "attention":
        return first.dtype, (*first.shape[:-1], arguments["v"].shape[-1])
    if op == "embed":
        weight = arguments["weight"]
        return compute_dtype(weight), (*first.shape, weight.shape[1])
    return None


def check_result(op: str, result: Any, like: Array, dtype: Any, shape: tuple[int, ...]) -> None:
    """Raise unless a result is an array of the library of `like`, with this dtype and shape.

    Raises
    ------
    NpllmTypeError
        For another library or dtype, and for what is no array.
    NpllmValueError
        For another shape.
    """
    library = array_namespace(like).__name__
    if not is_array(result):
        kind = f"{type(result).__module__}.{type(result).__qualname__}"
        raise NpllmTypeError(
            f"{op} must return an array of {library}, got {kind}; "
            "npllm.testing.adapt wraps a function of another library"
        )
    if array_namespace(result).__name__ != library:
        raise NpllmTypeError(
            f"{op} must return an array of {library}, the library of its input, "
            f"got {array_namespace(result).__name__}"
        )
    if result.dtype != dtype:
        wanted = getattr(dtype, "__name__", dtype)
        raise NpllmTypeError(
            f"{op} must return {wanted}, got {result.dtype}; round the result at the end"
        )
    if tuple(result.shape) != tuple(shape):
        raise NpllmValueError(f"{op} must return the shape {list(shape)}, got {list(result.shape)}")


def checked(op: str, fn: Callable, definition: Callable) -> Callable:
    """Return a function that calls `fn` and checks what comes back.

    Parameters
    ----------
    op : str
        Name of the operation.
    fn : callable
    definition : callable
        The operation of the same name in `npllm.ops`, for its parameter names.

    Returns
    -------
    op : callable
        With the signature of the definition.  Operations without a known shape are returned
        unchecked, as `fn` itself.
    """
    return _Checked(op, fn, definition) if op in (*SAME, "linear", "attention", "embed") else fn


class _Checked:
    """An operation whose results are checked.  A class, so that it can be pickled."""

    def __init__(self, op: str, fn: Callable, definition: Callable):
        update_wrapper(self, definition)
        self._op, self._fn, self._definition = op, fn, definition
        self._signature = inspect.signature(definition)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._fn(*args, **kwargs)
        bound = self._signature.bind(*args, **kwargs).arguments
        first = next(iter(bound.values()))
        like = bound["weight"] if self._op == "embed" else first
        array = result[0] if bound.get("return_lse") and isinstance(result, tuple) else result
        dtype, shape = expected_result(self._op, bound) or (array.dtype, array.shape)
        check_result(self._op, array, like, dtype, shape)
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        return _Checked, (self._op, self._fn, self._definition)


def replaced_ops(ops: Any, new: dict[str, Callable]) -> Any:
    """Return a set with some operations replaced, each checked for what it returns.

    Parameters
    ----------
    ops : Ops
    new : dict
        Name -> callable.

    Returns
    -------
    ops : Ops

    Raises
    ------
    NpllmTypeError
        For a name that no operation has, or a value that cannot be called.
    """
    import npllm.ops

    named = {
        name: checked(name, fn, getattr(npllm.ops, name))
        if callable(fn) and hasattr(npllm.ops, name)
        else fn
        for name, fn in new.items()
    }
    return ops.replace(**named)
