"""Attention step by step: from the residual stream through one head, and back into the stream."""

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
    """The steps of attention for one head at one position, in the order of the computation.

        x = rms_norm(stream)
        q = W_q x[i] + b_q;   k[j] = W_k x[j] + b_k;   v[j] = W_v x[j] + b_v
        scores[j] = (R_i q) . (R_j k[j]) / sqrt(d_head);   weights = softmax over the visible j
        output = sum_j weights[j] * v[j];   stream_after = stream[i] + W_o merged + b_o

    i is the position of the query, j that of a key.  Arrays are in the compute dtype; a bias b is 0
    where the checkpoint has none.

    Attributes
    ----------
    tokens : list of str
        n_ctx texts, one for each token of the prompt.
    layer, head, kv_head, position : int
        kv_head = head // (n_head // n_kv_head); position is i, 0 ... n_ctx - 1.
    stream : array [n_ctx, d_model]
        Step 1: the residual stream in front of the layer.
    x : array [n_ctx, d_model]
        Step 1: rms_norm(stream), the input of queries, keys and values.
    q : array [d_head]
        Step 2: W_q x[i] + b_q.
    k, v : array [n_ctx, d_head]
        Step 2: W_k x[j] + b_k, W_v x[j] + b_v.
    rotated_q : array [d_head]
        Step 3: R_i q, the rotation by the position of the query.
    rotated_k : array [n_ctx, d_head]
        Step 3: R_j k[j], each by its own position.
    scores : array [n_ctx]
        Step 4: rotated_q . rotated_k[j] / sqrt(d_head), of the keys that are not visible too.
    visible : boolean array [n_ctx]
        Step 4: whether the mask lets the query see the key.
    weights : array [n_ctx]
        Step 5: softmax of the scores over the visible keys, 0 elsewhere.
    weighted_values : array [n_ctx, d_head]
        Step 6: weights[j] * v[j].
    output : array [d_head]
        Step 7: sum_j weights[j] * v[j], the output of this head.
    merged : array [n_head*d_head]
        Step 8: the outputs of all heads side by side.
    o_proj : array [d_model]
        Step 9: W_o merged + b_o, what attention adds to the stream.
    stream_after : array [d_model]
        Step 10: stream[i] + o_proj, the residual stream behind attention.
    all_weights : array [n_head, n_seq, n_ctx]
        Step 5 of all heads and queries of the layer.
    """

    tokens: list[str]
    layer: int
    head: int
    kv_head: int
    position: int
    stream: Array
    x: Array
    q: Array
    k: Array
    v: Array
    rotated_q: Array
    rotated_k: Array
    scores: Array
    visible: Array
    weights: Array
    weighted_values: Array
    output: Array
    merged: Array
    o_proj: Array
    stream_after: Array
    all_weights: Array


def attention_steps(
    model: Model, prompt: Any, *, layer: int, head: int, position: int = -1
) -> AttentionSteps:
    """Follow one head of one layer at one position: from the residual stream back into it.

        x = rms_norm(stream)
        q = W_q x[i];   k[j] = W_k x[j];   v[j] = W_v x[j]
        s[j] = (R_i q) . (R_j k[j]) / sqrt(d_head);   w = softmax of s over the visible j
        y = sum_j w[j] * v[j];   merged = outputs y of all heads side by side
        stream_after = stream[i] + W_o merged

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
    All values but scores, weights, weighted values, their sum and the last one are those that the
    model computed, as a tap sees them.
    Source: "Attention Is All You Need" (Vaswani et al. 2017), section 3.2.1; rotation: "RoFormer"
    (Su et al. 2021); `Phi3Attention` in Transformers.
    """
    ids = read_prompt(model, prompt).ids
    _check_place(model.config, ids.shape, layer, head, position)
    place = _place(model, ids, layer, head, position)
    seen = _tapped(model, ids, layer)
    before = _before_the_scores(seen, place)
    all_weights = ops.attention_weights(seen["q"], seen["k"], mask=model.mask_rule(layer))[0]
    scores = before["rotated_k"] @ before["rotated_q"] * model.config.head_dim**-0.5
    weights = all_weights[head, place["position"]]
    weighted_values = weights[:, None] * before["v"]
    return AttentionSteps(
        **place,
        **before,
        scores=scores,
        visible=_visible(model, layer, place["position"], ids.shape[1]),
        weights=weights,
        weighted_values=weighted_values,
        output=weighted_values.sum(axis=0),
        **_after_the_heads(seen, place["position"]),
        all_weights=all_weights,
    )


