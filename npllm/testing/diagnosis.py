"""Which convention is wrong: the smallest set of options that explains an output."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from npllm.errors import NpllmValueError
from npllm.testing.arithmetic_models import FLUSHED
from npllm.testing.diagnosis_status import is_vague, output_status
from npllm.testing.diagnosis_text import lines_of
from npllm.testing.forms import Array, op_named, prepare
from npllm.testing.forms.text import detokenize
from npllm.testing.libraries import on_host
from npllm.testing.rates import rounding_options
from npllm.testing.registry import alternatives, conventions
from npllm.testing.search import Choices, Search, named

__all__ = ["Diagnosis", "diagnose"]

REPEATED = 0.9  # share of equal bits above which an output follows a known order of roundings


@dataclass(frozen=True)
class Diagnosis:
    """What is known of an output.

    Parameters
    ----------
    status : str
        "right", "wrong" or "not decidable".
    names : list of str
        The smallest set of options that explains a wrong output, such as ["C9 top-left"]; options
        that this input cannot tell apart stand in one name, joined by " or ".  Empty: right, or no
        listed option explains it.
    runner_up : tuple of str and float, optional
        The nearest other explanation, and its distance from the output in budgets.
    undecided : list of list of str
        Classes of options that give the same output on this input, within budget; "right" stands
        for the definition.
    probe : str, optional
        The built-in probe input that tells most of them apart; `npllm probes` writes it.
    where : str
        Where the error lives.
    model : str, optional
        The arithmetic that explains a wrong output, such as "bfloat16 accumulation".
    rounding : dict
        Convention id -> option, where equal bits show one that is not ours.
    """

    status: str
    names: list[str] = field(default_factory=list)
    runner_up: tuple[str, float] | None = None
    undecided: list[list[str]] = field(default_factory=list)
    probe: str | None = None
    where: str = ""
    model: str | None = None
    rounding: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join(lines_of(self))

    def facts(self) -> dict[str, Any]:
        """Return the fields as a dict of what JSON holds."""
        facts = asdict(self)
        if self.runner_up:
            name, value = self.runner_up
            facts["runner_up"] = {"name": name, "distance": value if np.isfinite(value) else None}
        return facts


def diagnose(op: str, inputs: Mapping[str, Any], output: Any) -> Diagnosis:
    """Name the convention that an implementation got wrong.

    Tries the definition, each wrong option alone, then pairs; the smallest set whose float64 answer
    lies within the error budget of the output is the answer.

    Parameters
    ----------
    op : str
        A key of `npllm.testing.forms.OPS`: "attention", "rope", "rms_norm", "swiglu",
        "qkv_projection", "linear", "sampler", ...; or "detokenize".
    inputs : dict
        By parameter name, arrays of any library and numbers.
    output : array
        What the implementation returned, in its own dtype; q, k, v for "qkv_projection" as a tuple,
        a dict or side by side; the pieces of text for "detokenize".

    Returns
    -------
    diagnosis : Diagnosis

    Raises
    ------
    NpllmValueError
        For an unknown operation or input, or an output of another shape.

    Notes
    -----
    A name is given only where the option explains every entry, and none where subnormal numbers
    flushed to zero explain it.  Where rounding could explain any output, the status is "not
    decidable".  Large inputs are searched on some rows and confirmed on
    all; what they cannot decide is said of those rows.
    """
    if op == "detokenize":
        return _diagnose_text(inputs, output)
    prepared = prepare(op, {name: on_host(value) for name, value in inputs.items()})
    output = _output(op, prepared, output)
    rates = rounding_options(op, prepared, output)
    rounding = {name: option for name, (option, _) in rates.items()}
    is_repeated = any(rate >= REPEATED and name != "C30" for name, (_, rate) in rates.items())
    found = output_status(op, prepared, output, is_repeated=is_repeated)
    groups = found.search.classes()
    undecided = _undecided(groups)
    names: list[Any] = []
    runner_up = None
    is_flushed = found.model is not None and found.model.endswith(FLUSHED)
    if found.status == "wrong" and not is_flushed and not is_vague(found.search):
        names, runner_up = _explain(found.search, groups)
    if found.status == "wrong" and not names and rounding.get("C30", "float32") != "float32":
        names = [f"C30 {rounding['C30']}"]
    return Diagnosis(
        found.status,
        names,
        runner_up,
        undecided,
        _probe(op, undecided),
        found.where,
        found.model,
        _surprising(rounding),
    )


def _surprising(rounding: dict[str, str]) -> dict[str, str]:
    """Options other than ours."""
    return {name: option for name, option in rounding.items() if option != conventions[name].ours}


def _output(op: str, inputs: dict, output: Any) -> Array:
    """Bring an output to the host and check its shape."""
    if op == "qkv_projection" and isinstance(output, Mapping):
        output = [output[name] for name in "qkv"]
    if isinstance(output, (tuple, list)) and op == "qkv_projection":
        output = np.concatenate([np.asarray(on_host(part)) for part in output], axis=-3)
    output, wanted = np.asarray(on_host(output)), op_named(op).shape(inputs)
    if tuple(output.shape) != tuple(wanted):
        raise NpllmValueError(
            f"output of {op} must be {list(wanted)} for these inputs, got {list(output.shape)}; "
            "are axes exchanged?"
        )
    return output


# ------------------------------------------------------------------ explanations


def _explain(
    search: Search, groups: list[list[Choices]]
) -> tuple[list[str], tuple[str, float] | None]:
    """Return the names of the smallest explanation, and the runner-up."""
    hidden = [choices for choices in groups[0] if choices]
    visible = [choices for group in groups[1:] for choices in group]
    tried: dict[Choices, float] = {}
    unsure = [choices for choices in hidden if np.isinf(search.answer(choices).slack).any()]
    few = search.narrowed()
    for looked, candidates in (
        (search, visible + unsure),
        (few, search.pairs(visible)),
        (few, _mixed(visible, hidden)),
    ):
        found = looked.distances(candidates)
        tried |= found
        matches = [
            choices
            for choices, value in found.items()
            if value <= 1 and search.explains_all(choices)
        ]
        if matches:
            matches.sort(key=lambda choices: found[choices])
            rest = {choices: value for choices, value in tried.items() if choices not in matches}
            return _names(matches), _nearest(rest)
    return [], _nearest(tried)


def _mixed(visible: list[Choices], hidden: list[Choices]) -> list[Choices]:
    """Pairs of an option that shows and one that shows only beside another."""
    pairs = [(*a, *b) for a in visible for b in hidden if a[0][0] != b[0][0]]
    return [tuple(sorted(pair, key=lambda choice: int(choice[0][1:]))) for pair in pairs]


def _names(matches: list[Choices]) -> list[str]:
    if len(matches) == 1:
        return [named((choice,)) for choice in matches[0]]
    return [" or ".join(named(choices) for choices in matches)]


def _nearest(distances: dict[Choices, float]) -> tuple[str, float] | None:
    if not distances:
        return None
    choices = min(distances, key=lambda key: distances[key])
    return named(choices), distances[choices]


def _undecided(groups: list[list[Choices]]) -> list[list[str]]:
    return [[named(choices) for choices in group] for group in groups if len(group) > 1]


def _probe(op: str, undecided: list[list[str]]) -> str | None:
    """The probe input that tells most of the undecided options apart."""
    if not undecided:
        return None
    from npllm.testing.probes import settling_probe

    return settling_probe(op, undecided)


# ------------------------------------------------------------------ text


def _diagnose_text(inputs: Mapping[str, Any], output: Any) -> Diagnosis:
    """Compare the text of a stream, piece by piece where pieces are given."""
    for name in ("prefixes", "tokens"):
        if name not in inputs:
            raise NpllmValueError(
                f"inputs of detokenize must be prefixes, tokens; got {', '.join(inputs)}"
            )
    got = "".join(map(str, np.asarray(output).ravel() if not isinstance(output, str) else [output]))
    groups: dict[str, list[str]] = {"".join(detokenize(dict(inputs), {})): ["right"]}
    for choice in alternatives("detokenize"):
        groups.setdefault("".join(detokenize(dict(inputs), dict([choice]))), []).append(
            named((choice,))
        )
    undecided = [group for group in groups.values() if len(group) > 1]
    probe = _probe("detokenize", undecided)
    matches = groups.get(got, [])
    if "right" in matches:
        return Diagnosis("right", undecided=undecided, probe=probe)
    names = [" or ".join(matches)] if matches else []
    right = next(iter(groups))
    same = next(
        (n for n, (a, b) in enumerate(zip(got, right, strict=False)) if a != b),
        min(len(got), len(right)),
    )
    return Diagnosis(
        "wrong",
        names,
        undecided=undecided,
        probe=probe,
        where=f"text differs from character {same}",
    )
