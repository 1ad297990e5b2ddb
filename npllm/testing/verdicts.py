"""The verdict: whether an output is right, how far inside its budget, and where it is not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from npllm.arrays import DTYPES
from npllm.testing.arithmetic import Arithmetic
from npllm.testing.arithmetic_models import Evidence, describe, explain, model_budget
from npllm.testing.budgets import Budget
from npllm.testing.exact import gold
from npllm.testing.libraries import on_host
from npllm.testing.location import features_of, where
from npllm.testing.within_budget import absolute_errors, judge, undetermined

__all__ = ["Verdict", "verdict"]

Array = Any
Inputs = Mapping[str, Any]


DIGITS = 40  # of the answer for float64 inputs
MOST_MPMATH = 2**21  # multiplications that mpmath is asked for


@dataclass(frozen=True)
class Verdict:
    """What is known of an output.

    Parameters
    ----------
    status : str
        "within", "wrong", "not decidable" (the deterministic budget exceeds the value, so that
        nothing would be proven) or "no gold" (the exact answer is not finite).
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
            lines.append(
                f"share of the budget {self.used:.3g} at {list(self.index)}, "
                f"condition {self.condition:.3g}"
            )
        if self.where != "nowhere":
            lines.append(f"over budget: {self.where}")
        lines.append(f"explained by: {self.model or 'no arithmetic model'}")
        return "\n".join(lines)


def verdict(
    op: str,
    inputs: Inputs,
    output: Array,
    *,
    dtype: str | None = None,
    accumulate: str | None = None,
    roundings: int = 1,
    operands: str | None = None,
    probabilities: str | None = None,
    flush_to_zero: bool = False,
    explained: bool = True,
) -> Verdict:
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
    roundings, operands, probabilities, flush_to_zero
        As in `budget`.
    explained : bool
        Look for the arithmetic model that explains an error, which takes most of the time of a
        wrong output; else `model` is None.

    Returns
    -------
    verdict : Verdict

    Raises
    ------
    NpllmValueError
        For an unknown operation or dtype; a wrong output is a verdict and no error.

    Notes
    -----
    What the output is comes first: library, dtype, shape, NaN, infinities; none of these ever
    passes.  An entry is over budget when its error is larger than the budget, not when it is
    equal.  Infinities that the exact answer has too are right.
    """
    accumulate = accumulate or ("float64" if _is_float64(inputs) else "float32")
    exact = _gold(op, inputs, accumulate)
    if exact is None:
        return Verdict(
            "no gold",
            message="float64 inputs of this size are too many for mpmath (at most "
            f"{MOST_MPMATH} products); judge a smaller problem",
        )
    finite = exact.astype(np.float64)
    found, problem = _look(output, finite, dtype)
    if problem is not None:
        return problem
    asked = Arithmetic(
        str(found.dtype), accumulate, roundings, operands, probabilities, flush_to_zero
    )
    bound = model_budget(op, inputs, asked)
    error = absolute_errors(found, exact, finite, bound)
    evidence = Evidence(op, inputs, found, finite, error)
    return _not_finite(evidence) or _report(evidence, bound, asked, explained)


def _is_float64(inputs: Inputs) -> bool:
    """Tell whether an operand is float64; frequencies of RoPE and their factors are constants."""
    operands = (x for name, x in inputs.items() if name not in ("factors", "inv_freq"))
    return any(str(getattr(x, "dtype", "")) == "float64" for x in operands)


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
    if isinstance(output, tuple):
        try:
            output = np.concatenate([on_host(part) for part in output], axis=-3)
        except (ValueError, TypeError) as error:
            return None, Verdict(
                "wrong",
                where="everywhere",
                message=f"the arrays of the output do not fit together ({error})",
            )
    found = on_host(output)
    name = (
        str(found.dtype)
        if hasattr(found, "dtype")
        else f"{type(output).__module__}.{type(output).__qualname__}"
    )
    if name not in DTYPES:
        return None, _wrong(f"the output must be an array of {', '.join(DTYPES)}, got {name}")
    if dtype is not None and name != dtype:
        return None, _wrong(f"the output must have dtype {dtype}, got {name}")
    if found.shape != exact.shape:
        return None, _wrong(
            f"the output must have shape {list(exact.shape)}, got {list(found.shape)}"
        )
    return found, None


def _wrong(message: str) -> Verdict:
    return Verdict("wrong", where="everywhere", message=message)


def _not_finite(evidence: Evidence) -> Verdict | None:
    """The verdict of NaN and infinities that the exact answer does not have."""
    found, exact, error = evidence.found, evidence.exact, evidence.error
    unknown, nan = np.isnan(exact), np.isnan(found.astype(np.float64))
    for bad, what in ((nan & ~unknown, "NaN"), (np.isinf(error) & ~unknown & ~nan, "an infinity")):
        if bad.any():
            first = tuple(int(n) for n in np.argwhere(bad)[0])
            text = (
                f"the output holds {what} or misses it in {np.count_nonzero(bad)} of {bad.size} "
                f"entries: {found[first]} for {exact[first]:.9g} at {list(first)}"
            )
            place = where(bad, evidence.op, _features(evidence))
            return Verdict("wrong", index=first, where=place, message=text)
    return None


def _report(evidence: Evidence, bound: Budget, asked: Arithmetic, explained: bool) -> Verdict:
    """Put the verdict together."""
    unknown = np.isnan(evidence.exact)
    evidence = evidence._replace(
        exact=np.where(unknown, 0.0, evidence.exact), error=np.where(unknown, 0.0, evidence.error)
    )
    exact, error = evidence.exact, evidence.error
    if exact.size == 0:
        return Verdict("within", 0.0, model=describe(asked), message="the output is empty")
    status, share = judge(error, exact, bound)
    status = "no gold" if status != "wrong" and unknown.any() else status
    index = _worst(share, exact, bound)
    vague = undetermined(exact, bound.deterministic, bound) & (error <= bound.deterministic)
    over = where((error > bound.statistical) & ~vague, evidence.op, _features(evidence))
    model = explain(evidence, asked, status, bound) if explained else None
    text = _sentence(status, index, evidence, bound, asked, model)
    return Verdict(
        status, float(share[index]), index, over, model, float(bound.condition[index]), text
    )


def _features(evidence: Evidence) -> dict[str, Array]:
    return features_of(evidence.op, evidence.inputs)


def _worst(share: Array, exact: Array, bound: Budget) -> tuple[int, ...]:
    """Index of the largest share, among the determined entries where there are any."""
    vague = undetermined(exact, bound.statistical, bound) & ~(share > 1)
    share = share if vague.all() else np.where(vague, -1.0, share)
    return tuple(int(n) for n in np.unravel_index(int(np.argmax(share)), share.shape))


def _sentence(
    status: str,
    index: tuple[int, ...],
    evidence: Evidence,
    bound: Budget,
    asked: Arithmetic,
    model: str | None,
) -> str:
    """Say in words what was found."""
    got, exact, error = (float(x[index]) for x in (evidence.found, evidence.exact, evidence.error))
    text = f"got {got:.9g}, exact {exact:.9g}, error {error:.3g}, "
    text += f"budget {float(bound.statistical[index]):.3g} ({describe(asked)})"
    if status == "wrong" and model is not None:
        return f"{text}; {model} explains it: ask for that model if it is what was meant"
    if status == "not decidable":
        off = float(bound.deterministic[index])
        return f"{text}; rounding alone may move it by {off:.3g}: try inputs that cancel less"
    if status == "no gold":
        return f"{text}; the exact answer is not finite everywhere"
    return text
