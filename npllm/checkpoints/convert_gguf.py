"""Conversion of a Llama-architecture GGUF file to a Phi-3 checkpoint folder.

Llama and Phi-3 compute the same function with differently packed weights.  The conversion
dequantizes the tensors, reorders the rows of q and k from interleaved to half-split RoPE order,
concatenates q|k|v and gate|up, and writes the tokenizer in the form of the `tokenizers` library.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from npllm.checkpoints.disk import publish_over, remove_checkpoint
from npllm.checkpoints.gguf import GGUFFile, GGUFTensor, dequantized_rows, tensor_kind
from npllm.checkpoints.gguf_config import phi3_config
from npllm.checkpoints.gguf_tokenizer import read_tokenizer, tokenizer_config
from npllm.checkpoints.phi3_layout import load_params
from npllm.config.config import Config
from npllm.config.strict_json import quote
from npllm.decoding.generation_config import GenerationConfig
from npllm.errors import NpllmError, NpllmOSError, NpllmValueError
from npllm.text.tokenizer import Tokenizer

__all__ = ["gguf_to_phi3", "half_split"]

DATA_ALIGNMENT = 64  # bytes of the file: the first tensor starts at a multiple
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
    bfloat16 has 8 significant bits: the relative rounding error of a weight is at most 2**-9.

    Source: GGUF's tensor names and metadata as in ggml's docs/gguf.md; the fused layout of
    `Phi3ForCausalLM` in Transformers.
    """
    gguf, folder = GGUFFile(Path(gguf_path)), Path(folder)
    config = phi3_config(gguf)
    _check_tensors(gguf, config)
    read_tokenizer(gguf)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
        complete = staging / "checkpoint"
        try:
            _write_checkpoint(gguf, config, complete)
            check_loads(gguf, complete)
            publish_over(complete, folder)
        finally:
            remove_checkpoint(complete)
            with contextlib.suppress(OSError):  # it holds what could not be moved back
                staging.rmdir()
    except NpllmError:
        raise
    except OSError as error:
        raise NpllmOSError(f"{folder}: cannot be written: {error.strerror or error}") from error


def _write_checkpoint(gguf: GGUFFile, config: dict[str, Any], folder: Path) -> None:
    """Write all files of the checkpoint to a new folder."""
    folder.mkdir()
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


def half_split(weight: np.ndarray, n_head: int) -> np.ndarray:
    """Reorder the rows of a q or k projection from interleaved to half-split RoPE order.

        y[h, i] = w[h, 2 i],  y[h, i + d_head / 2] = w[h, 2 i + 1]      for i < d_head / 2

    GGUF rotates the channel pairs (2 i, 2 i + 1), Phi-3 the pairs (i, i + d_head / 2); the pair
    keeps its angle i.

    Parameters
    ----------
    weight : array [n_head * d_head, d_model]
    n_head : int
        Heads in these rows: `n_kv_head` for k.

    Returns
    -------
    y : array [n_head * d_head, d_model]
        A copy.

    Raises
    ------
    NpllmValueError
        When the rows are not `n_head` heads of even width.

    Notes
    -----
    Source: the inverse of `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    n_rows, d_model = weight.shape
    if n_rows % (2 * n_head):
        raise NpllmValueError(
            f"weight must have n_head * d_head rows, {n_head} heads of even "
            f"width, got {n_rows} rows"
        )
    pairs = weight.reshape(n_head, n_rows // n_head // 2, 2, d_model)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(n_rows, d_model)


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


def _source_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape that each kind of GGUF tensor must have."""
    n_vocab = config["vocab_size"]
    d_model, d_ff = config["hidden_size"], config["intermediate_size"]
    d_kv = d_model // config["num_attention_heads"] * config["num_key_value_heads"]
    return {
        "token_embd": (n_vocab, d_model),
        "output": (n_vocab, d_model),
        "attn_norm": (d_model,),
        "ffn_norm": (d_model,),
        "output_norm": (d_model,),
        "attn_q": (d_model, d_model),
        "attn_k": (d_kv, d_model),
        "attn_v": (d_kv, d_model),
        "attn_output": (d_model, d_model),
        "ffn_gate": (d_ff, d_model),
        "ffn_up": (d_ff, d_model),
        "ffn_down": (d_model, d_ff),
    }


def _check_tensors(gguf: GGUFFile, config: dict[str, Any]) -> None:
    """Raise if a tensor is missing, unknown or of another shape."""
    wanted = [name for names in _sources(config).values() for name in names]
    missing = sorted(set(wanted) - set(gguf.tensors))
    unknown = sorted(set(gguf.tensors) - set(wanted))
    if missing or unknown:
        raise NpllmValueError(
            f"{gguf.path}: tensors missing: {quote(missing[:3])}, "
            f"tensors that would be dropped: {quote(unknown[:3])}"
        )
    shapes = _source_shapes(config)
    for name in wanted:
        expected, shape = shapes[tensor_kind(name)], gguf.tensors[name].shape
        if shape != expected:
            raise NpllmValueError(
                f"{gguf.path}: {name} must be {list(expected)}, got {list(shape)}"
            )


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
        file.write(_safetensors_header(shapes))
        for names in sources.values():
            for name in names:
                for rows in _phi3_rows(tensors[name], config):
                    file.write(rows.tobytes())


def _safetensors_header(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """Return the header of a safetensors file of contiguous bfloat16 tensors.

    The header is padded: the data start at a multiple of `DATA_ALIGNMENT` bytes of the file.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name, shape in shapes.items():
        start, stop = stop, stop + 2 * int(np.prod(shape))
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
