"""Status of a diagnosed output, before any convention is tried: right, wrong or not decidable.

It is that of the verdict; where an operation has none, that of the bounds of its form.
"""

from typing import Any, NamedTuple

import numpy as np

from npllm.testing.budgets import BUDGETS
from npllm.testing.forms import Array
from npllm.testing.forms.rope import chosen_factors
from npllm.testing.location import where
from npllm.testing.search import UNITS, Search, allowance, dtype_name
from npllm.testing.verdicts import Verdict, verdict

__all__ = ["OutputStatus", "is_vague", "output_status"]

CLOSE = 0.5  # share of the entries whose bound may exceed their value before nothing can be said


class OutputStatus(NamedTuple):
    """Status of an output, and where it is wrong.

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


def output_status(
    op: str, inputs: dict[str, Any], output: Array, *, is_repeated: bool = False
) -> OutputStatus:
    """Say whether an output is right.

    Parameters
    ----------
    op : str
    inputs : dict
        As `prepare` returns them.
    output : array
        In the operation's shape.
    is_repeated : bool
        The bits are those of a known order of roundings.

    Returns
    -------
    status : OutputStatus

    Notes
    -----
    An output of 16 bits is right as well where the arithmetic of its own dtype explains it, or
    where its bits are those of a known order of roundings.  The verdict's statistical budget is
    stricter than the bound: what exceeds it is wrong, though no convention may explain it.
    """
    status, search = _by_bounds(op, inputs, output)
    found = _verdict(op, inputs, output)
    if found is not None:
        short = dtype_name(output) in ("float16", "bfloat16")
        said = {"within": "right", "no gold": "not decidable"}.get(found.status, found.status)
        if not (said == "wrong" and status == "right" and short and found.model is not None):
            status = said
    status = "right" if is_repeated else status
    if status == "right":
        return OutputStatus(status, "", None, search)
    place = (
        found.where
        if found is not None and found.where != "nowhere"
        else _where(op, search, output)
    )
    return OutputStatus(status, place, None if found is None else found.model, search)


def _by_bounds(op: str, inputs: dict, output: Array) -> tuple[str, Search]:
    """Judge by the bounds of the form, in the precision of the output, then in a lower one."""
    units = {"float64": [2.0**-53, 2.0**-24]}.get(dtype_name(output), [2.0**-24])
    if dtype_name(output) in ("float16", "bfloat16"):
        units.append(UNITS[dtype_name(output)])
    searches = [Search(op, inputs, output, unit) for unit in units]
    for search in searches:
        if search.distance(()) <= 1 and search.explains_all(()):
            return ("not decidable" if is_vague(search) else "right"), search
    for search in searches[1:]:
        singles = search.distances(search.singles()).values()
        if not is_vague(search) and any(value <= 1 for value in singles):
            return "wrong", search
    return "wrong", searches[0]


def is_vague(search: Search) -> bool:
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
    if op == "attention":
        output = output.reshape(-1, *output.shape[-3:])
    return verdict(op, _plain_inputs(op, inputs), output)


def _plain_inputs(op: str, inputs: dict) -> dict:
    """Inputs as the verdict knows them: one batch axis, one mask, one set of factors."""
    plain = {
        name: x for name, x in inputs.items() if name not in ("documents", "d_rope", "n_original")
    }
    if op == "rope":
        plain["d_rope"], factors = inputs["d_rope"], inputs["factors"]
        if factors is not None:
            plain["factors"] = chosen_factors(inputs, inputs["positions"], {}, factors.shape[-1])
    return _attention_inputs(plain, inputs["documents"]) if op == "attention" else plain


def _attention_inputs(plain: dict, documents: Array) -> dict:
    """Inputs of attention with one batch axis; documents become a mask."""
    scores = (*plain["q"].shape[:-1], plain["k"].shape[-2])
    for name in ("bias", "mask"):
        if plain[name] is not None:
            plain[name] = np.broadcast_to(plain[name], scores).reshape(-1, *scores[-3:])
    for name in ("q", "k", "v"):
        plain[name] = plain[name].reshape(-1, *plain[name].shape[-3:])
    if documents is not None:
        same = (documents[:, -scores[-2] :, None] == documents[:, None, :])[:, None]
        plain["mask"] = same if plain["mask"] is None else same & plain["mask"]
    return plain


def _where(op: str, search: Search, output: Array) -> str:
    """Describe which entries are off by more than the bound."""
    answer = search.answer(())
    with np.errstate(invalid="ignore"):
        wrong = ~(np.abs(search.output - answer.y) <= allowance(answer, search.dtype))
    wrong &= ~(np.isnan(search.output) & np.isnan(answer.y)) & ~(search.output == answer.y)
    return where(wrong.reshape(output.shape) if wrong.size == output.size else wrong, op)
