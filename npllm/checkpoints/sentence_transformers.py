"""Folders of the library sentence-transformers: what stands beside the encoder."""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

from npllm.checkpoints.sentence_modules import read_head, refuse_others
from npllm.config.strict_json import LARGEST_SIZE, Reader, quote, read_json
from npllm.errors import NpllmValueError
from npllm.models.sentence import Head

__all__ = ["SentenceSettings", "read_sentence_settings", "token_count"]

SENTENCE, SETTINGS = "sentence_bert_config.json", "config_sentence_transformers.json"
TEXT = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}

# Further entries of sentence_bert_config.json, and the values that change nothing.
NEUTRAL = {
    "transformer_task": (None, "feature-extraction"),
    "modality_config": (None, TEXT),
    "module_output_name": (None, "token_embeddings"),
    "processing_kwargs": (None, {}),
    "unpad_inputs": (None, True, False),
    "query_length": (None,),
    "document_length": (None,),
    "query_expansion": (None,),
    "tokenizer_name_or_path": (None,),
    **{
        f"{part}_{kind}": (None, {})
        for part in ("model", "tokenizer", "processor", "config")
        for kind in ("args", "kwargs")
    },
}


class SentenceSettings(NamedTuple):
    """What a folder says beside the encoder."""

    head: Head = Head()
    prompts: dict[str, str] = {}  # noqa: RUF012 - never changed
    default_prompt_name: str | None = None
    max_length: int | None = None  # tokens of a text; None: the folder does not say
    do_lower_case: bool = False
    is_stated: bool = False  # whether a file says how vectors are made


def read_sentence_settings(
    folder: Path, d_model: int, dtype: str | None = None
) -> SentenceSettings:
    """Read everything that sentence-transformers would, beside the encoder.

    Parameters
    ----------
    folder : Path
    d_model : int
        Width of the encoder.
    dtype : str, optional
        Of the weights of dense modules, as in `npllm.load`.

    Returns
    -------
    settings : SentenceSettings

    Raises
    ------
    NpllmOSError
        When a file is missing or unreadable.
    NpllmValueError
        When a module or setting is not implemented, or contradicts another; names file and entry.

    Notes
    -----
    Source: `SentenceTransformer` and `Transformer` in sentence-transformers 6.2.
    """
    max_length, do_lower_case = _read_sentence_config(folder)
    prompts, default, dimension = _read_settings(folder)
    head, is_stated = read_head(folder, d_model, dtype)
    head = head._replace(dimension=dimension)
    return SentenceSettings(head, prompts, default, max_length, do_lower_case, is_stated)


def _read_sentence_config(folder):
    """Most tokens of a text, or None; and whether to write it in lower case first."""
    file = folder / SENTENCE
    if not file.is_file():
        return None, False
    read = Reader(read_json(file), file)
    length, do_lower_case = read.get("max_seq_length"), read.flag("do_lower_case", False)
    refuse_others(read, NEUTRAL)
    return length if length is None else token_count(file, "max_seq_length", length), do_lower_case


def token_count(file: Path, key: str, length: Any) -> int:
    """Check a number of tokens; one beyond any model counts as the largest."""
    if (
        isinstance(length, bool)
        or not isinstance(length, int | float)
        or not 1 <= length
        or length % 1
    ):
        raise NpllmValueError(
            f"{file}: {key} must be an integer of at least 1, got {quote(length)}"
        )
    return int(min(length, LARGEST_SIZE))


def _read_settings(folder):
    """Prompts by name, the name of the default one, and the number of entries to keep."""
    file = folder / SETTINGS
    if not file.is_file():
        return {}, None, None
    read = Reader(read_json(file), file)
    prompts, default = read.get("prompts", {}), read.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(
        isinstance(text, str | None) for text in prompts.values()
    ):
        raise NpllmValueError(f"{file}: prompts must be {{name: text}}, got {quote(prompts)}")
    prompts = {"query": "", "document": ""} | {name: text or "" for name, text in prompts.items()}
    if default is not None and default not in prompts:
        raise NpllmValueError(
            f"{file}: default_prompt_name must be one of {', '.join(prompts)}, got {quote(default)}"
        )
    dimension = read.optional_size("truncate_dim")
    if read.get("similarity_fn_name", "cosine") != "cosine":
        warnings.warn(
            f"{file}: similarity_fn_name = {quote(read.data['similarity_fn_name'])} is not used: "
            "vectors are as the folder says, but cosine_similarities compares them by the cosine",
            stacklevel=5,
        )
    for without_effect in ("__version__", "requirements"):
        read.get(without_effect)
    refuse_others(read, {"model_type": (None, "SentenceTransformer")})
    return prompts, default, dimension
