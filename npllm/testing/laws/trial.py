"""One trial: arguments for the function, and how its output is judged."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from npllm.testing.laws.arrays import Array, Guarded, same_bits
from npllm.testing.laws.broken import Finding
from npllm.testing.verdicts import Verdict, verdict

__all__ = ["HIDDEN", "VALUE", "Seen", "Trial", "examine"]

VALUE = "The output is within the error budget of the float64 answer."
HIDDEN = "What hidden keys hold does not change a row."
UNCHANGED = "The inputs are the same after the call."
RETURNS = "The function takes every input that the features allow."
OWN = "A later call does not change what an earlier call returned."
INSIDE = "Nothing is written beside the output that was given as `out`."
FILLED = "Every entry of the output that was given as `out` is written."


@dataclass
class Trial:
    """Arguments of one call, and what its output is held against.

    Parameters
    ----------
    arguments, options
        What the function is called with.
    judge : function (output) -> Finding or None, and the share of the budget
    shape : tuple of int, optional
        Of the output, where the function may be given memory for it.
    dtype : str
        Of the output.
    """

    arguments: tuple
    options: dict[str, Any]
    judge: Callable[[Any], tuple[Finding | None, float]]
    shape: tuple[int, ...] | None = None
    dtype: str = "float32"


@dataclass
class Seen:
    """What the trials of a search showed, for the report.

    Parameters
    ----------
    n : int
        Trials.
    used : float
        Largest share of the budget among right outputs.
    n_undecided : int
        Trials whose output could not be decided.
    """

    n: int = 0
    used: float = 0.0
    n_undecided: int = 0
    features: dict[str, int] = field(default_factory=dict)


def by_verdict(
    op: str,
    inputs: dict[str, Any],
    asked: tuple[str, dict[str, Any]] | None,
    law: str = VALUE,
    **arithmetic: Any,
) -> Callable[[Any], tuple[Finding | None, float]]:
    """Judge an output by its verdict.

    Parameters
    ----------
    op, inputs
        As in `verdict`.
    asked : tuple of op and inputs, optional
        As in `diagnose`.
    law : str
    **arithmetic
        As in `verdict`.
    """

    def judge(output: Any) -> tuple[Finding | None, float]:
        found = verdict(op, inputs, output, explained=False, **arithmetic)
        if found.status == "wrong":
            return _finding(law, found, asked, output), found.used
        return None, found.used if found.status == "within" else np.nan

    return judge


def _finding(law: str, found: Verdict, asked: Any, output: Any) -> Finding:
    where = "" if found.where in ("nowhere", "everywhere") else f"; over budget: {found.where}"
    op, inputs = asked or (None, None)
    used = found.used if np.isfinite(found.used) else None
    return Finding(law, found.message + where, op, inputs, output, used)


def examine(fn: Callable, trials: list[Trial], seen: Seen, takes_out: bool) -> Finding | None:
    """Run trials one after the other; return the first law that is broken."""
    returned: list[tuple[Any, Any]] = []
    for trial in trials:
        for finding in _run(fn, trial, seen, takes_out, returned):
            return finding
    return None


def _run(
    fn: Callable, trial: Trial, seen: Seen, takes_out: bool, returned: list
) -> Iterator[Finding]:
    before = [_copy(x) for x in (*trial.arguments, *trial.options.values())]
    guarded = Guarded(trial.shape, trial.dtype) if takes_out and trial.shape else None
    extra = {} if guarded is None else {"out": guarded.out}
    try:
        output = fn(*trial.arguments, **trial.options, **extra)
    except Exception as error:
        says = f"it raised {type(error).__name__}: {error}"
        yield Finding(RETURNS, says, cause=error)
        return
    after = (*trial.arguments, *trial.options.values())
    if any(not _equal(x, y) for x, y in zip(before, after, strict=True)):
        yield Finding(UNCHANGED, "an input holds other values after the call")
    if guarded is not None:
        output = guarded.out if output is None else output
        yield from _memory(guarded)
    for kept, now in returned:
        if not _equal(kept, now):
            yield Finding(OWN, "the first output changed when the function was called again")
    returned.append((_copy(output), output))
    finding, used = trial.judge(output)
    seen.n += 1
    seen.n_undecided += bool(np.isnan(used))
    if finding is not None:
        yield finding
    elif not np.isnan(used):
        seen.used = max(seen.used, used)


def _memory(guarded: Guarded) -> Iterator[Finding]:
    if not guarded.is_intact():
        yield Finding(INSIDE, "an entry before or behind the output was overwritten")
    if np.isnan(guarded.out.astype(np.float64)).any():
        yield Finding(FILLED, "an entry of the output is still the NaN that it was filled with")


def _copy(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(_copy(part) for part in x)
    return x.copy() if isinstance(x, np.ndarray) else x


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, tuple):
        return all(_equal(a, b) for a, b in zip(x, y, strict=True))
    return same_bits(x, y) if isinstance(x, np.ndarray) else True


def unknown(_: Array) -> tuple[Finding | None, float]:
    """Judge nothing: an output that is only there to be called for."""
    return None, float("nan")
