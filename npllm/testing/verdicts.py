"""The verdict: whether an output is right, how far inside its budget, and where it is not."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from npllm.arrays import DTYPES
from npllm.testing.arithmetic import LARGEST, Arithmetic
from npllm.testing.budgets import Budget, budget
from npllm.testing.exact import gold
from npllm.testing.location import features_of, where

__all__ = ["Verdict", "judge", "verdict"]

Array = Any
Inputs = Mapping[str, Any]

DIGITS = 40  # of the answer for float64 inputs
MOST_ROUNDING = 2.0**-3  # error, as a share of the sum of the absolute terms, beyond which no arithmetic model is tried
MOST_MPMATH = 2**21  # multiplications that mpmath is asked for


@dataclass(frozen=True)
class Verdict:
    """What is known of an output.

    Parameters
    ----------
    status : str
        "within", "wrong", "not decidable" (the deterministic budget exceeds the value, so that nothing would be proven) or
        "no gold" (the exact answer is not finite).
    used : float
        Largest share of the statistical budget; 1 is all of it, which one rounding uses rightly.
    index : tuple of int, optional
        Entry of that share.
    where : str
        Where the entries over budget are.
    model : str, optional
        The strictest arithmetic model that explains the error; None where none does.
    condition : float
        Condition number at `index`.
    message : str
        One sentence for the reader.
    """

    status: str
    used: float = float("inf")
    index: tuple[int, ...] | None = None
    where: str = "nowhere"
    model: str | None = None
    condition: float = float("nan")
    message: str = ""

    def __str__(self) -> str:
        lines = [f"{self.status}: {self.message}"]
        if self.index is not None:
            lines.append(f"share of the budget {self.used:.3g} at {list(self.index)}, condition {self.condition:.3g}")
        if self.where != "nowhere":
            lines.append(f"over budget: {self.where}")
        lines.append(f"explained by: {self.model or 'no arithmetic model'}")
        return "\n".join(lines)


def verdict(op: str, inputs: Inputs, output: Array, *, dtype: str | None = None, accumulate: str | None = None,
            roundings: int = 1, operands: str | None = None, probabilities: str | None = None) -> Verdict:
    """Judge the output of an operation.

    Parameters
    ----------
    op : str
        As in `budget`.
    inputs : dict
        The arguments by parameter name.
    output : array
        What the implementation returned, in any library; (q, k, v) of "qkv_projection".
    dtype : str, optional
        That the output must have.  None: the one it has.
    accumulate : str, optional
        None: "float64" where an input is float64, else "float32".
    roundings, operands, probabilities
        As in `budget`.

    Returns
    -------
    verdict : Verdict

    Raises
    ------
    NpllmValueError
        For an unknown operation or dtype; a wrong output is a verdict and no error.

    Notes
    -----
    What the output is comes first: library, dtype, shape, NaN, infinities; none of these ever passes.  An entry is over budget
    when its error is larger than the budget, not when it is equal.  Infinities that the exact answer has too are right.
    """
    accumulate = accumulate or ("float64" if _is_float64(inputs) else "float32")
    exact = _gold(op, inputs, accumulate)
    if exact is None:
        return Verdict("no gold", message=f"float64 inputs of this size are too many for mpmath (at most {MOST_MPMATH} products); "
                                          "judge a smaller problem")
    finite = exact.astype(np.float64)
    found, problem = _look(output, finite, dtype)
    if problem is not None:
        return problem
    asked = Arithmetic(str(found.dtype), accumulate, roundings, operands, probabilities)
    error = _errors(found, exact, finite)
    bound = _budget(op, inputs, asked)
    return _report(op, inputs, found, finite, error, bound, asked)


def judge(error: Array, exact: Array, bound: Budget) -> tuple[str, Array]:
    """Say "within", "wrong" or "not decidable" of errors; and the share of the budget of each entry.

    An entry is wrong when its error exceeds the deterministic bound, or the statistical one where the value is determined: where
    the deterministic bound is at most |exact|.  It is not decidable beyond that, and when most entries are not determined.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(error > 0, error / bound.statistical, 0.0)
        share = np.where(np.isnan(share), 0.0, share)  # infinity of infinity: nothing is promised there
    vague = undetermined(exact, bound)
    if ((error > bound.deterministic) | ((error > bound.statistical) & ~vague)).any():
        return "wrong", share
    if (error > bound.statistical).any() or vague.mean() > 0.5:
        return "not decidable", share
    return "within", share


