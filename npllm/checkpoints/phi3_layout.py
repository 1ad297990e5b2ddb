"""The tensors of a Phi-3 or Llama checkpoint, and how they become `Params`.

Tensor names are those of Transformers.  Llama's separate projections are concatenated to the fused
ones of Phi-3.
"""

from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np

from npllm.checkpoints.packed_layers import PackedLayer, packed_layers, zero_biases
from npllm.checkpoints.phi3_tensor_names import (
    EMBEDDING,
    OUTPUT,
    Sources,
    expected_shapes,
    layer_sources,
    top_sources,
)
from npllm.checkpoints.safetensors import (
    SAFETENSORS_DTYPES,
    TensorEntry,
    check_shapes,
    read_entries,
)
from npllm.checkpoints.tensor_files import view_of
from npllm.checkpoints.tensor_reader import TensorReader
from npllm.checkpoints.unused import are_rope_frequencies, same_values, warn_of_unused
from npllm.config.config import Config
from npllm.models.params import LayerParams, Params
from npllm.progress import progress_bar, warn
from npllm.quantized.dtypes import check_dtype

__all__ = ["check_entries", "expected_shapes", "layers_in", "load_params", "top_sources_in"]

ROPE_BUFFER = "rotary_emb.inv_freq"
MAY_BE_ABSENT = "lm_head.weight may be absent only where config.json says tie_word_embeddings: true"
WRONG_SIZES = "of packed tensors: are the bits and group_size of quantization_config right?"
NO_QUANTIZATION = (
    "packed matrices need quantization_config in config.json, which has none (AutoGPTQ's is in "
    "quantize_config.json)"
)
PACKED = (".qweight", ".weight_packed")


def load_params(
    folder: str | PathLike[str],
    config: Config,
    *,
    dtype: str | None = None,
    xp: Any = np,
    progress: bool = False,
    mmap: bool = True,
) -> Params:
    """Load the weights of a checkpoint folder.

    Parameters
    ----------
    folder : str or Path
        Holds model.safetensors, or model.safetensors.index.json and the files it names.
    config : Config
    dtype : str, optional
        "bfloat16", "float16", "float32", "float64"; or "int8" (matrices quantized to `Int8Weight`)
        or "int4" (to `BlockWeight`), all else as stored.  Default: each tensor as it is stored;
        what GPTQ or compressed-tensors packed is a `BlockWeight`, a `PermutedWeight` or a
        `GroupedWeight` then.
    xp : module
        The array library of the weights.
    progress : bool
        Show a bar with bytes and file on stderr where it is a terminal and tqdm is installed.
    mmap : bool
        False: copy every tensor into memory, so that no later change of a file matters.

    Returns
    -------
    params : Params
        With NumPy and `dtype` as stored: read-only views of the mapped files, unless `mmap` is
        False; `TensorFiles` says what must not happen to those files meanwhile.  With CuPy: copied
        from them by `npllm.checkpoints.upload`; the host holds no second copy.

    Raises
    ------
    NpllmOSError
        When a file is missing, truncated, or not safetensors.
    NpllmValueError
        One error that lists every missing, unknown and misshapen tensor and every unusable dtype.

    Warns
    -----
    UserWarning
        Where config.json ties two matrices that differ (both are used), and for tensors that hold
        weights and are not used.

    Notes
    -----
    Where config.json ties embedding and output and the file holds only one of the two, that one is
    used for both.

    Source: `PreTrainedModel.tie_weights` in Transformers 5.23.
    """
    check_dtype(dtype)
    entries = read_entries(folder)
    check_entries(folder, entries, config)
    _warn_of_ignored(folder, entries, config)
    sources = top_sources_in(folder, entries, config)
    layers = [layer_sources(config, number) for number in range(config.num_hidden_layers)]
    packed = layers_in(entries, config)
    n_bytes = _count_bytes(entries, packed, [sources, *layers])
    with progress_bar(n_bytes, "loading", wanted=progress) as advance:
        reader = TensorReader(entries, dtype, xp, advance, mmap=mmap, packed=packed)
        params = _assemble(reader, sources, layers)
        reader.finish()
    return _tie(params) if _is_tied(config) else params


def layers_in(entries: Mapping[str, TensorEntry], config: Config) -> dict[str, PackedLayer]:
    """List the packed matrices of a checkpoint, by the names that they have in floats.

    The embedding matrix is read as floats only.
    """
    matrices = {name: x for name, x in expected_shapes(config).items() if name != EMBEDDING}
    return packed_layers(entries, matrices, config.quantization)


