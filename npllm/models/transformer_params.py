"""Weights of the transformer of 2017: records with a shape on each field, and those of torch."""

from typing import Any, NamedTuple

from npllm.errors import NpllmValueError

__all__ = [
    "AttentionParams",
    "DecoderLayerParams",
    "EncoderLayerParams",
    "FeedForwardParams",
    "NormParams",
    "TransformerParams",
    "from_torch",
]

Array = Any


class NormParams(NamedTuple):
    """Gain and shift of a LayerNorm."""

    weight: Array  # [d_model]
    bias: Array  # [d_model]


class AttentionParams(NamedTuple):
    """The four projections of multi-head attention, and their biases."""

    q_proj: Array  # [n_head*d_head, d_model]
    k_proj: Array  # [n_kv_head*d_head, d_model]
    v_proj: Array  # [n_kv_head*d_head, d_model]
    o_proj: Array  # [d_model, n_head*d_head]
    q_bias: Array | None = None  # [n_head*d_head]
    k_bias: Array | None = None  # [n_kv_head*d_head]
    v_bias: Array | None = None  # [n_kv_head*d_head]
    o_bias: Array | None = None  # [d_model]


class FeedForwardParams(NamedTuple):
    """The two linear maps of a feed-forward network."""

    up_proj: Array  # [d_ff, d_model]
    up_bias: Array  # [d_ff]
    down_proj: Array  # [d_model, d_ff]
    down_bias: Array  # [d_model]


class EncoderLayerParams(NamedTuple):
    """Weights of an encoder layer."""

    self_attn: AttentionParams
    self_attn_norm: NormParams
    feed_forward: FeedForwardParams
    feed_forward_norm: NormParams


class DecoderLayerParams(NamedTuple):
    """Weights of a decoder layer with cross-attention."""

    self_attn: AttentionParams
    self_attn_norm: NormParams
    cross_attn: AttentionParams
    cross_attn_norm: NormParams
    feed_forward: FeedForwardParams
    feed_forward_norm: NormParams


class TransformerParams(NamedTuple):
    """Weights of an encoder and a decoder; a final norm where there is one."""

    encoder: tuple[EncoderLayerParams, ...]
    decoder: tuple[DecoderLayerParams, ...]
    encoder_norm: NormParams | None = None
    decoder_norm: NormParams | None = None


def from_torch(state: Any) -> Any:
    """Take over the weights of a `torch.nn.Transformer`.

    Parameters
    ----------
    state : dict of str to array
        Its `state_dict()`, the values as arrays.

    Returns
    -------
    params : TransformerParams

    Raises
    ------
    NpllmValueError
        When a tensor is missing; names it.

    Notes
    -----
    `in_proj_weight` holds the rows of q, k and v below each other.
    """

    def get(name: str) -> Array:
        if name not in state:
            raise NpllmValueError(
                f"the state has no {name}; it must be that of a torch.nn.Transformer with biases"
            )
        return state[name]

    def norm(name: str) -> Any:
        return NormParams(get(name + ".weight"), get(name + ".bias"))

    def attention(name: str) -> Any:
        weight, bias = get(name + ".in_proj_weight"), get(name + ".in_proj_bias")
        d = weight.shape[0] // 3
        return AttentionParams(
            weight[:d],
            weight[d : 2 * d],
            weight[2 * d :],
            get(name + ".out_proj.weight"),
            bias[:d],
            bias[d : 2 * d],
            bias[2 * d :],
            get(name + ".out_proj.bias"),
        )

    def network(name: str) -> Any:
        return FeedForwardParams(
            *(
                get(f"{name}.{leaf}")
                for leaf in ("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias")
            )
        )

    def layers(side: Any) -> Any:
        numbers = sorted(
            {int(name.split(".")[2]) for name in state if name.startswith(f"{side}.layers.")}
        )
        return [f"{side}.layers.{number}" for number in numbers]

    return TransformerParams(
        tuple(
            EncoderLayerParams(
                attention(n + ".self_attn"), norm(n + ".norm1"), network(n), norm(n + ".norm2")
            )
            for n in layers("encoder")
        ),
        tuple(
            DecoderLayerParams(
                attention(n + ".self_attn"),
                norm(n + ".norm1"),
                attention(n + ".multihead_attn"),
                norm(n + ".norm2"),
                network(n),
                norm(n + ".norm3"),
            )
            for n in layers("decoder")
        ),
        norm("encoder.norm") if "encoder.norm.weight" in state else None,
        norm("decoder.norm") if "decoder.norm.weight" in state else None,
    )
