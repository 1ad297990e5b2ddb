"""The weights of a decoder: named tuples of arrays, with the shape beside every field."""

from typing import Any, NamedTuple

__all__ = ["LayerParams", "Params"]

Array = Any


class LayerParams(NamedTuple):
    """Weights of one decoder layer, under Transformers' leaf names.  Biases are Llama's only."""

    input_layernorm: Array  # [d_model]
    qkv_proj: Array  # [(n_head + 2*n_kv_head)*d_head, d_model]: rows of all q heads, then k, then v
    o_proj: Array  # [d_model, n_head*d_head]
    post_attention_layernorm: Array  # [d_model]
    gate_up_proj: Array  # [2*d_ff, d_model]: rows of gate, then up
    down_proj: Array  # [d_model, d_ff]
    qkv_bias: Array | None = None  # [(n_head + 2*n_kv_head)*d_head]
    o_bias: Array | None = None  # [d_model]
    gate_up_bias: Array | None = None  # [2*d_ff]
    down_bias: Array | None = None  # [d_model]

    def __repr__(self) -> str:
        return _described(self)


class Params(NamedTuple):
    """Weights of a model.  Immutable.

    `lm_head` is the array `embed_tokens` itself where the checkpoint ties the two: where
    config.json says tie_word_embeddings and the file does not hold two different matrices.

    A classifier has `score` in place of `lm_head`.
    """

    embed_tokens: Array  # [n_vocab, d_model]
    layers: tuple[LayerParams, ...]  # n_layer of them
    norm: Array  # [d_model]
    lm_head: Array | None = None  # [n_vocab, d_model]
    score: Array | None = None  # [n_label, d_model]
    score_bias: Array | None = None  # [n_label]

    def __repr__(self) -> str:
        return _described(self)


def _described(params: tuple) -> str:
    """Each weight by dtype and shape, in place of its numbers; equal layers as their number."""
    fields = zip(params._fields, params, strict=True)  # type: ignore[attr-defined]
    shown = ", ".join(f"{name}={_short(x)}" for name, x in fields if x is not None)
    return f"{type(params).__name__}({shown})"


def _short(x: Any) -> str:
    if isinstance(x, tuple):
        return f"<{len(x)} x {type(x[0]).__name__}>" if x else "()"
    dtype = getattr(x, "dtype", type(x).__name__)
    return f"<{dtype} {list(x.shape)}>" if hasattr(x, "shape") else repr(x)
