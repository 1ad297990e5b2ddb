"""Phi-3: the decoder layer, and the stack of them.  Composition only; the mathematics is in `npllm.ops`."""

from npllm.ops import merge_heads
from npllm.ops.fusions import cut_heads

__all__ = ["decoder_layer", "forward", "lm_head"]


def forward(params, config, ids, cos, sin, masks, ops, cache=None, tap=None):
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
    cache : KVCache, optional
        Is appended to; the caller advances it.
    tap : function (name, array) -> array, optional
        Sees, and may replace, every named value.  The names are Transformers' module names, and `...self_attn.q`, `.k`, `.v`
        (after RoPE), `...self_attn.attention` and `...mlp.swiglu` for what is no module there.

    Returns
    -------
    hidden : array [n_batch, n_seq, d_model]

    Notes
    -----
    Source: `Phi3Model` in Transformers.
    """
    if tap is None:
        x = ops.embed(ids, params.embed_tokens)
        x = ops.decoder_layers(x, params.layers, config.rms_norm_eps, cos, sin, config.num_attention_heads,
                               config.num_key_value_heads, masks=masks, cache=cache)
        return ops.rms_norm(x, params.norm, config.rms_norm_eps)
    ops = ops.unfused()
    x = tap("model.embed_tokens", ops.embed(ids, params.embed_tokens))
    for number, layer in enumerate(params.layers):
        x = decoder_layer(x, layer, config, cos, sin, masks[number], ops, cache, number, tap)
    return tap("model.norm", ops.rms_norm(x, params.norm, config.rms_norm_eps))


def decoder_layer(x, params, config, cos, sin, mask, ops, cache=None, number=0, tap=None):
    """Add attention and then the feed-forward network to the residual stream, each after its own norm.

        x = x + self_attention(rms_norm(x));   x = x + mlp(rms_norm(x))

    Parameters
    ----------
    x : array [n_batch, n_seq, d_model]
    params : LayerParams
    config : Config
    cos, sin, ops, cache, tap
        As in `forward`.
    mask : Rule
    number : int
        Which layer this is: its place in the cache and in the names that the tap sees.

    Returns
    -------
    x : array [n_batch, n_seq, d_model]

    Notes
    -----
    Source: `Phi3DecoderLayer` in Transformers; pre-norm: "On Layer Normalization in the Transformer Architecture"
    (Xiong et al. 2020).
    """
    if tap is not None:
        return _traced_layer(x, params, config, cos, sin, mask, ops, cache, number, tap)
    return ops.decoder_layers(x, (params,), config.rms_norm_eps, cos, sin, config.num_attention_heads, config.num_key_value_heads,
                              masks=[mask], cache=cache, layer=number)


def _traced_layer(x, params, config, cos, sin, mask, ops, cache, number, tap):
    """The same layer step by step: every value under Transformers' name of the module that gives it."""
    def named(name, value):
        return tap(f"model.layers.{number}.{name}", value)

    y = named("input_layernorm", ops.rms_norm(x, params.input_layernorm, config.rms_norm_eps))
    x = ops.add(x, _traced_attention(y, params, config, cos, sin, mask, ops, cache, number, named))
    y = named("post_attention_layernorm", ops.rms_norm(x, params.post_attention_layernorm, config.rms_norm_eps))
    x = ops.add(x, _traced_mlp(y, params, ops, named))
    return tap(f"model.layers.{number}", x)


def _traced_attention(x, params, config, cos, sin, mask, ops, cache, number, named):
    """Let every position gather from the positions it sees: q, k, v, RoPE, attention, output projection."""
    qkv = named("self_attn.qkv_proj", ops.linear(x, params.qkv_proj, params.qkv_bias))
    q, k, v = cut_heads(qkv, config.num_attention_heads, config.num_key_value_heads)
    q = named("self_attn.q", ops.apply_rope(q, cos, sin))
    k = named("self_attn.k", ops.apply_rope(k, cos, sin))
    v = named("self_attn.v", v)
    slots = {}
    if cache is not None:
        k, v, k_slots = cache.append(number, k, v)
        slots = {"q_slots": range(k_slots.stop - q.shape[-2], k_slots.stop), "k_slots": k_slots}
    y = merge_heads(ops.attention(q, k, v, mask=mask, **slots))  # [..., n_head, n_seq, d_head] -> [..., n_seq, n_head*d_head]
    return named("self_attn.o_proj", ops.linear(named("self_attn.attention", y), params.o_proj, params.o_bias))


