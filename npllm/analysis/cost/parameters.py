"""Parameters of a decoder by part, and the sizes of its linear maps."""

from npllm.config.config import Config
from npllm.errors import NpllmValueError

__all__ = ["bias_sizes", "linear_shapes", "parameter_counts", "require_lm"]


def parameter_counts(config: Config) -> dict[str, int]:
    """Count parameters by part.

        embedding = n_vocab * d_model
        lm_head   = n_vocab * d_model, or 0 where it is tied to the embedding
        attention = n_layer * d_model * d_head * (n_head + 2 * n_kv_head)       q, k, v
                  + n_layer * d_model * d_head * n_head                         o  [+ biases]
        mlp       = n_layer * 3 * d_model * d_ff  [+ biases]
        norms     = (2 * n_layer + 1) * d_model

    Parameters
    ----------
    config : Config
        Of a causal language model.

    Returns
    -------
    counts : dict of str to int

    Raises
    ------
    NpllmValueError
        When the model has another head than the LM head.

    Notes
    -----
    Source: the shapes of `Phi3ForCausalLM` in Transformers;
    `npllm.checkpoints.phi3_layout.expected_shapes` lists them one by one.
    """
    require_lm(config)
    d, n_layer = config.hidden_size, config.num_hidden_layers
    biases = bias_sizes(config)
    part = {
        name: n_layer * (d_out * d_in + biases[name])
        for name, (d_out, d_in) in linear_shapes(config).items()
    }
    vocabulary = config.vocab_size * d
    return {
        "embedding": vocabulary,
        "attention": part["qkv"] + part["o"],
        "mlp": part["gate_up"] + part["down"],
        "norms": (2 * n_layer + 1) * d,
        "lm_head": 0 if config.tie_word_embeddings else vocabulary,
    }


def require_lm(config: Config) -> None:
    """Raise NpllmValueError unless the model has an LM head."""
    if config.head != "lm":
        raise NpllmValueError(
            "costs are defined for causal language models, "
            f"got architectures = [{config.architectures[0]!r}]"
        )


def linear_shapes(config: Config) -> dict[str, tuple[int, int]]:
    """Return the shape (d_out, d_in) of each linear map of a layer."""
    d, d_ff, d_head = config.hidden_size, config.intermediate_size, config.head_dim
    d_q, d_kv = config.num_attention_heads * d_head, config.num_key_value_heads * d_head
    return {"qkv": (d_q + 2 * d_kv, d), "o": (d, d_q), "gate_up": (2 * d_ff, d), "down": (d, d_ff)}


def bias_sizes(config: Config) -> dict[str, int]:
    """Return the number of bias entries of each linear map of a layer; 0 without a bias."""
    has = {
        "qkv": config.attention_bias,
        "o": config.attention_bias,
        "gate_up": config.mlp_bias,
        "down": config.mlp_bias,
    }
    return {name: d_out if has[name] else 0 for name, (d_out, _) in linear_shapes(config).items()}
