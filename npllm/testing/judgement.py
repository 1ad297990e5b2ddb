"""Right, wrong or not decidable: the verdict where an operation has one, else the bounds of its form."""

from typing import Any, NamedTuple

import numpy as np

from npllm.testing.budgets import BUDGETS
from npllm.testing.forms import Array
from npllm.testing.forms.rope import chosen_factors
from npllm.testing.location import where
from npllm.testing.search import UNITS, Search, allowance, dtype_name
from npllm.testing.verdicts import Verdict, verdict

__all__ = ["Judgement", "judge_output"]

CLOSE = 0.5  # share of the entries whose bound may exceed their value before nothing can be said


class Judgement(NamedTuple):
    """What is said of an output before any convention is tried.

    Parameters
    ----------
    status : str
        "right", "wrong" or "not decidable".
    where : str
        Where the error lives; empty where there is none.
    model : str, optional
        The arithmetic that explains the error.
    search : Search
        At the precision that the output was judged at.
    """

    status: str
    where: str
    model: str | None
    search: Search


def judge_output(op: str, inputs: dict[str, Any], output: Array) -> Judgement:
    """Say whether an output is right.

    Parameters
    ----------
    op : str
    inputs : dict
        As `prepare` returns them.
    output : array
        In the operation's shape.

    Returns
    -------
    judgement : Judgement

    Notes
    -----
    An output of 16 bits is right as well where the arithmetic of its own dtype explains it.  The verdict's statistical budget
    is stricter than the bound: what exceeds it is wrong, though no convention may explain it.
    """
    status, search = _by_bounds(op, inputs, output)
    found = _verdict(op, inputs, output)
    if found is not None:
        short = dtype_name(output) in ("float16", "bfloat16")
        said = {"within": "right", "no gold": "not decidable"}.get(found.status, found.status)
        if not (said == "wrong" and status == "right" and short and found.model is not None):
            status = said
    if status == "right":
        return Judgement(status, "", None, search)
    place = found.where if found is not None and found.where != "nowhere" else _where(op, search, output)
    return Judgement(status, place, None if found is None else found.model, search)


def _by_bounds(op: str, inputs: dict, output: Array) -> tuple[str, Search]:
    """Judge by the deterministic bounds of the form, at the precision of the output, then at a lower one."""
    units = {"float64": [2.0**-53, 2.0**-24]}.get(dtype_name(output), [2.0**-24])
    if dtype_name(output) in ("float16", "bfloat16"):
        units.append(UNITS[dtype_name(output)])
    searches = [Search(op, inputs, output, unit) for unit in units]
    for search in searches:
        if search.distance(()) <= 1 and search.explains_all(()):
            return ("not decidable" if _is_vague(search) else "right"), search
    for search in searches[1:]:
        singles = search.distances(search.singles()).values()
        if not _is_vague(search) and any(value <= 1 for value in singles):
            return "wrong", search
    return ("not decidable" if _is_vague(searches[0]) else "wrong"), searches[0]


def _is_vague(search: Search) -> bool:
    """Tell whether the bound exceeds the value in most entries: then anything would pass."""
    answer = search.answer(())
    counts = np.isfinite(answer.y) & (answer.y != 0)
    if not counts.any():
        return False
    loose = allowance(answer, search.dtype) > np.abs(answer.y)
    return float(np.mean(loose[counts])) > CLOSE


def _verdict(op: str, inputs: dict, output: Array) -> Verdict | None:
    """The verdict on an output; None for an operation or dtype that has none."""
    is_wide = any(str(getattr(x, "dtype", "")) == "float64" for x in inputs.values())
    if op == "lm_head":
        op, inputs = "linear", {"x": inputs["hidden"], "weight": inputs["weight"]}
    if op not in BUDGETS or is_wide or str(output.dtype) not in UNITS:
        return None
    return verdict(op, _plain_inputs(op, inputs), output)


def _plain_inputs(op: str, inputs: dict) -> dict:
    """Inputs under the names that the verdict knows: documents become a mask, two sets of factors the right one."""
    plain = {name: x for name, x in inputs.items() if name not in ("documents", "d_rope", "n_original")}
    if op == "rope":
        plain["d_rope"], factors = inputs["d_rope"], inputs["factors"]
        if factors is not None:
            plain["factors"] = chosen_factors(inputs, inputs["positions"], {}, factors.shape[-1])
    if op == "attention" and inputs["documents"] is not None:
        labels, n_seq = inputs["documents"], inputs["q"].shape[-2]
        same = (labels[:, -n_seq:, None] == labels[:, None, :])[:, None]
        plain["mask"] = same if inputs["mask"] is None else same & inputs["mask"]
    return plain


def _where(op: str, search: Search, output: Array) -> str:
    """Describe which entries are off by more than the bound, on the part that the search looks at."""
    answer = search.answer(())
    with np.errstate(invalid="ignore"):
        wrong = ~(np.abs(search.output - answer.y) <= allowance(answer, search.dtype))
    wrong &= ~(np.isnan(search.output) & np.isnan(answer.y)) & ~(search.output == answer.y)
    return where(wrong.reshape(output.shape) if wrong.size == output.size else wrong, op)
