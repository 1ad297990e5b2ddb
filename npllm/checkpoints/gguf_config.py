"""The config.json of a converted GGUF file, from its metadata."""

from typing import Any

import numpy as np

from npllm.checkpoints.gguf import GGUFFile
from npllm.config.config import Config
from npllm.errors import NpllmError, NpllmValueError

__all__ = ["phi3_config"]


def phi3_config(gguf: GGUFFile) -> dict[str, Any]:
    """Return the content of the config.json, validated.

    Parameters
    ----------
    gguf : GGUFFile

    Returns
    -------
    config : dict

    Raises
    ------
    NpllmValueError
        When a metadata value is missing, impossible, or not expressible in Phi-3's config.json.
    """
    config = _config_content(gguf)
    try:
        Config.from_json(config)
    except NpllmError as error:
        raise NpllmValueError(f"{gguf.path}: gives an impossible {error}") from None
    n_tokens = len(gguf.value("tokenizer.ggml.tokens", list))
    if n_tokens > config["vocab_size"]:
        raise NpllmValueError(
            f"{gguf.path}: the vocabulary must have at most llama.vocab_size = "
            f"{config['vocab_size']} tokens, got {n_tokens}"
        )
    return config


def _config_content(gguf: GGUFFile) -> dict[str, Any]:
    """Return the content of the config.json as the metadata say."""
    n_head = gguf.value("llama.attention.head_count", int)
    d_model = gguf.value("llama.embedding_length", int)
    n_ctx = gguf.value("llama.context_length", int)
    tokens = gguf.value("tokenizer.ggml.tokens", list)
    _check_rope(gguf, d_model, n_head)
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "vocab_size": gguf.value_or("llama.vocab_size", int, len(tokens)),
        "hidden_size": d_model,
        "intermediate_size": gguf.value("llama.feed_forward_length", int),
        "num_hidden_layers": gguf.value("llama.block_count", int),
        "num_attention_heads": n_head,
        "num_key_value_heads": gguf.value_or("llama.attention.head_count_kv", int, n_head),
        "hidden_act": "silu",
        "max_position_embeddings": n_ctx,
        "original_max_position_embeddings": n_ctx,
        "rms_norm_eps": _shortest(gguf.value("llama.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _shortest(gguf.value_or("llama.rope.freq_base", float, 10000.0)),
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        **gguf.special_ids(),
    }


def _check_rope(gguf: GGUFFile, d_model: int, n_head: int) -> None:
    """Raise on a head width or a RoPE variant that Phi-3's config.json cannot express."""
    if n_head < 1 or d_model % (2 * n_head):
        raise NpllmValueError(
            f"{gguf.path}: d_model must make n_head heads of even width, got {d_model} and {n_head}"
        )
    d_head = d_model // n_head
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        gguf.require(f"llama.{key}", gguf.value_or(f"llama.{key}", int, d_head), d_head)
    scaling = gguf.value_or("llama.rope.scaling.type", str, "none")
    gguf.require("llama.rope.scaling.type", scaling, "none")


def _shortest(x: float) -> float:
    """Return the shortest decimal with the same float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(x)))
