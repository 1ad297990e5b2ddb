"""What callers hand over, checked once, before any work is done.

Arrays become NumPy arrays of one kind of integer and in the byte order of the machine, NumPy
scalars become Python numbers.
"""

import inspect
import os
from pathlib import Path
from typing import Any

import numpy as np

from npllm.arrays import is_array, is_integer, native, to_numpy
from npllm.config.strict_json import quote
from npllm.errors import NpllmTypeError, NpllmValueError

__all__ = [
    "check_attention_mask",
    "check_flag",
    "check_ids",
    "check_integer",
    "check_mask",
    "check_number",
    "check_path",
    "check_paths",
    "check_positions",
    "host_array",
    "host_integers",
    "native_weights",
    "to_python",
]

Array = Any


def host_array(name: str, x: Any) -> np.ndarray:
    """Bring an argument, also nested lists, to the host, in the byte order of the machine.

    Raises
    ------
    NpllmTypeError
        For lists of unequal length.
    """
    if is_array(x):
        return native(to_numpy(x))
    try:
        return native(np.asarray(x))
    except ValueError as error:
        raise NpllmTypeError(
            f"{name} must be an array, or lists of equal length ({error})"
        ) from None


def host_integers(name: str, x: Any) -> np.ndarray:
    """Bring integers of any width and byte order to the host as int64.

    What holds no integers is returned as `host_array` gives it.

    Raises
    ------
    NpllmTypeError
        For lists of unequal length, and for integers beyond int64.
    """
    integers = host_array(name, x)
    if not is_integer(integers):
        return integers
    if integers.dtype == np.uint64 and integers.size and integers.max() > np.iinfo(np.int64).max:
        raise NpllmTypeError(f"{name} must fit into int64, got {integers.max()}")
    return integers.astype(np.int64, copy=False)


def check_ids(name: str, x: Any, size: int, size_name: str) -> np.ndarray:
    """Return ids as an int64 NumPy array [n_batch, n_seq]; raise unless they are integers below
    `size`.

    Raises
    ------
    NpllmTypeError
        For what is no integer array of two axes, or is empty.
    NpllmValueError
        For an id below 0 or not below `size`.
    """
    ids = host_integers(name, x)
    if not is_integer(ids) or ids.ndim != 2 or 0 in ids.shape:
        raise NpllmTypeError(
            f"{name} must be integers [n_batch, n_seq], both at least 1, "
            f"got {ids.dtype} {list(ids.shape)}"
        )
    if ids.min() < 0 or ids.max() >= size:
        raise NpllmValueError(
            f"{name} must lie in 0 ... {size_name} - 1 = {size - 1}, "
            f"got {ids.min()} ... {ids.max()}; is this the tokenizer of another model?"
        )
    return ids


def check_attention_mask(attention_mask: Any, n_seq: int, past: Array) -> Array:
    """Return which slots hold tokens; by default all the new ones do.

    Parameters
    ----------
    attention_mask : array [n_batch, n_past + n_seq] or None
        1 for a token, 0 for padding.
    n_seq : int
    past : bool array [n_batch, n_past]
        The same of the cached tokens.

    Returns
    -------
    valid : bool array [n_batch, n_past + n_seq]
        NumPy.

    Raises
    ------
    NpllmTypeError, NpllmValueError
        For another shape, other numbers, or other cached slots than `past`.
    """
    n_batch, n_past = past.shape
    if attention_mask is None:
        return np.concatenate([past, np.ones((n_batch, n_seq), dtype=bool)], axis=1)
    mask = host_array("attention_mask", attention_mask)
    if mask.shape != (n_batch, n_past + n_seq):
        raise NpllmValueError(
            f"attention_mask must be [n_batch, n_ctx] = [{n_batch}, {n_past + n_seq}] "
            f"(cached keys included), got {list(mask.shape)}"
        )
    if not np.isin(mask, (0, 1)).all():
        raise NpllmValueError(
            "attention_mask must hold 1 (token) and 0 (padding) only; additive masks are not taken"
        )
    if not np.array_equal(mask[:, :n_past], past):
        raise NpllmValueError(
            "attention_mask differs from the mask with which the cached tokens were computed; "
            "their keys depend on it, so begin with a new cache"
        )
    return mask.astype(bool)


def check_positions(position_ids: Any, n_batch: int, n_seq: int) -> Array:
    """Return given positions as an int64 NumPy array [n_seq] or [n_batch, n_seq].

    Raises
    ------
    NpllmTypeError, NpllmValueError
        For another shape, and for what is no integer from 0.
    """
    positions = host_integers("position_ids", position_ids)
    if (
        not is_integer(positions)
        or positions.shape not in ((n_seq,), (1, n_seq), (n_batch, n_seq))
        or positions.min() < 0
    ):
        raise NpllmValueError(
            f"position_ids must be integers from 0, [n_seq] = [{n_seq}] or [n_batch, n_seq] = "
            f"[{n_batch}, {n_seq}], got {positions.dtype} {list(positions.shape)}"
        )
    return positions[0] if positions.shape[:-1] == (1,) else positions


