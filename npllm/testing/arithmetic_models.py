"""Which arithmetic explains an error: models from float64 accumulation down to bfloat16."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from npllm.arrays import DTYPES
from npllm.quantized.activations import activation_group, rounded_values
from npllm.testing.arithmetic import GROUPWISE, STEP, TINY, Arithmetic
from npllm.testing.budgets import Budget, budget
from npllm.testing.exact import gold
from npllm.testing.within_budget import absolute_errors, judge

__all__ = ["FLUSHED", "SUBNORMAL", "Evidence", "describe", "explain", "models", "model_budget"]

Array = Any
Inputs = Mapping[str, Any]

MOST_ROUNDING = 2.0**-3  # of the sum of absolute terms: no arithmetic model is off by more
FLUSHED = "subnormal numbers flushed to zero"
SUBNORMAL = "intermediate results that are subnormal"
LARGE = 2**26  # products beyond which only some heads are looked at


def describe(arithmetic: Arithmetic) -> str:
    """Name an arithmetic model."""
    words = {1: "", 2: ", two roundings", 3: ", three roundings"}
    text = f"{arithmetic.accumulate} accumulation" + words.get(
        arithmetic.roundings, f", {arithmetic.roundings} roundings"
    )
    text += f", {arithmetic.probabilities} probabilities" if arithmetic.probabilities else ""
    operands = "TF32" if arithmetic.operands == "tf32" else arithmetic.operands
    text += f", {operands} products" if operands else ""
    return f"{text}, {FLUSHED}" if arithmetic.flush_to_zero else text


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
    return [*found, replace(base, flush_to_zero=True)]


class Evidence(NamedTuple):
    """What is known of one call: its inputs, what was found, the exact answer, the errors."""

    op: str
    inputs: Inputs
    found: Array
    exact: Array
    error: Array


def explain(evidence: Evidence, asked: Arithmetic, status: str, bound: Budget) -> str | None:
    """Name the strictest model that explains every error: the one with the smallest budget.

    Of a large attention the four heads with the largest errors are looked at.
    """
    candidates = models(evidence.op, asked)
    if status == "within" and asked == candidates[0]:
        return describe(asked)
    if status == "wrong" and _are_subnormal(evidence, bound, asked):
        return _explain_subnormal(evidence, candidates[-1])
    smallest = model_budget(evidence.op, evidence.inputs, candidates[-1]).statistical
    most = np.maximum(MOST_ROUNDING * bound.condition * np.abs(evidence.exact), smallest)
    if status == "wrong" and (evidence.error > most).any():
        return None  # no rounding does that
    parts = _worst_heads(evidence, bound)
    sizes = [(_size_where_it_explains(parts, model), describe(model)) for model in candidates]
    if status == "within":
        sizes.append((float(np.median(bound.statistical)), describe(asked)))
    elif asked not in candidates:
        sizes.append((_size_where_it_explains(parts, asked), describe(asked)))
    size, name = min(sizes)
    return name if np.isfinite(size) else None


def _are_subnormal(evidence: Evidence, bound: Budget, asked: Arithmetic) -> bool:
    """Tell whether every value over budget is subnormal: any short arithmetic reaches that."""
    over = evidence.error > bound.statistical
    return bool((np.abs(evidence.exact[over]) < TINY[asked.accumulate]).all())


def _explain_subnormal(evidence: Evidence, flushing: Arithmetic) -> str | None:
    """Say whether flushing explains wrong subnormal values, or that bits were lost on the way."""
    bound = model_budget(evidence.op, evidence.inputs, flushing)
    if judge(evidence.error, evidence.exact, bound)[0] == "wrong":
        return None
    if not _has_below(evidence.found, flushing):
        return describe(flushing)
    return f"{describe(replace(flushing, flush_to_zero=False))}, {SUBNORMAL}"


def _size_where_it_explains(parts: list[Evidence], model: Arithmetic) -> float:
    """Median budget of a model that explains all parts; infinity of one that does not."""
    sizes = []
    for part in parts:
        passes = ("within", "not decidable") if model.flush_to_zero else ("within",)
        within = [
            float(np.median(tried.statistical))
            for tried, off in _attempts(part, model)
            if judge(off, part.exact, tried)[0] in passes
        ]
        if not within:
            return np.inf
        sizes.append(min(within))
    return float(np.median(sizes))


def _worst_heads(evidence: Evidence, bound: Budget) -> list[Evidence]:
    """Cut a large attention down to the four heads with the largest share of the budget."""
    inputs, found = evidence.inputs, evidence.found
    large = evidence.op == "attention" and found.ndim == 4
    if not large or found.size * inputs["k"].shape[2] < LARGE:
        return [evidence]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.nan_to_num(evidence.error / bound.statistical, nan=0.0).max(axis=(2, 3))
    shape = (*found.shape[:3], inputs["k"].shape[2])
    group = found.shape[1] // inputs["k"].shape[1]
    heads = []
    for flat in np.argsort(share, axis=None)[-4:]:
        b, h = (int(n) for n in np.unravel_index(flat, share.shape))
        at, kv = np.s_[b : b + 1, h : h + 1], np.s_[b : b + 1, h // group : h // group + 1]
        cut = {**inputs, "q": inputs["q"][at], "k": inputs["k"][kv], "v": inputs["v"][kv]}
        for name in {"bias", "mask"} & {name for name, x in inputs.items() if x is not None}:
            cut[name] = np.broadcast_to(inputs[name], shape)[at]
        if inputs.get("valid") is not None:
            cut["valid"] = np.broadcast_to(inputs["valid"], (shape[0], shape[3]))[b : b + 1]
        arrays = (x[at] for x in (found, evidence.exact, evidence.error))
        heads.append(Evidence(evidence.op, cut, *arrays))
    return heads


def _attempts(part: Evidence, model: Arithmetic) -> Iterator[tuple[Budget, Array]]:
    """Budgets under a model, beside the errors to hold against them.

    Where a model rounds its operands, they are rounded here: what is left of the error must then be
    within the budget of the accumulation, which tells this model from others of the same size.
    An output that holds a smaller number than the arithmetic has is not explained by it.
    """
    if _has_below(part.found, model):
        return
    if not model.operands:
        yield model_budget(part.op, part.inputs, model), part.error
        return
    kept = model.operands if part.op == "attention" else model.probabilities
    rest = replace(model, operands=None, probabilities=kept)
    group = activation_group(part.inputs.get("weight"))
    if model.operands in GROUPWISE:
        x = rounded_values(np.asarray(part.inputs["x"], np.float32), model.operands, group)
        given = {**part.inputs, "x": x}
        exact, bound = gold(part.op, given), model_budget(part.op, given, rest)
        yield bound, absolute_errors(part.found, exact, exact, bound)
    for cut in OPERANDS.get(model.operands, ()):
        given = {name: _cut(cut, name, x) for name, x in part.inputs.items()}
        exact = gold(part.op, given)
        bound = model_budget(part.op, given, rest)
        yield bound, absolute_errors(part.found, exact, exact, bound)


def _has_below(found: Array, model: Arithmetic) -> bool:
    """Tell whether an output holds a smaller number than the accumulation can return."""
    size = np.abs(found.astype(np.float64))
    smallest = (TINY if model.flush_to_zero else STEP)[model.accumulate]
    return bool(((size > 0) & (size < smallest)).any())


def _cut(cut: Callable, name: str, x: Any) -> Any:
    """Round an operand; sums, such as a bias, are none."""
    is_operand = name in ("q", "k", "v", "x", "weight") and str(getattr(x, "dtype", "")) in DTYPES
    return cut(x) if is_operand else x


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
        flush_to_zero=a.flush_to_zero,
    )
