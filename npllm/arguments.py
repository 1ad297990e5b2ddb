"""What callers hand over, as NumPy arrays: one kind of integer, the byte order of the machine."""

from typing import Any

import numpy as np

from npllm.arrays import is_array, is_integer, native, to_numpy
from npllm.errors import NpllmTypeError

__all__ = ["host_array", "host_integers", "native_weights"]

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


def _arrays_of(tree):
    """Every NumPy array in tuples of tuples."""
    if isinstance(tree, tuple):
        for branch in tree:
            yield from _arrays_of(branch)
    elif isinstance(tree, np.ndarray):
        yield tree


def _mapped(tree, known):
    """The same tuples with native arrays; `known`: those that are converted, by identity."""
    if isinstance(tree, tuple):
        branches = [_mapped(branch, known) for branch in tree]
        return type(tree)(*branches) if hasattr(tree, "_fields") else tuple(branches)
    if isinstance(tree, np.ndarray):
        return known.setdefault(id(tree), native(tree))
    return tree