def attention_rows(steps: AttentionSteps) -> list[dict[str, Any]]:
    """List steps 4 to 6 key by key, as plain data.

    Parameters
    ----------
    steps : AttentionSteps

    Returns
    -------
    rows : list of dict
        Each {"slot", "token", "visible", "score", "weight", "weighted_value"}, the last as the
        length of the vector.
    """
    lengths = np.linalg.norm(steps.weighted_values, axis=1)
    columns = (steps.tokens, steps.visible, steps.scores, steps.weights, lengths)
    return [
        {
            "slot": slot,
            "token": token,
            "visible": bool(visible),
            "score": float(score),
            "weight": float(weight),
            "weighted_value": float(length),
        }
        for slot, (token, visible, score, weight, length) in enumerate(zip(*columns, strict=True))
    ]


def _check_place(config: Any, shape: tuple[int, ...], layer: int, head: int, position: int) -> None:
    n_batch, n_seq = shape
    if n_batch != 1:
        raise NpllmValueError(f"attention_steps takes one prompt, got {n_batch}")
    _check_range("layer", layer, 0, config.num_hidden_layers)
    _check_range("head", head, 0, config.num_attention_heads)
    _check_range("position", position, -n_seq, n_seq)


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value < high:
        raise NpllmValueError(f"{name} must lie in {low} ... {high - 1}, got {value}")


def _place(model: Model, ids: Array, layer: int, head: int, position: int) -> dict[str, Any]:
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    numbers = ids[0].tolist()
    return {
        "tokens": [model.tokenizer.token_text(i) if model.tokenizer else str(i) for i in numbers],
        "layer": layer,
        "head": head,
        "kv_head": head // group,
        "position": position % len(numbers),
    }


def _tapped(model: Model, ids: Array, layer: int) -> dict[str, Array]:
    """Return what a tap sees of one layer's attention, by the last part of its name; the input of
    the layer is "stream".
    """
    name_of_input = f"model.layers.{layer - 1}" if layer else "model.embed_tokens"
    prefix = f"model.layers.{layer}."
    seen = {}

    def tap(name: str, x: Array) -> Array:
        if name == name_of_input:
            seen["stream"] = to_numpy(x)
        elif name.startswith((prefix + "self_attn.", prefix + "input_layernorm")):
            seen[name.rsplit(".", 1)[-1]] = to_numpy(x)
        return x

    model.model(ids, tap=tap)
    for name in ("q", "k", "v"):
        check_finite(seen[name], f"{name} of layer {layer}", FROM_MODEL)
    return seen


def _before_the_scores(seen: dict[str, Array], place: dict[str, Any]) -> dict[str, Array]:
    """Steps 1 to 3: the stream, its norm, and queries, keys and values before and after rotation.

    x [1, n_seq, d_model], heads [1, n_head, n_seq, d_head] -> [n_seq, d_model], [n_seq, d_head]
    """
    head, kv_head, i = place["head"], place["kv_head"], place["position"]
    return {
        "stream": seen["stream"][0],
        "x": seen["input_layernorm"][0],
        "q": seen["q_proj"][0, head, i],
        "k": seen["k_proj"][0, kv_head],
        "v": seen["v"][0, kv_head],
        "rotated_q": seen["q"][0, head, i],
        "rotated_k": seen["k"][0, kv_head],
    }


def _after_the_heads(seen: dict[str, Array], i: int) -> dict[str, Array]:
    """Steps 8 to 10: all heads side by side, their projection, and the residual stream."""
    added = seen["o_proj"][0, i]
    return {
        "merged": seen["attention"][0, i],
        "o_proj": added,
        "stream_after": seen["stream"][0, i] + added,
    }


def _visible(model: Model, layer: int, i: int, n_ctx: int) -> Array:
    """Tell which keys the query sees: boolean [n_ctx]."""
    row = ops.mask.to_bool(model.mask_rule(layer), 1, n_ctx, q_slots=np.array([i]))
    return np.asarray(row).reshape(n_ctx)
