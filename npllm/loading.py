"""From a checkpoint folder, or a GGUF file, to a model or an encoder."""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tokenizers import normalizers

from npllm.arrays import backend_name, backend_namespace
from npllm.checkpoints import bert_layout, phi3_layout
from npllm.checkpoints.gguf import GGUFFile
from npllm.checkpoints.gguf_config import gguf_config
from npllm.checkpoints.gguf_tokenizer import gguf_tokenizer
from npllm.checkpoints.gguf_weights import load_gguf_params
from npllm.checkpoints.sentence_settings import (
    SentenceSettings,
    read_sentence_settings,
    token_count,
)
from npllm.config.bert_config import BertConfig
from npllm.config.config import Config
from npllm.config.regular_file import is_present
from npllm.config.strict_json import read_json
from npllm.decoding.generation_config import GenerationConfig
from npllm.encoder import Encoder
from npllm.language_model import Model
from npllm.ops.opset import Ops
from npllm.text.tokenizer import Tokenizer

__all__ = [
    "Origin",
    "is_gguf",
    "load_encoder",
    "load_gguf",
    "load_model",
    "read_config",
    "read_params",
    "read_tokenizer",
]


@dataclass(frozen=True)
class Origin:
    """Where weights were read from: enough for another process to read them again.

    Attributes
    ----------
    folder : Path
        Or a GGUF file.
    dtype : str or None
        As in `load`.
    backend : str
        "numpy" or "cupy".
    mmap : bool
    is_pooled : bool
        Of an encoder: whether its folder states how vectors are pooled.
    """

    folder: Path
    dtype: str | None = None
    backend: str = "numpy"
    mmap: bool = True
    is_pooled: bool = False

    def read(self, config: Config | BertConfig, *, progress: bool = False) -> Any:
        """Read the weights: Params, or BertParams for a BertConfig."""
        how: Any = {
            "dtype": self.dtype,
            "xp": backend_namespace(self.backend),
            "mmap": self.mmap,
        }
        if isinstance(config, BertConfig):
            return bert_layout.load_params(self.folder, config, is_pooled=self.is_pooled, **how)
        if is_gguf(self.folder):
            return load_gguf_params(GGUFFile(self.folder), config, progress=progress, **how)
        return phi3_layout.load_params(self.folder, config, progress=progress, **how)


def is_gguf(path: Path) -> bool:
    """Tell whether a path names a GGUF file, and no folder."""
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def read_config(path: Path) -> Config:
    """Read the configuration of a checkpoint folder or a GGUF file."""
    return Config.from_json(gguf_config(GGUFFile(path)) if is_gguf(path) else path)


def read_tokenizer(path: Path) -> Tokenizer:
    """Read the tokenizer of a checkpoint folder or a GGUF file."""
    return gguf_tokenizer(GGUFFile(path)) if is_gguf(path) else Tokenizer.from_folder(path)


def read_params(path: Path) -> Any:
    """Read the weights of a checkpoint folder or a GGUF file, as they are stored."""
    return Origin(path).read(read_config(path))


def load_gguf(
    path: Path,
    *,
    dtype: str | None = None,
    ops: Ops | str | None = None,
    xp: ModuleType = np,
    mmap: bool = True,
) -> Model:
    """Load a causal language model from a GGUF file, its weights in blocks as they are stored.

    Parameters
    ----------
    path : Path
    dtype, ops, mmap, xp
        As in `load_model`.

    Returns
    -------
    model : Model

    Raises
    ------
    NpllmOSError
        When the file cannot be read.
    NpllmValueError
        When it is incomplete, contradictory, or holds what is not implemented: an architecture
        other than llama and phi3, a pre-tokenizer, a type of a tensor.

    Notes
    -----
    The token ids that end an answer are those of `GGUFFile.stop_ids`.
    """
    gguf = GGUFFile(path)
    config = Config.from_json(gguf_config(gguf))
    how: dict[str, Any] = {"dtype": dtype, "xp": xp, "mmap": mmap, "progress": True}
    return Model(
        config,
        load_gguf_params(gguf, config, **how),
        ops=ops,
        tokenizer=gguf_tokenizer(gguf),
        folder=path,
        origin=Origin(path.absolute(), dtype, backend_name(xp), mmap),
    )


