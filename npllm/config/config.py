"""Config: the blueprint of a model, read from config.json into a frozen and validated dataclass.

Field names are those of config.json.  Every key of a file is used, or stands in `KEYS_WITHOUT_EFFECT`; a value that would change
the numbers and is not implemented raises; a key nobody has heard of warns by name, since fine-tunes carry many.
"""

import json
import math
import os.path
import reprlib
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from npllm.arrays import DTYPES
from npllm.errors import NpllmOSError, NpllmTypeError, NpllmValueError

__all__ = ["Config", "Reader", "RopeParameters", "config_data", "parse_dtype", "printable", "quote", "read_json"]

LARGEST_SIZE = 2**24  # of any axis; a vocabulary of 16 million is beyond every published model
LARGEST_LAYER_COUNT = 2**12
LARGEST_TOKEN = 2**31 - 1
LARGEST_JSON = 2**25  # bytes of a json file; the index of the largest published checkpoint has a third of it

KEYS_WITHOUT_EFFECT = frozenset("""
    _name_or_path _attn_implementation _attn_implementation_autoset auto_map embd_pdrop full_attn_mod initializer_range
    interpolate_factor transformers_version use_cache gradient_checkpointing return_dict output_attentions output_hidden_states
    torchscript id2label label2id num_labels problem_type task_specific_params finetuning_task chunk_size_feed_forward
    is_encoder_decoder is_decoder prefix tokenizer_class unsloth_version unsloth_fixed pretraining_tp
""".split())

# Keys that may be present only with a value that changes nothing.
ONLY = {"lm_head_bias": (False, None), "quantization_config": (None,), "add_cross_attention": (False, None), "layer_types": (None,)}

