"""One adapted function: how its arguments go in, and what is refused of its result."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from npllm.arrays import DTYPES, to_numpy
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.testing.layouts import Layout
from npllm.testing.libraries import from_numpy, to_host

__all__ = ["ALIASES", "AdaptedCall", "holds_no_nan"]

Array = Any

ALIASES = {
    "mask": ("mask", "attn_mask", "attention_mask"),
    "scale": ("scale", "sm_scale", "softmax_scale"),
    "softcap": ("softcap", "logits_soft_cap"),
    "bias": ("bias",),
}
"""What other libraries call the options of attention."""


class AdaptedCall:
    """One adapted function: how its arguments go in and its result comes out."""

    def __init__(
        self,
        fn: Callable,
        op: str,
        library: str,
        layout: Layout,
        dtype: str | None,
        mask: str,
        allow_nan: bool,
    ) -> None:
        self.fn, self.op, self.library, self.layout, self.mask = fn, op, library, layout, mask
        self.dtype = None if dtype is None else DTYPES[dtype]
        self.allow_nan = allow_nan
        self.name = f"{op} ({getattr(fn, '__name__', type(fn).__name__)}, {library})"
        self.names = _parameters(fn)

    def rounded(self, x: Array) -> Array:
        """The array on the host, a float one in the dtype of the function."""
        x = to_numpy(x)
        if self.dtype is None or str(x.dtype) not in DTYPES or x.dtype == self.dtype:
            return x
        with np.errstate(over="ignore"):  # to infinity, as the type says
            return x.astype(self.dtype)

    def give(self, x: Any) -> Any:
        """An argument for the function: arrays in its library, numbers as they are."""
        return (
            from_numpy(self.rounded(x), self.library)
            if hasattr(x, "shape") and x.shape is not None
            else x
        )

    def accepts(self, option: str) -> str | None:
        """The name under which the function takes an option; None where it does not."""
        return next(
            (name for name in ALIASES[option] if self.names is None or name in self.names), None
        )

    def take(
        self, result: Any, like: Array, shape: tuple[int, ...], layout: Layout | None, clean: bool
    ) -> Array:
        """The checked result on the host, in the dtype of `like`."""
        y = to_host(result, self.library, self.name)
        wanted = like.dtype if self.dtype is None else self.dtype
        if y.dtype != wanted:
            raise NpllmTypeError(
                f"{self.name} must return {wanted}, the dtype it was given, got {y.dtype}"
            )
        if layout is not None:
            y = layout.unpack(y, shape, self.name)
        elif tuple(y.shape) != shape:
            raise NpllmValueError(
                f"{self.name} must return the shape {list(shape)}, got {list(y.shape)}"
            )
        wrong = np.isnan(y.astype(np.float64))
        if clean and wrong.any() and not self.allow_nan:
            first = [int(n) for n in np.argwhere(wrong)[0]]
            raise NpllmValueError(
                f"{self.name} returned NaN in {np.count_nonzero(wrong)} of {wrong.size} entries, "
                f"first at {first}; "
                "no input holds NaN"
            )
        return y if y.dtype == like.dtype else y.astype(like.dtype)


def _parameters(fn: Callable) -> set[str] | None:
    """Names of a function's parameters, or those in its docstring; None where it takes any."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        stated = re.search(r"\w+\(([^()]*)", fn.__doc__ or "")
        return (
            {name.strip(" *").split("=")[0].split(":")[0] for name in stated[1].split(",")}
            if stated
            else None
        )
    return (
        None if any(p.kind is p.VAR_KEYWORD for p in parameters) else {p.name for p in parameters}
    )


def holds_no_nan(*arrays: Any) -> bool:
    """Tell whether no float array holds NaN."""
    return not any(
        str(x.dtype) in DTYPES and np.isnan(to_numpy(x).astype(np.float64)).any()
        for x in arrays
        if hasattr(x, "dtype")
    )
