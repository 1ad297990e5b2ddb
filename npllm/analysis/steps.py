"""Attention step by step: what one head looks at from one position, on a real checkpoint."""

from typing import NamedTuple

import numpy as np

from npllm import ops
from npllm.arrays import to_numpy
from npllm.decision import FROM_MODEL, check_finite
from npllm.decoding.prompt import read_prompt
from npllm.errors import NpllmValueError

__all__ = ["AttentionSteps", "attention_steps"]


class AttentionSteps(NamedTuple):
    """The four steps of attention at one position of one head, and the weights of all heads of the
    layer.
    """

    tokens: list  # n_ctx texts
    scores: np.ndarray  # [n_ctx]: 1. relevance, scale * q . k
    weights: np.ndarray  # [n_ctx]: 2. softmax over the visible keys
    weighted_values: np.ndarray  # [n_ctx, d_head]: 3. each value times its weight
    output: np.ndarray  # [d_head]: 4. their sum
    all_weights: np.ndarray  # [n_head, n_seq, n_ctx]


def attention_steps(model, prompt, *, layer, head, position=-1):
    """Follow attention through one head of one layer, at one position of a prompt.

        scores[j] = q . k[j] / sqrt(d_head);   weights = softmax of scores over the visible j
        weighted_values[j] = weights[j] * v[j];   output = sum_j weighted_values[j]

    Parameters
    ----------
    model : Model
    prompt : str, list of messages or integer array [1, n_prompt]
    layer, head : int
    position : int
        Which token asks; negative ones count from the end.

    Returns
    -------
    steps : AttentionSteps
        NumPy arrays in the compute dtype.

    Raises
    ------
    NpllmValueError
        When layer, head or position does not exist; names the range.  When there are several
        prompts, or q, k or v is not finite.

    Notes
    -----
    Source: "Attention Is All You Need" (Vaswani et al. 2017), section 3.2.1.
    """
    config = model.config
    ids = read_prompt(model, prompt).ids
    n_batch, n_seq = ids.shape
    if n_batch != 1:
        raise NpllmValueError(f"attention_steps follows one prompt, got {n_batch}")
    for name, value, low, high in (
        ("layer", layer, 0, config.num_hidden_layers),
        ("head", head, 0, config.num_attention_heads),
        ("position", position, -n_seq, n_seq),
    ):
        if not low <= value < high:
            raise NpllmValueError(f"{name} must lie in {low} ... {high - 1}, got {value}")
    q, k, v = _queries_keys_values(model, ids, layer)
    group = config.num_attention_heads // config.num_key_value_heads
    keys, values = k[0, head // group], v[0, head // group]
    scores = keys @ q[0, head, position] * config.head_dim**-0.5
    all_weights = ops.attention_weights(q, k, mask=model.mask_rule(layer))[0]
    weights = all_weights[head, position]
    weighted_values = weights[:, None] * values
    tokens = [model.tokenizer.token_text(i) if model.tokenizer else str(i) for i in ids[0].tolist()]
    return AttentionSteps(
        tokens, scores, weights, weighted_values, weighted_values.sum(axis=0), all_weights
    )


def _queries_keys_values(model, ids, layer):
    """What a tap sees of one layer: q [1, n_head, n_seq, d_head], k and v [1, n_kv_head, n_seq,
    d_head], after RoPE.
    """
    seen = {}

    def tap(name, x):
        if name.startswith(f"model.layers.{layer}.self_attn."):
            seen[name.rsplit(".", 1)[-1]] = x
        return x

    model.model(ids, tap=tap)
    return tuple(
        check_finite(to_numpy(seen[name]), f"{name} of layer {layer}", FROM_MODEL)
        for name in ("q", "k", "v")
    )