def undetermined(exact: Array, bound: Budget) -> Array:
    """Tell which entries rounding alone may change by all of their value."""
    return ~np.isfinite(bound.deterministic) | ((bound.deterministic > np.abs(exact)) & (bound.condition > 1))


def describe(arithmetic: Arithmetic) -> str:
    """Name an arithmetic model."""
    words = {1: "", 2: ", two roundings", 3: ", three roundings"}
    text = f"{arithmetic.accumulate} accumulation" + words.get(arithmetic.roundings, f", {arithmetic.roundings} roundings")
    text += f", {arithmetic.probabilities} probabilities" if arithmetic.probabilities else ""
    operands = "TF32" if arithmetic.operands == "tf32" else arithmetic.operands
    return text + (f", {operands} products" if operands else "")


def _is_float64(inputs: Inputs) -> bool:
    return any(str(getattr(x, "dtype", "")) == "float64" for x in inputs.values())


def _gold(op: str, inputs: Inputs, accumulate: str) -> Array | None:
    """The exact answer; with mpmath where float64 is what is judged."""
    if accumulate != "float64":
        return gold(op, inputs)
    sizes = [int(np.prod(x.shape)) for x in inputs.values() if getattr(x, "ndim", 0) > 1]
    if np.prod(sorted(sizes)[-2:], dtype=np.float64) > MOST_MPMATH * 64:
        return None
    return gold(op, inputs, digits=DIGITS)


def _look(output: Array, exact: Array, dtype: str | None) -> tuple[Array, Verdict | None]:
    """Bring an output to the host; a verdict where it is not even an array of the right kind."""
    if isinstance(output, tuple | list):
        try:
            output = np.concatenate([_host(part) for part in output], axis=-3)
        except (ValueError, TypeError) as error:
            return None, Verdict("wrong", where="everywhere", message=f"the arrays of the output do not fit together ({error})")
    found = _host(output)
    name = str(getattr(found, "dtype", type(output).__name__))
    if name not in DTYPES:
        return None, _wrong(f"the output must be an array of {', '.join(DTYPES)}, got {name}")
    if dtype is not None and name != dtype:
        return None, _wrong(f"the output must have dtype {dtype}, got {name}")
    if found.shape != exact.shape:
        return None, _wrong(f"the output must have shape {list(exact.shape)}, got {list(found.shape)}")
    return found, None


def _wrong(message: str) -> Verdict:
    return Verdict("wrong", where="everywhere", message=message)


def _host(x: Array) -> Array:
    """Bring an array of any library to NumPy; bfloat16 of torch by its bits."""
    if type(x).__module__.partition(".")[0] == "torch":
        from npllm.testing.adapters import torch_to_numpy

        return torch_to_numpy(x)
    x = x.get() if hasattr(x, "get") and not isinstance(x, dict) else x
    return np.asarray(x)


def _errors(found: Array, exact: Array, finite: Array) -> Array:
    """Absolute errors; 0 where both are the same infinity, or where rounding to the output's dtype overflows rightly."""
    got = found.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        usable = np.isfinite(got) & np.isfinite(finite)
        difference = got - exact if exact.dtype != object else (np.where(usable, got, 0.0) - np.where(usable, exact, 0))
        error = np.abs(difference).astype(np.float64)
        same = np.isinf(got) & (np.isinf(finite) | (np.abs(finite) >= LARGEST[str(found.dtype)])) & (got * finite > 0)
    error = np.where(usable, error, np.inf)
    return np.where(same, 0.0, error)


def _budget(op: str, inputs: Inputs, a: Arithmetic) -> Budget:
    return budget(op, inputs, dtype=a.dtype, accumulate=a.accumulate, roundings=a.roundings, operands=a.operands,
                  probabilities=a.probabilities)


