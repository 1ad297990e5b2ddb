"""The block of 2017 and its relatives: post-norm or pre-norm, encoder, decoder with
cross-attention, wired from the same ops.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from npllm.models.transformer_params import (
    AttentionParams,
    DecoderLayerParams,
    EncoderLayerParams,
    FeedForwardParams,
    NormParams,
    TransformerParams,
    from_torch,
)
from npllm.ops import Ops, merge_heads, split_heads
from npllm.ops import mask as rules

__all__ = [
    "AttentionParams",
    "DecoderLayerParams",
    "EncoderLayerParams",
    "FeedForwardParams",
    "NormParams",
    "TransformerParams",
    "decode",
    "decoder_layer",
    "encode",
    "encoder_layer",
    "feed_forward",
    "forward",
    "from_torch",
    "multi_head_attention",
]

Array = Any


def multi_head_attention(
    x: Array, memory: Array, params: Any, n_head: int, ops: Ops, mask: Any = None
) -> Array:
    """Let the positions of `x` gather from the positions of `memory`; self-attention where the two
    are the same.

        y = o_proj(merge_heads(attention(q, k, v)))
        q = q_proj(x),  k = k_proj(memory),  v = v_proj(memory)

    Parameters
    ----------
    x : array [n_batch, n_seq, d_model]
    memory : array [n_batch, n_ctx, d_model]
    params : AttentionParams
    n_head : int
        Query heads; the key/value heads follow from the rows of k_proj.
    ops : Ops
    mask : Rule, optional

    Returns
    -------
    y : array [n_batch, n_seq, d_model]

    Notes
    -----
    Source: "Attention Is All You Need" (Vaswani et al. 2017), section 3.2.2;
    `torch.nn.MultiheadAttention`.
    """
    d_head = params.q_proj.shape[0] // n_head
    q = split_heads(ops.linear(x, params.q_proj, params.q_bias), n_head)
    k = split_heads(
        ops.linear(memory, params.k_proj, params.k_bias), params.k_proj.shape[0] // d_head
    )
    v = split_heads(
        ops.linear(memory, params.v_proj, params.v_bias), params.k_proj.shape[0] // d_head
    )
    return ops.linear(merge_heads(ops.attention(q, k, v, mask=mask)), params.o_proj, params.o_bias)


def feed_forward(x: Array, params: Any, ops: Ops, activation: Callable) -> Array:
    """Transform every position by itself.

        y = down_proj(activation(up_proj(x)))

    Parameters
    ----------
    x : array [..., d_model]
    params : FeedForwardParams
    ops : Ops
    activation : function (array) -> array
        `ops.relu` in 2017, `ops.gelu` in BERT and GPT-2.

    Returns
    -------
    y : array [..., d_model]

    Notes
    -----
    Source: "Attention Is All You Need" (Vaswani et al. 2017), equation 2.
    """
    return ops.linear(
        activation(ops.linear(x, params.up_proj, params.up_bias)),
        params.down_proj,
        params.down_bias,
    )


def sublayer(
    x: Array, function: Callable, norm: Any, ops: Ops, norm_first: bool, eps: float
) -> Array:
    """Add what a sublayer computes to the residual stream, and normalise.

        post-norm: y = layer_norm(add(x, function(x)))
        pre-norm:  y = add(x, function(layer_norm(x)))

    Parameters
    ----------
    x : array [n_batch, n_seq, d_model]
    function : function (array) -> array
    norm : NormParams
    ops : Ops
    norm_first : bool
    eps : float

    Returns
    -------
    y : array [n_batch, n_seq, d_model]

    Notes
    -----
    Source: "On Layer Normalization in the Transformer Architecture" (Xiong et al. 2020), figure 1.
    """
    if norm_first:
        return ops.add(x, function(ops.layer_norm(x, norm.weight, norm.bias, eps)))
    return ops.layer_norm(ops.add(x, function(x)), norm.weight, norm.bias, eps)


def encoder_layer(
    x: Array,
    params: Any,
    n_head: int,
    ops: Ops,
    *,
    mask: Any = None,
    activation: Callable | None = None,
    norm_first: bool = False,
    eps: float = 1e-5,
) -> Array:
    """Self-attention that sees both sides, then the feed-forward network.

    Parameters
    ----------
    x : array [n_batch, n_seq, d_model]
    params : EncoderLayerParams
    n_head : int
    ops : Ops
    mask : Rule, optional
    activation : function, optional
        Default `ops.relu`.
    norm_first : bool
        False: post-norm, as in 2017 and in BERT.
    eps : float

    Returns
    -------
    x : array [n_batch, n_seq, d_model]

    Notes
    -----
    Source: "Attention Is All You Need" (Vaswani et al. 2017), section 3.1;
    `torch.nn.TransformerEncoderLayer`.
    """
    activation = ops.relu if activation is None else activation
    apply = partial(sublayer, ops=ops, norm_first=norm_first, eps=eps)
    x = apply(
        x,
        lambda y: multi_head_attention(y, y, params.self_attn, n_head, ops, mask),
        params.self_attn_norm,
    )
    return apply(
        x, lambda y: feed_forward(y, params.feed_forward, ops, activation), params.feed_forward_norm
    )


def decoder_layer(
    x: Array,
    memory: Array,
    params: Any,
    n_head: int,
    ops: Ops,
    *,
    mask: Any = None,
    memory_mask: Any = None,
    activation: Any = None,
    norm_first: bool = False,
    eps: float = 1e-5,
) -> Array:
    """Causal self-attention, cross-attention to the encoder's output, then the feed-forward
    network.

    Parameters
    ----------
    x : array [n_batch, n_seq, d_model]
    memory : array [n_batch, n_src, d_model]
    params : DecoderLayerParams
    n_head : int
    ops : Ops
    mask : Rule, optional
        Of the self-attention; default causal.
    memory_mask : Rule, optional
        Of the cross-attention; default everything.
    activation, norm_first, eps
        As in `encoder_layer`.

    Returns
    -------
    x : array [n_batch, n_seq, d_model]

    Notes
    -----
    Source: "Attention Is All You Need" (Vaswani et al. 2017), section 3.1;
    `torch.nn.TransformerDecoderLayer`.
    """
    activation = ops.relu if activation is None else activation
    mask = rules.causal() if mask is None else mask
    apply = partial(sublayer, ops=ops, norm_first=norm_first, eps=eps)
    x = apply(
        x,
        lambda y: multi_head_attention(y, y, params.self_attn, n_head, ops, mask),
        params.self_attn_norm,
    )
    x = apply(
        x,
        lambda y: multi_head_attention(y, memory, params.cross_attn, n_head, ops, memory_mask),
        params.cross_attn_norm,
    )
    return apply(
        x, lambda y: feed_forward(y, params.feed_forward, ops, activation), params.feed_forward_norm
    )


def encode(x: Array, params: Any, n_head: int, ops: Ops, **options: Any) -> Array:
    """Run the encoder's layers and its final norm, if any; options as in `encoder_layer`."""
    for layer in params.encoder:
        x = encoder_layer(x, layer, n_head, ops, **options)
    norm = params.encoder_norm
    return (
        x if norm is None else ops.layer_norm(x, norm.weight, norm.bias, options.get("eps", 1e-5))
    )


