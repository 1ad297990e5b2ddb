"""What a checkpoint holds: parameters, bytes and types by part; the error of rounded weights."""

from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from npllm.arrays import widen
from npllm.checkpoints.adapters.reader import Adapter
from npllm.checkpoints.gguf.config import gguf_config
from npllm.checkpoints.gguf.layout import check_tensors, expected_tensors
from npllm.checkpoints.gguf.reader import GGUFFile, is_gguf
from npllm.checkpoints.gguf.rope import ROPE_TENSORS
from npllm.checkpoints.origin import read_params
from npllm.checkpoints.phi3_layout import check_entries, layers_in
from npllm.checkpoints.safetensors import SAFETENSORS_DTYPES, read_entries
from npllm.config.config import Config
from npllm.models import module_tree
from npllm.models.params import Params
from npllm.quantized.dtypes import QUANTIZERS

__all__ = ["adapter_facts", "checkpoint_facts", "int8_errors", "rounding_errors"]

Array = Any

EMBEDDINGS = ("model.embed_tokens.weight", "token_embd.weight")
OUTPUTS = ("lm_head.weight", "score.weight", "output.weight")


def checkpoint_facts(folder: Path) -> dict[str, Any]:
    """Count a checkpoint's parameters and bytes, from its headers alone.

    Parameters
    ----------
    folder : Path
        Or a GGUF file.

    Returns
    -------
    facts : dict
        `kv_bytes_per_token` counts keys and values of all layers in float32, the dtype of the KV
        cache on a CPU.  `types` has tensors, parameters, bytes and bits a weight of each type.
        `weight_bytes_per_token`: what a decode step of one sequence reads, every tensor but the
        embedding matrix, of which it reads a row; one that is the output matrix as well counts.
        A matrix that GPTQ or compressed-tensors packed is one tensor here, with the bytes of all
        its parts in the file.

    Raises
    ------
    NpllmError
        When `load` would refuse the folder.
    """
    is_file = is_gguf(folder)
    config, tensors = _gguf_tensors(folder) if is_file else _folder_tensors(folder)
    parts = {"embeddings": 0, "attention": 0, "mlp": 0, "norms": 0}
    for x in tensors:
        parts[_part(x.name)] += x.size
    n_kv = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    n_bytes, n = sum(x.n_bytes for x in tensors), sum(parts.values())
    return {
        "folder": str(folder),
        "tree": module_tree.describe(config),
        "parameters": n,
        "parameters_by_part": parts,
        "bytes": n_bytes,
        "dtypes": sorted({x.kind for x in tensors}),
        "files": len({x.file for x in tensors}),
        "context_length": config.max_position_embeddings,
        "kv_bytes_per_token": 2 * n_kv * 4,
        "types": _types(tensors),
        "bits_per_weight": 8 * n_bytes / n,
        "weight_bytes_per_token": _bytes_per_token(tensors, config),
    }


def adapter_facts(adapter: Adapter) -> dict[str, Any]:
    """Count what a LoRA adapter holds.

    Parameters
    ----------
    adapter : Adapter

    Returns
    -------
    facts : dict
        `modules`: rank and scale of the updates of each weight, by its name in `Params`.
    """
    updates = [(field, x) for (_, field), many in adapter.updates.items() for x in many]
    modules = {
        field: {
            "updates": len(chosen),
            "ranks": sorted({int(x.a.shape[0]) for x in chosen}),
            "scales": sorted({x.scale for x in chosen}),
        }
        for field in dict.fromkeys(name for name, _ in updates)
        if (chosen := [x for name, x in updates if name == field])
    }
    replaced = [field if n is None else f"layers.{n}.{field}" for n, field in adapter.weights]
    return {
        "folder": str(adapter.folder),
        "rank": adapter.settings.r,
        "alpha": adapter.settings.lora_alpha,
        "parameters": adapter.n_parameters,
        "modules": modules,
        "replaced": replaced,
    }


class _Stored(NamedTuple):
    """A tensor of a checkpoint, by its header."""

    name: str
    kind: str
    size: int  # entries
    n_bytes: int
    file: Path


