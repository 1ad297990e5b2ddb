"""One value of a run against the float64 answer of its operation on the run's own inputs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from npllm.testing.arithmetic import LAMBDA, STEP, UNITS
from npllm.testing.budgets import Budget
from npllm.testing.inputs import f64, widened_weight
from npllm.testing.within_budget import absolute_errors, judge
from npllm.tracing.comparison.carried import CERTAIN, carried
from npllm.tracing.comparison.levels import ROUNDING, Level
from npllm.tracing.comparison.operations import Call, linear_blocks, own_budget, value_of

__all__ = ["Exact", "Judged", "Known", "judged"]

Array = Any

ROWS = 64  # rows of a matrix product whose exact budget is computed at a time


class Known:
    """A recorded value: exact, unless it was rounded when it was stored."""

    def __init__(self, value: Array) -> None:
        self.value = value

    def spread(self, level: Level) -> Array:
        """Five standard deviations of what the value may be off, for the operations that read it;
        None: it is exact.
        """
        return level.error_of(self.value)


class Exact(Known):
    """The float64 answer of a call, with what an implementation may be off.

    The budget is that of the call, and what the budgets of inputs that were not recorded carry into
    it (`npllm.tracing.comparison.carried`).

    Parameters
    ----------
    call : Call
    name : str
    inputs : sequence of Known
        In the order of `call.inputs`.
    """

    def __init__(self, call: Call, name: str, inputs: Sequence[Known]) -> None:
        super().__init__(value_of(call, name))
        self.call, self.name, self.inputs = call, name, inputs
        self._errors: dict[Level, Array] = {}
        self._is_sealed = False

    def spread(self, level: Level) -> Array:
        """The budget, in which the last rounding counts by its largest error, as five standard
        deviations.
        """
        if self.call.arrange is not None:
            return self.error(level)
        last = level.roundings * UNITS[level.dtype] * np.abs(self.value)
        return self.error(level) + (ROUNDING - 1) * last

    def error(self, level: Level) -> Array:
        """The statistical budget."""
        if level not in self._errors:
            self._errors[level] = self._cheap(level) * level.own_share + self._carried(level)
        return self._errors[level]

    def seal(self, levels: Sequence[Level]) -> None:
        """Keep the budgets at some levels, and let go of the inputs and theirs."""
        if self._is_sealed:
            return
        for level in levels:
            self.error(level)
        self.inputs, self._is_sealed = (), True
        self.call = self.call._replace(arguments={}, inputs=())

    def bound(self, level: Level) -> Budget:
        """The exact budget, of all entries."""
        own, share = self._own(level), level.own_share
        more = self._carried(level)
        det, stat = own.deterministic * share + CERTAIN * more, own.statistical * share + more
        return Budget(det, np.fmin(stat, det), own.condition)

    def bound_of_rows(self, level: Level, rows: Array, columns: slice) -> Budget:
        """The exact budget of some rows and columns of a matrix product."""
        a = self.call.arguments
        flat = a["x"].reshape(-1, a["x"].shape[-1])[rows]
        bias = None if a["bias"] is None else a["bias"][columns]
        part = {"x": flat, "weight": a["weight"][columns], "bias": bias}
        call = self.call._replace(arguments=part)
        own = own_budget(call, self.name, level.arithmetic("linear"), self.value)
        more, share = _rows(self._carried(level), rows, columns), level.own_share
        det, stat = own.deterministic * share + CERTAIN * more, own.statistical * share + more
        return Budget(det, np.fmin(stat, det), own.condition)

    def _own(self, level: Level) -> Budget:
        return own_budget(self.call, self.name, level.arithmetic(self.call.op), self.value)

    def _carried(self, level: Level) -> Array:
        errors = [x.spread(level) for x in self.inputs]
        return carried(self.call, dict(zip(self.call.inputs, errors, strict=True)))

    def _cheap(self, level: Level) -> Array:
        """The statistical budget of the call alone; of a matrix product the smallest of its forms,
        that of sums in random order, for one product instead of twenty.
        """
        if self.call.op != "linear":
            return self._own(level).statistical
        x, y, u = self.call.arguments["x"], self.value, UNITS[level.accumulate]
        n, sums = x.shape[-1], [_squares(x, block) for block in linear_blocks(self.call)]
        variance = (n / 3 + 1) * y * y + (n / 6 + 1) * np.concatenate(sums, axis=-1)
        last = level.roundings * UNITS[level.dtype] * np.abs(y) + STEP[level.accumulate]
        return LAMBDA * u * np.sqrt(variance) + last


def _squares(x: Array, block: Call) -> Array:
    """Sum (x_i w_i)**2 over i, in float32 where its range allows."""
    w, _ = widened_weight(block.arguments["weight"])
    narrow = np.float32 if np.abs(x).max(initial=0.0) < 1e15 else np.float64
    return f64((x * x).astype(narrow) @ (w * w).astype(narrow).T)


def _rows(x: Array, rows: Array, columns: slice) -> Array:
    return x if np.ndim(x) == 0 else x.reshape(-1, x.shape[-1])[rows, columns]


class Judged(NamedTuple):
    """What is known of a value.

    Parameters
    ----------
    status : str
        "within", "wrong", "not decidable" or "no gold".
    share : float
        Largest error in budgets.
    level : Level
        The strictest arithmetic that explains it, else the loosest that was tried.
    """

    status: str
    share: float
    level: Level


def judged(
    found: Array, exact: Exact, levels: Sequence[Level], real: Array | None = None
) -> Judged:
    """Judge a value: the strictest level within whose budget it is.

    Parameters
    ----------
    found : array
        In the shape of the exact value, in its own dtype.
    exact : Exact
    levels : sequence of Level
    real : bool array, optional
        Broadcasts to the shape; entries that are not judged are False.
    """
    worst = None
    for level in levels:
        one = _at(found, exact, level, real)
        if one.status == "within":
            return one
        if worst is None or one.status == "not decidable":
            worst = one
    assert worst is not None
    return worst


def _at(found: Array, exact: Exact, level: Level, real: Array | None) -> Judged:
    wide, y = f64(found), exact.value
    with np.errstate(all="ignore"):
        error = np.abs(wide - y)
        stat = exact.error(level)
        if real is not None:
            error = np.where(real, error, 0.0)
        over = ~(error <= stat) | (np.isinf(stat) & ~np.isfinite(y))
        over = over if real is None else over & real
    vague = np.abs(y) < stat
    vague = vague if real is None else vague & real
    is_vague, share = np.mean(vague) > 0.5, share_of(error, stat)
    if not over.any() and not is_vague:
        return Judged("within", share, level)
    if exact.call.op == "linear":
        one = _linear_at(found, exact, level, over, share)
        is_vague = is_vague and one.status == "within"
        return one._replace(status="not decidable") if is_vague else one
    bound = exact.bound(level)
    return _decided(found, y, bound, level, real)


def _decided(found: Array, y: Array, bound: Budget, level: Level, real: Array | None) -> Judged:
    """The verdict of `npllm.testing`, of the entries that count."""
    if real is not None:
        keep = np.broadcast_to(real, y.shape)
        found, y = found[keep], y[keep]
        bound = Budget(*(np.broadcast_to(x, keep.shape)[keep] for x in bound))
    unknown = np.isnan(y)
    if unknown.any():
        found, y = np.where(unknown, 0, found).astype(found.dtype), np.where(unknown, 0.0, y)
    error = absolute_errors(found, y, y, bound)
    if np.isinf(error).any():
        return Judged("wrong", float("inf"), level)
    status, share = judge(error, y, bound)
    if status != "wrong" and unknown.any():
        status = "no gold"
    return Judged(status, float(np.max(share, initial=0.0)), level)


def _linear_at(found: Array, exact: Exact, level: Level, over: Array, share: float) -> Judged:
    """Look at the rows and columns that exceed the cheap budget, until one is wrong."""
    rows, status = np.flatnonzero(over.reshape(-1, over.shape[-1]).any(axis=-1)), "within"
    flat, y, over = (x.reshape(-1, x.shape[-1]) for x in (found, exact.value, over))
    for start in range(0, len(rows), ROWS):
        some = rows[start : start + ROWS]
        for first in range(0, y.shape[-1], 8192):
            columns = slice(first, first + 8192)
            if not over[some, columns].any():
                continue
            bound = exact.bound_of_rows(level, some, columns)
            one = _decided(flat[some, columns], y[some, columns], bound, level, None)
            if one.status == "wrong":
                return one._replace(share=max(one.share, share))
            status = one.status if one.status != "within" else status
            share = min(share, max(1.0, one.share)) if one.status == "within" else share
    return Judged(status, share if status != "within" else min(share, 1.0), level)


def share_of(error: Array, stat: Array) -> float:
    """Largest error in budgets; infinity where an error is no number."""
    with np.errstate(all="ignore"):
        largest = float(np.max(error, initial=0.0))
        if largest == 0:
            return 0.0
        share = float(np.fmax.reduce(np.ravel(error / stat), initial=0.0))  # 0 / 0 is left out
    return float("inf") if np.isnan(largest) else share