def _count_bytes(
    entries: Mapping[str, TensorEntry], packed: Mapping[str, PackedLayer], sources: list[Sources]
) -> int:
    """Count the bytes of all tensors that are read."""
    names = [name for fields in sources for tensors in fields.values() for name in tensors]
    return sum(
        packed[name].n_bytes if name in packed else entries[name].stop - entries[name].start
        for name in names
    )


def _assemble(reader: TensorReader, sources: Sources, layer_sources: list[Sources]) -> Params:
    """Read all tensors: the layers first, then the rest."""
    layers = tuple(
        LayerParams(**{field: reader.read(tensors) for field, tensors in fields.items()})
        for fields in layer_sources
    )
    top = {field: reader.read(tensors) for field, tensors in sources.items()}
    return Params(layers=layers, **{"embed_tokens": None, **top})


def _tie(params: Params) -> Params:
    """Use one array for embedding and output where only one of the two was read."""
    if params.lm_head is None:
        return params._replace(lm_head=params.embed_tokens)
    if params.embed_tokens is None:
        return params._replace(embed_tokens=params.lm_head)
    return params


def _is_tied(config: Config) -> bool:
    """Return whether config.json says that embedding and output are one matrix."""
    return config.head == "lm" and config.tie_word_embeddings


def top_sources_in(
    folder: str | PathLike[str], entries: Mapping[str, TensorEntry], config: Config
) -> Sources:
    """List what to read: `top_sources`, but of two tied matrices those that the file holds.

    Where it holds both, they are read both only if they differ.
    """
    sources = top_sources(config)
    if not _is_tied(config) or OUTPUT not in entries:
        return sources
    output = {"lm_head": {OUTPUT: entries[OUTPUT].shape}}
    if EMBEDDING not in entries:
        del sources["embed_tokens"]
        return sources | output
    if same_values(view_of(entries[EMBEDDING]), view_of(entries[OUTPUT])):
        return sources
    warn(
        f"{folder}: config.json says tie_word_embeddings: true, but {OUTPUT} and {EMBEDDING} "
        "differ, so both are used; tie_word_embeddings: false would say so"
    )
    return sources | output


def _warn_of_ignored(
    folder: str | PathLike[str], entries: Mapping[str, TensorEntry], config: Config
) -> None:
    """Warn of tensors that hold weights and are not used."""
    buffers = [name for name in entries if name.endswith(ROPE_BUFFER)]
    unexplained = [name for name in buffers if not _follows_from(config, entries[name])]
    warn_of_unused(
        folder, unexplained, "they are not the RoPE frequencies of config.json, which are used"
    )
    if config.head != "lm" and OUTPUT in entries:
        warn_of_unused(folder, [OUTPUT], f"{config.architectures[0]} scores classes")


def _follows_from(config: Config, entry: TensorEntry) -> bool:
    """Return whether a stored RoPE buffer follows from config.json."""
    return entry.dtype in SAFETENSORS_DTYPES and are_rope_frequencies(view_of(entry), config)


def check_entries(
    folder: str | PathLike[str], entries: Mapping[str, TensorEntry], config: Config
) -> None:
    """Raise one error that lists everything wrong with the tensors of a checkpoint.

    Parameters
    ----------
    folder : str or Path
        For the message.
    entries : dict of str to TensorEntry
    config : Config

    Raises
    ------
    NpllmValueError
    """
    expected = expected_shapes(config)
    if _is_tied(config) and OUTPUT in entries:
        in_file = EMBEDDING in entries
        expected[OUTPUT] = expected[EMBEDDING] if in_file else expected.pop(EMBEDDING)
    ignored = {name for name in entries if name.endswith(ROPE_BUFFER)}
    if config.head != "lm":
        ignored.add(OUTPUT)
    packed = layers_in(entries, config)
    ignored |= zero_biases(entries, packed) - expected.keys()
    dtypes = {}
    for name, layer in packed.items():
        del expected[name]
        for leaf, part in layer.parts.items():
            if leaf in layer.entries or not part.is_optional:
                expected[layer.tensor_name(leaf)] = part.shape
                dtypes[layer.tensor_name(leaf)] = part.dtypes
    is_missing = OUTPUT in expected and OUTPUT not in entries
    advice = [MAY_BE_ABSENT] if is_missing else []
    if any(name in entries and entries[name].shape != expected[name] for name in dtypes):
        advice.append(WRONG_SIZES)
    if config.quantization is None and any(name.endswith(PACKED) for name in entries):
        advice.append(NO_QUANTIZATION)
    check_shapes(folder, entries, expected, ignored, advice, dtypes)