def to_python(value: Any) -> Any:
    """Return a NumPy scalar as the Python number it is, and anything else unchanged."""
    return value.item() if isinstance(value, np.generic) else value


def check_integer(name: str, value: Any, least: int, most: int, note: str = "") -> int:
    """Return an integer, also a NumPy one, as int; raise where it lies outside least ... most.

    Raises
    ------
    NpllmValueError
        For another type as well, bool included.
    """
    number = to_python(value)
    if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= most:
        raise NpllmValueError(
            f"{name} must be an integer in {least} ... {most}{note}, got {quote(number)}"
        )
    return number


def check_number(name: str, value: Any, least: float, most: float) -> float:
    """Return a number, also a NumPy one, as int or float; raise where it is not below `most` or
    below `least`.

    Raises
    ------
    NpllmValueError
        For another type as well, bool and NaN included.
    """
    number = to_python(value)
    if (
        isinstance(number, bool)
        or not isinstance(number, int | float)
        or not least <= number <= most
    ):
        raise NpllmValueError(f"{name} must be a number in {least} ... {most}, got {quote(number)}")
    return number


def check_flag(name: str, value: Any) -> bool:
    """Return a truth value, also a NumPy one, as bool; raise for anything else.

    Raises
    ------
    NpllmValueError
        For another type.
    """
    flag = to_python(value)
    if not isinstance(flag, bool):
        raise NpllmValueError(f"{name} must be True or False, got {quote(flag)}")
    return flag


def check_mask(mask: Any, name: str = "mask") -> Any:
    """Return a mask rule, a function of slots, a bool array or None; raise for anything else.

    Raises
    ------
    NpllmTypeError
        For a function of `npllm.ops.mask` that was not called, a name, a list: says what to write.
    """
    module = getattr(mask, "__module__", None) or ""
    if inspect.isfunction(mask) and module.startswith("npllm.ops.mask"):
        call = f"{mask.__name__}({'...' if inspect.signature(mask).parameters else ''})"
        raise NpllmTypeError(
            f"{name} must be a rule, got the function {mask.__name__}, which makes one: "
            f"call it, {name}=ops.mask.{call}"
        )
    if mask is None or callable(mask) or is_array(mask):
        return mask
    raise NpllmTypeError(
        f"{name} must be a rule such as ops.mask.causal(), a bool array (True = visible) or None, "
        f"got {quote(mask)}"
    )


def check_path(name: str, path: Any) -> Path:
    """Return a path; raise for what is none.

    Raises
    ------
    NpllmTypeError
        For anything but a str or a path object: a number, bytes, a list.
    NpllmValueError
        For a name with a NUL character, which no system takes.
    """
    value = os.fspath(path) if isinstance(path, str | os.PathLike) else path
    if not isinstance(value, str):
        raise NpllmTypeError(f"{name} must be a str or a Path, got {quote(path)}")
    if "\0" in value:
        raise NpllmValueError(f"{name} must hold no NUL character, got {quote(value)}")
    return Path(value)


def check_paths(name: str, paths: Any) -> list[Path]:
    """Return one path, or each of several, as a list; raise as `check_path` does."""
    several = paths if isinstance(paths, list | tuple) else [paths]
    return [check_path(name, path) for path in several]


def native_weights(weights: Any) -> Any:
    """Bring weights, in tuples of tuples, into the byte order of the machine.

    Parameters
    ----------
    weights : named tuple
        `Params` or `BertParams`.

    Returns
    -------
    weights : named tuple
        The same one where every array has that order already; arrays that were one object stay one.
    """
    if all(x.dtype.isnative for x in _arrays_of(weights)):
        return weights
    return _mapped(weights, {})


def _arrays_of(tree: Any) -> Any:
    """Every NumPy array in tuples of tuples."""
    if isinstance(tree, tuple):
        for branch in tree:
            yield from _arrays_of(branch)
    elif isinstance(tree, np.ndarray):
        yield tree


def _mapped(tree: Any, known: dict[int, Array]) -> Any:
    """The same tuples with native arrays; `known`: those that are converted, by identity."""
    if isinstance(tree, tuple):
        branches = [_mapped(branch, known) for branch in tree]
        return type(tree)(*branches) if hasattr(tree, "_fields") else tuple(branches)
    if isinstance(tree, np.ndarray):
        return known.setdefault(id(tree), native(tree))
    return tree
