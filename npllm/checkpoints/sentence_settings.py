"""Settings of a sentence-transformers folder: pooling, prompts, lengths."""

from pathlib import Path
from typing import Any, NamedTuple

from npllm.checkpoints.sentence_modules import read_head, refuse_others
from npllm.config.reader import Reader
from npllm.config.regular_file import is_present
from npllm.config.strict_json import LARGEST_SIZE, quote, read_json
from npllm.errors import NpllmValueError
from npllm.models.sentence import Head
from npllm.progress import warn

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
    """The settings that a folder holds beside those of the encoder."""

    head: Head = Head()
    prompts: dict[str, str] = {}  # noqa: RUF012 - never changed
    default_prompt_name: str | None = None
    max_length: int | None = None  # tokens of a text; None: not in the folder
    do_lower_case: bool = False
    is_stated: bool = False  # whether a file states how hidden states become vectors


def read_sentence_settings(
    folder: Path, d_model: int, dtype: str | None = None, mmap: bool = True
) -> SentenceSettings:
    """Read every file that sentence-transformers reads beside those of the encoder.

    Parameters
    ----------
    folder : Path
    d_model : int
        Width of the encoder.
    dtype, mmap
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
    head, is_stated = read_head(folder, d_model, dtype, mmap)
    head = head._replace(dimension=dimension)
    return SentenceSettings(head, prompts, default, max_length, do_lower_case, is_stated)


def _read_sentence_config(folder: Path) -> tuple[int | None, bool]:
    """Read the most tokens of a text, or None, and whether texts are put in lower case."""
    file = folder / SENTENCE
    if not is_present(file):
        return None, False
    read = Reader(read_json(file), file)
    length, do_lower_case = read.get("max_seq_length"), read.flag("do_lower_case", False)
    refuse_others(read, NEUTRAL)
    max_length = None if length is None else token_count(file, "max_seq_length", length)
    return max_length, do_lower_case


def token_count(file: Path, key: str, length: Any) -> int:
    """Check a number of tokens; at most `LARGEST_SIZE` is returned.

    Parameters
    ----------
    file : Path
    key : str
        For the message.
    length : object
        As read from JSON; an integral float is accepted.

    Returns
    -------
    n : int

    Raises
    ------
    NpllmValueError
        When it is no integer of at least 1.
    """
    is_number = isinstance(length, int | float) and not isinstance(length, bool)
    if not is_number or not length >= 1 or length % 1:
        raise NpllmValueError(
            f"{file}: {key} must be an integer of at least 1, got {quote(length)}"
        )
    return int(min(length, LARGEST_SIZE))


def _read_settings(folder: Path) -> tuple[dict[str, str], str | None, int | None]:
    """Read prompts by name, the name of the default one, and the number of entries to keep."""
    file = folder / SETTINGS
    if not is_present(file):
        return {}, None, None
    read = Reader(read_json(file), file)
    prompts = _read_prompts(read)
    default = read.get("default_prompt_name")
    if default is not None and default not in [*prompts]:  # of any type, hashable or not
        raise NpllmValueError(
            f"{file}: default_prompt_name must be one of {', '.join(prompts)}, got {quote(default)}"
        )
    dimension = read.optional_size("truncate_dim")
    similarity = read.get("similarity_fn_name", "cosine")
    if similarity != "cosine":
        warn(
            f"{file}: similarity_fn_name = {quote(similarity)} is not used: "
            "vectors are as the folder says, but cosine_similarities compares them by the cosine"
        )
    for without_effect in ("__version__", "requirements"):
        read.get(without_effect)
    refuse_others(read, {"model_type": (None, "SentenceTransformer")})
    return prompts, default, dimension


def _read_prompts(read: Reader) -> dict[str, str]:
    """Read the prompts by name; query and document are always among them."""
    prompts = read.get("prompts", {})
    is_object = isinstance(prompts, dict)
    if not is_object or not all(isinstance(text, str | None) for text in prompts.values()):
        raise NpllmValueError(f"{read.where}: prompts must be {{name: text}}, got {quote(prompts)}")
    return {"query": "", "document": ""} | {name: text or "" for name, text in prompts.items()}
