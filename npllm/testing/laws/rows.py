"""Operations that work row by row, and the text of a stream: arrays of a case, and trials."""

from collections.abc import Callable
from typing import Any

import numpy as np

from npllm.arrays import DTYPES
from npllm.testing.laws.arrays import Array, laid_out, normal, tiny_scale
from npllm.testing.laws.broken import Finding
from npllm.testing.laws.trial import Trial, by_verdict

__all__ = ["ROW_TRIALS"]

TEXT = "The pieces of a stream joined are the text of all its tokens."


def _sized(x: Array, size: str, dtype: str) -> Array:
    """Values of another size, in the same dtype."""
    wide = x.astype(np.float64)
    if size == "huge":
        wide = wide * (1e12 if dtype != "float16" else 30.0)
    if size == "subnormal":
        wide = wide * tiny_scale(dtype)
    if size == "equal":
        wide = np.broadcast_to(wide[..., :1], wide.shape)
    if size == "zeros":
        wide = np.zeros_like(wide)
    return wide.astype(DTYPES[dtype])


def _rms_norm(case: dict[str, Any], rng: np.random.Generator) -> tuple[tuple, dict, dict]:
    """Rows off centre, of 3e-3 to 1, so that eps counts in some of them."""
    dtype, n = case["dtype"], case["n_row"]
    rows = normal(rng, (n, case["d_model"]), dtype).astype(np.float64) + 0.5
    rows = rows * 10.0 ** rng.uniform(-2.5, 0, (n, 1))
    if case["size"] == "cancelling":
        rows = rows + 100.0
    weight = (0.3 + 0.1 * rng.standard_normal(case["d_model"])).astype(DTYPES[dtype])
    inputs = {
        "x": _sized(rows, case["size"], dtype),
        "weight": weight,
        "eps": case["eps"],
    }
    return tuple(inputs.values()), inputs, inputs


def _linear(case: dict[str, Any], rng: np.random.Generator) -> tuple[tuple, dict, dict]:
    """Products of one sign, so that no sum cancels; of both signs where the case says so."""
    dtype, d_in = case["dtype"], case["d_in"]
    sign = np.where(rng.random(d_in) < 0.5, -1.0, 1.0)
    x, w = (0.2 + np.abs(rng.standard_normal((n, d_in))) for n in (case["n_row"], case["d_out"]))
    if case["size"] == "cancelling":
        w = w * np.where(rng.random(w.shape) < 0.5, -1.0, 1.0)
    sums_fit = dtype != "float16" or d_in < 200
    x = _sized(x, case["size"] if sums_fit else "plain", dtype).astype(np.float64) * sign
    inputs = {"x": x.astype(DTYPES[dtype]), "weight": (w * sign).astype(DTYPES[dtype])}
    if case["bias"]:
        size = np.abs(x).mean() * d_in
        inputs["bias"] = (size * (1 + rng.random(case["d_out"]))).astype(DTYPES[dtype])
    return tuple(inputs.values()), inputs, inputs


def _swiglu(case: dict[str, Any], rng: np.random.Generator) -> tuple[tuple, dict, dict]:
    """A moderate gate, on which GELU and ReLU differ from SiLU; large ones overflow exp."""
    dtype, shape = case["dtype"], (case["n_row"], case["d_ff"])
    gate = rng.standard_normal(shape) + 0.5
    up = rng.standard_normal(shape) - 0.25
    gate = gate * (60.0 if case["size"] == "huge" else 1.0)
    gate = gate.astype(DTYPES[dtype])
    up = _sized(up, "plain" if case["size"] == "huge" else case["size"], dtype)
    asked = {"gate_up": np.concatenate([gate, up], axis=-1)}
    return (gate, up), {"gate": gate, "up": up}, asked


def _qkv(case: dict[str, Any], rng: np.random.Generator) -> tuple[tuple, dict, dict]:
    """Fewer key heads than query heads in most cases."""
    n_all = case["n_head"] + 2 * case["n_kv_head"]
    size = {"n_row": case["n_seq"], "d_out": n_all * case["d_head"], "bias": False}
    (x, weight), _, _ = _linear({**case, **size}, rng)
    inputs = {"x": x[None], "weight": weight}
    inputs |= {"n_head": case["n_head"], "n_kv_head": case["n_kv_head"]}
    return tuple(inputs.values()), inputs, inputs


