"""Whether a GGUF file says of a model what its source says: configuration, tokens, template."""

from pathlib import Path
from typing import Any

import numpy as np

from npllm.checkpoints.gguf.config import gguf_config
from npllm.checkpoints.gguf.reader import GGUFFile
from npllm.checkpoints.gguf.sources import GGUFSource
from npllm.checkpoints.gguf.tokenizer import gguf_tokenizer
from npllm.checkpoints.gguf.vocabulary import PROBE
from npllm.config.config import Config
from npllm.config.strict_json import quote
from npllm.errors import NpllmError, NpllmValueError
from npllm.models import rope
from npllm.progress import warn
from npllm.text.tokenizer import Tokenizer

__all__ = ["check_read_back"]

Array = Any
FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "d_rope",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "sliding_window",
)
TOLERANCE = 1e-5  # relative, of numbers that the file holds in float32
N_SPECIAL = 24  # special tokens that are tried


def check_read_back(path: Path, source: GGUFSource, output: Path) -> None:
    """Raise unless a file gives the configuration and the token ids of its source.

    Parameters
    ----------
    path : Path
        Metadata, RoPE tensors and places of all tensors are there.
    source : GGUFSource
    output : Path
        The final name, for messages.

    Raises
    ------
    NpllmValueError
        When a model would compute other numbers or split text otherwise.

    Warns
    -----
    UserWarning
        Where the file has no place for a stop id, or for the spaces that special tokens take along.
    """
    try:
        gguf = GGUFFile(path)
        config = Config.from_json(gguf_config(gguf))
        tokenizer = gguf_tokenizer(gguf)
    except NpllmError as error:
        reason = str(error).replace(str(path), str(output))
        raise NpllmValueError(f"{source.path}: cannot be read back as GGUF: {reason}") from None
    wrong = [*_config_differences(source.config, config)]
    if wrong:
        raise NpllmValueError(f"{source.path}: GGUF has no place for {', '.join(wrong)}")
    _check_tokens(source, tokenizer)
    lost = sorted(set(source.stop_ids) - set(config.eos_token_id))
    if lost:
        warn(f"{output}: has no place for the stop ids {lost}; generation does not end at them")


def _config_differences(wanted: Config, got: Config) -> list[str]:
    """Name what differs between two configurations, as far as it changes numbers."""
    wrong = [
        f"{name} {getattr(wanted, name)} (it would be {getattr(got, name)})"
        for name in FIELDS
        if getattr(wanted, name) != getattr(got, name)
    ]
    if not _near(wanted.rms_norm_eps, got.rms_norm_eps):
        wrong.append(f"rms_norm_eps {wanted.rms_norm_eps:g}")
    return wrong or [*_rope_differences(wanted, got)]


def _rope_differences(wanted: Config, got: Config) -> list[str]:
    """Name the RoPE quantities that differ."""
    lengths = 1, wanted.original_max_position_embeddings + 1
    pairs: dict[str, list[Array]] = {
        "these RoPE frequencies": [
            [rope.frequencies(x, rope.frequency_choice(x, n)) for n in lengths]
            for x in (wanted, got)
        ],
        "this attention_factor": [rope.attention_factor(x) for x in (wanted, got)],
    }
    return [name for name, (one, other) in pairs.items() if not _near(one, other)]


def _near(one: Array, other: Array) -> bool:
    """Tell whether numbers agree to float32."""
    return np.shape(one) == np.shape(other) and np.allclose(one, other, rtol=TOLERANCE, atol=0)


def _check_tokens(source: GGUFSource, tokenizer: Tokenizer) -> None:
    """Raise where plain text is split otherwise; warn where text beside special tokens is."""
    texts = [PROBE, *PROBE.split(), *PROBE.split("  ")]
    wrong = [x for x in texts if source.tokenizer.encode(x) != tokenizer.encode(x)]
    if wrong:
        raise NpllmValueError(
            f"{source.path}: GGUF has no place for this tokenizer: {quote(min(wrong, key=len))} "
            "would have other token ids"
        )
    added = source.tokenizer.backend.get_added_tokens_decoder().values()
    texts = [f"a {token.content} \n b" for token in added][:N_SPECIAL]
    wrong = [x for x in texts if source.tokenizer.encode(x) != tokenizer.encode(x)]
    if wrong:
        warn(
            f"{source.path}: GGUF has no place for the spaces that special tokens take along: "
            f"{quote(wrong[0])} and {len(wrong) - 1} more get other token ids from the file"
        )
