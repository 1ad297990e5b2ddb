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
from npllm.tracing.chain_search import searched
from npllm.tracing.graft import Run, without_padding
from npllm.tracing.nodes import Exact
from npllm.tracing.questions import questions
from npllm.tracing.wiring import wired

__all__ = ["explain"]

Array = Any
Question = tuple[str, dict[str, Any]]

ROUNDED = 1e-5  # of the mean difference: what another operation rounds, where ours is small
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
    is_chain = any(isinstance(one, Exact) for one in exact.inputs)
    return wired(run, name, t, exact, x) or (searched(run, name, t, exact, x) if is_chain else "")


def _asked(question: Question, output: Array, run: Run, exact: Exact) -> str:
    """The answer of `diagnose`, else the option that is nearest."""
    op, inputs = question
    is_chain = any(isinstance(one, Exact) for one in exact.inputs)
    try:
        if not is_chain:
            found = diagnose(op, inputs, output)
            return " & ".join(found.names) or (found.model or "")
        return _nearest(op, inputs, output, run, exact)
    except NpllmError:
        return ""


def _nearest(op: str, inputs: dict[str, Any], output: Array, run: Run, exact: Exact) -> str:
    """The single option within the budget of the chain: several, where they agree."""
    prepared, level = prepare(op, inputs), run.levels(output)[-1]
    scale = np.mean(np.abs(f64(output) - exact.value.reshape(output.shape)))
    allowed, found = exact.error(level) + ROUNDED * scale, {}
    for name, option in alternatives(op):
        try:
            answer = evaluate(op, prepared, {name: option})
        except NotApplicableError:
            continue
        if answer.y.size != output.size:
            continue
        error = np.abs(answer.y.reshape(output.shape) - f64(output))
        with np.errstate(all="ignore"):
            share = float(np.max(np.where(error > 0, error / allowed, 0.0)))
        if share <= CLOSE:
            found[f"{name} {option}"] = share
    return " or ".join(sorted(found, key=lambda text: found[text]))