def _embed(case: dict[str, Any], rng: np.random.Generator) -> tuple[tuple, dict, dict]:
    """Ids of the whole table, its first and last row included."""
    ids = rng.integers(0, case["n_vocab"], (2, case["n_row"]))
    ids.flat[0], ids.flat[-1] = 0, case["n_vocab"] - 1
    weight = normal(rng, (case["n_vocab"], case["d_model"]), case["dtype"])
    inputs = {"ids": ids, "weight": _sized(weight, case["size"], case["dtype"])}
    return tuple(inputs.values()), inputs, inputs


def _lm_head(case: dict[str, Any], rng: np.random.Generator) -> tuple[tuple, dict, dict]:
    """A head and an embedding that differ."""
    _, linear, _ = _linear(case | {"bias": False}, rng)
    embedding = normal(rng, linear["weight"].shape, case["dtype"])
    asked = {"hidden": linear["x"], "weight": linear["weight"], "embedding": embedding}
    return tuple(asked.values()), linear, asked


MADE: dict[str, Callable] = {
    "rms_norm": _rms_norm,
    "linear": _linear,
    "swiglu": _swiglu,
    "qkv_projection": _qkv,
    "embed": _embed,
    "lm_head": _lm_head,
}
"""Operation -> function (case, rng) -> arguments, inputs of `verdict`, inputs of `diagnose`."""


def _trials(name: str) -> Callable:
    """Make the trials of an operation: two calls of the same shape with different values."""

    def trials(case: dict[str, Any], _: frozenset[str], **arithmetic: Any) -> list:
        return [_trial(name, case, seed, arithmetic) for seed in (case["seed"], case["seed"] + 1)]

    return trials


def _trial(name: str, case: dict[str, Any], seed: int, arithmetic: dict) -> Trial:
    arguments, inputs, asked = MADE[name](case, np.random.default_rng(seed))
    op = "linear" if name == "lm_head" else name
    by_value = by_verdict(op, inputs, (name, asked), dtype=case["dtype"], **arithmetic)
    arguments = tuple(
        laid_out(x, case["layout"]) if getattr(x, "ndim", 0) > 1 else x for x in arguments
    )
    return Trial(arguments, {}, by_value, _shape(name, inputs), case["dtype"])


def _shape(name: str, inputs: dict[str, Any]) -> tuple[int, ...] | None:
    """Shape of the output, where it is one array."""
    if name == "qkv_projection":
        return None
    if name == "swiglu":
        return inputs["gate"].shape
    if name == "rms_norm":
        return inputs["x"].shape
    if name == "embed":
        return (*inputs["ids"].shape, inputs["weight"].shape[-1])
    return (*inputs["x"].shape[:-1], len(inputs["weight"]))


# ------------------------------------------------------------------ text

PIECES = ("Hello", " world", ",", " caf\u00e9", "!", " \U0001f642", " naïve")
BROKEN = "\ufffd"


def _detokenize(case: dict[str, Any], _: frozenset[str]) -> list[Trial]:
    """A stream of pieces, some of them characters of two tokens."""
    rng = np.random.default_rng(case["seed"])
    prefixes, tokens, text = [], [], ""
    for piece in rng.choice(PIECES, case["n_token"]):
        if case["split"] and piece[-1] > "\u00ff":
            prefixes.append(text + piece[:-1] + BROKEN)
            tokens += [BROKEN, BROKEN]
        else:
            tokens.append(str(piece).strip())
        text += str(piece)
        prefixes.append(text)

    def judge(pieces: Any) -> tuple[Finding | None, float]:
        got = "".join(map(str, pieces))
        if got == text:
            return None, 0.0
        asked = {"prefixes": prefixes, "tokens": tokens}
        return Finding(TEXT, f"{got!r} instead of {text!r}", "detokenize", asked, pieces), 0.0

    return [Trial((), {"prefixes": prefixes, "tokens": tokens}, judge)]


ROW_TRIALS: dict[str, Callable] = {name: _trials(name) for name in MADE} | {
    "detokenize": _detokenize
}
"""Operation -> function (case, features) -> trials."""
