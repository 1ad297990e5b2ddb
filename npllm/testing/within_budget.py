"""Whether errors are within a budget: within, wrong, or not decidable."""

from typing import Any

import numpy as np

from npllm.testing.arithmetic import LARGEST
from npllm.testing.budgets import Budget

__all__ = ["absolute_errors", "judge", "undetermined"]

Array = Any


def judge(error: Array, exact: Array, bound: Budget) -> tuple[str, Array]:
    """Say "within", "wrong" or "not decidable"; and the share of the budget of each entry.

    An entry is wrong when its error exceeds the deterministic bound, or the statistical one where
    the value is determined: where the deterministic bound is at most |exact|.  An error between the
    two on an undetermined entry is not decidable.  Nor is an output of which the statistical budget
    of most entries exceeds their value: zeros would pass.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(error > 0, error / bound.statistical, 0.0)
        share = np.where(
            np.isnan(share), 0.0, share
        )  # infinity of infinity: nothing is promised there
    over = error > bound.statistical
    if (
        (error > bound.deterministic) | (over & ~undetermined(exact, bound.deterministic, bound))
    ).any():
        return "wrong", share
    if over.any() or np.mean(undetermined(exact, bound.statistical, bound)) > 0.5:
        return "not decidable", share
    return "within", share


def undetermined(exact: Array, limit: Array, bound: Budget) -> Array:
    """Tell of which finite values an error of this size would be all."""
    return np.isfinite(exact) & (
        ~np.isfinite(bound.deterministic) | ((limit > np.abs(exact)) & (bound.condition > 1))
    )


def absolute_errors(found: Array, exact: Array, finite: Array, bound: Budget) -> Array:
    """Return |found - exact|; 0 for infinities that are right, also after an overflow.

    An infinity is right where an answer within the budget overflows: where the exact value, moved
    towards it by what the budget allows, is at least the largest finite number of the dtype.
    """
    got = found.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        usable = np.isfinite(got) & np.isfinite(finite)
        difference = (
            got - exact
            if exact.dtype != object
            else (np.where(usable, got, 0.0) - np.where(usable, exact, 0))
        )
        error = np.abs(difference).astype(np.float64)
        vague = undetermined(finite, bound.deterministic, bound)
        allowed = np.where(vague, bound.deterministic, bound.statistical)
        towards = np.where(np.isinf(finite), 0.0, allowed) + np.sign(got) * finite
        same = np.isinf(got) & (towards >= LARGEST[str(found.dtype)])
    error = np.where(usable, error, np.inf)
    return np.where(same, 0.0, error)
