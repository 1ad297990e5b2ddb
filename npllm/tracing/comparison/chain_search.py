"""A mistake in an operation whose result was not recorded: which one explains the first value that
was.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from npllm.errors import NpllmError
from npllm.testing.forms import NotApplicableError, evaluate, prepare
from npllm.testing.inputs import f64
from npllm.testing.registry import alternatives
from npllm.tracing.comparison.graft import NotRecordedError, Run, real_entries
from npllm.tracing.comparison.nodes import Exact, Known, share_of
from npllm.tracing.comparison.operations import table_part
from npllm.tracing.comparison.questions import questions
from npllm.tracing.comparison.steps import key_of
from npllm.tracing.comparison.wiring import last_roundings, plain_attempts, short_name

__all__ = ["searched"]

Array = Any

CLOSE = 2.0  # budgets of the chain within which an option explains the value
TWINS = {"q": "k", "cos": "sin", "gate": "up"}  # values that one mistake changes alike
MOST = 26  # operations that are looked at: those of a layer


def searched(run: Run, name: str, t: int, exact: Exact, x: Array) -> str:
    """Name the option of an operation before a value that explains the value.

    Parameters
    ----------
    run : Run
    name : str
    t : int
    exact : Exact
        The answer that the value disagrees with; some of its inputs were not recorded.
    x : array
        The value in our order.

    Returns
    -------
    text : str
        "C7 up first in mlp.swiglu"; several are joined by " or ".  Empty where none is found.
    """
    level = run.levels(x)[-1]
    allowed = exact.error(level)
    real = real_entries(name, exact.value.shape, run.settings[t].step)
    found: dict[str, float] = {}
    for text, values in _candidates(run, name, t):
        with run.given({key_of(other, t): Known(value) for other, value in values.items()}):
            y = run.exact(name, t).value
        error = np.abs(y - f64(x))
        unit = allowed + last_roundings(level, y)
        share = share_of(error if real is None else np.where(real, error, 0.0), unit)
        if share <= CLOSE:
            found[f"{text} in {' and '.join(map(short_name, values))}"] = share
    return " or ".join(sorted(found, key=lambda text: found[text])[:3])


def _candidates(run: Run, name: str, t: int) -> Iterator[tuple[str, dict[str, Array]]]:
    """What one operation, or the two that are made alike, may have done: sentence, and values."""
    options: dict[str, dict[str, Array]] = {}
    for other in before(run, name, t):
        try:
            options[other] = dict(_options(run, other, t, run.exact(other, t)))
        except NotRecordedError:
            continue
        yield from ((text, {other: value}) for text, value in options[other].items())
    for other, values in options.items():
        front, _, leaf = other.rpartition(".")
        twin = f"{front}.{TWINS.get(leaf, '')}"
        for text in values.keys() & options.get(twin, {}).keys():
            yield text, {other: values[text], twin: options[twin][text]}


def before(run: Run, name: str, t: int) -> list[str]:
    """Name the values before one that were not recorded, up to those that were, nearest first."""
    found: list[str] = []
    left = [*run.graphs[t][name].inputs]
    while left and len(found) < MOST:
        other = left.pop(0)
        if other not in found and not run.has(other, t):
            found.append(other)
            left += run.graphs[t][other].inputs
    return found


def _options(run: Run, name: str, t: int, exact: Exact) -> Iterator[tuple[str, Array]]:
    """What the operation of a value may have done instead: sentence, and the value."""
    for (op, inputs), _ in questions(run, name, t, exact, exact.value):
        try:
            prepared = prepare(op, inputs)
        except NpllmError:
            continue
        for convention, option in alternatives(op):
            try:
                y = evaluate(op, prepared, {convention: option}).y
            except (NotApplicableError, ValueError, IndexError):
                continue
            if y.size == exact.value.size and np.isfinite(y).all():
                is_table = exact.call.op == "tables"
                value = table_part(y, name) if is_table else y.reshape(exact.value.shape)
                yield f"{convention} {option}", value
    yield from plain_attempts(run, name, t, exact)
