"""Which arithmetic explains an error: models from float64 accumulation down to bfloat16."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from npllm.arrays import DTYPES
from npllm.testing.arithmetic import Arithmetic
from npllm.testing.budgets import Budget, budget
from npllm.testing.exact import gold
from npllm.testing.judging import absolute_errors, judge

__all__ = ["describe", "explain", "models", "model_budget"]

Array = Any
Inputs = Mapping[str, Any]

MOST_ROUNDING = (
    2.0**-3
)  # error, as a share of the sum of the absolute terms, beyond which no arithmetic model is tried


def describe(arithmetic: Arithmetic) -> str:
    """Name an arithmetic model."""
    words = {1: "", 2: ", two roundings", 3: ", three roundings"}
    text = f"{arithmetic.accumulate} accumulation" + words.get(
        arithmetic.roundings, f", {arithmetic.roundings} roundings"
    )
    text += f", {arithmetic.probabilities} probabilities" if arithmetic.probabilities else ""
    operands = "TF32" if arithmetic.operands == "tf32" else arithmetic.operands
    return text + (f", {operands} products" if operands else "")


def models(op: str, asked: Arithmetic) -> list[Arithmetic]:
    """Arithmetic models that an implementation may follow, the strictest first."""
    base = Arithmetic(asked.dtype, "float64" if asked.accumulate == "float64" else "float32")
    short = asked.dtype in ("float16", "bfloat16")
    found = [base] + [replace(base, roundings=n) for n in (2, 3) if short]
    if base.accumulate == "float64":
        found.append(replace(base, accumulate="float32"))
    plain = replace(base, accumulate="float32")
    if op == "attention":
        found += [replace(plain, probabilities=name) for name in ("float16", "bfloat16")]
    if op in ("attention", "linear", "qkv_projection"):
        found += [replace(plain, operands=name) for name in ("tf32", "bfloat16")]
    found += [replace(plain, accumulate=name) for name in ("float16", "bfloat16")]
    return found


def explain(
    op: str,
    inputs: Inputs,
    found: Array,
    exact: Array,
    error: Array,
    asked: Arithmetic,
    status: str,
    bound: Budget,
) -> str | None:
    """Name the strictest model that explains every error: the one with the smallest budget."""
    candidates = models(op, asked)
    if status == "within" and asked == candidates[0]:
        return describe(asked)
    if status == "wrong" and (error > MOST_ROUNDING * bound.condition * np.abs(exact)).any():
        return None  # no rounding does that
    explaining = []
    for model in dict.fromkeys([asked, *candidates]):
        for tried, off in _attempts(op, inputs, model, error, found):
            if judge(off, exact, tried)[0] == "within":
                explaining.append((float(np.median(tried.statistical)), describe(model)))
    return min(explaining)[1] if explaining else None


def _attempts(
    op: str, inputs: Inputs, model: Arithmetic, error: Array, found: Array
) -> Iterator[tuple[Budget, Array]]:
    """Budgets under a model, beside the errors to hold against them.

    Where a model rounds its operands, they are rounded here: what is left of the error must then be
    within the budget of the accumulation, which tells this model from others of the same size.
    """
    if not model.operands:
        yield model_budget(op, inputs, model), error
        return
    rest = replace(
        model,
        operands=None,
        probabilities=model.operands if op == "attention" else model.probabilities,
    )
    for cut in OPERANDS[model.operands]:
        given = {
            name: cut(x) if str(getattr(x, "dtype", "")) in DTYPES else x
            for name, x in inputs.items()
        }
        exact = gold(op, given)
        yield model_budget(op, given, rest), absolute_errors(found, exact, exact)


def _keep_bits(x: Array, half: int) -> Array:
    """Keep 10 bits of the fraction of float32: cut with half = 0, round with half a step."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64) + half
    return (bits & 0xFFFFE000).astype(np.uint32).view(np.float32).reshape(x.shape)


OPERANDS = {
    "tf32": (lambda x: _keep_bits(x, 0), lambda x: _keep_bits(x, 0x1000)),
    "float16": (lambda x: x.astype(np.float16).astype(np.float32),),
    "bfloat16": (lambda x: x.astype(DTYPES["bfloat16"]).astype(np.float32),),
}
"""How the factors of a product may have been rounded."""


def model_budget(op: str, inputs: Inputs, a: Arithmetic) -> Budget:
    """The budget of an operation under a model."""
    return budget(
        op,
        inputs,
        dtype=a.dtype,
        accumulate=a.accumulate,
        roundings=a.roundings,
        operands=a.operands,
        probabilities=a.probabilities,
    )