def _folder_tensors(folder: Path) -> tuple[Config, list[_Stored]]:
    """Read configuration and headers of a folder; raise where `load` would refuse it."""
    config, entries = Config.from_json(folder), read_entries(folder)
    check_entries(folder, entries, config)
    packed = layers_in(entries, config)
    parts = {layer.tensor_name(leaf) for layer in packed.values() for leaf in layer.entries}
    stored = [
        _Stored(name, x.kind, prod(x.shape), x.n_bytes, next(iter(x.entries.values())).file)
        for name, x in packed.items()
    ]
    return config, stored + [
        _Stored(
            name,
            SAFETENSORS_DTYPES.get(entry.dtype, entry.dtype),
            prod(entry.shape),
            entry.stop - entry.start,
            entry.file,
        )
        for name, entry in entries.items()
        if name not in parts
    ]


def _gguf_tensors(path: Path) -> tuple[Config, list[_Stored]]:
    """Read configuration and header of a GGUF file; raise where `load` would refuse it."""
    gguf = GGUFFile(path)
    config = Config.from_json(gguf_config(gguf))
    check_tensors(gguf, expected_tensors(config, gguf.architecture))
    return config, [
        _Stored(name, x.kind, prod(x.shape), x.rows.nbytes, path)
        for name, x in gguf.tensors.items()
        if name not in ROPE_TENSORS
    ]


def _types(tensors: list[_Stored]) -> dict[str, dict[str, float]]:
    """Count tensors, parameters and bytes of each type."""
    return {
        kind: {
            "tensors": len(chosen),
            "parameters": sum(x.size for x in chosen),
            "bytes": sum(x.n_bytes for x in chosen),
            "bits_per_weight": 8 * sum(x.n_bytes for x in chosen) / sum(x.size for x in chosen),
        }
        for kind in sorted({x.kind for x in tensors})
        if (chosen := [x for x in tensors if x.kind == kind])
    }


def _bytes_per_token(tensors: list[_Stored], config: Config) -> int:
    """Count the bytes of weights that a decode step of one sequence reads."""
    output = any(x.name in OUTPUTS for x in tensors)
    embedding = [x for x in tensors if x.name in EMBEDDINGS and output]
    row = sum(x.n_bytes // config.vocab_size for x in embedding)
    return sum(x.n_bytes for x in tensors if x not in embedding) + row


def _part(name: str) -> str:
    """The part of the model that a tensor belongs to."""
    if "norm" in name:
        return "norms"
    if ".self_attn." in name or ".attn_" in name:
        return "attention"
    return "mlp" if ".mlp." in name or ".ffn_" in name else "embeddings"


def int8_errors(folder: Path) -> dict[str, dict[str, float]]:
    """Measure the relative error of every matrix of a checkpoint in 8 bits."""
    return rounding_errors(folder, "int8")


def rounding_errors(folder: Path, dtype: str) -> dict[str, dict[str, float]]:
    """Measure the relative error of every matrix of a checkpoint in a weight type.

        error = |weight - quantized| / |weight|,   |.| the square root of the sum of squares

    Parameters
    ----------
    folder : Path
        Or a GGUF file.
    dtype : str
        A key of `npllm.quantized.dtypes.QUANTIZERS`.

    Returns
    -------
    errors : dict of str to dict
        Part ("embed_tokens, lm_head", "layer 0", ...) -> name of the matrix -> relative error.
    """
    params = read_params(folder)
    return {
        part: {
            name: _error(x, QUANTIZERS[dtype])
            for name, x in tensors.items()
            if x is not None and x.ndim == 2
        }
        for part, tensors in _tensors_by_part(params)
    }


def _tensors_by_part(params: Params) -> Iterator[tuple[str, dict[str, Array]]]:
    """Yield each part of a model with its tensors by name."""
    yield (
        "embed_tokens, lm_head",
        {"embed_tokens": params.embed_tokens, "lm_head": params.lm_head},
    )
    for number, layer in enumerate(params.layers):
        yield f"layer {number}", layer._asdict()


def _error(weight: Array, quantize: Callable[[Array], Any], n_rows: int = 512) -> float:
    """Relative error of one matrix, n_rows rows at a time."""
    squared_error = squared_norm = 0.0
    for start in range(0, len(weight), n_rows):
        wide = widen(weight[start : start + n_rows], np.float32)
        squared_error += float(np.square(quantize(wide).widened() - wide).sum())
        squared_norm += float(np.square(wide).sum())
    return (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0
