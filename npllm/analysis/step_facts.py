"""The steps of attention as plain data: what each is, its shape and its length."""

from typing import Any

import numpy as np

from npllm.analysis.steps import AttentionSteps, attention_rows

__all__ = ["STEPS", "attention_facts"]

# Field of AttentionSteps -> number of the step, axes, formula.  i is the query, j a key.
STEPS = {
    "stream": (1, "[n_ctx, d_model]", "residual stream in front of the layer"),
    "x": (1, "[n_ctx, d_model]", "x = rms_norm(stream)"),
    "q": (2, "[d_head]", "q = W_q x[i] + b_q"),
    "k": (2, "[n_ctx, d_head]", "k[j] = W_k x[j] + b_k"),
    "v": (2, "[n_ctx, d_head]", "v[j] = W_v x[j] + b_v"),
    "rotated_q": (3, "[d_head]", "R_i q, rotated by the position of the query"),
    "rotated_k": (3, "[n_ctx, d_head]", "R_j k[j], rotated by the position of the key"),
    "scores": (4, "[n_ctx]", "s[j] = rotated_q . rotated_k[j] / sqrt(d_head)"),
    "weights": (5, "[n_ctx]", "w = softmax(s) over the visible keys"),
    "weighted_values": (6, "[n_ctx, d_head]", "w[j] * v[j]"),
    "output": (7, "[d_head]", "y = sum_j w[j] * v[j], the output of the head"),
    "merged": (8, "[n_head*d_head]", "outputs of all heads side by side"),
    "o_proj": (9, "[d_model]", "W_o merged + b_o"),
    "stream_after": (10, "[d_model]", "stream[i] + o_proj"),
}


def attention_facts(steps: AttentionSteps) -> dict[str, Any]:
    """Describe every step as plain data, in order.

    Parameters
    ----------
    steps : AttentionSteps

    Returns
    -------
    facts : dict
        {"layer", "head", "kv_head", "position", "token", "steps", "keys"}.  "steps" has a dict
        for each entry of `STEPS`: {"step", "name", "axes", "shape", "formula", "length"}, the last
        that of the vector at the query's position, and None for steps 4 to 6, whose numbers are in
        "keys": `attention_rows`.
    """
    place = {name: getattr(steps, name) for name in ("layer", "head", "kv_head", "position")}
    return {
        **place,
        "token": steps.tokens[steps.position],
        "steps": [_step(steps, name) for name in STEPS],
        "keys": attention_rows(steps),
    }


def _step(steps: AttentionSteps, name: str) -> dict[str, Any]:
    number, axes, formula = STEPS[name]
    value = getattr(steps, name)
    by_key = name in ("scores", "weights", "weighted_values")
    vector = value[steps.position] if value.ndim == 2 else value
    return {
        "step": number,
        "name": name,
        "axes": axes,
        "shape": list(value.shape),
        "formula": formula,
        "length": None if by_key else float(np.linalg.norm(vector)),
    }
