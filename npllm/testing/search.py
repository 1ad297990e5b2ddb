"""The search for the smallest set of options that explains an output."""

from collections.abc import Iterable
from copy import copy
from itertools import combinations
from typing import Any

import numpy as np

from npllm.testing.forms import Answer, Array, NotApplicableError, Work, evaluate
from npllm.testing.forms.table import OPS
from npllm.testing.registry import alternatives

__all__ = ["Choices", "Search", "distance", "named"]

Choices = tuple[tuple[str, str], ...]  # (convention id, option) of each convention that is not ours

UNITS = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
STEPS = {"float64": 2.0**-1074, "float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}
LIMIT = 2**17  # entries of the table of scores, or of the output, that one option may cost
FEW = 4  # rows that a pair may cost
WHOLE = 2**22  # the same where one option is confirmed on the whole input


def named(choices: Choices) -> str:
    """Name a set of options: "C8 tile & C21 twice"; "right" where there is none."""
    return " & ".join(f"{name} {option}" for name, option in choices) or "right"


def dtype_name(x: Array) -> str:
    """Name of the dtype that an output was rounded to; float64 for integers."""
    name = str(x.dtype)
    return name if name in UNITS else "float64"


def allowance(answer: Answer, dtype: str) -> Array:
    """Return the error that an implementation may make: the slack, and one rounding to `dtype`."""
    size = np.where(np.isfinite(answer.y), np.abs(answer.y), 0)
    return answer.slack + UNITS[dtype] * size + np.where(answer.slack > 0, STEPS[dtype], 0)


def distance(output: Array, answer: Answer, dtype: str) -> float:
    """Return the largest error in units of what is allowed; infinity for a NaN out of place.

    Parameters
    ----------
    output : float64 array
    answer : Answer
    dtype : str
        Of the output before it was widened.
    """
    y = answer.y
    same = (output == y) | (np.isnan(output) & np.isnan(y))
    allowed = allowance(answer, dtype)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        share = np.where(same, 0.0, np.abs(output - y) / allowed)
    share = np.where(np.isnan(share) | (~np.isfinite(y) & ~same), np.inf, share)
    share = np.where(np.isinf(allowed) & np.isfinite(y) & ~np.isnan(output), 0.0, share)
    return float(share.max(initial=0.0))


def differ(a: Answer, b: Answer, dtype: str) -> bool:
    """Tell whether two answers are farther apart somewhere than both allowances together."""
    both = allowance(a, dtype) + allowance(b, dtype)
    with np.errstate(invalid="ignore"):
        apart = np.abs(a.y - b.y) > both
    odd = ~(np.isfinite(a.y) & np.isfinite(b.y))
    same = (a.y == b.y) | (np.isnan(a.y) & np.isnan(b.y))
    return bool((apart | (odd & ~same)).any())


class Search:
    """Answers of an operation under sets of options, and their distances from an output.

    Parameters
    ----------
    op : str
    inputs : dict
        As `prepare` returns them.
    output : array
        In the shape of the operation's output.
    unit : float
        Unit roundoff of the implementation.
    """

    def __init__(self, op: str, inputs: dict[str, Any], output: Array, unit: float) -> None:
        self.op, self.unit, self.dtype = op, unit, dtype_name(output)
        self.whole = inputs, _flat(op, inputs, output)
        self.inputs, self.output, self.rows = _cut(op, inputs, self.whole[1])
        self.answers: dict[Choices, Answer] = {}

    def answer(self, choices: Choices) -> Answer:
        """Evaluate a set of options on the part of the input that the search looks at."""
        if choices not in self.answers:
            self.answers[choices] = evaluate(
                self.op, self.inputs, dict(choices), self._work(self.rows)
            )
        return self.answers[choices]

    def distance(self, choices: Choices) -> float:
        """Return how far the output is from a set of options, in allowances."""
        answer = evaluate(self.op, self.inputs, dict(choices), self._work(self.rows))
        return distance(self.output, answer, self.dtype)

    def narrowed(self) -> "Search":
        """Return a search on fewer rows where the input was cut, since pairs are many."""
        if self.rows is None or len(self.rows) <= FEW:
            return self
        few = copy(self)
        at = np.linspace(0, len(self.rows) - 1, FEW).astype(int)
        few.rows, few.answers = self.rows[at], {}
        few.output = np.take(self.output, at, OPS[self.op].rows_axis * -1)
        return few

    def explains_all(self, choices: Choices) -> bool:
        """Tell whether a set of options explains the whole output, not only a part."""
        inputs, output = self.whole
        if self.output is output:
            return True
        if self.rows is None:
            answer = evaluate(self.op, inputs, dict(choices), self._work(None))
            return distance(output, answer, self.dtype) <= 1
        size = max(1, WHOLE // (output.shape[0] * output.shape[1] * inputs["k"].shape[-2]))
        for start in range(0, inputs["q"].shape[-2], size):
            rows = np.arange(start, min(start + size, inputs["q"].shape[-2]))
            answer = evaluate(self.op, inputs, dict(choices), self._work(rows))
            if distance(np.take(output, rows, OPS[self.op].rows_axis * -1), answer, self.dtype) > 1:
                return False
        return True

    def _work(self, rows: Array) -> Work:
        return Work(unit=self.unit, rows=rows)

    def singles(self) -> list[Choices]:
        """List the single options that can be run on this input."""
        return [
            choices
            for choices in (((name, option),) for name, option in alternatives(self.op))
            if self._runs(choices)
        ]

    def _runs(self, choices: Choices) -> bool:
        try:
            self.answer(choices)
        except NotApplicableError:
            return False
        return True

    def classes(self) -> list[list[Choices]]:
        """Group the definition, first, and all single options by what this input tells apart."""
        groups: list[list[Choices]] = []
        for choices in [(), *self.singles()]:
            for group in groups:
                if not any(
                    differ(self.answer(choices), self.answer(other), self.dtype) for other in group
                ):
                    group.append(choices)
                    break
            else:
                groups.append([choices])
        return groups

    def pairs(self, singles: Iterable[Choices]) -> list[Choices]:
        """List the pairs of options of two conventions."""
        return [(*a, *b) for a, b in combinations(singles, 2) if a[0][0] != b[0][0]]

    def distances(self, candidates: Iterable[Choices]) -> dict[Choices, float]:
        """Return the distance of each candidate that can be run."""
        found = {}
        for choices in candidates:
            try:
                found[choices] = self.distance(choices)
            except NotApplicableError:
                continue
        return found


def _flat(op: str, inputs: dict, output: Array) -> Array:
    """Output in float64, with the axes in front flattened as the forms flatten them."""
    shape = OPS[op].shape(inputs)
    keep = {"attention": 3, "attention_lse": 2, "rope": 3, "qkv_projection": 3}.get(op, 1)
    return np.asarray(output).astype(np.float64).reshape(-1, *shape[len(shape) - keep :])


# ------------------------------------------------------------------ a part of a large input


def _cut(op: str, inputs: dict, output: Array) -> tuple[dict, Array, Array]:
    """Cut a large problem to a part: inputs, output and query rows."""
    if op in ("attention", "attention_lse"):
        return _cut_attention(op, inputs, output)
    if output.size <= LIMIT or op == "qkv_projection":
        return inputs, output, None
    if op == "rope":
        heads = [0, inputs["x"].shape[-3] - 1]
        return inputs | {"x": inputs["x"][..., heads, :, :]}, output[:, heads], None
    name = next(iter(OPS[op].arrays))
    rows = _spread(len(output), max(4, LIMIT // output.shape[-1]), output)
    flat = inputs[name].reshape(
        len(output), *inputs[name].shape[inputs[name].ndim - (name != "ids") :]
    )
    cut = inputs | {name: flat[rows]}
    if inputs.get("seen") is not None:
        cut["seen"] = np.broadcast_to(inputs["seen"], inputs[name].shape).reshape(flat.shape)[rows]
    return cut, output[rows], None


def _cut_attention(op: str, inputs: dict, output: Array) -> tuple[dict, Array, Array]:
    per_row = output.shape[0] * output.shape[1] * inputs["k"].shape[-2]
    n_rows, axis = output.shape[2], OPS[op].rows_axis * -1
    if n_rows * per_row <= LIMIT:
        return inputs, output, None
    rows = _spread(n_rows, max(4, LIMIT // per_row), np.moveaxis(output, 2, 0))
    return inputs, np.take(output, rows, axis), rows


def _spread(n: int, count: int, rows: Array) -> Array:
    """Choose about `count` of n rows: first, last, evenly between, and the largest in magnitude."""
    even = np.linspace(0, n - 1, min(n, count - count // 4)).astype(int)
    size = np.nan_to_num(np.abs(rows.reshape(n, -1)), nan=np.inf).max(axis=-1)
    return np.unique(np.concatenate([even, np.argsort(-size)[: count // 4]]))
