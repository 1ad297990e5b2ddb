"""Modules of a sentence-transformers folder: Transformer, Pooling, then Dense and Normalize.

Any other module, and any setting that is not implemented, is refused by name.
"""

from pathlib import Path
from typing import Any

import numpy as np

from npllm.arrays import DTYPES
from npllm.checkpoints.safetensors import check_shapes, read_entries
from npllm.checkpoints.tensor_reader import TensorReader
from npllm.config import legacy_names
from npllm.config.reader import Reader
from npllm.config.regular_file import is_present
from npllm.config.strict_json import quote, read_json
from npllm.errors import NpllmValueError
from npllm.models.sentence import ACTIVATIONS, POOLINGS, Dense, Head, Normalize

__all__ = ["read_head", "refuse_others"]

MODULES = "modules.json"
Neutral = dict[str, tuple[Any, ...]]
NAMES = ("Transformer", "Pooling", "Dense", "Normalize")
INPUT_NAMES = {
    "module_input_name": (None, "sentence_embedding"),
    "module_output_name": (None, "sentence_embedding"),
}


def read_head(
    folder: Path, d_model: int, dtype: str | None = None, mmap: bool = True
) -> tuple[Head, bool]:
    """Read modules.json and the modules that it lists.

    Parameters
    ----------
    folder : Path
    d_model : int
        Width of the encoder.
    dtype, mmap
        Of the weights of dense modules, as in `npllm.load`.

    Returns
    -------
    head : Head
        Without modules.json the pooling of 1_Pooling/config.json, else the mean.
    is_stated : bool
        Whether any of these files exists.

    Raises
    ------
    NpllmOSError
        When a file is missing or unreadable.
    NpllmValueError
        When a module or setting is not implemented, or contradicts another; names file and entry.

    Notes
    -----
    Source: `Pooling`, `Dense` and `Normalize` in sentence-transformers 6.2.
    """
    paths = _module_paths(folder)
    pooling = folder / paths[0][1] / "config.json"
    head, width = _read_pooling(pooling, d_model)
    modules: list[Dense | Normalize] = []
    for name, path in paths[1:]:
        if name == "Normalize":
            modules.append(_read_normalize(folder / path))
        else:
            dense = _read_dense(folder / path, width, dtype, mmap)
            modules.append(dense)
            width = len(dense.weight)
    is_stated = is_present(pooling) or is_present(folder / MODULES)
    return head._replace(modules=tuple(modules)), is_stated


def _module_paths(folder: Path) -> list[tuple[str, str]]:
    """Return the modules after the Transformer, as (name, folder), the pooling first."""
    file = folder / MODULES
    if not is_present(file):
        return [("Pooling", "1_Pooling")]
    modules = [_module(file, entry) for entry in read_json(file, list)]
    names = [name for name, _ in modules]
    if names[:2] != ["Transformer", "Pooling"] or not set(names[2:]) <= {"Dense", "Normalize"}:
        raise NpllmValueError(
            f"{file}: must list Transformer, Pooling, and then Dense and Normalize modules only, "
            f"got {', '.join(names) or 'none'}"
        )
    if modules[0][1]:
        raise NpllmValueError(
            f'{file}: the Transformer must be in the folder itself, path "", got '
            f"{quote(modules[0][1])}, which is not implemented"
        )
    return modules[1:]


def _module(file: Path, entry: Any) -> tuple[str, str]:
    """Read name and path of one module."""
    read = Reader(entry if isinstance(entry, dict) else {}, file)
    kind, path = read.text("type", ""), read.text("path", "")
    library, _, name = kind.rpartition(".")
    if library.partition(".")[0] != "sentence_transformers" or name not in NAMES:
        raise NpllmValueError(
            f"{file}: modules must be {', '.join(NAMES)} of sentence_transformers, "
            f"got {quote(kind)}, which is not implemented"
        )
    if path in (".", "..") or path != Path(path).name or "\\" in path or not path.isprintable():
        raise NpllmValueError(
            f"{file}: a module's path must be the name of a folder inside, got {quote(path)}"
        )
    for without_effect in ("idx", "name"):
        read.get(without_effect)
    refuse_others(read, {"kwargs": (None, [], {})})
    return name, path


