"""Rotary position embedding: arrays of a case, and the trials that its laws need."""

from collections.abc import Callable
from typing import Any

import numpy as np

from npllm import ops
from npllm.testing.forms.rope import chosen_factors
from npllm.testing.laws.arrays import Array, laid_out, normal, tiny_scale
from npllm.testing.laws.trial import Trial, by_verdict
from npllm.testing.planted import run

__all__ = ["FEATURES", "N_ORIGINAL", "rope_trials", "rope_wrapper"]

FEATURES = ("partial", "magnitude", "factors", "padding", "packing", "cache", "long")
"""What can be switched off, one by one."""

N_ORIGINAL = 4096


def rope_trials(
    case: dict[str, Any],
    features: frozenset[str],  # noqa: ARG001 - of all subjects
    part: str,
    **arithmetic: Any,
) -> list:
    """Make the trials of a case: two calls of the same shape with different values."""
    return [_trial(case, seed, part, arithmetic) for seed in (case["seed"], case["seed"] + 1)]


def rope_wrapper(fn: Callable, part: str) -> Callable:
    """Put a part of the rotation into the definition of the whole."""
    if part in ("apply_rope", "rope"):
        return fn
    return lambda **inputs: run("rope", inputs, **{part: fn})


def _trial(case: dict[str, Any], seed: int, part: str, arithmetic: dict) -> Trial:
    inputs = _inputs(case, seed)
    exact = {name: x for name, x in inputs.items() if name != "n_original"}
    if exact.get("factors") is not None:
        factors = inputs["factors"]
        exact["factors"] = chosen_factors(inputs, inputs["positions"], {}, factors.shape[-1])
    x = laid_out(inputs["x"], case["layout"])
    if part != "apply_rope":
        judge = by_verdict("rope", exact, ("rope", inputs), dtype=case["dtype"], **arithmetic)
        return Trial((), inputs | {"x": x}, judge, None, case["dtype"])
    cos, sin = _tables(inputs)
    judge = by_verdict(
        "rope",
        {"x": x, "cos": cos, "sin": sin},
        ("rope", inputs),
        dtype=case["dtype"],
        **arithmetic,
    )
    return Trial((x, cos, sin), {}, judge, x.shape, case["dtype"])


def _tables(inputs: dict[str, Any]) -> tuple[Array, Array]:
    """Tables of the definition, in float32."""
    factors = inputs.get("factors")
    if factors is not None:
        factors = chosen_factors(inputs, inputs["positions"], {}, factors.shape[-1])
    inv_freq = ops.rope_frequencies(inputs["d_rope"], inputs["base"], factors)
    return ops.rope_tables(inputs["positions"], inv_freq, float(np.float32(inputs["magnitude"])))


def _inputs(case: dict[str, Any], seed: int) -> dict[str, Any]:
    """Inputs of `diagnose` for a whole rotation."""
    rng, d = np.random.default_rng(seed), case["d_head"]
    d_rope = d // 2 // 2 * 2 if case["partial"] else d
    x = normal(rng, (case["n_batch"], case["n_head"], case["n_seq"], d), case["dtype"])
    scale = {"huge": 1e3, "subnormal": tiny_scale(case["dtype"])}.get(case["size"], 1.0)
    x = (x.astype(np.float64) * scale).astype(x.dtype)
    if case["size"] == "equal":
        x = np.broadcast_to(x[..., :1], x.shape).copy()
    inputs = {
        "x": x,
        "positions": _positions(case),
        "base": case["base"],
        "d_rope": d_rope,
        "magnitude": 1.19 if case["magnitude"] else 1.0,
    }
    if case["factors"]:
        grown = np.linspace(1.0, 1.5, d_rope // 2), np.linspace(2.0, 9.0, d_rope // 2)
        inputs |= {"factors": np.stack(grown).astype(np.float32), "n_original": N_ORIGINAL}
    return inputs


def _positions(case: dict[str, Any]) -> Array:
    """Positions, integer [n_seq], or [n_batch, n_seq] where rows are padded."""
    n_seq = case["n_seq"]
    at = np.arange(case["start"], case["start"] + n_seq)
    if case["packing"] and n_seq > 1:
        at = np.concatenate([np.arange(n_seq - n_seq // 2), np.arange(n_seq // 2)])
    if not case["padding"]:
        return at
    n_pad = np.arange(case["n_batch"])[::-1] + 1
    return np.maximum(at - np.minimum(n_pad, n_seq - 1)[:, None], 0)
