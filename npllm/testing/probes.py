"""Probe inputs that tell conventions apart, and the files that diagnose a port in any language.

A probe is a small input on which the options of an operation give different answers.
`write_probes` writes inputs, right answers and the answer of every wrong option: a port computes,
and compares with each within the budget beside it.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from npllm.arguments import check_path
from npllm.arrays import dtype_named
from npllm.errors import NpllmOSError
from npllm.testing.forms import Array, prepare
from npllm.testing.forms.rounding import emulations
from npllm.testing.forms.table import OPS
from npllm.testing.forms.text import detokenize
from npllm.testing.probe_inputs import PROBES, Probe
from npllm.testing.rates import rounding_choices
from npllm.testing.registry import alternatives, conventions
from npllm.testing.search import Search, allowance, named

__all__ = ["PROBES", "Probe", "settling_probe", "write_probes"]


@cache
def _search(name: str) -> Search:
    """The answers of all single options on a probe."""
    probe = PROBES[name]
    inputs = prepare(probe.op, probe.make())
    return Search(probe.op, inputs, np.zeros(OPS[probe.op].shape(inputs), np.float32), 2.0**-24)


@cache
def _classes(name: str) -> dict[str, int]:
    """Number the classes of options that look alike on a probe."""
    probe = PROBES[name]
    if probe.op == "detokenize":
        texts = {
            named((choice,)): "".join(detokenize(probe.make(), dict([choice])))
            for choice in alternatives(probe.op)
        }
        texts["right"] = "".join(detokenize(probe.make(), {}))
        return {option: sorted(set(texts.values())).index(text) for option, text in texts.items()}
    groups = _search(name).classes()
    return {named(choices): number for number, group in enumerate(groups) for choices in group}


def settling_probe(op: str, undecided: list[list[str]]) -> str | None:
    """Name the probe that tells most pairs of undecided options apart; None where no probe does."""

    def settled(name: str) -> int:
        classes = _classes(name)
        found = [[classes[option] for option in group if option in classes] for group in undecided]
        return sum(a != b for group in found for n, a in enumerate(group) for b in group[:n])

    names = [probe.name for probe in PROBES.values() if probe.op == op and not probe.rounding]
    best = max(names, key=settled, default=None)
    return best if best and settled(best) else None


# ------------------------------------------------------------------ files


def write_probes(folder: str | Path) -> list[Path]:
    """Write every probe: inputs, right answers, the answer of each wrong option, and an index.

    Parameters
    ----------
    folder : path
        Made where it does not exist.

    Returns
    -------
    paths : list of Path
        "index.json" first.

    Raises
    ------
    NpllmOSError
        When the folder cannot be written.

    Notes
    -----
    For each probe: NAME.inputs and NAME.answers, as .npz and as .safetensors, with the same names
    of arrays in both.  Answers are "right/float64", "right/float32" and "right/budget", and
    "OPTION/float64" and "OPTION/budget" for each wrong option.  An output agrees with an option
    where |output - float64| <= budget in every entry, and NaN stands where it stands.
    """
    folder = check_path("folder", folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        entries, paths = [], []
        for probe in PROBES.values():
            entry, written = _write(folder, probe)
            entries.append(entry)
            paths += written
        index = folder / "index.json"
        index.write_text(
            json.dumps({"format": 1, "probes": entries}, indent=1, ensure_ascii=False),
            encoding="utf-8",
        )
    except OSError as error:
        raise NpllmOSError(
            f"{folder}: cannot be written ({error.strerror}); name another folder"
        ) from None
    return [index, *paths]


def _write(folder: Path, probe: Probe) -> tuple[dict[str, Any], list[Path]]:
    entry: dict[str, Any] = {
        "name": probe.name,
        "op": probe.op,
        "says": probe.says,
        "dtype": probe.dtype,
    }
    if probe.op == "detokenize":
        texts = {
            named((choice,)): detokenize(probe.make(), dict([choice]))
            for choice in alternatives(probe.op)
        }
        return entry | {
            "inputs": probe.make(),
            "answers": {"right": detokenize(probe.make(), {})} | texts,
        }, []
    inputs = {name: np.asarray(value) for name, value in probe.make().items()}
    answers = _rounding_answers(probe) if probe.rounding else _answers(probe)
    paths = []
    for kind, arrays in (("inputs", inputs), ("answers", answers)):
        arrays = {name: np.ascontiguousarray(x).reshape(x.shape) for name, x in arrays.items()}
        npz, tensors = (
            folder / f"{probe.name}.{kind}.npz",
            folder / f"{probe.name}.{kind}.safetensors",
        )
        np.savez(npz, **arrays)
        save_file(arrays, tensors)
        paths += [npz, tensors]
        entry[kind] = {
            "npz": npz.name,
            "safetensors": tensors.name,
            "arrays": {
                name: {"dtype": str(x.dtype), "shape": list(x.shape)} for name, x in arrays.items()
            },
        }
    entry["numbers"] = {name: x.item() for name, x in inputs.items() if x.ndim == 0}
    entry["options"] = _options(probe)
    return entry, paths


def _options(probe: Probe) -> dict[str, Any]:
    """What each option of a probe means, and which look alike on it."""
    found = {}
    for name, option in alternatives(probe.op, rounding=probe.rounding):
        found[f"{name} {option}"] = {
            "convention": name,
            "option": option,
            "says": conventions[name].options[option].says,
        }
    if probe.rounding:
        return found
    classes = _classes(probe.name)
    return {
        name: facts
        | {
            "same_as_right": classes[name] == classes["right"],
            "same_as": sorted(
                other for other in classes if classes[other] == classes[name] and other != name
            ),
        }
        for name, facts in found.items()
        if name in classes
    }


def _answers(probe: Probe) -> dict[str, Array]:
    """Arrays of the right answer and of each wrong option, in the shape of the output."""
    search = _search(probe.name)
    shape = OPS[probe.op].shape(search.inputs)
    arrays = {}
    for choices in [(), *search.singles()]:
        answer, name = search.answer(choices), named(choices)
        arrays[f"{name}/float64"] = answer.y.reshape(shape)
        arrays[f"{name}/budget"] = allowance(answer, "float32").reshape(shape)
        if not choices:
            arrays[f"{name}/float32"] = answer.y.astype(np.float32).reshape(shape)
    return arrays


def _rounding_answers(probe: Probe) -> dict[str, Array]:
    """Outputs of each option of a probe of rounding: float32, of values that its dtype holds."""
    inputs, dtype = prepare(probe.op, probe.make()), dtype_named(probe.dtype)
    shape = OPS[probe.op].shape(inputs)
    arrays = {}
    for name, options in rounding_choices(probe.op, dtype).items():
        for option in options:
            for style, y in enumerate(emulations(name, option, probe.op, inputs, dtype)):
                arrays[f"{name} {option}/{probe.dtype}/{style}"] = y.reshape(shape)
    return arrays
