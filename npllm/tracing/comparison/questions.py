"""Nodes of the graph as operations of `npllm.testing.diagnose`, with their inputs and output."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from npllm.errors import NpllmError
from npllm.models import rope
from npllm.testing.inputs import f64
from npllm.tracing.comparison.graft import Run
from npllm.tracing.comparison.nodes import Exact
from npllm.tracing.comparison.operations import table_arguments

__all__ = ["questions", "rope_question"]

Array = Any
Question = tuple[str, dict[str, Any]]

MOST_WEIGHTS = 2**24  # entries of a matrix that the search is run on


def questions(
    run: Run, name: str, t: int, exact: Exact, x: Array
) -> Iterator[tuple[Question, Array]]:
    """Ask `diagnose` about a node: operation and inputs, output.

    Parameters
    ----------
    run : Run
    name : str
    t : int
    exact : Exact
        Its call has the inputs.
    x : array
        The output.
    """
    a, op = exact.call.arguments, run.graphs[t][name].op
    x = x if str(x.dtype) != "float64" else f64(x)
    if op in ("rms_norm", "linear") and np.size(a["weight"]) <= MOST_WEIGHTS:
        kept = {key: a[key] for key in ("x", "weight", "eps", "bias") if a.get(key) is not None}
        if name == "lm_head":
            table = run.settings[t].weights.weight("model.embed_tokens")
            kept = {"hidden": a["x"], "weight": f64(a["weight"]), "embedding": f64(table)}
            yield ("lm_head", kept), x
            yield ("linear", {"x": a["x"], "weight": f64(a["weight"])}), x
        else:
            yield (op, {key: f64(one) if np.ndim(one) else one for key, one in kept.items()}), x
    if op == "embed":
        yield ("embed", {"ids": a["ids"], "weight": f64(a["weight"])}), x
    if op == "swiglu":
        yield ("swiglu", {"gate_up": np.concatenate([a["gate"], a["up"]], axis=-1)}), x
    if op == "rope":
        yield ("rope", rope_question(run, t, a["x"])), x
    if op == "tables":
        yield from _of_tables(run, name, t)
    if op == "attention":
        yield ("attention", _attention_question(run, t, a)), x


def rope_question(run: Run, t: int, x: Array) -> dict[str, Any]:
    """Inputs of "rope": constants of the config, positions of the step."""
    config, step = run.config, run.settings[t].step
    parameters = config.rope_parameters
    found = {"x": x, "positions": step.positions, "base": float(parameters.rope_theta)}
    found |= {"d_rope": config.d_rope, "magnitude": rope.attention_factor(config)}
    if parameters.rope_type == "longrope":
        factors = [parameters.short_factor, parameters.long_factor]
        found["factors"] = np.asarray(factors, dtype=np.float32)
        found["n_original"] = config.original_max_position_embeddings
    elif parameters.rope_type != "default":
        factors = table_arguments(config, step)["factors"]
        found["factors"] = factors[0].reshape(-1)
    return found


def _of_tables(run: Run, name: str, t: int) -> Iterator[tuple[Question, Array]]:
    """Tables are the rotation of a head of ones and zeros; else what they did to queries shows."""
    names = "model.rotary_emb.cos", "model.rotary_emb.sin"
    half = run.config.d_rope // 2
    head = table_arguments(run.config, run.settings[t].step)["x"]
    real = run.settings[t].step.real[:, None, :, None]  # known values are zeros at padding
    question = rope_question(run, t, f64(head) * real)
    try:
        cos, sin = (run.known(one, t).value[..., :half] for one in names)
        dtype = run.raw(name, t).dtype if run.has(name, t) else np.dtype(np.float64)
    except NpllmError:
        return
    if cos.shape == sin.shape == (*head.shape[:1], head.shape[2], half):
        yield ("rope", question), np.concatenate([cos, sin], axis=-1)[:, None].astype(dtype)


def _attention_question(run: Run, t: int, a: dict[str, Any]) -> dict[str, Any]:
    setting, n_ctx = run.settings[t], a["k"].shape[-2]
    found = {name: a[name] for name in "qkv"}
    found |= {"causal": True, "window": run.config.sliding_window, "d_rope": run.config.d_rope}
    if not setting.step.valid.all():
        found["valid"] = setting.step.valid[:, -n_ctx:]
    if setting.documents is not None:
        found["documents"] = setting.documents[:, -n_ctx:]
    return found
