"""What is wrong with an operation: its convention by `npllm.testing.diagnose`, or what else it did.

Where an input was not recorded, the options are held against the budget of the whole chain.
"""

from typing import Any

import numpy as np

from npllm.errors import NpllmError
from npllm.testing.diagnosis import diagnose
from npllm.testing.forms import NotApplicableError, evaluate, prepare
from npllm.testing.inputs import f64
from npllm.testing.registry import alternatives
from npllm.tracing.comparison.chain_search import searched
from npllm.tracing.comparison.graft import Run, without_padding
from npllm.tracing.comparison.nodes import Exact, share_of
from npllm.tracing.comparison.questions import questions
from npllm.tracing.comparison.wiring import last_roundings, wired

__all__ = ["explain"]

Array = Any
Question = tuple[str, dict[str, Any]]

CLOSE = 2.0  # budgets within which an option explains a chain of operations


def explain(run: Run, name: str, t: int, exact: Exact, x: Array) -> str:
    """Name what an operation did instead of its definition.

    Parameters
    ----------
    run : Run
    name : str
    t : int
    exact : Exact
        The answer that the value disagrees with.
    x : array
        The value in our order.

    Returns
    -------
    text : str
        Convention and option, such as "C7 up first"; empty where nothing is known.
    """
    if np.isnan(f64(x)).all() or x.shape != exact.value.shape:
        return ""
    x = without_padding(name, x, run.settings[t].step).astype(x.dtype)
    for question, output in questions(run, name, t, exact, x):
        found = _asked(question, output, run, exact)
        if found:
            return found
    found = wired(run, name, t, exact, x)
    is_chain = any(isinstance(one, Exact) for one in exact.inputs)
    return found or (searched(run, name, t, exact, x) if is_chain else "")


def _is_chain(run: Run, exact: Exact, x: Array) -> bool:
    """Tell whether an input was computed anew, with a budget of its own; a view has none."""
    level = run.levels(x)[-1]
    return any(isinstance(one, Exact) and np.any(one.error(level)) for one in exact.inputs)


def _asked(question: Question, output: Array, run: Run, exact: Exact) -> str:
    """The answer of `diagnose`, else the option that is nearest."""
    op, inputs = question
    try:
        if not _is_chain(run, exact, output):
            found = diagnose(op, inputs, output)
            return " & ".join(found.names) or (found.model or "")
        return _nearest(op, inputs, output, run, exact)
    except NpllmError:
        return ""


def _nearest(op: str, inputs: dict[str, Any], output: Array, run: Run, exact: Exact) -> str:
    """The single option within the budget of the chain: several, where they agree."""
    prepared, level = prepare(op, inputs), run.levels(output)[-1]
    allowed, found = exact.error(level), {}
    for name, option in alternatives(op):
        try:
            answer = evaluate(op, prepared, {name: option})
        except NotApplicableError:
            continue
        if answer.y.size != output.size:
            continue
        y = answer.y.reshape(output.shape)
        share = share_of(np.abs(y - f64(output)), allowed + last_roundings(level, y))
        if share <= CLOSE:
            found[f"{name} {option}"] = share
    return " or ".join(sorted(found, key=lambda text: found[text]))
