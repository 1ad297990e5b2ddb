"""Error budgets: how far a correct implementation may be off, entry by entry.

Each operation has two: a deterministic bound, which no correct implementation exceeds whatever its
order of summation, and a statistical one, which rounding errors that are independent exceed with a
probability of less than one in a million.  The derivation is docs/budgets.md; the terms are named
after it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from npllm.errors import NpllmValueError
from npllm.testing.arithmetic import GROUPWISE, TINY, UNITS, Arithmetic
from npllm.testing.attention_budget import attention_budget
from npllm.testing.elementwise_budgets import (
    add_budget,
    embed_budget,
    gelu_budget,
    rope_budget,
    softmax_budget,
    swiglu_budget,
)
from npllm.testing.exact import gold
from npllm.testing.reduction_budgets import (
    layer_norm_budget,
    linear_budget,
    qkv_budget,
    rms_norm_budget,
)

__all__ = ["BUDGETS", "Budget", "budget"]

Array = Any
Inputs = Mapping[str, Any]


class Budget(NamedTuple):
    """Largest errors that a correct implementation makes, entry by entry.

    Parameters
    ----------
    deterministic : float64 array
        A bound for every order of summation; infinity where the arithmetic promises nothing.
    statistical : float64 array
        What independent rounding errors reach; never above the deterministic bound.
    condition : float64 array
        Sum of the absolute terms over the absolute value: what a relative error of the terms is
        multiplied by.
    """

    deterministic: Array
    statistical: Array
    condition: Array


def budget(
    op: str,
    inputs: Inputs,
    *,
    dtype: str = "float32",
    accumulate: str = "float32",
    roundings: int = 1,
    operands: str | None = None,
    probabilities: str | None = None,
    flush_to_zero: bool = False,
) -> Budget:
    """Bound the error of an operation on given inputs, entry by entry.

        |computed - exact| <= deterministic, always;   <= statistical, for independent rounding
        errors

    Parameters
    ----------
    op : str
        "linear", "qkv_projection", "rms_norm", "layer_norm", "rope", "softmax", "attention",
        "swiglu", "gelu", "embed" or "add".
    inputs : dict
        The arguments by parameter name, as NumPy arrays and numbers.
    dtype : str
        Of the output: "float64", "float32", "float16" or "bfloat16".
    accumulate : str
        In which sums and elementary functions are evaluated.
    roundings : int
        How often a value is rounded to `dtype` on its way to the output.
    operands : str, optional
        To which the factors of matrix products are rounded before, such as "tf32"; of a linear
        map also "int8" or "int16": x alone, with one scale for each group.
    probabilities : str, optional
        To which attention rounds its probabilities, such as "bfloat16".
    flush_to_zero : bool
        Operands and results below the smallest normal number of `accumulate` count as zero.

    Returns
    -------
    budget : Budget
        Arrays of the output's shape.

    Raises
    ------
    NpllmValueError
        For an unknown operation, dtype or input name.

    Notes
    -----
    Source: docs/budgets.md; Higham, "Accuracy and Stability of Numerical Algorithms" (2nd ed.
    2002), chapters 2 to 4.
    """
    if op not in BUDGETS:
        raise NpllmValueError(f"no budget is called {op!r}; there are {', '.join(BUDGETS)}")
    if operands in GROUPWISE and op not in ("linear", "qkv_projection"):
        raise NpllmValueError(f'operands="{operands}" are those of a linear map, got {op!r}')
    arithmetic = Arithmetic(dtype, accumulate, roundings, operands, probabilities, flush_to_zero)
    with np.errstate(all="ignore"):  # an overflow is a bound of infinity
        deterministic, statistical, condition = BUDGETS[op](arithmetic, **inputs)
        if flush_to_zero:
            lost = _operand_loss(op, inputs, TINY[accumulate])
            deterministic, statistical = deterministic + lost, statistical + lost
    deterministic = np.where(np.isnan(deterministic), np.inf, deterministic)
    statistical = np.fmin(statistical, deterministic)
    return Budget(deterministic, statistical, condition)


def _operand_loss(op: str, inputs: Inputs, smallest: float) -> Array:
    """What operands that count as zero change: |exact(inputs) - exact(inputs, flushed)|."""
    flushed = {name: _flushed(x, smallest) for name, x in inputs.items()}
    if all(flushed[name] is x for name, x in inputs.items()):
        return 0.0
    return np.abs(gold(op, inputs) - gold(op, flushed))


def _flushed(x: Any, smallest: float) -> Any:
    """Put zero for the subnormal numbers of an array; return itself where it has none."""
    if not isinstance(x, np.ndarray) or str(x.dtype) not in UNITS:
        return x
    size = np.abs(x.astype(np.float64))
    is_subnormal = (size > 0) & (size < smallest)
    return np.where(is_subnormal, np.zeros((), x.dtype), x) if is_subnormal.any() else x


BUDGETS: dict[str, Callable] = {
    "linear": linear_budget,
    "qkv_projection": qkv_budget,
    "rms_norm": rms_norm_budget,
    "layer_norm": layer_norm_budget,
    "rope": rope_budget,
    "softmax": softmax_budget,
    "attention": attention_budget,
    "swiglu": swiglu_budget,
    "gelu": gelu_budget,
    "embed": embed_budget,
    "add": add_budget,
}
"""One function an operation: (arithmetic, **inputs) -> deterministic, statistical, condition."""
