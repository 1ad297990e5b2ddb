"""The tensors of a Phi-3 or Llama checkpoint, and how they become `Params`.

Tensor names are those of Transformers.  Llama's separate projections are concatenated to the fused
ones of Phi-3.
"""

from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np

from npllm.arrays import DTYPES
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
from npllm.errors import NpllmValueError
from npllm.models.params import LayerParams, Params
from npllm.progress import progress_bar, warn

__all__ = ["check_entries", "expected_shapes", "load_params"]

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
ROPE_BUFFER = "rotary_emb.inv_freq"
MAY_BE_ABSENT = "lm_head.weight may be absent only where config.json says tie_word_embeddings: true"

# Field of Params or LayerParams -> the tensors it is concatenated from: {name in the file: shape}.
Sources = dict[str, dict[str, tuple[int, ...]]]


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """List every tensor that a checkpoint of this configuration holds.

    Parameters
    ----------
    config : Config

    Returns
    -------
    shapes : dict of str to tuple of int
        Tensor name as in the file -> shape.
    """
    layers = [_layer_sources(config, number) for number in range(config.num_hidden_layers)]
    shapes: dict[str, tuple[int, ...]] = {}
    for fields in (_top_sources(config), *layers):
        for tensors in fields.values():
            shapes |= tensors
    return shapes


def _top_sources(config: Config) -> Sources:
    """List the fields of Params, except its layers."""
    n_vocab, d_model = config.vocab_size, config.hidden_size
    sources: Sources = {
        "embed_tokens": {EMBEDDING: (n_vocab, d_model)},
        "norm": {"model.norm.weight": (d_model,)},
    }
    if config.head != "lm":
        sources["score"] = {"score.weight": (config.num_labels, d_model)}
    elif not config.tie_word_embeddings:
        sources["lm_head"] = {OUTPUT: (n_vocab, d_model)}
    if config.head == "token":
        sources["score_bias"] = {"score.bias": (config.num_labels,)}
    return sources


def _layer_sources(config: Config, number: int) -> Sources:
    """List the fields of LayerParams."""
    d_model, d_ff = config.hidden_size, config.intermediate_size
    d_q = config.num_attention_heads * config.head_dim
    d_kv = config.num_key_value_heads * config.head_dim
    if config.model_type == "phi3":
        qkv, gate_up = {"qkv_proj": d_q + 2 * d_kv}, {"gate_up_proj": 2 * d_ff}
    else:
        qkv = {"q_proj": d_q, "k_proj": d_kv, "v_proj": d_kv}
        gate_up = {"gate_proj": d_ff, "up_proj": d_ff}
    layer = f"model.layers.{number}"
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    sources: Sources = {
        norm: {f"{layer}.{norm}.weight": (d_model,)}
        for norm in ("input_layernorm", "post_attention_layernorm")
    }
    sources |= _linear_sources("qkv", attention, qkv, d_model, config.attention_bias)
    sources |= _linear_sources("o", attention, {"o_proj": d_model}, d_q, config.attention_bias)
    sources |= _linear_sources("gate_up", mlp, gate_up, d_model, config.mlp_bias)
    sources |= _linear_sources("down", mlp, {"down_proj": d_model}, d_ff, config.mlp_bias)
    return sources


def _linear_sources(
    field: str, module: str, rows: dict[str, int], d_in: int, has_bias: bool
) -> Sources:
    """List weight and bias of a linear map; `rows` are its parts in the file, with their d_out."""
    sources: Sources = {
        f"{field}_proj": {f"{module}.{leaf}.weight": (d_out, d_in) for leaf, d_out in rows.items()}
    }
    if has_bias:
        sources[f"{field}_bias"] = {f"{module}.{leaf}.bias": (d,) for leaf, d in rows.items()}
    return sources


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
        "bfloat16", "float16", "float32", "float64", or "int8": matrices quantized to `Int8Weight`,
        all else as stored.  Default: each tensor as it is stored.
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
    if dtype is not None and (not isinstance(dtype, str) or dtype not in (*DTYPES, "int8")):
        raise NpllmValueError(f"dtype must be one of {', '.join(DTYPES)}, int8, got {dtype!r}")
    entries = read_entries(folder)
    check_entries(folder, entries, config)
    _warn_of_ignored(folder, entries, config)
    sources = _top_sources_in(folder, entries, config)
    layers = [_layer_sources(config, number) for number in range(config.num_hidden_layers)]
    n_bytes = _count_bytes(entries, [sources, *layers])
    with progress_bar(n_bytes, "loading", wanted=progress) as advance:
        reader = TensorReader(entries, dtype, xp, advance, mmap=mmap)
        params = _assemble(reader, sources, layers)
        reader.finish()
    return _tie(params) if _is_tied(config) else params


def _count_bytes(entries: Mapping[str, TensorEntry], sources: list[Sources]) -> int:
    """Count the bytes of all tensors that are read."""
    names = [name for fields in sources for tensors in fields.values() for name in tensors]
    return sum(entries[name].stop - entries[name].start for name in names)


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


def _top_sources_in(
    folder: str | PathLike[str], entries: Mapping[str, TensorEntry], config: Config
) -> Sources:
    """List what to read: `_top_sources`, but of two tied matrices those that the file holds.

    Where it holds both, they are read both only if they differ.
    """
    sources = _top_sources(config)
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
        "differ, so both are used; tie_word_embeddings: false would say so",
        stacklevel=4,
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
    is_missing = OUTPUT in expected and OUTPUT not in entries
    check_shapes(folder, entries, expected, ignored, [MAY_BE_ABSENT] if is_missing else [])
