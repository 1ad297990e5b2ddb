"""A checkpoint as what a GGUF file holds: metadata, and tensors that are read one by one."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from npllm.arrays import is_packed
from npllm.checkpoints.adapters.merged_checkpoint import MergedCheckpoint
from npllm.checkpoints.gguf.config import gguf_config
from npllm.checkpoints.gguf.layout import check_tensors, expected_tensors
from npllm.checkpoints.gguf.metadata import config_metadata, rope_tensors
from npllm.checkpoints.gguf.reader import FLOATS, GGUFFile, GGUFTensor, is_gguf
from npllm.checkpoints.gguf.rope import ROPE_TENSORS
from npllm.checkpoints.gguf.tokenizer import gguf_tokenizer
from npllm.checkpoints.gguf.vocabulary import vocabulary_metadata
from npllm.checkpoints.gguf.weights import interleaved
from npllm.checkpoints.phi3_tensor_names import layer_sources
from npllm.checkpoints.tensor_files import release_mapped
from npllm.config.config import Config
from npllm.config.strict_json import read_json
from npllm.decoding.generation_config import GenerationConfig
from npllm.errors import NpllmError, NpllmValueError
from npllm.text.tokenizer import Tokenizer

__all__ = ["GGUFSource", "SourceTensor", "gguf_source"]

Array = Any
TOP = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
KINDS = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Transformers' name of a tensor of a layer -> GGUF's kind."""
OF_THE_FILE = ("general.architecture", "general.alignment", "general.file_type")
OF_QUANTISATION = ("general.quantization_version", "quantize.", "split.")


class SourceTensor(NamedTuple):
    """A tensor that is to be written."""

    shape: tuple[int, ...]
    n_bytes: int  # as it is stored now
    kind: str | None  # GGML's type, where it is stored in one whose bytes can be copied
    read: Callable[[], Array]  # a float array, or packed
    release: Callable[[], None]  # gives back the memory of its pages


class GGUFSource(NamedTuple):
    """A checkpoint, as a GGUF file would hold it."""

    path: Path
    config: Config
    metadata: dict[str, Any]
    rope: dict[str, Array]  # float32 vectors
    tensors: dict[str, SourceTensor]  # by GGUF's name, all others
    tokenizer: Tokenizer
    stop_ids: list[int]


def gguf_source(path: Path, adapters: Sequence[Any] = ()) -> GGUFSource:
    """Read the headers of a checkpoint, and nothing else.

    Parameters
    ----------
    path : Path
        A folder of model_type phi3 or llama, or a GGUF file.
    adapters : sequence of paths
        LoRA adapters to merge into the tensors of a folder.

    Returns
    -------
    source : GGUFSource

    Raises
    ------
    NpllmOSError, NpllmValueError
        When the checkpoint cannot be loaded, or GGUF has no place for it; names the path.
    """
    if is_gguf(path):
        if adapters:
            raise NpllmValueError(
                f"{path}: adapters are merged into the weights of a folder with safetensors, got "
                "a GGUF file; quantize the folder that it was made of"
            )
        return _from_gguf(GGUFFile(path))
    model_type = read_json(path / "config.json").get("model_type")
    if model_type == "bert":
        raise NpllmValueError(f"{path}: an encoder (bert) cannot be written as GGUF")
    config = Config.from_json(path)
    try:
        return _from_folder(path, config, adapters)
    except NpllmError as error:
        if str(error).startswith(str(path)):
            raise
        raise NpllmValueError(f"{path}: {error}") from None


def _from_gguf(gguf: GGUFFile) -> GGUFSource:
    """Take the metadata of a GGUF file over, all but what says how it was quantised."""
    config = Config.from_json(gguf_config(gguf))
    check_tensors(gguf, expected_tensors(config, gguf.architecture))
    kept = {
        key: value
        for key, value in gguf.metadata.items()
        if key not in OF_THE_FILE and not key.startswith(OF_QUANTISATION)
    }
    rope = {name: gguf.tensors[name].stored for name in ROPE_TENSORS if name in gguf.tensors}
    tensors = {
        name: _gguf_tensor(x) for name, x in gguf.tensors.items() if name not in ROPE_TENSORS
    }
    tokenizer, stop_ids = gguf_tokenizer(gguf), list(config.eos_token_id)
    return GGUFSource(gguf.path, config, kept, rope, tensors, tokenizer, stop_ids)


def _gguf_tensor(x: GGUFTensor) -> SourceTensor:
    """Describe a tensor of a GGUF file."""
    n_bytes = x.rows.nbytes
    return SourceTensor(x.shape, n_bytes, x.kind, lambda: x.stored, lambda: release_mapped(x.rows))


def _from_folder(folder: Path, config: Config, adapters: Sequence[Any]) -> GGUFSource:
    """Name and convert what a folder holds as llama.cpp's converter does."""
    metadata = config_metadata(config)
    merged = MergedCheckpoint(folder, config, adapters)
    config = merged.config
    tokenizer = Tokenizer.from_folder(folder)
    stop_ids = list(GenerationConfig.from_folder(folder, config).eos_token_id)
    metadata |= vocabulary_metadata(tokenizer, config.vocab_size, stop_ids)
    metadata["general.type"], metadata["general.name"] = "model", folder.resolve().name
    tensors, rope = _folder_tensors(merged), rope_tensors(config)
    return GGUFSource(folder, config, metadata, rope, tensors, tokenizer, stop_ids)


def _folder_tensors(merged: MergedCheckpoint) -> dict[str, SourceTensor]:
    """List the tensors of a folder under GGUF's names, in GGUF's order of rows."""
    config, top = merged.config, merged.top
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    names = {}
    is_alone = "embed_tokens" not in top  # the file holds the output matrix, which is used for both
    for field, tensors in top.items():
        kind = "token_embd" if is_alone and field == "lm_head" else TOP[field]
        names[f"{kind}.weight"] = next(iter(tensors))
    for number in range(config.num_hidden_layers):
        prefix = f"model.layers.{number}."
        for tensors in layer_sources(config, number).values():
            for name in tensors:
                kind = KINDS[name.removeprefix(prefix).removesuffix(".weight")]
                names[f"blk.{number}.{kind}.weight"] = name
    return {
        name: _folder_tensor(merged, own, heads.get(name.split(".")[-2]))
        for name, own in names.items()
    }


def _folder_tensor(merged: MergedCheckpoint, name: str, n_head: int | None) -> SourceTensor:
    """Describe one tensor; the rows of Llama's q and k take the order of interleaved RoPE."""

    def read() -> Array:
        x = merged.read(name)
        if n_head is None:
            return x
        if is_packed(x):
            return x.take(interleaved(np.arange(len(x))[:, None], n_head)[:, 0])
        return interleaved(x, n_head)

    def release() -> None:
        merged.release(name)

    layer = merged.packed.get(name)
    if layer is not None:
        return SourceTensor(layer.shape, layer.n_bytes, None, read, release)
    entry = merged.entries[name]
    kind = entry.dtype if entry.dtype in FLOATS else None
    n_bytes = entry.stop - entry.start
    return SourceTensor(entry.shape, n_bytes, kind, read, release)
