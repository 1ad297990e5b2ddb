"""Folders of the library sentence-transformers: what stands beside the encoder, and refusals of what is not implemented.

modules.json lists a Transformer, a Pooling, and then Dense and Normalize modules in any number.
"""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from npllm.arrays import DTYPES
from npllm.checkpoints.safetensors import TensorReader, check_shapes, read_entries
from npllm.config.config import LARGEST_SIZE, Reader, quote, read_json
from npllm.errors import NpllmValueError
from npllm.models.sentence import ACTIVATIONS, POOLINGS, Dense, Head, Normalize

__all__ = ["SentenceSettings", "read_sentence_settings", "token_count"]

MODULES, SENTENCE, SETTINGS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
LEGACY_POOLINGS = {"pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max",
                   "pooling_mode_mean_tokens": "mean", "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
                   "pooling_mode_weightedmean_tokens": "weightedmean", "pooling_mode_lasttoken": "lasttoken"}
NAMES = ("Transformer", "Pooling", "Dense", "Normalize")
TEXT = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}

# Entries of sentence_bert_config.json beside max_seq_length and do_lower_case, and the values that change nothing.
NEUTRAL = {"transformer_task": (None, "feature-extraction"), "modality_config": (None, TEXT),
           "module_output_name": (None, "token_embeddings"), "processing_kwargs": (None, {}),
           "unpad_inputs": (None, True, False), "query_length": (None,), "document_length": (None,),
           "query_expansion": (None,), "tokenizer_name_or_path": (None,),
           **{f"{part}_{kind}": (None, {}) for part in ("model", "tokenizer", "processor", "config")
              for kind in ("args", "kwargs")}}


class SentenceSettings(NamedTuple):
    """What a folder says beside the encoder."""

    head: Head = Head()
    prompts: dict[str, str] = {}  # noqa: RUF012 - never changed
    default_prompt_name: str | None = None
    max_length: int | None = None  # tokens of a text; None: the folder does not say
    do_lower_case: bool = False
    is_stated: bool = False  # whether a file says how vectors are made


