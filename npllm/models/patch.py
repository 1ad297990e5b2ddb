"""Patches: values of a forward pass that are replaced by name."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import numpy as np

from npllm.arrays import asarray, is_array
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.models.taps import NAMES, Tap, check_returned

__all__ = ["Patch", "value_names"]

Array = Any

CACHED = ("cached_k", "cached_v")


def value_names(config: Any, *, cached: bool) -> list[str]:
    """List the values that a tap sees in a run, and may replace: those of the layers, in the order
    of a layer, between what is before and behind them.

    Parameters
    ----------
    config : Config
    cached : bool
        Whether the run appends to a cache; `cached_k` and `cached_v` do not exist otherwise.

    Returns
    -------
    names : list of str
    """
    names = []
    for name in NAMES:
        is_there = config.head == "lm" or not name.startswith("lm_head")
        if is_there and (cached or not name.endswith(CACHED)):
            numbers = range(config.num_hidden_layers) if ".N" in name else (0,)
            names += [name.replace(".N", f".{number}") for number in numbers]
    return names


class Patch:
    """A tap that replaces values.

    Parameters
    ----------
    patch : mapping of str to function or array
        A function gets the value, which it must not change, and returns what takes its place; an
        array takes its place.  Both have the value's shape and dtype.
    names : list of str
        The values of the run, from `value_names`.
    xp : module
        The library of the model; a NumPy array is moved there.
    tap : function (name, array) -> array, optional
        Sees every value after its patch.

    Raises
    ------
    NpllmTypeError
        For what is no mapping to functions and arrays.
    NpllmValueError
        For a name that the run does not have.
    """

    def __init__(self, patch: Any, names: list[str], xp: Any, tap: Tap | None = None) -> None:
        if not isinstance(patch, Mapping):
            raise NpllmTypeError(
                "patch must map names to functions or arrays, "
                f'{{"model.layers.0": fn}}, got {type(patch).__name__}'
            )
        for name, new in patch.items():
            _check(name, new, names)
        self._patch, self._xp, self._tap = dict(patch), xp, tap
        self._unused, self._last = set(patch), names[-1]
        self.pairs = getattr(tap, "pairs", False)

    def __call__(self, name: str, x: Array) -> Array:
        """Return what takes the place of a value.

        Raises
        ------
        NpllmTypeError, NpllmValueError
            For another library, dtype or shape; at the last value of the run for a patch that did
            not take the place of any.
        """
        if name in self._patch:
            self._unused.discard(name)
            new = self._patch[name]
            y = new(x) if callable(new) else _moved(new, self._xp)
            check_returned(f"the patch of {name}", y, x)
            x = y
        if name == self._last and self._unused:
            raise NpllmValueError(
                f"the patch of {', '.join(sorted(self._unused))} never fired: a kernel that was "
                "given to with_ops computes that stretch of the layer as a whole; "
                "run the model without it"
            )
        return x if self._tap is None else self._tap(name, x)


def _check(name: Any, new: Any, names: list[str]) -> None:
    """Check one patch."""
    if name not in names:
        near = get_close_matches(str(name), names, 3, 0.0)
        raise NpllmValueError(
            f"patch has {name!r}, which is no value of this run that can be replaced; "
            f"there are {', '.join(near)}"
        )
    if not callable(new) and not is_array(new):
        raise NpllmTypeError(
            f"the patch of {name} must be a function or an array, got {type(new).__name__}"
        )


def _moved(x: Array, xp: Any) -> Array:
    return asarray(x, xp) if isinstance(x, np.ndarray) else x
