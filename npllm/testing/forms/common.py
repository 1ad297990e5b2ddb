"""What the forms share: the answer, the precision of the work, and small pieces of arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from npllm.errors import NpllmValueError

__all__ = [
    "EXACT",
    "U32",
    "Answer",
    "Array",
    "Choice",
    "NotApplicableError",
    "Work",
    "gamma",
    "rounded",
]

Array = Any
Choice = Mapping[str, str]  # convention id -> name of the option, for those that are not ours

U32 = 2.0**-24


class NotApplicableError(NpllmValueError):
    """An option that cannot be run on the given inputs, such as swapping operands of two shapes."""


@dataclass(frozen=True)
class Answer:
    """What an operation gives under some options.

    Parameters
    ----------
    y : array [...]
        The value.
    slack : array [...]
        By how much an implementation with the given unit roundoff may differ, before the last
        rounding: a bound, whatever the order of summation.
    """

    y: Array
    slack: Array


@dataclass(frozen=True)
class Work:
    """How a form is evaluated.

    Parameters
    ----------
    dtype : dtype
        float64; float32 makes the answer that of an ordinary kernel.
    unit : float
        Unit roundoff of the implementation that the slack is for.
    rows : integer array, optional
        The query rows of attention to evaluate.  None: all.
    """

    dtype: Any = np.float64
    unit: float = U32
    rows: Array = None


EXACT = Work()


def gamma(n: float, unit: float) -> float:
    """Bound the relative error of n operations: n u / (1 - n u), infinity where n u >= 1."""
    return n * unit / (1 - n * unit) if n * unit < 1 else np.inf


def rounded(x: Array, dtype: Any) -> Array:
    """Round to a narrower dtype and return float32, of values that the narrow dtype holds."""
    return np.asarray(x, dtype=np.float32).astype(dtype).astype(np.float32)
