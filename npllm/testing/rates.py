"""Evidence of rounding: where two options differ, how many bits agree with each."""

from itertools import combinations
from typing import Any

import numpy as np

from npllm.testing.forms import Array
from npllm.testing.forms.rounding import EMULATORS, emulations
from npllm.testing.registry import conventions

__all__ = ["LEAST", "rounding_choices", "rounding_options"]

LEAST = 16  # entries on which two options must differ before one is preferred
SHARE = 0.8  # of them, how many must agree with the one that is named
N_ROWS = 64


def rounding_options(
    op: str, inputs: dict[str, Any], output: Array
) -> dict[str, tuple[str, float]]:
    """Say how an output was rounded, where its bits show it.

    Parameters
    ----------
    op : str
    inputs : dict
        As `prepare` returns them.
    output : array
        In the shape and dtype that the implementation returned.

    Returns
    -------
    found : dict
        Convention id -> (option, share of all entries with equal bits); only where the input tells
        the options apart.
    """
    found = {}
    for name, options in rounding_choices(op, output.dtype).items():
        winner = _winner(name, options, op, inputs, output)
        if winner:
            found[name] = winner
    return found


def rounding_choices(op: str, dtype: Any) -> dict[str, list[str]]:
    """List the options, ours first, of each convention that shows in the bits of a dtype."""
    is_narrow, is_single = str(dtype) in ("bfloat16", "float16"), str(dtype) == "float32"
    shows = {"C2": is_single, "C13": is_narrow, "C14": is_narrow, "C30": is_narrow or is_single}
    found = {}
    for name in (name for name, other in EMULATORS if other == op and shows[name]):
        convention = conventions[name]
        wrong = [
            option
            for option in convention.wrong(op)
            if convention.evidence_of(option) == "rounding"
        ]
        found[name] = [convention.ours, *wrong]
    return found


def _winner(
    name: str, options: list[str], op: str, inputs: dict, output: Array
) -> tuple[str, float] | None:
    inputs, part = _few_rows(op, inputs, output)
    target = np.asarray(part).astype(np.float32)
    best: dict[str, Array] = {}
    for option in options:
        found = emulations(name, option, op, inputs, output.dtype)
        found = [y.reshape(target.shape) for y in found]
        nearest = max(found, key=lambda y: float(np.mean(y == target)))
        if not any(np.array_equal(nearest, other, equal_nan=True) for other in best.values()):
            best[option] = nearest
    beaten = set()
    for a, b in combinations(best, 2):
        beaten |= _weaker(a, best[a], b, best[b], target)
    left = [option for option in best if option not in beaten]
    if len(left) != 1 or len(best) < 2:
        return None
    return left[0], float(np.mean(best[left[0]] == target))


def _weaker(a: str, y_a: Array, b: str, y_b: Array, target: Array) -> set[str]:
    """Which of two options the bits speak against; neither or both where they leave it open."""
    apart = (y_a != y_b) & np.isfinite(target)
    n = int(apart.sum())
    for_a, for_b = int((apart & (y_a == target)).sum()), int((apart & (y_b == target)).sum())
    if n < LEAST or max(for_a, for_b) < SHARE * n:
        return {a, b} if n >= LEAST else set()
    return {b} if for_a > for_b else {a}


def _few_rows(op: str, inputs: dict, output: Array) -> tuple[dict, Array]:
    """The first rows of a large input: a rate needs no more."""
    if op not in ("rms_norm", "linear") or inputs["x"][..., 0].size <= N_ROWS:
        return inputs, output
    x = inputs["x"].reshape(-1, inputs["x"].shape[-1])[:N_ROWS]
    return inputs | {"x": x}, output.reshape(-1, output.shape[-1])[:N_ROWS]
