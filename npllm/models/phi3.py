"""Phi-3: the decoder layer, and the stack of them.  Composition only; the mathematics is in
`npllm.ops`.

A set of operations may hold a kernel for a stretch of this file (`npllm.ops.SLOTS`).  Before each
stretch the set is asked for it; what follows is what the kernel has to compute.
"""

from collections.abc import Callable
from typing import Any

from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.models import adapted
from npllm.models.taps import UNTAPPED, NamedTap, Tap
from npllm.ops import Ops, Step, merge_heads, split_qkv

__all__ = ["attention_block", "decoder_layer", "decoder_layers", "forward", "lm_head", "mlp_block"]

Array = Any


def forward(
    params: Any,
    config: Any,
    ids: Array,
    cos: Array,
    sin: Array,
    masks: Any,
    ops: Ops,
    cache: Any = None,
    tap: Tap | None = None,
) -> Array:
    """Turn token ids into the hidden state after the final norm.

        x = embed(ids);   x = decoder_layer_l(x) for each layer l;   hidden = rms_norm(x)

    Parameters
    ----------
    params : Params
    config : Config
    ids : integer array [n_batch, n_seq]
    cos, sin : array [n_seq, d_rope]
        Or [n_batch, n_seq, d_rope]; computed once, the same for all layers.
    masks : list of Rule
        One for each layer.
    ops : Ops
        Under a tap its own slots are not used, so that every named value exists.
    cache : KVCache, optional
        Is appended to; the caller advances it.
    tap : function (name, array) -> array, optional
        Sees, and may replace, every value that `npllm.models.taps` lists.

    Returns
    -------
    hidden : array [n_batch, n_seq, d_model]

    Raises
    ------
    NpllmTypeError, NpllmValueError
        When a tap returns an array of another library, dtype or shape.

    Notes
    -----
    Source: `Phi3Model` in Transformers.
    """
    ops, named = ops if tap is None else ops.without_slots(), NamedTap(tap, "model.")
    cos, sin = named("rotary_emb.cos", cos), named("rotary_emb.sin", sin)
    step = Step(
        cos,
        sin,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.rms_norm_eps,
        masks,
        cache,
    )
    x = named("embed_tokens", adapted.embed(ops, ids, params.embed_tokens))
    x = decoder_layers(x, params.layers, step, ops, tap)
    return named("norm", ops.rms_norm(x, params.norm, config.rms_norm_eps))


def decoder_layers(x: Array, layers: Any, step: Step, ops: Ops, tap: Tap | None = None) -> Array:
    """Send the residual stream through decoder layers, the first of which is layer `step.layer`."""
    if step.masks is not None and len(step.masks) < step.layer + len(layers):
        raise NpllmValueError(
            f"masks must hold one rule for each of {step.layer + len(layers)} layers, "
            f"got {len(step.masks)}"
        )
    y = _kernel(ops.decoder_layers, x, layers, step)
    if y is not None:
        return y
    for number, layer in enumerate(layers, step.layer):
        x = decoder_layer(x, layer, step.at(number), ops, tap)
    return x


def decoder_layer(x: Array, layer: Any, step: Step, ops: Ops, tap: Tap | None = None) -> Array:
    """Add attention and then the feed-forward network to the residual stream, each after its own
    norm.

        x = x + self_attention(rms_norm(x));   x = x + mlp(rms_norm(x))

    Parameters
    ----------
    x : array [n_batch, n_seq, d_model]
    layer : LayerParams
    step : Step
    ops, tap
        As in `forward`.

    Returns
    -------
    x : array [n_batch, n_seq, d_model]

    Notes
    -----
    Source: `Phi3DecoderLayer` in Transformers; pre-norm: "On Layer Normalization in the Transformer
    Architecture" (Xiong et al. 2020).
    """
    named = NamedTap(tap, f"model.layers.{step.layer}.")
    x = named("residual", attention_block(x, layer, step, ops, named))
    return NamedTap(tap, "")(f"model.layers.{step.layer}", mlp_block(x, layer, step, ops, named))


