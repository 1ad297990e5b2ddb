"""Fusions: neighbouring operations under one name, each *defined* as the composition of its parts.

A kernel set may put one kernel in the place of a composition, so that what stands between the parts never goes through memory.
The compositions here take the set of operations that they are made of as their first argument.
"""

from types import SimpleNamespace

from npllm.arrays import array_namespace
from npllm.errors import NpllmValueError
from npllm.ops.attention import attention
from npllm.ops.feedforward import swiglu
from npllm.ops.linear import linear, merge_heads, split_heads
from npllm.ops.norm import rms_norm
from npllm.ops.residual import add
from npllm.ops.rope import apply_rope

__all__ = ["COMPOSITIONS", "FUSIONS", "attention_block", "decoder_layers", "linear_add", "mlp_block", "norm_linear", "norm_swiglu",
           "rope_attention"]


def norm_linear(x, norm_weight, eps, weight, bias=None):
    """Normalise each row and multiply it by a weight matrix: a fusion, defined as the composition of its parts.

        y = linear(rms_norm(x, norm_weight, eps), weight, bias)

    Parameters
    ----------
    x : array [..., d_model]
    norm_weight : array [d_model]
    eps : float
    weight : array [d_out, d_model]
    bias : array [d_out], optional

    Returns
    -------
    y : array [..., d_out]
        In the dtype of `x`.

    Raises
    ------
    NpllmValueError
        When the shapes do not fit.

    Notes
    -----
    The normalised row is rounded to the dtype of `x` between the two.

    Source: `Phi3DecoderLayer` in Transformers: a norm, then the first projection of the half block.
    """
    return _norm_linear(_DEFINITIONS, x, norm_weight, eps, weight, bias)


def norm_swiglu(x, norm_weight, eps, weight, bias=None):
    """Normalise each row, multiply it by the weights of gate and up, and gate: a fusion, defined as the composition of its parts.

        gate | up = norm_linear(x, norm_weight, eps, weight, bias);   y = swiglu(gate, up)

    Parameters
    ----------
    x : array [..., d_model]
    norm_weight : array [d_model]
    eps : float
    weight : array [2*d_ff, d_model]
        `gate_up_proj`: the rows of gate, then those of up.
    bias : array [2*d_ff], optional

    Returns
    -------
    y : array [..., d_ff]
        In the dtype of `x`.

    Raises
    ------
    NpllmValueError
        When the shapes do not fit.

    Notes
    -----
    Rounded to the dtype of `x` after each part.

    Source: "GLU Variants Improve Transformer" (Shazeer 2020), equation 6; `Phi3MLP` in Transformers.
    """
    return _norm_swiglu(_DEFINITIONS, x, norm_weight, eps, weight, bias)


def linear_add(x, weight, residual, bias=None):
    """Multiply each row by a weight matrix and add it to the residual stream: a fusion, defined as the composition of its parts.

        y = add(residual, linear(x, weight, bias))

    Parameters
    ----------
    x : array [..., d_in]
    weight : array [d_model, d_in]
    residual : array [..., d_model]
    bias : array [d_model], optional

    Returns
    -------
    y : array [..., d_model]
        A new array in the dtype of `residual`.

    Raises
    ------
    NpllmValueError
        When the shapes do not fit.

    Notes
    -----
    The product is rounded to the dtype of `x` before the sum.

    Source: `Phi3DecoderLayer` in Transformers: the last projection of each half block, and the stream.
    """
    return _linear_add(_DEFINITIONS, x, weight, residual, bias)


def rope_attention(qkv, cos, sin, n_head, n_kv_head, *, mask=None, cache=None, layer=0):
    """Cut projected rows into heads, rotate, append to the cache, and attend: a fusion, defined as the composition of its parts.

        q | k | v = split_heads(qkv);   q, k = apply_rope(q), apply_rope(k);   k, v = cache.append(layer, k, v)
        y = merge_heads(attention(q, k, v, mask))

    Parameters
    ----------
    qkv : array [..., n_seq, (n_head+2*n_kv_head)*d_head]
        Rows of `qkv_proj`: all query heads, then the key heads, then the value heads.
    cos, sin : array [n_seq, d_rope]
        From `rope_tables`; [n_batch, n_seq, d_rope] where they differ by row.
    n_head : int
    n_kv_head : int
    mask : Rule, optional
        Over slots; None: every key is visible.
    cache : KVCache, optional
        Is appended to, and says in which slots keys and queries stand; the caller advances it.
    layer : int
        The place in the cache.

    Returns
    -------
    y : array [..., n_seq, n_head*d_head]
        In the dtype of `qkv`.

    Raises
    ------
    NpllmValueError
        When the shapes do not fit, or the cache is full.

    Notes
    -----
    Source: `Phi3Attention` in Transformers, between its two projections.
    """
    return compose_rope_attention(_DEFINITIONS, qkv, cos, sin, n_head, n_kv_head, mask=mask, cache=cache, layer=layer)