ROPE_ALIASES = {"su": "longrope", "yarn": "longrope"}  # of model_type phi3; to Llama, yarn is a type of its own
ROPE_TYPES = {"phi3": ("default", "longrope"), "llama": ("default", "linear", "dynamic", "yarn", "llama3", "longrope")}
ROPE_NEEDS = {"default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": (), "longrope": ("short_factor", "long_factor"),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
HEADS = {"ForCausalLM": "lm", "ForSequenceClassification": "sequence", "ForTokenClassification": "token"}


@dataclass(frozen=True)
class RopeParameters:
    """How positions turn into angles: `rope_parameters` of config.json, or its older spelling `rope_scaling` and `rope_theta`.

    What each number means stands with the function that uses it, in `npllm.ops.frequencies`.  None: the file does not say.
    """

    rope_type: str = "default"
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    factor: float | None = None
    attention_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


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
        Number of keys a query sees, its own included; None: all earlier ones.
    tie_word_embeddings : bool
        The embedding matrix is the output matrix as well.
    bos_token_id, pad_token_id : int or None
    eos_token_id : tuple of int
        Any of them ends an answer; generation_config.json overrides it.
    dtype : str
        In which the weights are stored.
    model_type : str
        "phi3" (fused projections) or "llama" (split ones, fused at load; the same mathematics).
    architectures : tuple of str
        Names the head: `...ForCausalLM`, `...ForSequenceClassification` or `...ForTokenClassification`.
    attention_bias, mlp_bias : bool
        The linear maps of that half have biases; Llama only.
    num_labels : int
        Of a classification head.
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

    @property
    def d_rope(self):
        """Number of channels of a head that RoPE rotates, `int(d_head * partial_rotary_factor)`."""
        return int(self.head_dim * self.rope_parameters.partial_rotary_factor)

    @property
    def head(self):
        """What stands on top of the hidden state: "lm", "sequence" (classification) or "token" (classification)."""
        return next(head for suffix, head in HEADS.items() if self.architectures[0].endswith(suffix))

    @property
    def context_length(self):
        """Most tokens of a sequence: `max_position_embeddings`, stretched by the factor of dynamic RoPE."""
        rope = self.rope_parameters
        return int(self.max_position_embeddings * (rope.factor if rope.rope_type == "dynamic" else 1))

    @classmethod
    def from_json(cls, path_or_dict):
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
            When it is no JSON object, a key is missing, or a value is impossible or not implemented; names key and value.

        Notes
        -----
        Source: `Phi3Config` in Transformers 5.23; older files are understood as well (`torch_dtype`, `rope_scaling`, `rope_theta`).
        """
        return _parse(*config_data(path_or_dict))


def config_data(path_or_dict):
    """Read the content of a config.json, from the file, its folder or the dict it is already; return it and a name for messages.

    Raises
    ------
    NpllmOSError, NpllmValueError
        As `read_json`.
    """
    if isinstance(path_or_dict, dict):
        return path_or_dict, "config"
    try:
        path = Path(path_or_dict)
    except TypeError:
        raise NpllmTypeError(f"path_or_dict must be a path or a dict, got {type(path_or_dict).__name__}") from None
    path = path / "config.json" if os.path.isdir(path) else path
    return read_json(path), str(path)


def read_json(path, kind=dict):
    """Read a JSON object from a UTF-8 file, or a list where `kind` is list.

    Raises
    ------
    NpllmOSError
        When the file is missing or cannot be read.
    NpllmValueError
        When it is too large, not UTF-8, not JSON, nested too deeply, says a key twice, or is not of that kind.
    """
    try:
        n_bytes = os.path.getsize(path)
        if n_bytes > LARGEST_JSON:
            raise NpllmValueError(f"{path}: has {n_bytes} bytes; more than {LARGEST_JSON} are refused")
        text = Path(path).read_text(encoding="utf-8-sig")
    except NpllmValueError:
        raise
    except UnicodeDecodeError as error:
        raise NpllmValueError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (OSError, ValueError) as error:
        raise NpllmOSError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    try:
        data = json.loads(text, object_pairs_hook=no_duplicates)
    except RecursionError:
        raise NpllmValueError(f"{path}: is nested too deeply to be a configuration") from None
    except ValueError as error:
        raise NpllmValueError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(data, kind):
        wanted = {dict: "object {...}", list: "list [...]"}[kind]
        raise NpllmValueError(f"{path}: must hold a JSON {wanted}, got {type(data).__name__}")
    return data


def no_duplicates(pairs):
    """Make a dict of the pairs of a JSON object; a name that stands there twice has no right reading (object_pairs_hook)."""
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError(f"it names {quote(Counter(name for name, _ in pairs).most_common(1)[0][0])} twice")
    return data


def quote(value):
    """Write a value into a message: cut, however long or deeply nested it is, and with nothing that could not be printed."""
    try:
        return _SHORT.repr(value)
    except (RecursionError, ValueError):  # an integer of too many digits
        return f"a {type(value).__name__} too large to show"


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 100, 100


def printable(text):
    """Write out a name that a file gives, without characters that a terminal would obey."""
    return text if text.isprintable() else repr(text)[1:-1]


def _parse(data, where):
    """Turn the content of a config.json into a Config."""
    read = Reader(data, where)
    model_type = read.data.get("model_type")
    if not isinstance(model_type, str) or model_type not in ROPE_TYPES:
        raise NpllmValueError(f"{where}: model_type must be one of {', '.join(ROPE_TYPES)}, got {quote(model_type)}")
    n_head, d_model = read.size("num_attention_heads"), read.size("hidden_size")
    max_position = read.size("max_position_embeddings", default=4096 if model_type == "phi3" else 2048)
    rope, n_original = _parse_rope(read, model_type)
    config = Config(
        vocab_size=read.size("vocab_size"),
        hidden_size=d_model,
        intermediate_size=read.size("intermediate_size"),
        num_hidden_layers=read.size("num_hidden_layers", largest=LARGEST_LAYER_COUNT),
        num_attention_heads=n_head,
        num_key_value_heads=read.size("num_key_value_heads", default=n_head),
        head_dim=read.size("head_dim", default=d_model // n_head),
        max_position_embeddings=max_position,
        original_max_position_embeddings=n_original or (4096 if model_type == "phi3" else max_position),
        rms_norm_eps=read.number("rms_norm_eps", default=1e-5 if model_type == "phi3" else 1e-6),
        rope_parameters=rope,
        sliding_window=read.size("sliding_window", default=None) if model_type == "phi3" else None,
        tie_word_embeddings=read.flag("tie_word_embeddings", default=False),
        bos_token_id=read.token("bos_token_id"),
        eos_token_id=read.tokens("eos_token_id"),
        pad_token_id=read.token("pad_token_id"),
        dtype=parse_dtype(read),
        model_type=read.text("model_type"),
        architectures=_parse_architectures(read, model_type),
        hidden_act=read.text("hidden_act", default="silu"),
        attention_bias=read.flag("attention_bias", default=False),
        mlp_bias=read.flag("mlp_bias", default=False),
        num_labels=_parse_num_labels(read),
        attention_dropout=read.number("attention_dropout", default=0.0),
        resid_pdrop=read.number("resid_pdrop", default=0.0),
    )
    _validate(config, where)
    read.finish()
    return config


def _parse_rope(read, model_type):
    """Read the old and the new spelling of the rope parameters; return them and the original context length, or None.

    As in Transformers, `rope_scaling` wins over `rope_parameters`, and the context length at top level over the nested one.
    """
    nested = read.get("rope_parameters") or {}
    nested = read.get("rope_scaling") or nested
    if not isinstance(nested, dict):
        raise NpllmValueError(f"{read.where}: rope_scaling must be null or an object, got {quote(nested)}")
    theta, fraction = (read.number(key, default=value) for key, value in (("rope_theta", 10000.0), ("partial_rotary_factor", 1.0)))
    n_original = read.size("original_max_position_embeddings", default=None)
    rope = Reader(nested, f"{read.where}: rope_parameters")
    spelled_old = rope.text("type", default="default")
    rope_type = rope.text("rope_type", default=spelled_old)
    numbers = ("factor", "attention_factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale",
               "mscale_all_dim")
    parameters = RopeParameters(
        rope_type=ROPE_ALIASES.get(rope_type, rope_type) if model_type == "phi3" else rope_type,
        rope_theta=rope.number("rope_theta", default=theta),
        partial_rotary_factor=_rotated_part(rope, rope_type, fraction, model_type),
        short_factor=rope.numbers("short_factor"),
        long_factor=rope.numbers("long_factor"),
        truncate=rope.flag("truncate", default=True),
        **{name: rope.number(name, default=None) for name in numbers},
    )
    nested_original = rope.size("original_max_position_embeddings", default=None)
    for ignored in ("short_mscale", "long_mscale"):  # Transformers does not read them
        rope.get(ignored)
    rope.finish()
    return parameters, n_original or nested_original


def _rotated_part(rope, rope_type, fraction, model_type):
    """Read partial_rotary_factor; Llama's default RoPE rotates whole heads, as in Transformers."""
    fraction = rope.number("partial_rotary_factor", default=fraction)
    if model_type == "llama" and rope_type == "default" and fraction != 1:
        warnings.warn(f"{rope.where}: partial_rotary_factor = {fraction} has no effect with model_type llama and rope_type "
                      "default: whole heads are rotated, as in Transformers", stacklevel=6)
        return 1.0
    return fraction


def _parse_architectures(read, model_type):
    """Read which head the checkpoint carries; the default is a language model."""
    family = {"phi3": "Phi3", "llama": "Llama"}[model_type]
    names = read.get("architectures", [family + "ForCausalLM"])
    known = [family + suffix for suffix in HEADS]
    if not isinstance(names, list) or not names or names[0] not in known or not all(isinstance(name, str) for name in names):
        raise NpllmValueError(f"{read.where}: architectures must be one of {', '.join(known)}, got {quote(names)}")
    return tuple(names)


def _parse_num_labels(read):
    """Number of classes: as said, else as many as have names, else 2 as in Transformers."""
    names = read.get("id2label", {})
    return read.size("num_labels", default=len(names) if isinstance(names, dict) and names else 2)


def parse_dtype(read):
    """Read the dtype of the weights, `torch_dtype` in older files."""
    old = read.text("torch_dtype", default="float32")
    name = read.text("dtype", default=old).removeprefix("torch.")
    if name not in DTYPES:
        raise NpllmValueError(f"{read.where}: dtype must be one of {', '.join(DTYPES)}, got {quote(name)}")
    return name


def _validate(config, where):
    """Raise for sizes that contradict each other and for values that are not implemented."""

    def require(holds, message):
        if not holds:
            raise NpllmValueError(f"{where}: {message}")

    n_head, n_kv_head = config.num_attention_heads, config.num_key_value_heads
    require(n_head % n_kv_head == 0, f"num_attention_heads must be a multiple of num_key_value_heads, got {n_head} and {n_kv_head}")
    require(config.hidden_act == "silu", f"hidden_act must be silu, got {config.hidden_act!r}, which is not implemented")
    require(config.rms_norm_eps >= 0, f"rms_norm_eps must be at least 0, got {config.rms_norm_eps}")
    require(config.model_type == "llama" or not (config.attention_bias or config.mlp_bias),
            "attention_bias and mlp_bias must be false for model_type phi3, got true, which is not implemented")
    _validate_rope(config, require)
    for name in ("bos_token_id", "pad_token_id"):
        token = getattr(config, name)
        require(token is None or token < config.vocab_size, f"{name} must be below vocab_size = {config.vocab_size}, got {token}")


def _validate_rope(config, require):
    """Check the rope parameters against their type and against the width of a head."""
    rope, d_rope = config.rope_parameters, config.d_rope
    types = ROPE_TYPES[config.model_type]
    require(rope.rope_type in types,
            f"rope_type must be one of {', '.join(types)}, got {rope.rope_type!r}, which is not implemented")
    require(config.model_type != "llama" or d_rope == config.head_dim,
            f"partial_rotary_factor must be 1 for model_type llama and rope_type {rope.rope_type}, got "
            f"{rope.partial_rotary_factor}; Transformers cannot compute it either")
    require(1 < rope.rope_theta < 1e30, f"rope_theta must be above 1 and below 1e30, got {rope.rope_theta}")
    require(2 <= d_rope <= config.head_dim and d_rope % 2 == 0,
            f"head_dim * partial_rotary_factor must be even and in 2 ... head_dim = {config.head_dim}, "
            f"got {config.head_dim} * {rope.partial_rotary_factor} = {d_rope}")
    for name in ROPE_NEEDS[rope.rope_type]:
        require(getattr(rope, name) is not None, f"rope_type {rope.rope_type} needs {name}, which is missing")
    for name in ("factor", "attention_factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
        value = getattr(rope, name)
        require(value is None or 1e-9 < value < 1e9, f"{name} must be above 1e-9 and below 1e9, got {value}")
    for name in ("mscale", "mscale_all_dim"):
        value = getattr(rope, name)
        require(value is None or 0 <= value < 1e9, f"{name} must be at least 0 and below 1e9, got {value}")
    for name in ("short_factor", "long_factor"):
        factors = getattr(rope, name)
        require(factors is None or (len(factors) == d_rope // 2 and all(1e-9 < x < 1e9 for x in factors)),
                f"{name} must hold d_rope/2 = {d_rope // 2} positive numbers, got {len(factors or ())}")
    if rope.rope_type == "longrope":
        require(config.original_max_position_embeddings > 1, "original_max_position_embeddings must be above 1 for longrope, got 1")
    if rope.rope_type == "llama3":
        require(rope.high_freq_factor > rope.low_freq_factor,
                f"high_freq_factor must be above low_freq_factor = {rope.low_freq_factor}, got {rope.high_freq_factor}")
    if rope.rope_type == "dynamic":
        require(d_rope >= 4 and rope.factor >= 1, f"dynamic RoPE needs d_rope >= 4 and factor >= 1, got {d_rope} and {rope.factor}")
        require(config.context_length <= LARGEST_SIZE, f"max_position_embeddings * factor must be at most {LARGEST_SIZE}, "
                f"got {config.context_length}")


class Reader:
    """Takes keys out of a JSON object one by one, checks their types, and knows which were never asked for."""

    def __init__(self, data, where):
        self.data, self.where, self.asked = data, where, set()

    def get(self, key, default=None):
        """Take a value of any kind; null counts as absent."""
        self.asked.add(key)
        value = self.data.get(key)
        return default if value is None else value

    def _fail(self, key, wanted, value):
        raise NpllmValueError(f"{self.where}: {key} must be {wanted}, got {quote(value)}")

    def size(self, key, *, largest=LARGEST_SIZE, **default):
        """Take an integer from 1 on; without a default the key must be there."""
        value = self.get(key, default.get("default"))
        if value is None and "default" in default:
            return None
        if not _is_int(value) or not 1 <= value <= largest:
            self._fail(key, f"an integer in 1 ... {largest}", value)
        return value

    def number(self, key, default):
        """Take a finite number."""
        value = self.get(key, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:
            self._fail(key, "a finite number", value)
        return float(value)

    def numbers(self, key):
        """Take a list of finite numbers."""
        value = self.get(key)
        if value is not None and not isinstance(value, list):
            self._fail(key, "a list of numbers", value)
        return None if value is None else tuple(Reader({key: x}, self.where).number(key, default=math.nan) for x in value)

    def text(self, key, default=None):
        """Take a string."""
        value = self.get(key, default)
        if not isinstance(value, str):
            self._fail(key, "a string", value)
        return value

    def flag(self, key, default):
        """Take true or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            self._fail(key, "true or false", value)
        return value

    def token(self, key):
        """Take a token id or null."""
        value = self.get(key)
        if value is not None and not is_token(value):
            self._fail(key, "a token id or null", value)
        return value

    def tokens(self, key):
        """Take a token id, a list of them or null."""
        value = self.get(key, [])
        value = value if isinstance(value, list) else [value]
        if not all(map(is_token, value)):
            self._fail(key, "a token id, a list of them or null", value)
        return tuple(value)

    def finish(self, only=ONLY, without_effect=KEYS_WITHOUT_EFFECT):
        """Raise for values that are not implemented, and warn of keys that nobody knows."""
        for key, allowed in only.items():
            if self.get(key) not in allowed:
                self._fail(key, " or ".join(map(repr, allowed)) + " (anything else is not implemented)", self.data[key])
        unknown = sorted(set(self.data) - self.asked - without_effect)
        if unknown:
            warnings.warn(f"{self.where}: unknown keys are ignored: {', '.join(map(printable, unknown))}"[:500], stacklevel=5)


def _is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


def is_token(value):
    """Tell whether a value can be a token id."""
    return _is_int(value) and 0 <= value <= LARGEST_TOKEN