def decode(x: Array, memory: Array, params: Any, n_head: int, ops: Ops, **options: Any) -> Array:
    """Run the decoder's layers and its final norm, if any; options as in `decoder_layer`."""
    for layer in params.decoder:
        x = decoder_layer(x, memory, layer, n_head, ops, **options)
    norm = params.decoder_norm
    return (
        x if norm is None else ops.layer_norm(x, norm.weight, norm.bias, options.get("eps", 1e-5))
    )


def forward(
    source: Array,
    target: Array,
    params: Any,
    n_head: int,
    ops: Ops,
    *,
    source_mask: Any = None,
    **options: Any,
) -> Array:
    """The encoder-decoder of 2017: read the source, then score the target from it.

        hidden = decode(target, encode(source))

    Parameters
    ----------
    source : array [n_batch, n_src, d_model]
        Embedded tokens with their positions added (`ops.embed`, `ops.sinusoidal_positions`).
    target : array [n_batch, n_seq, d_model]
    params : TransformerParams
    n_head : int
    ops : Ops
    source_mask : Rule, optional
        Hides padding of the source, in the encoder and from the decoder.
    **options
        activation, norm_first and eps, as in `encoder_layer`.

    Returns
    -------
    hidden : array [n_batch, n_seq, d_model]

    Notes
    -----
    Source: "Attention Is All You Need" (Vaswani et al. 2017), figure 1; `torch.nn.Transformer`.
    """
    memory = encode(source, params, n_head, ops, mask=source_mask, **options)
    return decode(target, memory, params, n_head, ops, memory_mask=source_mask, **options)