def read_sentence_settings(folder: Path, d_model: int, dtype: str | None = None) -> SentenceSettings:
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
    Without modules.json the pooling is that of 1_Pooling/config.json, else the mean.

    Source: `SentenceTransformer` and its modules in sentence-transformers 6.2.
    """
    max_length, do_lower_case = _read_sentence_config(folder)
    prompts, default, dimension = _read_settings(folder)
    paths = _module_paths(folder)
    pooling = folder / paths[0][1] / "config.json"
    head, width = _read_pooling(pooling, d_model)
    modules = []
    for name, path in paths[1:]:
        modules.append(Normalize() if name == "Normalize" else _read_dense(folder / path, width, dtype))
        width = width if name == "Normalize" else len(modules[-1].weight)
        if name == "Normalize":
            _refuse_input_names(folder / path / "config.json")
    head = head._replace(modules=tuple(modules), dimension=dimension)
    is_stated = pooling.is_file() or (folder / MODULES).is_file()
    return SentenceSettings(head, prompts, default, max_length, do_lower_case, is_stated)


def _module_paths(folder):
    """The modules after the Transformer, as (name, folder), the pooling first."""
    file = folder / MODULES
    if not file.is_file():
        return [("Pooling", "1_Pooling")]
    modules = [_module(file, entry) for entry in read_json(file, list)]
    names = [name for name, _ in modules]
    if names[:2] != ["Transformer", "Pooling"] or not set(names[2:]) <= {"Dense", "Normalize"}:
        raise NpllmValueError(f"{file}: must list Transformer, Pooling, and then Dense and Normalize modules only, "
                              f"got {', '.join(names) or 'none'}")
    if modules[0][1]:
        raise NpllmValueError(f"{file}: the Transformer must stand in the folder itself, path \"\", got "
                              f"{quote(modules[0][1])}, which is not implemented")
    return modules[1:]


def _module(file, entry):
    """Name and path of one module."""
    read = Reader(entry if isinstance(entry, dict) else {}, file)
    kind, path = read.text("type", ""), read.text("path", "")
    library, _, name = kind.rpartition(".")
    if library.partition(".")[0] != "sentence_transformers" or name not in NAMES:
        raise NpllmValueError(f"{file}: modules must be {', '.join(NAMES)} of sentence_transformers, got {quote(kind)}, "
                              "which is not implemented")
    if path in (".", "..") or path != Path(path).name or "\\" in path or not path.isprintable():
        raise NpllmValueError(f"{file}: a module's path must be the name of a folder inside, got {quote(path)}")
    read.get("idx"), read.get("name")
    _refuse(read, {"kwargs": (None, [], {})})
    return name, path


def _read_pooling(file, d_model):
    """The head as 1_Pooling/config.json describes it, and the width of what it gives."""
    if not file.is_file():
        return Head(), d_model
    read = Reader(read_json(file), file)
    width = read.size("embedding_dimension", default=read.size("word_embedding_dimension", default=d_model))
    if width != d_model:
        raise NpllmValueError(f"{file}: the pooling is for vectors of {width} entries, but the encoder gives {d_model}")
    legacy = [name for key, name in LEGACY_POOLINGS.items() if read.flag(key, False)]
    names = read.get("pooling_mode", legacy or ["mean"])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not names or not all(isinstance(x, str) and x in POOLINGS for x in names):
        raise NpllmValueError(f"{file}: pooling_mode must be one or several of {', '.join(POOLINGS)}, got {quote(names)}, "
                              "which is not implemented")
    include_prompt = read.flag("include_prompt", True)
    _refuse(read)
    return Head(tuple(names), include_prompt), len(names) * d_model


def _read_dense(folder, width, dtype):
    """A dense module: config.json and model.safetensors of its folder."""
    file = folder / "config.json"
    read = Reader(read_json(file), file)
    d_in, d_out, has_bias = read.size("in_features"), read.size("out_features"), read.flag("bias", True)
    activation = read.text("activation_function", "torch.nn.modules.activation.Tanh")
    library, _, name = activation.rpartition(".")
    if library.split(".")[:2] != ["torch", "nn"] or name not in ACTIVATIONS:
        raise NpllmValueError(f"{file}: activation_function must be one of {', '.join(ACTIVATIONS)} of torch.nn, got "
                              f"{quote(activation)}, which is not implemented")
    _refuse(read, {**_INPUT_NAMES, "use_residual": (None, False)})
    if d_in != width:
        raise NpllmValueError(f"{file}: in_features must be {width}, as the module before gives, got {d_in}")
    shapes = {"linear.weight": (d_out, d_in)} | ({"linear.bias": (d_out,)} if has_bias else {})
    entries = read_entries(folder)
    check_shapes(folder, entries, shapes)
    reader = TensorReader(entries, dtype if dtype in DTYPES else None, np, None)
    return Dense(reader.read(["linear.weight"]), reader.read(["linear.bias"]) if has_bias else None, name)


_INPUT_NAMES = {"module_input_name": (None, "sentence_embedding"), "module_output_name": (None, "sentence_embedding")}


def _refuse_input_names(file):
    """Refuse a Normalize module that works on something else than the vector of a text."""
    if file.is_file():
        _refuse(Reader(read_json(file), file), _INPUT_NAMES)


def _read_sentence_config(folder):
    """Most tokens of a text, or None; and whether to write it in lower case first."""
    file = folder / SENTENCE
    if not file.is_file():
        return None, False
    read = Reader(read_json(file), file)
    length, do_lower_case = read.get("max_seq_length"), read.flag("do_lower_case", False)
    _refuse(read, NEUTRAL)
    return length if length is None else token_count(file, "max_seq_length", length), do_lower_case


def token_count(file: Path, key: str, length: Any) -> int:
    """Check a number of tokens; one beyond any model counts as the largest."""
    if isinstance(length, bool) or not isinstance(length, int | float) or not 1 <= length or length % 1:
        raise NpllmValueError(f"{file}: {key} must be an integer of at least 1, got {quote(length)}")
    return int(min(length, LARGEST_SIZE))


def _read_settings(folder):
    """Prompts by name, the name of the default one, and the number of entries to keep."""
    file = folder / SETTINGS
    if not file.is_file():
        return {}, None, None
    read = Reader(read_json(file), file)
    prompts, default = read.get("prompts", {}), read.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise NpllmValueError(f"{file}: prompts must be {{name: text}}, got {quote(prompts)}")
    prompts = {"query": "", "document": ""} | {name: text or "" for name, text in prompts.items()}
    if default is not None and default not in prompts:
        raise NpllmValueError(f"{file}: default_prompt_name must be one of {', '.join(prompts)}, got {quote(default)}")
    dimension = read.size("truncate_dim", default=None)
    if read.get("similarity_fn_name", "cosine") != "cosine":
        warnings.warn(f"{file}: similarity_fn_name = {quote(read.data['similarity_fn_name'])} is not used: vectors "
                      "are as the folder says, but cosine_similarities compares them by the cosine", stacklevel=5)
    for without_effect in ("__version__", "requirements"):
        read.get(without_effect)
    _refuse(read, {"model_type": (None, "SentenceTransformer")})
    return prompts, default, dimension


def _refuse(read, neutral=None):
    """Refuse every entry that was not asked for, unless its value changes nothing."""
    for key in read.data.keys() - read.asked:
        value = read.data[key]
        if key not in (neutral or {}) or not any(type(value) is type(x) and value == x for x in neutral[key]):
            raise NpllmValueError(f"{read.where}: {key} = {quote(value)} is not implemented")
