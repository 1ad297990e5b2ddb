"""The tensors of a BERT checkpoint, and how they become `BertParams`.

Names may begin with "bert.", as they do where a head was trained on top.  Old spellings are those
of `npllm.config.legacy_names`.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

import numpy as np

from npllm.checkpoints.safetensors import (
    INTEGER_DTYPES,
    TensorEntry,
    check_shapes,
    read_entries,
)
from npllm.checkpoints.tensor_files import view_of
from npllm.checkpoints.tensor_reader import TensorReader
from npllm.checkpoints.unused import warn_of_unused
from npllm.config.bert_config import BertConfig
from npllm.config.legacy_names import modern_tensor_name
from npllm.models.bert import BertParams
from npllm.models.transformer import (
    AttentionParams,
    EncoderLayerParams,
    FeedForwardParams,
    NormParams,
)
from npllm.quantized.dtypes import check_dtype

__all__ = ["assemble", "expected_shapes", "load_params"]

Array = Any
PREFIX = "bert."
HEADS = ("cls.", "classifier.", "qa_outputs.")  # prefixes, where the body has none
TABLES = ("word", "position", "token_type")
ATTENTION = ("self.query", "self.key", "self.value", "output.dense")
POSITION_IDS = "embeddings.position_ids"
POOLER = ("pooler.dense.weight", "pooler.dense.bias")


def load_params(
    folder: str | PathLike[str],
    config: BertConfig,
    *,
    dtype: str | None = None,
    xp: Any = np,
    is_pooled: bool = False,
    mmap: bool = True,
) -> BertParams:
    """Load the weights of a BERT folder.

    Parameters
    ----------
    folder : str or Path
    config : BertConfig
    dtype, xp, mmap
        As in `npllm.checkpoints.phi3_layout.load_params`.
    is_pooled : bool
        The folder states how hidden states become vectors, so an unused pooler needs no warning.

    Returns
    -------
    params : BertParams

    Raises
    ------
    NpllmOSError
        When a file is missing, truncated, or not safetensors.
    NpllmValueError
        One error that lists every missing, unknown and misshapen tensor and every unusable dtype.

    Warns
    -----
    UserWarning
        For position ids that are not 0, 1, 2, ..., for a head (`cls.*`, `classifier.*`), and for a
        pooler, which is not used, unless `is_pooled`.
    """
    check_dtype(dtype)
    entries, head = split_off_head(read_entries(folder))
    entries = rename_entries(entries)
    check_shapes(folder, entries, expected_shapes(config), (POSITION_IDS, *POOLER))
    warn_of_unused(folder, head, "they are a head of the model, and an encoder has none")
    _warn_of_ignored(folder, entries, config, is_pooled)
    reader = TensorReader(entries, dtype, xp, mmap=mmap)
    params = assemble(lambda name: reader.read([name]), config)
    reader.finish()
    return params


def _warn_of_ignored(
    folder: str | PathLike[str],
    entries: Mapping[str, TensorEntry],
    config: BertConfig,
    is_pooled: bool,
) -> None:
    """Warn of tensors that hold values and are not used."""
    ids, n_pos = entries.get(POSITION_IDS), config.max_position_embeddings
    if ids is not None and not _is_range(ids, n_pos):
        warn_of_unused(folder, [POSITION_IDS], f"it is not 0 ... {n_pos - 1}, which is used")
    if not is_pooled:
        pooler = [name for name in POOLER if name in entries]
        warn_of_unused(
            folder,
            pooler,
            "hidden states are combined as 1_Pooling/config.json says, else by their mean",
        )


def _is_range(entry: TensorEntry, n: int) -> bool:
    """Return whether a tensor of the file holds the integers 0 ... n - 1."""
    return entry.dtype in INTEGER_DTYPES and np.array_equal(view_of(entry).ravel(), np.arange(n))


def expected_shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """List every tensor that a checkpoint of this configuration holds.

    Parameters
    ----------
    config : BertConfig

    Returns
    -------
    shapes : dict of str to tuple of int
        Tensor name, without the prefix "bert." -> shape.
    """
    d_model = config.hidden_size
    n_rows = (config.vocab_size, config.max_position_embeddings, config.type_vocab_size)
    shapes: dict[str, tuple[int, ...]] = {
        _table(name): (n, d_model) for name, n in zip(TABLES, n_rows, strict=True)
    }
    layers = [f"encoder.layer.{number}" for number in range(config.num_hidden_layers)]
    for layer in layers:
        shapes |= _linear_shapes(config, layer)
    for module in ("embeddings", *(module for layer in layers for module in _norms(layer))):
        shapes |= {f"{module}.LayerNorm.{leaf}": (d_model,) for leaf in ("weight", "bias")}
    return shapes


def _table(name: str) -> str:
    """Return the tensor name of an embedding table."""
    return f"embeddings.{name}_embeddings.weight"


def _norms(layer: str) -> tuple[str, str]:
    """Return the modules of a layer that have a LayerNorm."""
    return f"{layer}.attention.output", f"{layer}.output"


def _linear_shapes(config: BertConfig, layer: str) -> dict[str, tuple[int, ...]]:
    """List weights and biases of the linear maps of one layer."""
    d_model, d_ff = config.hidden_size, config.intermediate_size
    linears = {f"{layer}.attention.{linear}": (d_model, d_model) for linear in ATTENTION}
    linears[f"{layer}.intermediate.dense"] = (d_ff, d_model)
    linears[f"{layer}.output.dense"] = (d_model, d_ff)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (d_out, d_in) in linears.items():
        shapes |= {f"{name}.weight": (d_out, d_in), f"{name}.bias": (d_out,)}
    return shapes


def assemble(get: Callable[[str], Array], config: BertConfig) -> BertParams:
    """Build the parameters from tensors by name.

    Parameters
    ----------
    get : function (name) -> array
        Called with every name of `expected_shapes`.
    config : BertConfig

    Returns
    -------
    params : BertParams
    """
    word, position, token_type = (get(_table(name)) for name in TABLES)
    norm = _norm(get, "embeddings")
    numbers = range(config.num_hidden_layers)
    layers = tuple(_layer(get, f"encoder.layer.{number}") for number in numbers)
    return BertParams(word, position, token_type, norm, layers)


def _norm(get: Callable[[str], Array], module: str) -> NormParams:
    """Build the parameters of the LayerNorm of a module."""
    return NormParams(get(f"{module}.LayerNorm.weight"), get(f"{module}.LayerNorm.bias"))


def _layer(get: Callable[[str], Array], layer: str) -> EncoderLayerParams:
    """Build the parameters of one layer."""
    weights = [get(f"{layer}.attention.{linear}.weight") for linear in ATTENTION]
    biases = [get(f"{layer}.attention.{linear}.bias") for linear in ATTENTION]
    network = FeedForwardParams(
        get(f"{layer}.intermediate.dense.weight"),
        get(f"{layer}.intermediate.dense.bias"),
        get(f"{layer}.output.dense.weight"),
        get(f"{layer}.output.dense.bias"),
    )
    attention_norm, network_norm = (_norm(get, module) for module in _norms(layer))
    attention = AttentionParams(*weights, *biases)
    return EncoderLayerParams(attention, attention_norm, network, network_norm)


def split_off_head(
    entries: Mapping[str, TensorEntry],
) -> tuple[dict[str, TensorEntry], list[str]]:
    """Return the tensors of the encoder, and the names of those of a head on top of it.

    Where the encoder's names begin with "bert.", all others are the head's.
    """
    if PREFIX + _table(TABLES[0]) in entries:
        others = [name for name in entries if not name.startswith(PREFIX)]
        head = [name for name in others if PREFIX + name not in entries]
    else:
        head = [name for name in entries if name.startswith(HEADS)]
    return {name: entry for name, entry in entries.items() if name not in head}, head


def rename_entries(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Give tensors the names of `expected_shapes`, except where two would have the same."""
    result = {}
    n_names = Counter(_short_name(name) for name in entries)
    for name, entry in entries.items():
        short = _short_name(name)
        result[short if n_names[short] == 1 else name] = entry
    return result


def _short_name(name: str) -> str:
    """Return the name of a tensor without prefix and in today's spelling."""
    return modern_tensor_name(name.removeprefix(PREFIX))