def attention_block(x, norm_weight, eps, qkv_weight, o_weight, cos, sin, n_head, n_kv_head, qkv_bias=None, o_bias=None, *,
                    mask=None, cache=None, layer=0):
    """Compute the first half of a decoder layer: a fusion, defined as the composition of its parts.

        qkv = norm_linear(x, norm_weight, eps, qkv_weight, qkv_bias)
        y = linear_add(rope_attention(qkv, cos, sin, n_head, n_kv_head, mask, cache, layer), o_weight, x, o_bias)

    Parameters
    ----------
    x : array [..., n_seq, d_model]
        The residual stream.
    norm_weight : array [d_model]
        `input_layernorm`.
    eps : float
    qkv_weight : array [(n_head+2*n_kv_head)*d_head, d_model]
        `qkv_proj`: the rows of all query heads, then the key heads, then the value heads.
    o_weight : array [d_model, n_head*d_head]
        `o_proj`.
    cos, sin, n_head, n_kv_head
        As in `rope_attention`.
    qkv_bias : array [(n_head+2*n_kv_head)*d_head], optional
    o_bias : array [d_model], optional
    mask, cache, layer
        As in `rope_attention`.

    Returns
    -------
    y : array [..., n_seq, d_model]
        A new array in the dtype of `x`.

    Raises
    ------
    NpllmValueError
        When the shapes do not fit, or the cache is full.

    Notes
    -----
    Rounded to the dtype of `x` after each part.

    Source: `Phi3DecoderLayer` in Transformers, `input_layernorm`, `self_attn` and the sum.
    """
    return _attention_block(_DEFINITIONS, x, norm_weight, eps, qkv_weight, o_weight, cos, sin, n_head, n_kv_head, qkv_bias, o_bias,
                            mask=mask, cache=cache, layer=layer)


def mlp_block(x, norm_weight, eps, gate_up_weight, down_weight, gate_up_bias=None, down_bias=None):
    """Compute the second half of a decoder layer: a fusion, defined as the composition of its parts.

        y = linear_add(norm_swiglu(x, norm_weight, eps, gate_up_weight, gate_up_bias), down_weight, x, down_bias)

    Parameters
    ----------
    x : array [..., d_model]
        The residual stream.
    norm_weight : array [d_model]
        `post_attention_layernorm`.
    eps : float
    gate_up_weight : array [2*d_ff, d_model]
        `gate_up_proj`: the rows of gate, then those of up.
    down_weight : array [d_model, d_ff]
        `down_proj`.
    gate_up_bias : array [2*d_ff], optional
    down_bias : array [d_model], optional

    Returns
    -------
    y : array [..., d_model]
        A new array in the dtype of `x`.

    Raises
    ------
    NpllmValueError
        When the shapes do not fit.

    Notes
    -----
    Rounded to the dtype of `x` after each part.

    Source: `Phi3DecoderLayer` in Transformers, `post_attention_layernorm`, `mlp` and the sum.
    """
    return _mlp_block(_DEFINITIONS, x, norm_weight, eps, gate_up_weight, down_weight, gate_up_bias, down_bias)


def decoder_layers(x, layers, eps, cos, sin, n_head, n_kv_head, *, masks=None, cache=None, layer=0):
    """Send the residual stream through decoder layers one after the other: a fusion, defined as the composition of its parts.

        x = attention_block(x, input_layernorm_l, eps, qkv_proj_l, o_proj_l, cos, sin, n_head, n_kv_head, mask_l, cache, layer + l)
        x = mlp_block(x, post_attention_layernorm_l, eps, gate_up_proj_l, down_proj_l)        for l = 0, 1, ...

    Parameters
    ----------
    x : array [..., n_seq, d_model]
        The residual stream.
    layers : tuple of LayerParams
        The weights of each layer under the names of `LayerParams`, biases included.
    eps : float
    cos, sin, n_head, n_kv_head
        As in `rope_attention`.
    masks : list of Rule, optional
        One for each layer; None: every key is visible.
    cache : KVCache, optional
        As in `rope_attention`.
    layer : int
        The first layer's place in the cache.

    Returns
    -------
    y : array [..., n_seq, d_model]
        In the dtype of `x`; a new array, unless there is no layer.

    Raises
    ------
    NpllmValueError
        When the shapes do not fit, masks are not as many as layers, or the cache is full.

    Notes
    -----
    Rounded to the dtype of `x` after each part.

    Source: `Phi3Model` in Transformers, the loop over its layers.
    """
    return _decoder_layers(_DEFINITIONS, x, layers, eps, cos, sin, n_head, n_kv_head, masks=masks, cache=cache, layer=layer)


