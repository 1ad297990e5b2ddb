"""What a checkpoint holds: parameters and bytes by part; the error of 8-bit weights."""

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from npllm.checkpoints.phi3_layout import check_entries, load_params
from npllm.checkpoints.safetensors import SAFETENSORS_DTYPES, read_entries
from npllm.config.config import Config
from npllm.models import module_tree
from npllm.models.params import Params
from npllm.quantized.int8 import quantize

__all__ = ["checkpoint_facts", "int8_errors"]

Array = Any


def checkpoint_facts(folder: Path) -> dict[str, Any]:
    """Count a checkpoint's parameters and bytes, from its headers alone.

    Parameters
    ----------
    folder : Path

    Returns
    -------
    facts : dict
        `kv_bytes_per_token` counts keys and values of all layers in float32, the dtype of the KV
        cache on a CPU.

    Raises
    ------
    NpllmError
        When `load` would refuse the folder.
    """
    config, entries = Config.from_json(folder), read_entries(folder)
    check_entries(folder, entries, config)
    parts = {"embeddings": 0, "attention": 0, "mlp": 0, "norms": 0}
    for name, entry in entries.items():
        parts[_part(name)] += prod(entry.shape)
    n_kv = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    dtypes = {SAFETENSORS_DTYPES.get(entry.dtype, entry.dtype) for entry in entries.values()}
    return {
        "folder": str(folder),
        "tree": module_tree.describe(config),
        "parameters": sum(parts.values()),
        "parameters_by_part": parts,
        "bytes": sum(entry.stop - entry.start for entry in entries.values()),
        "dtypes": sorted(dtypes),
        "files": len({entry.file for entry in entries.values()}),
        "context_length": config.max_position_embeddings,
        "kv_bytes_per_token": 2 * n_kv * 4,
    }


def _part(name: str) -> str:
    """The part of the model that a tensor belongs to."""
    if "norm" in name:
        return "norms"
    if ".self_attn." in name:
        return "attention"
    return "mlp" if ".mlp." in name else "embeddings"


def int8_errors(folder: Path) -> dict[str, dict[str, float]]:
    """Measure the relative error of every matrix of a checkpoint in 8 bits.

        error = |weight - quantized| / |weight|,   |.| the square root of the sum of squares

    Parameters
    ----------
    folder : Path

    Returns
    -------
    errors : dict of str to dict
        Part ("embed_tokens, lm_head", "layer 0", ...) -> name of the matrix -> relative error.
    """
    params = load_params(folder, Config.from_json(folder))
    return {
        part: {name: _int8_error(x) for name, x in tensors.items() if x is not None and x.ndim == 2}
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


def _int8_error(weight: Array, n_rows: int = 512) -> float:
    """Relative error of one matrix, n_rows rows at a time."""
    squared_error = squared_norm = 0.0
    for start in range(0, len(weight), n_rows):
        wide = weight[start : start + n_rows].astype(np.float32)
        squared_error += float(np.square(quantize(wide).widened() - wide).sum())
        squared_norm += float(np.square(wide).sum())
    return (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0