def _traced_mlp(x, params, ops, named):
    """Transform every position by itself: the gated feed-forward network."""
    gate_up = named("mlp.gate_up_proj", ops.linear(x, params.gate_up_proj, params.gate_up_bias))
    d_ff = gate_up.shape[-1] // 2
    y = named("mlp.swiglu", ops.swiglu(gate_up[..., :d_ff], gate_up[..., d_ff:]))
    return named("mlp.down_proj", ops.linear(y, params.down_proj, params.down_bias))


def lm_head(hidden, params, ops, tap=None):
    """Score every token of the vocabulary by its product with the hidden state.

        logits[..., t] = sum_i hidden[..., i] * lm_head[t, i]

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
    logits = ops.linear(hidden, params.lm_head)
    return logits if tap is None else tap("lm_head", logits)


def describe(config):
    """Draw the tree of modules that Transformers prints for the same folder: `str(model) == str(hf_model)`.

    Parameters
    ----------
    config : Config

    Returns
    -------
    tree : str

    Notes
    -----
    Source: `torch.nn.Module.__repr__` of `Phi3ForCausalLM`, Transformers 5.23.
    """
    d_model, eps, n_layer = config.hidden_size, config.rms_norm_eps, config.num_hidden_layers
    family = {"phi3": "Phi3", "llama": "Llama"}[config.model_type]
    padding = "" if config.pad_token_id is None else f", padding_idx={config.pad_token_id}"
    norm = f"{family}RMSNorm(({d_model},), eps={eps})"
    layers = f"(0): {family}DecoderLayer(" if n_layer == 1 else f"(0-{n_layer - 1}): {n_layer} x {family}DecoderLayer("
    attention, mlp, dropouts = _describe_phi3(config) if family == "Phi3" else _describe_llama(config)
    lines = [
        f"{config.architectures[0]}(", f"  (model): {family}Model(",
        f"    (embed_tokens): Embedding({config.vocab_size}, {d_model}{padding})",
        "    (layers): ModuleList(", f"      {layers}",
        f"        (self_attn): {family}Attention(", *("          " + line for line in attention), "        )",
        f"        (mlp): {family}MLP(", *("          " + line for line in mlp), "        )",
        f"        (input_layernorm): {norm}", f"        (post_attention_layernorm): {norm}",
        *("        " + line for line in dropouts),
        "      )", "    )", f"    (norm): {norm}", f"    (rotary_emb): {family}RotaryEmbedding()", "  )",
    ]
    heads = {"lm": [_linear_line("lm_head", d_model, config.vocab_size)],
             "sequence": [_linear_line("score", d_model, config.num_labels)],
             "token": ["(dropout): Dropout(p=0.1, inplace=False)", _linear_line("score", d_model, config.num_labels, True)]}
    return "\n".join([*lines, *("  " + line for line in heads[config.head]), ")"])


def _describe_phi3(config):
    """Lines of attention, feed-forward network and dropouts of a Phi-3 layer."""
    d_model, d_ff = config.hidden_size, config.intermediate_size
    d_q, d_kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention = [_linear_line("o_proj", d_q, d_model), _linear_line("qkv_proj", d_model, d_q + 2 * d_kv)]
    mlp = [_linear_line("gate_up_proj", d_model, 2 * d_ff), _linear_line("down_proj", d_ff, d_model),
           "(activation_fn): SiLUActivation()"]
    return attention, mlp, [f"({name}): Dropout(p={config.resid_pdrop}, inplace=False)"
                            for name in ("resid_attn_dropout", "resid_mlp_dropout")]


def _describe_llama(config):
    """Lines of attention and feed-forward network of a Llama layer, split as Transformers keeps them."""
    d_model, d_ff = config.hidden_size, config.intermediate_size
    d_q, d_kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention = [_linear_line(name, *size, config.attention_bias) for name, size in (
        ("q_proj", (d_model, d_q)), ("k_proj", (d_model, d_kv)), ("v_proj", (d_model, d_kv)), ("o_proj", (d_q, d_model)))]
    mlp = [_linear_line(name, *size, config.mlp_bias) for name, size in (
        ("gate_proj", (d_model, d_ff)), ("up_proj", (d_model, d_ff)), ("down_proj", (d_ff, d_model)))]
    return attention, [*mlp, "(act_fn): SiLUActivation()"], []


def _linear_line(name, n_in, n_out, bias=False):
    return f"({name}): Linear(in_features={n_in}, out_features={n_out}, bias={bias})"
