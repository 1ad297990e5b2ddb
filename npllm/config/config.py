"""Config: sizes and choices of a model, read from config.json into a frozen, validated dataclass.

Field names are those of config.json.  Every key is used or listed in `KEYS_WITHOUT_EFFECT`.  A
value that would change the numbers and is not implemented raises; an unknown key warns by name.
"""

from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any

from npllm.arrays import DTYPES
from npllm.config import legacy_names
from npllm.config.quantization import Quantization, parse_quantization
from npllm.config.reader import Reader
from npllm.config.rope_parameters import ROPE_TYPES, RopeParameters, parse_rope, validate_rope
from npllm.config.strict_json import config_data, quote, require
from npllm.errors import NpllmValueError

__all__ = ["Config", "Quantization", "RopeParameters", "parse_dtype"]

LARGEST_LAYER_COUNT = 2**12

KEYS_WITHOUT_EFFECT = frozenset(
    """
    _name_or_path _attn_implementation _attn_implementation_autoset auto_map embd_pdrop
    full_attn_mod initializer_range interpolate_factor transformers_version use_cache
    gradient_checkpointing return_dict output_attentions output_hidden_states torchscript id2label
    label2id num_labels problem_type task_specific_params finetuning_task
    chunk_size_feed_forward is_encoder_decoder is_decoder prefix tokenizer_class unsloth_version
    unsloth_fixed pretraining_tp
""".split()
)

# Keys that may be present only with a value that changes nothing.
ONLY = {
    "lm_head_bias": (False, None),
    "add_cross_attention": (False, None),
    "layer_types": (None,),
}

FAMILIES = {"phi3": "Phi3", "llama": "Llama"}  # model_type -> prefix of the architectures
HEADS = {
    "ForCausalLM": "lm",
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "token",
}


