"""A configuration as GGUF metadata, and the tensors that its rotary position embedding needs."""

from typing import Any

import numpy as np

from npllm import ops
from npllm.checkpoints.gguf.rope import (
    LLAMA3,
    LLAMA3_HIGH,
    LLAMA3_LOW,
    LLAMA3_ORIGINAL,
    LONG,
    SHORT,
)
from npllm.config.config import Config
from npllm.errors import NpllmValueError
from npllm.models import rope

__all__ = ["config_metadata", "rope_tensors"]


def config_metadata(config: Config) -> dict[str, Any]:
    """Return the metadata of a configuration, as llama.cpp's converter writes them.

    Parameters
    ----------
    config : Config
        Of a language model.

    Returns
    -------
    metadata : dict of str to int, float or str

    Raises
    ------
    NpllmValueError
        When GGUF, or the reader of llama.cpp, has no place for the model; says why.

    Notes
    -----
    Source: `Phi3MiniModel.set_gguf_parameters` and `LlamaModel.set_gguf_parameters` in llama.cpp's
    converter.
    """
    _check_can_be_held(config)
    sizes = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.d_rope,
        "rope.freq_base": float(config.rope_parameters.rope_theta),
        **(_phi3_values(config) if config.model_type == "phi3" else _llama_values(config)),
    }
    return {f"{config.model_type}.{name}": value for name, value in sizes.items()}


def _check_can_be_held(config: Config) -> None:
    """Raise for a model that GGUF, or a reader of it, has no place for."""
    kind, rope_type = config.model_type, config.rope_parameters.rope_type
    d_q = config.num_attention_heads * config.head_dim
    reasons = {
        f"{config.architectures[0]} is no language model": config.head != "lm",
        "attention_bias and mlp_bias must be false": config.attention_bias or config.mlp_bias,
        f"rope_type {rope_type} has no place there": rope_type in ("dynamic", "yarn"),
        "llama3 must have low_freq_factor 1, high_freq_factor 4 and "
        "original_max_position_embeddings 8192, which a reader assumes": not _is_known_llama3(
            config
        ),
        f"n_head * d_head = {d_q} must be d_model = {config.hidden_size}, which llama.cpp "
        "expects of Phi-3": kind == "phi3" and d_q != config.hidden_size,
        "partial_rotary_factor must be 1 for Llama": kind == "llama"
        and config.d_rope != config.head_dim,
    }
    for reason, applies in reasons.items():
        if applies:
            raise NpllmValueError(f"cannot be written as GGUF: {reason}")


def _is_known_llama3(config: Config) -> bool:
    """Tell whether llama3's parameters are those that follow from its frequencies."""
    own = config.rope_parameters
    numbers = own.low_freq_factor, own.high_freq_factor, config.original_max_position_embeddings
    return own.rope_type != "llama3" or numbers == (LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_ORIGINAL)


def _phi3_values(config: Config) -> dict[str, Any]:
    """Return what files of Phi-3 have; a window of 0 means none."""
    is_long = config.rope_parameters.rope_type == "longrope"
    scale = {"rope.scaling.attn_factor": float(rope.attention_factor(config))} if is_long else {}
    return {
        "rope.scaling.original_context_length": config.original_max_position_embeddings,
        "attention.sliding_window": config.sliding_window or 0,
        **scale,
    }


def _llama_values(config: Config) -> dict[str, Any]:
    """Return what files of Llama have."""
    own = config.rope_parameters
    scaling: dict[str, Any] = {}
    if own.rope_type in ("linear", "longrope"):
        scaling["rope.scaling.type"] = own.rope_type
    if own.rope_type == "linear":
        scaling["rope.scaling.factor"] = own.factor
    if own.rope_type == "longrope":
        n_original = config.original_max_position_embeddings
        scaling["rope.scaling.original_context_length"] = n_original
        scaling["rope.scaling.attn_factor"] = float(rope.attention_factor(config))
    return {
        "vocab_size": config.vocab_size,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        **scaling,
    }


def rope_tensors(config: Config) -> dict[str, np.ndarray]:
    """Return the tensors of longrope (factors) and llama3 (quotients of the frequencies).

    Parameters
    ----------
    config : Config

    Returns
    -------
    tensors : dict of str to float32 array [d_rope/2]
        Empty for other rope types.

    Notes
    -----
    Source: `generate_extra_tensors` of both classes in llama.cpp's converter.
    """
    own = config.rope_parameters
    if own.rope_type == "longrope":
        both = {LONG: own.long_factor, SHORT: own.short_factor}
        return {name: np.asarray(x, np.float32) for name, x in both.items()}
    if own.rope_type != "llama3":
        return {}
    plain = ops.rope_frequencies(config.d_rope, own.rope_theta)
    return {LLAMA3: (plain / rope.frequencies(config, 0)).astype(np.float32)}
