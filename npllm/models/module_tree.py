"""The tree of modules that Transformers prints for a checkpoint, drawn from config.json alone."""

from typing import Any

__all__ = ["describe"]


def describe(config: Any) -> str:
    """Draw the tree of modules that Transformers prints for the same folder: `str(model) ==
    str(hf_model)`.

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
    layers = (
        f"(0): {family}DecoderLayer("
        if n_layer == 1
        else f"(0-{n_layer - 1}): {n_layer} x {family}DecoderLayer("
    )
    attention, mlp, dropouts = (
        _describe_phi3(config) if family == "Phi3" else _describe_llama(config)
    )
    lines = [
        f"{config.architectures[0]}(",
        f"  (model): {family}Model(",
        f"    (embed_tokens): Embedding({config.vocab_size}, {d_model}{padding})",
        "    (layers): ModuleList(",
        f"      {layers}",
        f"        (self_attn): {family}Attention(",
        *("          " + line for line in attention),
        "        )",
        f"        (mlp): {family}MLP(",
        *("          " + line for line in mlp),
        "        )",
        f"        (input_layernorm): {norm}",
        f"        (post_attention_layernorm): {norm}",
        *("        " + line for line in dropouts),
        "      )",
        "    )",
        f"    (norm): {norm}",
        f"    (rotary_emb): {family}RotaryEmbedding()",
        "  )",
    ]
    heads = {
        "lm": [_linear_line("lm_head", d_model, config.vocab_size)],
        "sequence": [_linear_line("score", d_model, config.num_labels)],
        "token": [
            "(dropout): Dropout(p=0.1, inplace=False)",
            _linear_line("score", d_model, config.num_labels, True),
        ],
    }
    return "\n".join([*lines, *("  " + line for line in heads[config.head]), ")"])


def _describe_phi3(config: Any) -> tuple[list[str], ...]:
    """Lines of attention, feed-forward network and dropouts of a Phi-3 layer."""
    d_model, d_ff = config.hidden_size, config.intermediate_size
    d_q, d_kv = (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )
    attention = [
        _linear_line("o_proj", d_q, d_model),
        _linear_line("qkv_proj", d_model, d_q + 2 * d_kv),
    ]
    mlp = [
        _linear_line("gate_up_proj", d_model, 2 * d_ff),
        _linear_line("down_proj", d_ff, d_model),
        "(activation_fn): SiLUActivation()",
    ]
    return (
        attention,
        mlp,
        [
            f"({name}): Dropout(p={config.resid_pdrop}, inplace=False)"
            for name in ("resid_attn_dropout", "resid_mlp_dropout")
        ],
    )


def _describe_llama(config: Any) -> tuple[list[str], ...]:
    """Lines of attention and feed-forward network of a Llama layer, split as Transformers keeps
    them.
    """
    d_model, d_ff = config.hidden_size, config.intermediate_size
    d_q, d_kv = (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )
    attention = [
        _linear_line(name, *size, config.attention_bias)
        for name, size in (
            ("q_proj", (d_model, d_q)),
            ("k_proj", (d_model, d_kv)),
            ("v_proj", (d_model, d_kv)),
            ("o_proj", (d_q, d_model)),
        )
    ]
    mlp = [
        _linear_line(name, *size, config.mlp_bias)
        for name, size in (
            ("gate_proj", (d_model, d_ff)),
            ("up_proj", (d_model, d_ff)),
            ("down_proj", (d_ff, d_model)),
        )
    ]
    return attention, [*mlp, "(act_fn): SiLUActivation()"], []


def _linear_line(name: str, n_in: int, n_out: int, bias: bool = False) -> str:
    return f"({name}): Linear(in_features={n_in}, out_features={n_out}, bias={bias})"