def attention_block(
    x: Array, layer: Any, step: Step, ops: Ops, named: NamedTap = UNTAPPED
) -> Array:
    """Compute the first half of a layer: every position gathers from the positions that it sees.

        q, k, v = W_qkv rms_norm(x);   y = x + W_o attention(rope(q), rope(k), v)

    Notes
    -----
    Source: `Phi3Attention` in Transformers.
    """
    y = _kernel(ops.attention_block, x, layer, step)
    if y is not None:
        return y
    qkv = _kernel(
        ops.norm_linear, x, layer.input_layernorm, step.eps, layer.qkv_proj, layer.qkv_bias
    )
    if qkv is None:
        h = named("input_layernorm", ops.rms_norm(x, layer.input_layernorm, step.eps))
        qkv = adapted.linear(ops, h, layer.qkv_proj, layer.qkv_bias)
    y = rope_attention(named("self_attn.qkv_proj", qkv), step, ops, named)
    y = named("self_attn.attention", y)
    total = _kernel(ops.linear_add, y, layer.o_proj, x, layer.o_bias)
    if total is not None:
        return total
    return ops.add(x, named("self_attn.o_proj", adapted.linear(ops, y, layer.o_proj, layer.o_bias)))


def rope_attention(qkv: Array, step: Step, ops: Ops, named: NamedTap = UNTAPPED) -> Array:
    """Cut into heads, rotate, append to the cache, attend, and put the heads side by side.

    [..., n_seq, (n_head+2*n_kv_head)*d_head] -> [..., n_seq, n_head*d_head]
    """
    y = _kernel(ops.rope_attention, qkv, step)
    if y is not None:
        return y
    q, k, v = split_qkv(qkv, step.n_head, step.n_kv_head)
    q, k, v = named("self_attn.q_proj", q), named("self_attn.k_proj", k), named("self_attn.v", v)
    q = named("self_attn.q", ops.apply_rope(q, step.cos, step.sin))
    k = named("self_attn.k", ops.apply_rope(k, step.cos, step.sin))
    slots = {}
    if step.cache is not None:
        k, v, k_slots = step.cache.append(step.layer, k, v)
        slots = {"q_slots": range(k_slots.stop - q.shape[-2], k_slots.stop), "k_slots": k_slots}
        k, v = named("self_attn.cached_k", k), named("self_attn.cached_v", v)
    named.pairs(q, k, step.mask, slots)
    return merge_heads(named("self_attn.heads", ops.attention(q, k, v, mask=step.mask, **slots)))


def mlp_block(x: Array, layer: Any, step: Step, ops: Ops, named: NamedTap = UNTAPPED) -> Array:
    """Compute the second half of a layer: every position is transformed by itself.

        gate | up = W_gate_up rms_norm(x);   y = x + W_down (silu(gate) * up)

    Notes
    -----
    Source: `Phi3MLP` in Transformers; "GLU Variants Improve Transformer" (Shazeer 2020), equation
    6.
    """
    y = _kernel(ops.mlp_block, x, layer, step)
    if y is not None:
        return y
    gain, weight, bias = layer.post_attention_layernorm, layer.gate_up_proj, layer.gate_up_bias
    y = _kernel(ops.norm_swiglu, x, gain, step.eps, weight, bias)
    if y is None:
        gate_up = _kernel(ops.norm_linear, x, gain, step.eps, weight, bias)
        if gate_up is None:
            h = named("post_attention_layernorm", ops.rms_norm(x, gain, step.eps))
            gate_up = adapted.linear(ops, h, weight, bias)
        gate_up = named("mlp.gate_up_proj", gate_up)
        d_ff = gate_up.shape[-1] // 2
        gate, up = named("mlp.gate", gate_up[..., :d_ff]), named("mlp.up", gate_up[..., d_ff:])
        y = ops.swiglu(gate, up)
    y = named("mlp.swiglu", y)
    total = _kernel(ops.linear_add, y, layer.down_proj, x, layer.down_bias)
    if total is not None:
        return total
    return ops.add(
        x, named("mlp.down_proj", adapted.linear(ops, y, layer.down_proj, layer.down_bias))
    )


def lm_head(hidden: Array, params: Any, ops: Ops, tap: Tap | None = None) -> Array:
    """Score every token of the vocabulary: `npllm.ops.lm_head` with the set's own product.

    Parameters
    ----------
    hidden : array [..., d_model]
    params : Params
    ops : Ops
    tap : function (name, array) -> array, optional

    Returns
    -------
    logits : array [..., n_vocab]

    Notes
    -----
    Source: `Phi3ForCausalLM.lm_head` in Transformers.
    """
    named = NamedTap(tap, "")
    return named("lm_head", adapted.linear(ops, named("lm_head.input", hidden), params.lm_head))


def _kernel(kernel: Callable | None, *arguments: Any) -> Array | None:
    """Return what a slot's kernel gives; None where there is no kernel for this call."""
    if kernel is None:
        return None
    y = kernel(*arguments)
    if y is None:
        raise NpllmTypeError(
            f"the kernel {kernel!r} returned None; it must return an array, or NotImplemented"
        )
    return None if y is NotImplemented else y