def _read_pooling(file: Path, d_model: int) -> tuple[Head, int]:
    """Read 1_Pooling/config.json to a head, and return the width of its result as well."""
    if not is_present(file):
        return Head(), d_model
    read = Reader(read_json(file), file)
    width = read.size("embedding_dimension", read.size("word_embedding_dimension", d_model))
    if width != d_model:
        raise NpllmValueError(
            f"{file}: the pooling is for vectors of {width} entries, but the encoder gives "
            f"{d_model}"
        )
    names = _read_pooling_modes(read)
    include_prompt = read.flag("include_prompt", True)
    refuse_others(read)
    return Head(tuple(names), include_prompt), len(names) * d_model


def _read_pooling_modes(read: Reader) -> list[str]:
    """Read the names of the poolings, in either spelling."""
    legacy = [name for key, name in legacy_names.POOLINGS.items() if read.flag(key, False)]
    names = read.get("pooling_mode", legacy or ["mean"])
    names = [names] if isinstance(names, str) else names
    are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not are_names or not names or not set(names) <= POOLINGS.keys():
        raise NpllmValueError(
            f"{read.where}: pooling_mode must be one or several of {', '.join(POOLINGS)}, "
            f"got {quote(names)}, which is not implemented"
        )
    return names


def _read_dense(folder: Path, width: int, dtype: str | None, mmap: bool) -> Dense:
    """Read a dense module: config.json and model.safetensors of its folder."""
    file = folder / "config.json"
    read = Reader(read_json(file), file)
    d_in, d_out = read.size("in_features"), read.size("out_features")
    has_bias = read.flag("bias", True)
    activation = read.text("activation_function", "torch.nn.modules.activation.Tanh")
    library, _, name = activation.rpartition(".")
    if library.split(".")[:2] != ["torch", "nn"] or name not in ACTIVATIONS:
        raise NpllmValueError(
            f"{file}: activation_function must be one of {', '.join(ACTIVATIONS)} of torch.nn, got "
            f"{quote(activation)}, which is not implemented"
        )
    refuse_others(read, {**INPUT_NAMES, "use_residual": (None, False)})
    if d_in != width:
        raise NpllmValueError(
            f"{file}: in_features must be {width}, the width of the module before, got {d_in}"
        )
    shapes: dict[str, tuple[int, ...]] = {"linear.weight": (d_out, d_in)}
    if has_bias:
        shapes["linear.bias"] = (d_out,)
    entries = read_entries(folder)
    check_shapes(folder, entries, shapes)
    reader = TensorReader(entries, dtype if dtype in DTYPES else None, np, mmap=mmap)
    weight = reader.read(["linear.weight"])
    bias = reader.read(["linear.bias"]) if has_bias else None
    return Dense(weight, bias, name)


def _read_normalize(folder: Path) -> Normalize:
    """Read a Normalize module; one that normalizes tokens is refused."""
    file = folder / "config.json"
    if is_present(file):
        refuse_others(Reader(read_json(file), file), INPUT_NAMES)
    return Normalize()


def refuse_others(read: Reader, neutral: Neutral | None = None) -> None:
    """Refuse every entry that was not read, unless its value changes nothing.

    Parameters
    ----------
    read : Reader
    neutral : dict of str to tuple, optional
        Entry -> values that change nothing.

    Raises
    ------
    NpllmValueError
        Names file, entry and value.
    """
    harmless = neutral or {}
    for key in read.data.keys() - read.asked:
        value = read.data[key]
        if not any(type(value) is type(x) and value == x for x in harmless.get(key, ())):
            raise NpllmValueError(f"{read.where}: {key} = {quote(value)} is not implemented")