def load_model(
    folder: str | Path,
    *,
    dtype: str | None = None,
    ops: Ops | str | None = None,
    xp: ModuleType = np,
    mmap: bool = True,
) -> Model:
    """Load a causal language model, or a classifier, from a checkpoint folder.

    Parameters
    ----------
    folder : str or Path
        config.json and safetensors; tokenizer.json where there is to be text.
    dtype, ops, mmap
        As in `npllm.load`.
    xp : module
        The array library to put the weights into.

    Returns
    -------
    model : Model

    Raises
    ------
    NpllmOSError
        When a file is missing or unreadable.
    NpllmValueError
        When its content is contradictory or not implemented.
    """
    folder = Path(folder)
    config = Config.from_json(folder)
    origin = Origin(folder.absolute(), dtype, backend_name(xp), mmap)
    return Model(
        config,
        origin.read(config, progress=True),
        ops=ops,
        tokenizer=_tokenizer(folder),
        generation_config=GenerationConfig.from_folder(folder, config),
        folder=folder,
        origin=origin,
    )


def load_encoder(
    folder: str | Path,
    *,
    dtype: str | None = None,
    ops: Ops | str | None = None,
    xp: ModuleType = np,
    mmap: bool = True,
) -> Encoder:
    """Load an encoder from a checkpoint folder of model_type "bert".

    Parameters
    ----------
    folder : str or Path
        config.json and model.safetensors; tokenizer.json where texts are to be embedded.
    dtype, ops, mmap
        As in `npllm.load`.
    xp : module
        The array library to put the weights into.

    Returns
    -------
    encoder : Encoder

    Raises
    ------
    NpllmOSError
        When a file is missing or unreadable.
    NpllmValueError
        When its content is contradictory or not implemented, such as a module of modules.json.

    Notes
    -----
    A text is cut to the first of these that the folder states, and never longer than
    `max_position_embeddings`: max_seq_length of sentence_bert_config.json, model_max_length of
    tokenizer_config.json, and, which sentence-transformers does not read in its own folders, the
    truncation of tokenizer.json.

    Source: `SentenceTransformer` in the library sentence-transformers, whose files these are.
    """
    folder = Path(folder)
    config = BertConfig.from_json(folder)
    settings = read_sentence_settings(folder, config.hidden_size, dtype, mmap)
    origin = Origin(folder.absolute(), dtype, backend_name(xp), mmap, settings.is_stated)
    tokenizer = _tokenizer(folder)
    if tokenizer is not None and settings.do_lower_case:
        _lower_case(tokenizer.backend)
    return Encoder(
        config,
        origin.read(config),
        ops=ops,
        tokenizer=tokenizer,
        max_length=None if tokenizer is None else _max_length(folder, config, settings),
        folder=folder,
        settings=settings,
        origin=origin,
    )


def _tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder; None where it has no tokenizer.json."""
    return Tokenizer.from_folder(folder) if is_present(folder / "tokenizer.json") else None


def _max_length(folder: Path, config: BertConfig, settings: SentenceSettings) -> int:
    """At how many tokens the folder cuts a text."""
    length: int | None = settings.max_length
    places: list[tuple[str, tuple[str, ...]]] = [("tokenizer_config.json", ("model_max_length",))]
    if not settings.is_stated:
        places.append(("tokenizer.json", ("truncation", "max_length")))
    for file, keys in places:
        is_open = length is None and is_present(folder / file)
        value: Any = read_json(folder / file) if is_open else None
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            length = token_count(folder / file, ".".join(keys), value)
    return (
        config.max_position_embeddings
        if length is None
        else min(length, config.max_position_embeddings)
    )


def _lower_case(backend: Any) -> None:
    """Let a tokenizer begin with lower-casing a text, unless it does so already."""
    steps: Any = backend.normalizer
    is_several = isinstance(steps, normalizers.Sequence)
    known = [*steps] if is_several else [] if steps is None else [steps]
    if not any(isinstance(step, normalizers.Lowercase) for step in known):
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *known])
