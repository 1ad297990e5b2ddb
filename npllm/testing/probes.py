"""Probe inputs that tell conventions apart, and the files that diagnose a port in any language.

A probe is a small input on which the options of an operation give different answers.  `write_probes` writes inputs, right
answers and the answer of every wrong option: a port computes, and compares with each within the budget beside it.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from npllm.arrays import dtype_named
from npllm.errors import NpllmOSError
from npllm.testing.forms import Array, prepare
from npllm.testing.forms.rounding import emulations
from npllm.testing.forms.table import OPS
from npllm.testing.forms.text import detokenize
from npllm.testing.rates import rounding_choices
from npllm.testing.registry import alternatives, conventions
from npllm.testing.search import Search, allowance, named

__all__ = ["PROBES", "Probe", "settling_probe", "write_probes"]


@dataclass(frozen=True)
class Probe:
    """An input that tells options apart.

    Parameters
    ----------
    name : str
    op : str
    says : str
        What it contains, and what it is for.
    make : function () -> dict
        The inputs by parameter name; the same at every call.
    dtype : str
        Of the output.
    rounding : bool
        It shows roundings, as rates of equal bits, and nothing else.
    """

    name: str
    op: str
    says: str
    make: Callable[[], dict[str, Any]]
    dtype: str = "float32"
    rounding: bool = False


def _normal(seed: int, *shape: int, scale: float = 1.0) -> Array:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def _bfloat16(x: Array) -> Array:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


# ------------------------------------------------------------------ attention


def _attention_padded() -> dict[str, Any]:
    q, k, v = _normal(1, 2, 6, 16, 16), _normal(2, 2, 3, 29, 16), _normal(3, 2, 3, 29, 16)
    q[:, :, 0] *= 2000  # scores that -1e4 cannot hide
    valid = np.ones((2, 29), dtype=bool)
    valid[0, :17] = False
    return {"q": q, "k": k, "v": v, "causal": True, "window": 4, "valid": valid, "scale": 0.3}


def _attention_cached() -> dict[str, Any]:
    return {"q": _normal(4, 2, 6, 5, 16), "k": _normal(5, 2, 3, 13, 16), "v": _normal(6, 2, 3, 13, 16),
            "causal": True, "window": 6, "scale": 0.4, "d_rope": 12}


def _attention_unwindowed() -> dict[str, Any]:
    valid = np.arange(14) >= np.array([[5], [0]])
    return {"q": _normal(13, 2, 4, 6, 12), "k": _normal(14, 2, 2, 14, 12), "v": _normal(15, 2, 2, 14, 12), "valid": valid}


def _attention_packed() -> dict[str, Any]:
    q, k, v = (_normal(seed, 1, 4, 9, 12) for seed in (7, 8, 9))
    return {"q": q, "k": k, "v": v, "causal": True, "scale": 0.35,
            "documents": np.array([[0, 0, 0, 0, 1, 1, 1, 1, 1]])}


def _attention_bfloat16() -> dict[str, Any]:
    q, k, v = (_bfloat16(_normal(seed, 1, 4, 24, 24, scale=1.5)) for seed in (10, 11, 12))
    return {"q": q, "k": k, "v": v, "causal": True}


# ------------------------------------------------------------------ rope


def _rope_long() -> dict[str, Any]:
    factors = np.stack([np.linspace(1.0, 1.5, 6), np.linspace(2.0, 9.0, 6)]).astype(np.float32)
    return {"x": _normal(20, 2, 3, 4, 20), "positions": np.array([3, 15962, 15963, 70001]), "base": 5e5, "d_rope": 12,
            "magnitude": 1.19, "factors": factors, "n_original": 4096}


def _rope_across() -> dict[str, Any]:
    return _rope_long() | {"x": _normal(21, 2, 3, 6, 20), "positions": np.arange(4093, 4099)}


def _rope_beyond() -> dict[str, Any]:
    return _rope_long() | {"x": _normal(22, 2, 3, 4, 20), "positions": np.arange(6000, 6004)}


def _rope_below() -> dict[str, Any]:
    return _rope_long() | {"x": _normal(23, 2, 3, 4, 20), "positions": np.arange(300, 304)}


def _rope_padded() -> dict[str, Any]:
    return {"x": _normal(24, 2, 3, 7, 20), "positions": np.array([[0, 0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]]),
            "base": 5e5, "d_rope": 12, "magnitude": 1.19}


def _rope_packed() -> dict[str, Any]:
    return {"x": _normal(25, 1, 3, 7, 20), "positions": np.array([0, 1, 2, 3, 0, 1, 2]), "base": 5e5, "d_rope": 12,
            "magnitude": 1.19}


def _rope_bits() -> dict[str, Any]:
    return {"x": _normal(26, 1, 4, 16, 32), "positions": np.arange(900, 916), "base": 5e5, "d_rope": 32}


# ------------------------------------------------------------------ rows, sampler, text


def _norm_small() -> dict[str, Any]:
    sizes = np.array([3e-3, 1e-2, 1e-1, 1.0], dtype=np.float32)[:, None]
    gain = (0.3 + 0.1 * np.random.default_rng(31).standard_normal(24)).astype(np.float32)
    return {"x": sizes * (_normal(30, 4, 24) + np.float32(0.5)), "weight": gain, "eps": 1e-4}


def _norm_bfloat16() -> dict[str, Any]:
    return {"x": _bfloat16(_normal(32, 16, 96)), "weight": _bfloat16(1 + _normal(33, 96, scale=0.3)), "eps": 1e-5}


def _linear_bfloat16() -> dict[str, Any]:
    return {"x": _bfloat16(_normal(34, 8, 96)), "weight": _bfloat16(_normal(35, 24, 96, scale=0.1))}


def _linear_rectangular() -> dict[str, Any]:
    return {"x": _normal(36, 5, 20), "weight": _normal(37, 12, 20)}


def _linear_biased() -> dict[str, Any]:
    return _linear_rectangular() | {"bias": _normal(45, 12)}


def _swiglu_moderate() -> dict[str, Any]:
    return {"gate_up": _normal(38, 6, 32) + np.repeat(np.float32([0.5, -0.25]), 16)}


def _qkv_grouped() -> dict[str, Any]:
    return {"x": _normal(39, 2, 5, 10), "weight": _normal(40, 8 * 6, 10), "n_head": 4, "n_kv_head": 2}


def _embed_table() -> dict[str, Any]:
    return {"ids": np.array([[3, 0, 7], [1, 6, 3]]), "weight": _normal(41, 8, 12)}


def _head_untied() -> dict[str, Any]:
    return {"hidden": _normal(42, 3, 12), "weight": _normal(43, 8, 12), "embedding": _normal(44, 8, 12)}


def _sampler_boundaries() -> dict[str, Any]:
    rows = [[3.0, 1.0, 0.0, -2.0, -1.5, -4.0, -3.5, -4.0], [1.5, 0.5, -2.0, -1.5, 2.0, 1.0, 0.0, -1.5],
            [-30.0, -30.0, 2.0, 3.0, 2.0, 3.0, 2.0, 2.0], [-2.5, 0.0, -1.5, -2.5, 3.5, 2.5, -3.0, 3.5],
            [2.0, 2.0, 3.0, 2.0, 3.0, 3.0, 2.0, 3.0], [0.5, 4.0, 1.5, 1.0, 2.5, 0.0, 3.0, 2.0],
            [2.0, 1.5, 2.5, 1.0, 1.5, 2.5, 0.5, 2.0], [1.0, 3.0, 1.0, 2.0, 1.0, 2.0, 3.0, 0.0]]
    return {"logits": np.array(rows, dtype=np.float32), "temperature": 2.0, "top_k": 4, "top_p": 0.75, "min_p": 0.3}


def _text_stream() -> dict[str, Any]:
    broken = "\ufffd"
    return {"prefixes": ["Hello", "Hello world", "Hello world " + broken, "Hello world \U0001f642", "Hello world \U0001f642!"],
            "tokens": ["Hello", "world", broken, broken, "!"]}


_ALL = [
    Probe("attention-padded", "attention", "Grouped heads, more keys than queries, window, left padding, rows without keys, "
          "one row of large q.", _attention_padded),
    Probe("attention-cached", "attention", "A cache, no padding; a last tile that is not full.", _attention_cached),
    Probe("attention-unwindowed", "attention", "Left padding and a cache, no window.", _attention_unwindowed),
    Probe("attention-packed", "attention", "As many keys as queries, as many key heads as query heads, two documents.",
          _attention_packed),
    Probe("attention-lse-padded", "attention_lse", "The log-sum-exp of attention-padded.", _attention_padded),
    Probe("attention-lse-cached", "attention_lse", "The log-sum-exp of attention-cached.", _attention_cached),
    Probe("attention-bfloat16", "attention", "Where the softmax and the scale round.", _attention_bfloat16, "bfloat16", True),
    Probe("rope-long", "rope", "Positions 3 ... 70001, part of the head, a base of 5e5, a magnitude, two sets of factors.",
          _rope_long),
    Probe("rope-across", "rope", "A call that crosses the original context.", _rope_across),
    Probe("rope-beyond", "rope", "A call beyond the original context.", _rope_beyond),
    Probe("rope-below", "rope", "A call below the original context.", _rope_below),
    Probe("rope-padded", "rope", "Two rows, one of them padded on the left.", _rope_padded),
    Probe("rope-packed", "rope", "Positions that start again.", _rope_packed),
    Probe("rope-bits", "rope", "Short positions, on which the dtype of the phase shows in the last bits.", _rope_bits,
          "float32", True),
    Probe("rms-norm-small", "rms_norm", "Rows of size 3e-3 ... 1, off centre, a gain of about 0.3.", _norm_small),
    Probe("rms-norm-bfloat16", "rms_norm", "Where the row is rounded.", _norm_bfloat16, "bfloat16", True),
    Probe("swiglu-moderate", "swiglu", "Gate and up different, and moderate.", _swiglu_moderate),
    Probe("linear-rectangular", "linear", "A weight that is not square.", _linear_rectangular),
    Probe("linear-biased", "linear", "A bias.", _linear_biased),
    Probe("linear-bfloat16", "linear", "What the sums are rounded to.", _linear_bfloat16, "bfloat16", True),
    Probe("qkv-grouped", "qkv_projection", "Fewer key heads than query heads.", _qkv_grouped),
    Probe("embed-table", "embed", "A small table.", _embed_table),
    Probe("lm-head-untied", "lm_head", "A head and an embedding that differ.", _head_untied),
    Probe("sampler-boundaries", "sampler", "Rows on which orders and boundaries differ; cumulative sums equal to top_p; ties.",
          _sampler_boundaries),
    Probe("detokenize-stream", "detokenize", "A space inside, and a character of several tokens.", _text_stream),
]

PROBES: dict[str, Probe] = {probe.name: probe for probe in _ALL}
"""Name -> Probe."""


@cache
def _search(name: str) -> Search:
    """The answers of all single options on a probe."""
    probe = PROBES[name]
    inputs = prepare(probe.op, probe.make())
    return Search(probe.op, inputs, np.zeros(OPS[probe.op].shape(inputs), np.float32), 2.0**-24)


@cache
def _classes(name: str) -> dict[str, int]:
    """Number of the class that each option falls into on a probe; options in one class look alike."""
    probe = PROBES[name]
    if probe.op == "detokenize":
        texts = {named((choice,)): "".join(detokenize(probe.make(), dict([choice]))) for choice in alternatives(probe.op)}
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
    For each probe: NAME.inputs and NAME.answers, as .npz and as .safetensors, with the same names of arrays in both.  Answers
    are "right/float64", "right/float32" and "right/budget", and "OPTION/float64" and "OPTION/budget" for each wrong option.  An
    output agrees with an option where |output - float64| <= budget in every entry, and NaN stands where it stands.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        entries, paths = [], []
        for probe in PROBES.values():
            entry, written = _write(folder, probe)
            entries.append(entry)
            paths += written
        index = folder / "index.json"
        index.write_text(json.dumps({"format": 1, "probes": entries}, indent=1, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        raise NpllmOSError(f"{folder}: cannot be written ({error.strerror}); name another folder") from None
    return [index, *paths]


def _write(folder: Path, probe: Probe) -> tuple[dict[str, Any], list[Path]]:
    entry: dict[str, Any] = {"name": probe.name, "op": probe.op, "says": probe.says, "dtype": probe.dtype}
    if probe.op == "detokenize":
        texts = {named((choice,)): detokenize(probe.make(), dict([choice])) for choice in alternatives(probe.op)}
        return entry | {"inputs": probe.make(), "answers": {"right": detokenize(probe.make(), {})} | texts}, []
    inputs = {name: np.asarray(value) for name, value in probe.make().items()}
    answers = _rounding_answers(probe) if probe.rounding else _answers(probe)
    paths = []
    for kind, arrays in (("inputs", inputs), ("answers", answers)):
        arrays = {name: np.ascontiguousarray(x).reshape(x.shape) for name, x in arrays.items()}
        npz, tensors = folder / f"{probe.name}.{kind}.npz", folder / f"{probe.name}.{kind}.safetensors"
        np.savez(npz, **arrays)
        save_file(arrays, tensors)
        paths += [npz, tensors]
        entry[kind] = {"npz": npz.name, "safetensors": tensors.name,
                       "arrays": {name: {"dtype": str(x.dtype), "shape": list(x.shape)} for name, x in arrays.items()}}
    entry["numbers"] = {name: x.item() for name, x in inputs.items() if x.ndim == 0}
    entry["options"] = _options(probe)
    return entry, paths


def _options(probe: Probe) -> dict[str, Any]:
    """What each option of a probe means, and which look alike on it."""
    found = {}
    for name, option in alternatives(probe.op, rounding=probe.rounding):
        found[f"{name} {option}"] = {"convention": name, "option": option, "says": conventions[name].options[option].says}
    if probe.rounding:
        return found
    classes = _classes(probe.name)
    return {name: facts | {"same_as_right": classes[name] == classes["right"],
                           "same_as": sorted(other for other in classes if classes[other] == classes[name] and other != name)}
            for name, facts in found.items() if name in classes}


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
    """Outputs of each option of a probe of rounding, as float32 arrays of values that its dtype holds; one a style."""
    inputs, dtype = prepare(probe.op, probe.make()), dtype_named(probe.dtype)
    shape = OPS[probe.op].shape(inputs)
    arrays = {}
    for name, options in rounding_choices(probe.op, dtype).items():
        for option in options:
            for style, y in enumerate(emulations(name, option, probe.op, inputs, dtype)):
                arrays[f"{name} {option}/{probe.dtype}/{style}"] = y.reshape(shape)
    return arrays
