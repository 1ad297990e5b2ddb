"""What is wrong with an operation: its convention by `npllm.testing.diagnose`, or what else it did.

Where an input was not recorded, the options are held against the budget of the whole chain.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from npllm.errors import NpllmError
from npllm.models import rope
from npllm.testing.diagnosis import diagnose
from npllm.testing.forms import NotApplicableError, evaluate, prepare
from npllm.testing.inputs import f64
from npllm.testing.registry import alternatives
from npllm.tracing.graft import NotRecordedError, Run, without_padding
from npllm.tracing.nodes import Exact
from npllm.tracing.operations import table_arguments
from npllm.tracing.wiring import wired

__all__ = ["explain"]

Array = Any
Question = tuple[str, dict[str, Any]]

MOST_WEIGHTS = 2**24  # entries of a matrix that the search is run on
CLOSE = 2.0  # budgets within which an option explains a chain of operations


def explain(run: Run, name: str, t: int, exact: Exact, x: Array) -> str:
    """Name what an operation did instead of its definition.

    Parameters
    ----------
    run : Run
    name : str
    t : int
    exact : Exact
        The answer that the value disagrees with.
    x : array
        The value in our order.

    Returns
    -------
    text : str
        Convention and option, such as "C7 up first"; empty where nothing is known.
    """
    if np.isnan(f64(x)).all() or x.shape != exact.value.shape:
        return ""
    x = without_padding(name, x, run.settings[t].step).astype(x.dtype)
    for question, output in _questions(run, name, t, exact, x):
        found = _asked(question, output, run, exact)
        if found:
            return found
    return wired(run, name, t, exact, x)


def _asked(question: Question, output: Array, run: Run, exact: Exact) -> str:
    """The answer of `diagnose`, else the option that is nearest."""
    op, inputs = question
    is_chain = any(isinstance(one, Exact) for one in exact.inputs)
    try:
        if not is_chain:
            found = diagnose(op, inputs, output)
            return " & ".join(found.names) or (found.model or "")
        return _nearest(op, inputs, output, run, exact)
    except NpllmError:
        return ""


def _nearest(op: str, inputs: dict[str, Any], output: Array, run: Run, exact: Exact) -> str:
    """The single option within the budget of the chain: several, where they agree."""
    prepared, level = prepare(op, inputs), run.levels(output)[-1]
    allowed, found = exact.error(level), {}
    for name, option in alternatives(op):
        try:
            answer = evaluate(op, prepared, {name: option})
        except NotApplicableError:
            continue
        if answer.y.size != output.size:
            continue
        error = np.abs(answer.y.reshape(output.shape) - f64(output))
        with np.errstate(all="ignore"):
            share = float(np.max(np.where(error > 0, error / allowed, 0.0)))
        if share <= CLOSE:
            found[f"{name} {option}"] = share
    return " or ".join(sorted(found, key=lambda text: found[text]))


# ------------------------------------------------------------------ questions


def _questions(
    run: Run, name: str, t: int, exact: Exact, x: Array
) -> Iterator[tuple[Question, Array]]:
    """Operations of `diagnose` with the inputs and the output of a node."""
    a, op = exact.call.arguments, run.graphs[t][name].op
    x = x if str(x.dtype) != "float64" else f64(x)
    if op in ("rms_norm", "linear") and np.size(a["weight"]) <= MOST_WEIGHTS:
        kept = {key: a[key] for key in ("x", "weight", "eps", "bias") if a.get(key) is not None}
        if name == "lm_head":
            table = run.settings[t].weights.params.embed_tokens
            kept = {"hidden": a["x"], "weight": f64(a["weight"]), "embedding": f64(table)}
            yield ("lm_head", kept), x
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
    question = rope_question(run, t, f64(head))
    try:
        cos, sin = (run.known(one, t).value[..., :half] for one in names)
        dtype = run.raw(name, t).dtype
    except (NotRecordedError, NpllmError):
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