@dataclass(frozen=True)
class Config:
    """Sizes and choices of one model of the Phi-3 family.

    Parameters
    ----------
    vocab_size, hidden_size, intermediate_size : int
        n_vocab, d_model and d_ff.
    num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim : int
        n_layer, n_head, n_kv_head and d_head.
    max_position_embeddings : int
        The context length: most tokens of a sequence, prompt and answer together.
    original_max_position_embeddings : int
        The context length of the first training.
    rms_norm_eps : float
    rope_parameters : RopeParameters
    sliding_window : int or None
        Number of keys that a query sees, its own included; None: all earlier ones.
    tie_word_embeddings : bool
        The output matrix is the embedding matrix.
    bos_token_id, pad_token_id : int or None
    eos_token_id : tuple of int
        Each of them ends an answer; generation_config.json overrides them.
    dtype : str
        The dtype of the stored weights.
    model_type : str
        "phi3" (fused projections) or "llama" (separate ones, fused at load; the same function).
    architectures : tuple of str
        Names the head: `...ForCausalLM`, `...ForSequenceClassification` or
        `...ForTokenClassification`.
    attention_bias, mlp_bias : bool
        The linear maps of attention, of the feed-forward network, have biases; Llama only.
    num_labels : int
        Of a classification head.
    quantization : Quantization or None
        How the stored matrices are quantised, `quantization_config`; None: they are floats.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    original_max_position_embeddings: int
    rms_norm_eps: float
    rope_parameters: RopeParameters
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dtype: str = "float32"
    model_type: str = "phi3"
    architectures: tuple[str, ...] = ("Phi3ForCausalLM",)
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    num_labels: int = 2
    attention_dropout: float = 0.0
    resid_pdrop: float = 0.0
    quantization: Quantization | None = None

    @property
    def d_rope(self) -> int:
        """Channels of a head that RoPE rotates, `int(d_head * partial_rotary_factor)`."""
        return int(self.head_dim * self.rope_parameters.partial_rotary_factor)

    @cached_property
    def head(self) -> str:
        """The head: "lm", "sequence" (classification) or "token" (classification)."""
        name = self.architectures[0]
        return next(head for suffix, head in HEADS.items() if name.endswith(suffix))

    @property
    def context_length(self) -> int:
        """Most tokens of a sequence, prompt and answer together."""
        return self.rope_parameters.context_length(self.max_position_embeddings)

    @classmethod
    def from_json(cls, path_or_dict: str | PathLike[str] | dict[str, Any]) -> "Config":
        """Read and validate a config.json.

        Parameters
        ----------
        path_or_dict : str, Path or dict
            The file, the folder that holds it, or its parsed content.

        Returns
        -------
        config : Config

        Raises
        ------
        NpllmOSError
            When the file cannot be read.
        NpllmValueError
            When it is no JSON object, a key is missing, or a value is impossible or not
            implemented; names key and value.

        Notes
        -----
        Older files are read as well: `torch_dtype`, `rope_scaling`, `rope_theta`.

        Source: `Phi3Config` in Transformers 5.23.
        """
        return _parse(*config_data(path_or_dict))


def _parse(data: dict[str, Any], where: str) -> Config:
    """Turn the content of a config.json into a Config."""
    read = Reader(data, where)
    model_type = read.get("model_type")
    if not isinstance(model_type, str) or model_type not in ROPE_TYPES:
        raise NpllmValueError(
            f"{where}: model_type must be one of {', '.join(ROPE_TYPES)}, got {quote(model_type)}"
        )
    is_phi3 = model_type == "phi3"
    n_head, d_model = read.size("num_attention_heads"), read.size("hidden_size")
    max_position = read.size("max_position_embeddings", 4096 if is_phi3 else 2048)
    rope, n_original = parse_rope(read, model_type)
    config = Config(
        vocab_size=read.size("vocab_size"),
        hidden_size=d_model,
        intermediate_size=read.size("intermediate_size"),
        num_hidden_layers=read.size("num_hidden_layers", largest=LARGEST_LAYER_COUNT),
        num_attention_heads=n_head,
        num_key_value_heads=read.size("num_key_value_heads", n_head),
        head_dim=read.size("head_dim", d_model // n_head),
        max_position_embeddings=max_position,
        original_max_position_embeddings=n_original or (4096 if is_phi3 else max_position),
        rms_norm_eps=read.number("rms_norm_eps", 1e-5 if is_phi3 else 1e-6),
        rope_parameters=rope,
        sliding_window=read.optional_size("sliding_window") if is_phi3 else None,
        tie_word_embeddings=read.flag("tie_word_embeddings", False),
        bos_token_id=read.token("bos_token_id"),
        eos_token_id=read.tokens("eos_token_id"),
        pad_token_id=read.padding_token("pad_token_id"),
        dtype=parse_dtype(read),
        model_type=model_type,
        architectures=_parse_architectures(read, model_type),
        hidden_act=read.text("hidden_act", "silu"),
        attention_bias=read.flag("attention_bias", False),
        mlp_bias=read.flag("mlp_bias", False),
        num_labels=_parse_num_labels(read),
        attention_dropout=read.number("attention_dropout", 0.0),
        resid_pdrop=read.number("resid_pdrop", 0.0),
        quantization=parse_quantization(read),
    )
    _validate(config, where)
    read.finish(ONLY, KEYS_WITHOUT_EFFECT)
    return config


def _parse_architectures(read: Reader, model_type: str) -> tuple[str, ...]:
    """Read which head the checkpoint has; the default is a language model."""
    family = FAMILIES[model_type]
    names = read.get("architectures", [family + "ForCausalLM"])
    known = [family + suffix for suffix in HEADS]
    are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if are_names:
        names = [legacy_names.ARCHITECTURES.get(name, name) for name in names]
    if not are_names or not names or names[0] not in known:
        raise NpllmValueError(
            f"{read.where}: architectures must be one of {', '.join(known)}, got {quote(names)}"
        )
    return tuple(names)


def _parse_num_labels(read: Reader) -> int:
    """Read the number of classes; the default is the number of names, else 2 as in Transformers."""
    names = read.get("id2label", {})
    return read.size("num_labels", len(names) if isinstance(names, dict) and names else 2)


def parse_dtype(read: Reader) -> str:
    """Read the dtype of the weights; older files name it `torch_dtype`."""
    name = read.text("dtype", read.text("torch_dtype", "float32")).removeprefix("torch.")
    if name not in DTYPES:
        raise NpllmValueError(
            f"{read.where}: dtype must be one of {', '.join(DTYPES)}, got {quote(name)}"
        )
    return name


def _validate(config: Config, where: str) -> None:
    """Raise for sizes that contradict each other and for values that are not implemented."""
    n_head, n_kv_head = config.num_attention_heads, config.num_key_value_heads
    require(
        where,
        n_head % n_kv_head == 0,
        "num_attention_heads must be a multiple of num_key_value_heads, "
        f"got {n_head} and {n_kv_head}",
    )
    require(
        where,
        config.hidden_act == "silu",
        f"hidden_act must be silu, got {config.hidden_act!r}, which is not implemented",
    )
    require(
        where,
        config.rms_norm_eps >= 0,
        f"rms_norm_eps must be at least 0, got {config.rms_norm_eps}",
    )
    has_bias = config.attention_bias or config.mlp_bias
    require(
        where,
        config.model_type == "llama" or not has_bias,
        "attention_bias and mlp_bias must be false for model_type phi3, got true, which is "
        "not implemented",
    )
    validate_rope(
        config.rope_parameters,
        where,
        model_type=config.model_type,
        d_head=config.head_dim,
        d_rope=config.d_rope,
        n_original=config.original_max_position_embeddings,
        max_position_embeddings=config.max_position_embeddings,
    )
    for name in ("bos_token_id", "pad_token_id"):
        token = getattr(config, name)
        require(
            where,
            token is None or token < config.vocab_size,
            f"{name} must be below vocab_size = {config.vocab_size}, got {token}",
        )
