"""Conversion of a Llama-architecture GGUF file to a Phi-3 checkpoint folder.

Llama and Phi-3 compute the same function with differently packed weights.  The conversion
dequantizes the tensors, reorders the rows of q and k from interleaved to half-split RoPE order,
concatenates q|k|v and gate|up, and writes the tokenizer in the form of the `tokenizers` library.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from npllm.checkpoints.disk import checkpoint_beside
from npllm.checkpoints.gguf.config import phi3_config
from npllm.checkpoints.gguf.layout import check_tensors, expected_tensors
from npllm.checkpoints.gguf.reader import GGUFFile, GGUFTensor, dequantized_rows, tensor_kind
from npllm.checkpoints.gguf.tokenizer import read_tokenizer, tokenizer_config
from npllm.checkpoints.gguf.weights import half_split
from npllm.checkpoints.phi3_layout import load_params
from npllm.checkpoints.tensor_writer import safetensors_header
from npllm.config.config import Config
from npllm.decoding.generation_config import GenerationConfig
from npllm.errors import NpllmError, NpllmOSError, NpllmValueError
from npllm.text.tokenizer import Tokenizer

__all__ = ["gguf_to_phi3", "half_split"]

LAYER_SOURCES = {  # Phi-3's name -> GGUF's, in the order of their rows
    "input_layernorm": ["attn_norm"],
    "self_attn.qkv_proj": ["attn_q", "attn_k", "attn_v"],
    "self_attn.o_proj": ["attn_output"],
    "post_attention_layernorm": ["ffn_norm"],
    "mlp.gate_up_proj": ["ffn_gate", "ffn_up"],
    "mlp.down_proj": ["ffn_down"],
}


def gguf_to_phi3(gguf_path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Convert a Llama-architecture GGUF file to a Phi-3 checkpoint folder.

    Writes config.json, model.safetensors (bfloat16), tokenizer.json, tokenizer_config.json and
    generation_config.json.  They are written to a folder beside, loaded once as a check, and then
    put in place: an interruption leaves what was there before.

    Parameters
    ----------
    gguf_path : path
        Of any quantization that the `gguf` package can undo, with a byte-level BPE vocabulary.
    folder : path
        Created if it does not exist.  Of a checkpoint that is there, all files that a loader reads
        are replaced; other files stay.

    Raises
    ------
    MissingExtraError
        When the package `gguf` is not installed.
    NpllmValueError
        When the file is not GGUF, of another architecture, incomplete, contradicts itself, or
        holds what the folder cannot express.
    NpllmOSError
        When the file cannot be read or the folder cannot be written.

    Notes
    -----
    bfloat16 has 8 significant bits: the relative rounding error of a weight is at most 2**-8.

    Source: GGUF's tensor names and metadata as in ggml's docs/gguf.md; the fused layout of
    `Phi3ForCausalLM` in Transformers.
    """
    gguf, folder = GGUFFile(Path(gguf_path)), Path(folder)
    config = phi3_config(gguf)
    check_tensors(gguf, expected_tensors(Config.from_json(config), "llama"))
    _check_pre_tokenizer(gguf)
    read_tokenizer(gguf)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with checkpoint_beside(folder) as complete:
            _write_checkpoint(gguf, config, complete)
            check_loads(gguf, complete)
    except NpllmError:
        raise
    except OSError as error:
        raise NpllmOSError(f"{folder}: cannot be written: {error.strerror or error}") from error


def _write_checkpoint(gguf: GGUFFile, config: dict[str, Any], folder: Path) -> None:
    """Write all files of the checkpoint to a new folder."""
    write_weights(gguf.tensors, config, folder / "model.safetensors")
    text = read_tokenizer(gguf).to_str(pretty=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", tokenizer_config(gguf))
    write_json(folder / "generation_config.json", gguf.special_ids())
    write_json(folder / "config.json", config)


def check_loads(gguf: GGUFFile, folder: Path) -> None:
    """Raise unless every reader of `npllm.load` accepts the folder."""
    try:
        config = Config.from_json(folder)
        load_params(folder, config)
        Tokenizer.from_folder(folder)
        GenerationConfig.from_folder(folder, config)
    except NpllmError as error:
        raise NpllmValueError(
            f"{gguf.path}: what was converted cannot be loaded: {error}"
        ) from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, indented, in UTF-8."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def _check_pre_tokenizer(gguf: GGUFFile) -> None:
    """Raise unless the vocabulary is one that the folder's files can express."""
    gguf.require("tokenizer.ggml.model", gguf.value("tokenizer.ggml.model", str), "gpt2")
    gguf.require("tokenizer.ggml.pre", gguf.value("tokenizer.ggml.pre", str), "smollm")


def _sources(config: dict[str, Any]) -> dict[str, list[str]]:
    """Return for each tensor of the checkpoint the GGUF tensors whose rows it concatenates."""
    sources = {"model.embed_tokens.weight": ["token_embd.weight"]}
    for i in range(config["num_hidden_layers"]):
        for name, kinds in LAYER_SOURCES.items():
            names = [f"blk.{i}.{kind}.weight" for kind in kinds]
            sources[f"model.layers.{i}.{name}.weight"] = names
    sources["model.norm.weight"] = ["output_norm.weight"]
    if not config["tie_word_embeddings"]:
        sources["lm_head.weight"] = ["output.weight"]
    return sources


def _phi3_rows(tensor: GGUFTensor, config: dict[str, Any]) -> Iterator[np.ndarray]:
    """Yield the rows of a GGUF tensor in Phi-3's order, a block of rows at a time."""
    n_head = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }.get(tensor_kind(tensor.name))
    if n_head is None:
        yield from dequantized_rows(tensor)
    else:
        yield half_split(np.concatenate(list(dequantized_rows(tensor))), n_head)


def write_weights(tensors: dict[str, GGUFTensor], config: dict[str, Any], path: Path) -> None:
    """Write model.safetensors, one block of rows at a time: the model is never whole in memory."""
    sources = _sources(config)
    shapes = {}
    for name, names in sources.items():
        parts = [tensors[part].shape for part in names]
        shapes[name] = (sum(part[0] for part in parts), *parts[0][1:])
    with open(path, "wb") as file:
        file.write(safetensors_header({name: ("BF16", x) for name, x in shapes.items()}))
        for names in sources.values():
            for name in names:
                for rows in _phi3_rows(tensors[name], config):
                    file.write(rows.tobytes())
