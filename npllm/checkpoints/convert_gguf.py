"""Conversion of a Llama-architecture GGUF file to a Phi-3 checkpoint folder.

Llama and Phi-3 compute the same function with differently packed weights.  The conversion
dequantizes the tensors, reorders the rows of q and k from interleaved to half-split RoPE order,
concatenates q|k|v and gate|up, and writes the tokenizer in the form of the `tokenizers` library.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from npllm.checkpoints.gguf import GGUFFile, dequantized_rows, tensor_kind, tensor_shape
from npllm.checkpoints.gguf_tokenizer import read_tokenizer, tokenizer_config
from npllm.errors import NpllmOSError, NpllmValueError

if TYPE_CHECKING:
    from gguf import ReaderTensor

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
    generation_config.json.  config.json is written last: a folder without it is incomplete.

    Parameters
    ----------
    gguf_path : path
        Of any quantization that the `gguf` package can undo, with a byte-level BPE vocabulary.
    folder : path
        Created if it does not exist.  Files of the same names are replaced.

    Raises
    ------
    MissingExtraError
        When the package `gguf` is not installed.
    NpllmValueError
        When the file is not GGUF, of another architecture, incomplete, or holds what the folder
        cannot express.
    NpllmOSError
        When the file cannot be read or the folder cannot be written.

    Notes
    -----
    bfloat16 has 8 significant bits: the relative rounding error of a weight is at most 2**-9.

    Source: GGUF's tensor names and metadata as in ggml's docs/gguf.md; the fused layout of
    `Phi3ForCausalLM` in Transformers.
    """
    gguf, folder = GGUFFile(Path(gguf_path)), Path(folder)
    config = _phi3_config(gguf)
    tensors = _checked_tensors(gguf, config)
    tokenizer = read_tokenizer(gguf)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_weights(tensors, config, folder / "model.safetensors")
        text = tokenizer.to_str(pretty=False)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        _write_json(folder / "tokenizer_config.json", tokenizer_config(gguf))
        _write_json(folder / "generation_config.json", gguf.special_ids())
        _write_json(folder / "config.json", config)
    except OSError as error:
        raise NpllmOSError(f"{folder}: cannot be written: {error.strerror or error}") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, indented, in UTF-8."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def _phi3_config(gguf: GGUFFile) -> dict[str, Any]:
    """Return the content of the config.json."""
    n_head = gguf.value("llama.attention.head_count", int)
    d_model = gguf.value("llama.embedding_length", int)
    n_ctx = gguf.value("llama.context_length", int)
    tokens = gguf.value("tokenizer.ggml.tokens", list)
    _check_rope(gguf, d_model, n_head)
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "vocab_size": gguf.value_or("llama.vocab_size", int, len(tokens)),
        "hidden_size": d_model,
        "intermediate_size": gguf.value("llama.feed_forward_length", int),
        "num_hidden_layers": gguf.value("llama.block_count", int),
        "num_attention_heads": n_head,
        "num_key_value_heads": gguf.value_or("llama.attention.head_count_kv", int, n_head),
        "hidden_act": "silu",
        "max_position_embeddings": n_ctx,
        "original_max_position_embeddings": n_ctx,
        "rms_norm_eps": _shortest(gguf.value("llama.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _shortest(gguf.value_or("llama.rope.freq_base", float, 10000.0)),
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        **gguf.special_ids(),
    }


def _check_rope(gguf: GGUFFile, d_model: int, n_head: int) -> None:
    """Raise on a head width or a RoPE variant that Phi-3's config.json cannot express."""
    if n_head < 1 or d_model % (2 * n_head):
        raise NpllmValueError(
            f"{gguf.path}: d_model must make n_head heads of even width, got {d_model} and {n_head}"
        )
    d_head = d_model // n_head
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        gguf.require(f"llama.{key}", gguf.value_or(f"llama.{key}", int, d_head), d_head)
    scaling = gguf.value_or("llama.rope.scaling.type", str, "none")
    gguf.require("llama.rope.scaling.type", scaling, "none")


def _shortest(x: float) -> float:
    """Return the shortest decimal with the same float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(x)))


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


def _checked_tensors(gguf: GGUFFile, config: dict[str, Any]) -> dict[str, "ReaderTensor"]:
    """Return the tensors by name; raise if one is missing, unknown or of another shape."""
    wanted = [name for names in _sources(config).values() for name in names]
    missing = sorted(set(wanted) - set(gguf.tensors))
    unknown = sorted(set(gguf.tensors) - set(wanted))
    if missing or unknown:
        raise NpllmValueError(
            f"{gguf.path}: tensors missing: {missing[:3]}, "
            f"tensors that would be dropped: {unknown[:3]}"
        )
    shapes = _source_shapes(config)
    for name in wanted:
        expected, shape = shapes[tensor_kind(name)], tensor_shape(gguf.tensors[name])
        if shape != expected:
            raise NpllmValueError(
                f"{gguf.path}: {name} must be {list(expected)}, got {list(shape)}"
            )
    return gguf.tensors


def _phi3_rows(tensor: "ReaderTensor", config: dict[str, Any]) -> Iterator[np.ndarray]:
    """Yield the rows of a GGUF tensor in Phi-3's order, a block of rows at a time."""
    n_head = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }.get(tensor_kind(tensor.name))
    if n_head is None:
        yield from dequantized_rows(tensor)
    else:
        yield half_split(np.concatenate(list(dequantized_rows(tensor))), n_head)


def _write_weights(tensors: dict[str, "ReaderTensor"], config: dict[str, Any], path: Path) -> None:
    """Write model.safetensors, one block of rows at a time: the model is never whole in memory."""
    sources = _sources(config)
    shapes = {}
    for name, names in sources.items():
        parts = [tensor_shape(tensors[part]) for part in names]
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
