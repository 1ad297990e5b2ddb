"""BertConfig: sizes and choices of a BERT encoder, read from config.json."""

from dataclasses import dataclass
from os import PathLike
from typing import Any

from npllm.config.config import KEYS_WITHOUT_EFFECT, LARGEST_LAYER_COUNT, parse_dtype
from npllm.config.reader import Reader
from npllm.config.strict_json import config_data, quote, require
from npllm.errors import NpllmValueError

__all__ = ["ACTIVATIONS", "BertConfig"]

ACTIVATIONS = ("gelu", "relu", "silu")

# Keys that may be present only with a value that changes nothing.
ONLY = {
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "quantization_config": (None,),
    "embedding_size": (None,),
}
WITHOUT_EFFECT = KEYS_WITHOUT_EFFECT - ONLY.keys() | frozenset(
    """
    architectures attention_probs_dropout_prob hidden_dropout_prob classifier_dropout
    tie_word_embeddings bos_token_id eos_token_id directionality pooler_fc_size
    pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type
""".split()
)


@dataclass(frozen=True)
class BertConfig:
    """Sizes and choices of one BERT encoder; field names are those of config.json.

    Parameters
    ----------
    vocab_size, hidden_size, intermediate_size : int
        n_vocab, d_model and d_ff.
    num_hidden_layers, num_attention_heads : int
        n_layer and n_head.
    max_position_embeddings : int
        n_pos: rows of the position table; the most tokens of a text.
    type_vocab_size : int
        Rows of the token-type table: one for each segment of a pair.
    layer_norm_eps : float
    hidden_act : str
        One of `ACTIVATIONS`; "gelu" is exact, without approximation.
    pad_token_id : int or None
    dtype : str
        The dtype of the stored weights.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    pad_token_id: int | None = 0
    dtype: str = "float32"
    model_type: str = "bert"

    @property
    def context_length(self) -> int:
        """Most tokens of a text: `max_position_embeddings`."""
        return self.max_position_embeddings

    @classmethod
    def from_json(cls, path_or_dict: str | PathLike[str] | dict[str, Any]) -> "BertConfig":
        """Read and validate a config.json.

        Parameters
        ----------
        path_or_dict : str, Path or dict
            The file, the folder that holds it, or its parsed content.

        Returns
        -------
        config : BertConfig

        Raises
        ------
        NpllmOSError
            When the file cannot be read.
        NpllmValueError
            When it is no JSON object, a key is missing, or a value is impossible or not
            implemented; names key and value.

        Notes
        -----
        Source: `BertConfig` in Transformers 5.23.
        """
        return _parse(*config_data(path_or_dict))


def _parse(data: dict[str, Any], where: str) -> BertConfig:
    """Turn the content of a config.json into a BertConfig."""
    read = Reader(data, where)
    if read.get("model_type") != "bert":
        raise NpllmValueError(
            f"{where}: model_type must be bert, got {quote(read.get('model_type'))}"
        )
    config = BertConfig(
        vocab_size=read.size("vocab_size"),
        hidden_size=read.size("hidden_size"),
        intermediate_size=read.size("intermediate_size"),
        num_hidden_layers=read.size("num_hidden_layers", largest=LARGEST_LAYER_COUNT),
        num_attention_heads=read.size("num_attention_heads"),
        max_position_embeddings=read.size("max_position_embeddings", 512),
        type_vocab_size=read.size("type_vocab_size", 2),
        layer_norm_eps=read.number("layer_norm_eps", 1e-12),
        hidden_act=read.text("hidden_act", "gelu"),
        pad_token_id=read.padding_token("pad_token_id"),
        dtype=parse_dtype(read),
    )
    _validate(config, where)
    read.finish(ONLY, WITHOUT_EFFECT)
    return config


def _validate(config: BertConfig, where: str) -> None:
    """Raise for sizes that contradict each other and for values that are not implemented."""
    n_head, d_model = config.num_attention_heads, config.hidden_size
    require(
        where,
        d_model % n_head == 0,
        f"hidden_size must be a multiple of num_attention_heads, got {d_model} and {n_head}",
    )
    require(
        where,
        config.hidden_act in ACTIVATIONS,
        f"hidden_act must be one of {', '.join(ACTIVATIONS)}, "
        f"got {quote(config.hidden_act)}, which is not implemented",
    )
    require(
        where,
        config.layer_norm_eps >= 0,
        f"layer_norm_eps must be at least 0, got {config.layer_norm_eps}",
    )
    pad = config.pad_token_id
    require(
        where,
        pad is None or pad < config.vocab_size,
        f"pad_token_id must be below vocab_size = {config.vocab_size}, got {pad}",
    )