def _report(op: str, inputs: Inputs, found: Array, exact: Array, error: Array, bound: Budget, asked: Arithmetic) -> Verdict:
    """Put the verdict together."""
    features = features_of(op, inputs)
    unknown, nan = np.isnan(exact), np.isnan(found.astype(np.float64))
    for bad, what in ((nan & ~unknown, "NaN"), (np.isinf(error) & ~unknown & ~nan, "an infinity")):
        if bad.any():
            first = tuple(int(n) for n in np.argwhere(bad)[0])
            text = f"the output holds {what} in {np.count_nonzero(bad)} of {bad.size} entries, the exact answer does not: " \
                   f"{found[first]} for {exact[first]:.9g} at {list(first)}"
            return Verdict("wrong", index=first, where=where(bad, op, features), message=text)
    error = np.where(unknown, 0.0, error)
    status, share = judge(error, np.where(unknown, 0.0, exact), bound)
    index = _worst(share, np.where(unknown, 0.0, exact), bound)
    if status != "wrong" and unknown.any():
        status = "no gold"
    over = (error > bound.statistical) & ~(undetermined(exact, bound) & (error <= bound.deterministic))
    model = _explain(op, inputs, exact, error, asked, status, bound)
    used, condition = (float(share[index]), float(bound.condition[index])) if index is not None else (0.0, 1.0)
    return Verdict(status, used, index, where(over, op, features), model, condition,
                   _sentence(status, index, found, exact, error, bound, asked, model))


def _worst(share: Array, exact: Array, bound: Budget) -> tuple[int, ...] | None:
    """Index of the largest share, among the determined entries where there are any."""
    if share.size == 0:
        return None
    vague = undetermined(exact, bound) & ~(share > 1)
    share = share if vague.all() else np.where(vague, -1.0, share)
    return tuple(int(n) for n in np.unravel_index(int(np.argmax(share)), share.shape))


def _models(op: str, asked: Arithmetic) -> list[Arithmetic]:
    """Arithmetic models that an implementation may follow, the strictest first."""
    base = Arithmetic(asked.dtype, "float64" if asked.accumulate == "float64" else "float32")
    short = asked.dtype in ("float16", "bfloat16")
    models = [base] + [replace(base, roundings=n) for n in (2, 3) if short]
    if base.accumulate == "float64":
        models.append(replace(base, accumulate="float32"))
    plain = replace(base, accumulate="float32")
    if op == "attention":
        models += [replace(plain, probabilities=name) for name in ("float16", "bfloat16")]
    if op in ("attention", "linear", "qkv_projection"):
        models += [replace(plain, operands=name) for name in ("tf32", "bfloat16")]
    models += [replace(plain, accumulate=name) for name in ("float16", "bfloat16")]
    return models


def _explain(op: str, inputs: Inputs, exact: Array, error: Array, asked: Arithmetic, status: str, bound: Budget) -> str | None:
    """Name the strictest model that explains every error: the one with the smallest budget."""
    models = _models(op, asked)
    if status == "within" and asked == models[0]:
        return describe(asked)
    if (error > MOST_ROUNDING * bound.condition * np.abs(exact)).any() and status == "wrong":
        return None  # no rounding does that
    explaining = []
    for model in dict.fromkeys([asked, *models]):
        tried = bound if model == asked else _budget(op, inputs, model)
        if judge(error, exact, tried)[0] == "within":
            explaining.append((float(np.median(tried.statistical)), describe(model)))
    return min(explaining)[1] if explaining else None


def _sentence(status: str, index: tuple | None, found: Array, exact: Array, error: Array, bound: Budget, asked: Arithmetic,
              model: str | None) -> str:
    """Say in words what was found."""
    if index is None:
        return "the output is empty"
    text = f"got {float(found[index]):.9g}, exact {float(exact[index]):.9g}, error {float(error[index]):.3g}, " \
           f"budget {float(bound.statistical[index]):.3g} ({describe(asked)})"
    if status == "wrong" and model is not None:
        return f"{text}; {model} explains it: ask for that model if it is what was meant"
    if status == "not decidable":
        return f"{text}; rounding alone may change this value by {float(bound.deterministic[index]):.3g}: try inputs that cancel less"
    if status == "no gold":
        return f"{text}; the exact answer is not finite everywhere"
    return text
