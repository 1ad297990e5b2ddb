"""Which tensors of a Phi-3 or Llama checkpoint make each field of `Params`, and their shapes."""

from npllm.config.config import Config

__all__ = ["EMBEDDING", "OUTPUT", "Sources", "expected_shapes", "layer_sources", "top_sources"]

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"

# Field of Params or LayerParams -> the tensors it is concatenated from: {name in the file: shape}.
Sources = dict[str, dict[str, tuple[int, ...]]]


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """List every tensor that a checkpoint of this configuration holds.

    Parameters
    ----------
    config : Config

    Returns
    -------
    shapes : dict of str to tuple of int
        Tensor name as in the file -> shape.
    """
    layers = [layer_sources(config, number) for number in range(config.num_hidden_layers)]
    shapes: dict[str, tuple[int, ...]] = {}
    for fields in (top_sources(config), *layers):
        for tensors in fields.values():
            shapes |= tensors
    return shapes


def top_sources(config: Config) -> Sources:
    """List the fields of Params, except its layers."""
    n_vocab, d_model = config.vocab_size, config.hidden_size
    sources: Sources = {
        "embed_tokens": {EMBEDDING: (n_vocab, d_model)},
        "norm": {"model.norm.weight": (d_model,)},
    }
    if config.head != "lm":
        sources["score"] = {"score.weight": (config.num_labels, d_model)}
    elif not config.tie_word_embeddings:
        sources["lm_head"] = {OUTPUT: (n_vocab, d_model)}
    if config.head == "token":
        sources["score_bias"] = {"score.bias": (config.num_labels,)}
    return sources


def layer_sources(config: Config, number: int, *, is_fused: bool | None = None) -> Sources:
    """List the fields of LayerParams; `is_fused`: whether q, k and v are one tensor, and gate and
    up, as in Phi-3.  None: as in files of the model's type.
    """
    d_model, d_ff = config.hidden_size, config.intermediate_size
    d_q = config.num_attention_heads * config.head_dim
    d_kv = config.num_key_value_heads * config.head_dim
    if config.model_type == "phi3" if is_fused is None else is_fused:
        qkv, gate_up = {"qkv_proj": d_q + 2 * d_kv}, {"gate_up_proj": 2 * d_ff}
    else:
        qkv = {"q_proj": d_q, "k_proj": d_kv, "v_proj": d_kv}
        gate_up = {"gate_proj": d_ff, "up_proj": d_ff}
    layer = f"model.layers.{number}"
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    sources: Sources = {
        norm: {f"{layer}.{norm}.weight": (d_model,)}
        for norm in ("input_layernorm", "post_attention_layernorm")
    }
    sources |= _linear_sources("qkv", attention, qkv, d_model, config.attention_bias)
    sources |= _linear_sources("o", attention, {"o_proj": d_model}, d_q, config.attention_bias)
    sources |= _linear_sources("gate_up", mlp, gate_up, d_model, config.mlp_bias)
    sources |= _linear_sources("down", mlp, {"down_proj": d_model}, d_ff, config.mlp_bias)
    return sources


def _linear_sources(
    field: str, module: str, rows: dict[str, int], d_in: int, has_bias: bool
) -> Sources:
    """List weight and bias of a linear map; `rows` are its parts in the file, with their d_out."""
    sources: Sources = {
        f"{field}_proj": {f"{module}.{leaf}.weight": (d_out, d_in) for leaf, d_out in rows.items()}
    }
    if has_bias:
        sources[f"{field}_bias"] = {f"{module}.{leaf}.bias": (d,) for leaf, d in rows.items()}
    return sources