def cut_heads(qkv, n_head, n_kv_head):
    """Views of a projected row: q [..., n_head, n_seq, d_head], k and v [..., n_kv_head, n_seq, d_head]."""
    array_namespace(qkv)
    if min(n_head, n_kv_head) < 1:
        raise NpllmValueError(f"n_head and n_kv_head must be at least 1, got {n_head} and {n_kv_head}")
    d_head = qkv.shape[-1] // (n_head + 2 * n_kv_head)
    q_end, k_end = n_head * d_head, (n_head + n_kv_head) * d_head
    q, k, v = qkv[..., :q_end], qkv[..., q_end:k_end], qkv[..., k_end:]
    return split_heads(q, n_head), split_heads(k, n_kv_head), split_heads(v, n_kv_head)


def _norm_linear(parts, x, norm_weight, eps, weight, bias=None):
    return parts.linear(parts.rms_norm(x, norm_weight, eps), weight, bias)


def _norm_swiglu(parts, x, norm_weight, eps, weight, bias=None):
    gate_up = parts.norm_linear(x, norm_weight, eps, weight, bias)
    d_ff = gate_up.shape[-1] // 2
    return parts.swiglu(gate_up[..., :d_ff], gate_up[..., d_ff:])


def _linear_add(parts, x, weight, residual, bias=None):
    return parts.add(residual, parts.linear(x, weight, bias))


def compose_rope_attention(parts, qkv, cos, sin, n_head, n_kv_head, *, mask=None, cache=None, layer=0):
    """Compute `rope_attention` with the given parts; a kernel set hands on what its own kernel is not made for."""
    q, k, v = cut_heads(qkv, n_head, n_kv_head)
    q, k = parts.apply_rope(q, cos, sin), parts.apply_rope(k, cos, sin)
    slots = {}
    if cache is not None:
        k, v, k_slots = cache.append(layer, k, v)
        slots = {"q_slots": range(k_slots.stop - q.shape[-2], k_slots.stop), "k_slots": k_slots}
    return merge_heads(parts.attention(q, k, v, mask=mask, **slots))


def _attention_block(parts, x, norm_weight, eps, qkv_weight, o_weight, cos, sin, n_head, n_kv_head, qkv_bias=None, o_bias=None, *,
                     mask=None, cache=None, layer=0):
    qkv = parts.norm_linear(x, norm_weight, eps, qkv_weight, qkv_bias)
    y = parts.rope_attention(qkv, cos, sin, n_head, n_kv_head, mask=mask, cache=cache, layer=layer)
    return parts.linear_add(y, o_weight, x, o_bias)


def _mlp_block(parts, x, norm_weight, eps, gate_up_weight, down_weight, gate_up_bias=None, down_bias=None):
    y = parts.norm_swiglu(x, norm_weight, eps, gate_up_weight, gate_up_bias)
    return parts.linear_add(y, down_weight, x, down_bias)


def _decoder_layers(parts, x, layers, eps, cos, sin, n_head, n_kv_head, *, masks=None, cache=None, layer=0):
    if masks is not None and len(masks) != len(layers):
        raise NpllmValueError(f"masks must hold one rule for each of {len(layers)} layers, got {len(masks)}")
    for number, params in enumerate(layers):
        x = parts.attention_block(x, params.input_layernorm, eps, params.qkv_proj, params.o_proj, cos, sin, n_head, n_kv_head,
                                  params.qkv_bias, params.o_bias, mask=None if masks is None else masks[number], cache=cache,
                                  layer=layer + number)
        x = parts.mlp_block(x, params.post_attention_layernorm, eps, params.gate_up_proj, params.down_proj, params.gate_up_bias,
                            params.down_bias)
    return x


# What a fusion is composed by, and of what: whoever replaces a part gets the composition of the parts back.
COMPOSITIONS = {"norm_linear": _norm_linear, "norm_swiglu": _norm_swiglu, "linear_add": _linear_add,
                "rope_attention": compose_rope_attention, "attention_block": _attention_block, "mlp_block": _mlp_block,
                "decoder_layers": _decoder_layers}
FUSIONS = {"norm_linear": ("rms_norm", "linear"), "norm_swiglu": ("rms_norm", "linear", "norm_linear", "swiglu"),
           "linear_add": ("linear", "add"), "rope_attention": ("apply_rope", "attention"),
           "attention_block": ("rms_norm", "linear", "norm_linear", "apply_rope", "attention", "rope_attention", "add",
                               "linear_add"),
           "mlp_block": ("rms_norm", "linear", "norm_linear", "swiglu", "norm_swiglu", "add", "linear_add"),
           "decoder_layers": ("rms_norm", "linear", "norm_linear", "apply_rope", "attention", "rope_attention", "swiglu",
                              "norm_swiglu", "add", "linear_add", "attention_block", "mlp_block")}

_DEFINITIONS = SimpleNamespace(linear=linear, rms_norm=rms_norm, norm_linear=norm_linear, norm_swiglu=norm_swiglu, swiglu=swiglu,
                               add=add, linear_add=linear_add, apply_rope=apply_rope, attention=attention,
                               rope_attention=rope_attention, attention_block=attention_block, mlp_block=mlp_block)
