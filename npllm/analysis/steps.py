"""Attention step by step: scores, weights and weighted values of one head at one position."""

from typing import Any, NamedTuple

import numpy as np

from npllm import ops
from npllm.arrays import to_numpy
from npllm.decoding.prompt import read_prompt
from npllm.errors import NpllmValueError
from npllm.finite_scores import FROM_MODEL, check_finite
from npllm.model import Model

__all__ = ["AttentionSteps", "attention_rows", "attention_steps"]

Array = Any


class AttentionSteps(NamedTuple):
    """The four steps of attention at one position of one head, and the weights of all heads of the
    layer.
    """

    tokens: list[str]  # n_ctx texts
    scores: Array  # [n_ctx]: 1. scaled product, scale * q . k
    weights: Array  # [n_ctx]: 2. softmax over the visible keys
    weighted_values: Array  # [n_ctx, d_head]: 3. each value times its weight
    output: Array  # [d_head]: 4. their sum
    all_weights: Array  # [n_head, n_seq, n_ctx]


def attention_steps(
    model: Model, prompt: Any, *, layer: int, head: int, position: int = -1
) -> AttentionSteps:
    """Compute the steps of attention for one head of one layer, at one position of a prompt.

        scores[j] = q . k[j] / sqrt(d_head);   weights = softmax of scores over the visible j
        weighted_values[j] = weights[j] * v[j];   output = sum_j weighted_values[j]

    Parameters
    ----------
    model : Model
    prompt : str, list of messages or integer array [1, n_prompt]
    layer, head : int
    position : int
        Of the query; negative numbers count from the end.

    Returns
    -------
    steps : AttentionSteps
        NumPy arrays in the compute dtype.

    Raises
    ------
    NpllmValueError
        When layer, head or position is out of range, when there are several prompts, or when q, k
        or v is not finite.

    Notes
    -----
    Source: "Attention Is All You Need" (Vaswani et al. 2017), section 3.2.1.
    """
    config = model.config
    ids = read_prompt(model, prompt).ids
    n_batch, n_seq = ids.shape
    if n_batch != 1:
        raise NpllmValueError(f"attention_steps takes one prompt, got {n_batch}")
    _check_range("layer", layer, 0, config.num_hidden_layers)
    _check_range("head", head, 0, config.num_attention_heads)
    _check_range("position", position, -n_seq, n_seq)
    q, k, v = _queries_keys_values(model, ids, layer)
    kv_head = head // (config.num_attention_heads // config.num_key_value_heads)
    scores = k[0, kv_head] @ q[0, head, position] * config.head_dim**-0.5
    all_weights = ops.attention_weights(q, k, mask=model.mask_rule(layer))[0]
    weights = all_weights[head, position]
    weighted_values = weights[:, None] * v[0, kv_head]
    output = weighted_values.sum(axis=0)
    tokens = [model.tokenizer.token_text(i) if model.tokenizer else str(i) for i in ids[0].tolist()]
    return AttentionSteps(tokens, scores, weights, weighted_values, output, all_weights)


def attention_rows(steps: AttentionSteps) -> list[dict[str, Any]]:
    """List the steps key by key, as plain data.

    Parameters
    ----------
    steps : AttentionSteps

    Returns
    -------
    rows : list of dict
        Each {"slot", "token", "score", "weight", "weighted_value"}, the last as the length of the
        vector.
    """
    lengths = np.linalg.norm(steps.weighted_values, axis=1)
    keys = zip(steps.tokens, steps.scores, steps.weights, lengths, strict=True)
    return [
        {
            "slot": slot,
            "token": token,
            "score": float(score),
            "weight": float(weight),
            "weighted_value": float(length),
        }
        for slot, (token, score, weight, length) in enumerate(keys)
    ]


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value < high:
        raise NpllmValueError(f"{name} must lie in {low} ... {high - 1}, got {value}")


def _queries_keys_values(model: Model, ids: Array, layer: int) -> tuple[Array, ...]:
    """Return q [1, n_head, n_seq, d_head], k and v [1, n_kv_head, n_seq, d_head] of one
    layer, after RoPE, as a tap sees them.
    """
    seen = {}

    def tap(name: str, x: Array) -> Array:
        if name.startswith(f"model.layers.{layer}.self_attn."):
            seen[name.rsplit(".", 1)[-1]] = x
        return x

    model.model(ids, tap=tap)
    return tuple(
        check_finite(to_numpy(seen[name]), f"{name} of layer {layer}", FROM_MODEL)
        for name in ("q", "k", "v")
    )
