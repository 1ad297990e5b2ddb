"""The config.json of a GGUF file, from its metadata."""

from typing import Any

from npllm.checkpoints.gguf.reader import GGUFFile
from npllm.checkpoints.gguf.rope import rope_parameters, shortest
from npllm.config.config import Config
from npllm.config.strict_json import quote
from npllm.errors import NpllmError, NpllmValueError
from npllm.progress import warn

__all__ = ["gguf_config", "phi3_config"]

# Keys below the architecture's name that are read, or that change no number.
KEYS = frozenset(
    """
    attention.head_count attention.head_count_kv attention.key_length attention.value_length
    attention.layer_norm_rms_epsilon attention.sliding_window block_count context_length
    embedding_length feed_forward_length rope.dimension_count rope.freq_base rope.scaling.type
    rope.scaling.factor rope.scaling.attn_factor rope.scaling.original_context_length
    rope.scaling.finetuned vocab_size
""".split()
)
ONLY = {"expert_count": 0, "expert_used_count": 0}  # keys that may have one value alone
FAMILIES = {"llama": "Llama", "phi3": "Phi3"}
# Of Phi-3-mini-4k and Phi-3-medium-4k: layers, context length, and the window in config.json.
OLD_LAYERS, OLD_CONTEXT, OLD_WINDOW = (32, 40), 4096, 2047


def gguf_config(gguf: GGUFFile) -> dict[str, Any]:
    """Return the content of a config.json under which the file runs as it is.

    Parameters
    ----------
    gguf : GGUFFile
        Of the architecture llama or phi3.

    Returns
    -------
    config : dict
        As Transformers' `LlamaConfig` and `Phi3Config` have it.

    Raises
    ------
    NpllmValueError
        When a metadata value is missing, impossible or not implemented.

    Warns
    -----
    UserWarning
        Where a file of Phi-3 says nothing of a sliding window, and one is assumed; for keys of the
        architecture that are not known.

    Notes
    -----
    Source: `Phi3MiniModel` and `LlamaModel` in llama.cpp's convert_hf_to_gguf.py.
    """
    _check_keys(gguf)
    return _validated(gguf, _own_content(gguf))


def _check_keys(gguf: GGUFFile) -> None:
    """Raise for values that are not implemented; warn of keys that are not known."""
    for name, wanted in ONLY.items():
        gguf.require(gguf.own(name), _or(gguf, name, wanted), wanted)
    prefix = gguf.own("")
    names = {key.removeprefix(prefix) for key in gguf.metadata if key.startswith(prefix)}
    unknown = sorted(names - KEYS - set(ONLY))
    if unknown:
        warn(f"{gguf.path}: unknown keys, not used: {quote([prefix + name for name in unknown])}")


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
    gguf.require("general.architecture", gguf.architecture, "llama")
    return _validated(gguf, _config_content(gguf))


def _validated(gguf: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    """Raise unless a config.json is possible, and has room for the vocabulary."""
    try:
        Config.from_json(config)
    except NpllmError as error:
        raise NpllmValueError(f"{gguf.path}: gives an impossible {error}") from None
    n_tokens = len(gguf.value("tokenizer.ggml.tokens", list))
    if n_tokens > config["vocab_size"]:
        raise NpllmValueError(
            f"{gguf.path}: the vocabulary must have at most {gguf.architecture}.vocab_size = "
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
        "rms_norm_eps": shortest(gguf.value("llama.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": shortest(gguf.value_or("llama.rope.freq_base", float, 10000.0)),
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


def _own_content(gguf: GGUFFile) -> dict[str, Any]:
    """Return the content of the config.json of a file that runs as it is."""
    own, n_ctx = gguf.own, gguf.value(gguf.own("context_length"), int)
    n_head, d_model = gguf.value(own("attention.head_count"), int), _width(gguf)
    d_head = gguf.value_or(own("attention.key_length"), int, d_model // max(1, n_head))
    gguf.require(own("attention.value_length"), _or(gguf, "attention.value_length", d_head), d_head)
    d_rope = _or(gguf, "rope.dimension_count", d_head)
    if gguf.architecture == "llama" and n_head > 0:
        gguf.require(own("rope.dimension_count"), d_rope, d_head)
    theta = shortest(gguf.value_or(own("rope.freq_base"), float, 10000.0))
    scaling = rope_parameters(gguf, theta, d_rope)
    n_original = _or(gguf, "rope.scaling.original_context_length", n_ctx)
    return {
        "architectures": [FAMILIES[gguf.architecture] + "ForCausalLM"],
        "model_type": gguf.architecture,
        "vocab_size": _or(gguf, "vocab_size", _n_vocab(gguf)),
        "hidden_size": d_model,
        "intermediate_size": gguf.value(own("feed_forward_length"), int),
        "num_hidden_layers": gguf.value(own("block_count"), int),
        "num_attention_heads": n_head,
        "num_key_value_heads": _or(gguf, "attention.head_count_kv", n_head),
        "head_dim": d_head,
        "partial_rotary_factor": _rotated_fraction(d_rope, d_head),
        "max_position_embeddings": n_ctx,
        "original_max_position_embeddings": (scaling or {}).get(
            "original_max_position_embeddings", n_original
        ),
        "rms_norm_eps": shortest(gguf.value(own("attention.layer_norm_rms_epsilon"), float)),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        **({"sliding_window": _window(gguf, n_ctx)} if gguf.architecture == "phi3" else {}),
        **gguf.special_ids(),
        "eos_token_id": gguf.stop_ids(),
    }


def _or(gguf: GGUFFile, name: str, default: int) -> int:
    """Return an integer of this architecture, or a default where the file does not have it."""
    return gguf.value_or(gguf.own(name), int, default)


def _width(gguf: GGUFFile) -> int:
    """Return d_model."""
    return gguf.value(gguf.own("embedding_length"), int)


def _n_vocab(gguf: GGUFFile) -> int:
    """Return the number of rows of the embedding matrix."""
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        return len(gguf.value("tokenizer.ggml.tokens", list))
    return embedding.shape[0]


def _rotated_fraction(d_rope: int, d_head: int) -> float:
    """Return the fraction of a head that is rotated, so that int(d_head * fraction) is d_rope."""
    if d_head < 1:
        return 1.0
    fraction = d_rope / d_head
    return fraction if int(d_head * fraction) == d_rope else (d_rope + 0.5) / d_head


def _window(gguf: GGUFFile, n_ctx: int) -> int | None:
    """Return the sliding window of a Phi-3 file: how many keys a query sees; None for all.

    Notes
    -----
    A value of 0 means none: the converter writes it for Phi-4.  Files from before August 2024 have
    no value; llama.cpp then assumed that of the published config.json, and so does this function.
    Later versions of llama.cpp ignore the window.

    Source: `LLM_ARCH_PHI3` in llama.cpp's `llama_model::load_hparams`.
    """
    key = gguf.own("attention.sliding_window")
    if key in gguf.metadata:
        return gguf.value(key, int) or None
    n_layer = gguf.value(gguf.own("block_count"), int)
    is_small = n_ctx == OLD_CONTEXT and n_layer in OLD_LAYERS
    assumed = OLD_WINDOW if is_small else None
    warn(
        f"{gguf.path}: has no {key}, as files from before August 2024: "
        f"{f'a window of {assumed} tokens' if assumed else 'no window'} is assumed"
    )
    return assumed
