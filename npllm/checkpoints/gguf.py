"""Write a Phi-3 checkpoint folder from a Llama-architecture GGUF file.

Llama and Phi-3 are the same function of differently packed weights, so only four things happen here: the quantised
tensors are dequantised, the rows of q and k are put back from interleaved to half-split RoPE order, q|k|v and gate|up
are stacked, and the tokenizer's vocabulary is written in the form that the `tokenizers` library reads.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from npllm.errors import MissingExtraError, NpllmOSError, NpllmValueError

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor
    from tokenizers import Tokenizer

__all__ = ["gguf_to_phi3", "half_split"]

ROWS_AT_ONCE = 4096  # of a matrix, while it is dequantised: what bounds the memory of a conversion
DATA_ALIGNMENT = 64  # bytes; the first tensor starts on such a boundary of the file
CONTROL_TOKEN = 3  # of tokenizer.ggml.token_type: never produced by text, only by name


# ---------------------------------------------------------------------------------------------------------------------
# Reading GGUF


def open_gguf(path: Path) -> "GGUFReader":
    """Open a GGUF file, memory-mapped, and check that it holds a Llama-architecture model."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingExtraError('reading GGUF needs the package gguf: pip install "npllm[fetch]"') from error
    try:
        reader = GGUFReader(path)
    except OSError as error:
        raise NpllmOSError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise NpllmValueError(f"{path}: not a complete GGUF file: {error}") from error
    require(path, "general.architecture", value(reader, path, "general.architecture", str), "llama")
    return reader


def value(reader: "GGUFReader", path: Path, key: str, kind: type) -> Any:
    """Return one metadata value of a GGUF file, which must be there and of the kind asked for."""
    if key not in reader.fields:
        raise NpllmValueError(f"{path}: the GGUF metadata has no {key!r}; a Llama model must have it")
    found = reader.fields[key].contents()
    if kind is float and isinstance(found, int):
        found = float(found)
    if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
        raise NpllmValueError(f"{path}: {key} must be {kind.__name__}, got {type(found).__name__}: {str(found)[:60]}")
    return found


def value_or(reader: "GGUFReader", path: Path, key: str, kind: type, default: Any) -> Any:
    """Return one metadata value of a GGUF file, or a default where the file does not have it."""
    return value(reader, path, key, kind) if key in reader.fields else default


def require(path: Path, what: str, got: object, wanted: object) -> None:
    """Raise unless a value of the GGUF file is the one that the conversion is written for."""
    if got != wanted:
        raise NpllmValueError(f"{path}: {what} must be {wanted!r}, got {got!r}; other GGUF files are not converted")


def shortest_float(x: float) -> float:
    """Return the shortest decimal that rounds to the same float32: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(x)))


# ---------------------------------------------------------------------------------------------------------------------
# config.json, generation_config.json


def phi3_config(reader: "GGUFReader", path: Path) -> dict[str, Any]:
    """Return the config.json of the Phi-3 checkpoint that a Llama GGUF file describes."""
    n_head = value(reader, path, "llama.attention.head_count", int)
    d_model = value(reader, path, "llama.embedding_length", int)
    n_ctx = value(reader, path, "llama.context_length", int)
    tokens = value(reader, path, "tokenizer.ggml.tokens", list)
    check_rope(reader, path, d_model, n_head)
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "vocab_size": value_or(reader, path, "llama.vocab_size", int, len(tokens)),
        "hidden_size": d_model,
        "intermediate_size": value(reader, path, "llama.feed_forward_length", int),
        "num_hidden_layers": value(reader, path, "llama.block_count", int),
        "num_attention_heads": n_head,
        "num_key_value_heads": value_or(reader, path, "llama.attention.head_count_kv", int, n_head),
        "hidden_act": "silu",
        "max_position_embeddings": n_ctx,
        "original_max_position_embeddings": n_ctx,
        "rms_norm_eps": shortest_float(value(reader, path, "llama.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": shortest_float(value_or(reader, path, "llama.rope.freq_base", float, 10000.0)),
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        **special_ids(reader, path),
    }


def check_rope(reader: "GGUFReader", path: Path, d_model: int, n_head: int) -> None:
    """Raise on a head width or a RoPE variant that the Phi-3 config.json cannot express."""
    if n_head < 1 or d_model % (2 * n_head):
        raise NpllmValueError(f"{path}: d_model must make n_head heads of even width, got {d_model} and {n_head}")
    d_head = d_model // n_head
    for key in ("llama.attention.key_length", "llama.attention.value_length", "llama.rope.dimension_count"):
        require(path, key, value_or(reader, path, key, int, d_head), d_head)
    require(path, "llama.rope.scaling.type", value_or(reader, path, "llama.rope.scaling.type", str, "none"), "none")


def special_ids(reader: "GGUFReader", path: Path) -> dict[str, int]:
    """Return the begin, end and padding ids; padding falls back to the end id."""
    eos = value(reader, path, "tokenizer.ggml.eos_token_id", int)
    ids = {
        "bos_token_id": value_or(reader, path, "tokenizer.ggml.bos_token_id", int, eos),
        "eos_token_id": eos,
        "pad_token_id": value_or(reader, path, "tokenizer.ggml.padding_token_id", int, eos),
    }
    n_vocab = len(value(reader, path, "tokenizer.ggml.tokens", list))
    if not all(0 <= i < n_vocab for i in ids.values()):
        raise NpllmValueError(f"{path}: special ids must be below n_vocab = {n_vocab}, got {ids}")
    return ids


# ---------------------------------------------------------------------------------------------------------------------
# model.safetensors


def half_split(weight: np.ndarray, n_head: int) -> np.ndarray:
    """Put the rows of a q or k projection from interleaved into half-split RoPE order, head by head.

        y[h, i] = w[h, 2 i],  y[h, i + d_head / 2] = w[h, 2 i + 1]      for i < d_head / 2

    GGUF rotates the channel pairs (2 i, 2 i + 1), Phi-3 the pairs (i, i + d_head / 2); the pair keeps its angle i.

    Parameters
    ----------
    weight : array [n_head * d_head, d_model]
    n_head : int
        Heads in these rows: `n_kv_head` for k.

    Returns
    -------
    array [n_head * d_head, d_model]
        A copy.

    Raises
    ------
    NpllmValueError
        If the rows do not make `n_head` heads of even width.

    Notes
    -----
    Source: the inverse of `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    n_rows, d_model = weight.shape
    if n_rows % (2 * n_head):
        raise NpllmValueError(f"weight must have n_head * d_head rows, {n_head} heads of even width, got {n_rows} rows")
    pairs = weight.reshape(n_head, n_rows // n_head // 2, 2, d_model)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(n_rows, d_model)


def sources(config: dict[str, Any]) -> dict[str, list[str]]:
    """Return, for each tensor of the Phi-3 checkpoint, the GGUF tensors whose rows it stacks, in order."""
    plan = {"model.embed_tokens.weight": ["token_embd.weight"]}
    for i in range(config["num_hidden_layers"]):
        names = {
            "input_layernorm": ["attn_norm"],
            "self_attn.qkv_proj": ["attn_q", "attn_k", "attn_v"],
            "self_attn.o_proj": ["attn_output"],
            "post_attention_layernorm": ["ffn_norm"],
            "mlp.gate_up_proj": ["ffn_gate", "ffn_up"],
            "mlp.down_proj": ["ffn_down"],
        }
        for name, parts in names.items():
            plan[f"model.layers.{i}.{name}.weight"] = [f"blk.{i}.{part}.weight" for part in parts]
    plan["model.norm.weight"] = ["output_norm.weight"]
    if not config["tie_word_embeddings"]:
        plan["lm_head.weight"] = ["output.weight"]
    return plan


def source_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape that each kind of GGUF tensor (the name's last word) must have."""
    d_model, d_ff, n_vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
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


def kind(name: str) -> str:
    """Return what a GGUF tensor is: `attn_q` for `blk.3.attn_q.weight`."""
    return name.split(".")[-2]


def shape(tensor: "ReaderTensor") -> tuple[int, ...]:
    """Return the shape of a GGUF tensor, slowest axis first."""
    return tuple(int(n) for n in reversed(tensor.shape))


def checked_tensors(reader: "GGUFReader", path: Path, config: dict[str, Any]) -> dict[str, "ReaderTensor"]:
    """Return the tensors by name, after checking that none is missing, unknown or of another shape."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    wanted = [name for parts in sources(config).values() for name in parts]
    missing, unknown = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or unknown:
        raise NpllmValueError(f"{path}: tensors missing: {missing[:3]}, tensors that would be dropped: {unknown[:3]}")
    shapes = source_shapes(config)
    for name in wanted:
        if shape(tensors[name]) != shapes[kind(name)]:
            want, got = list(shapes[kind(name)]), list(shape(tensors[name]))
            raise NpllmValueError(f"{path}: {name} must be {want}, got {got}")
    return tensors


def dequantised(tensor: "ReaderTensor") -> Iterator[np.ndarray]:
    """Yield the rows of a GGUF tensor in bfloat16, a block of rows at a time."""
    import ml_dtypes
    from gguf.quants import dequantize

    for start in range(0, len(tensor.data), ROWS_AT_ONCE):
        try:
            rows = dequantize(tensor.data[start : start + ROWS_AT_ONCE], tensor.tensor_type)
        except NotImplementedError as error:
            raise NpllmValueError(f"{tensor.name} is stored as {tensor.tensor_type.name}: {error}") from error
        yield rows.astype(ml_dtypes.bfloat16)


def phi3_rows(tensor: "ReaderTensor", config: dict[str, Any]) -> Iterator[np.ndarray]:
    """Yield the rows of a GGUF tensor as Phi-3 stores them, a block of rows at a time."""
    n_head = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}.get(kind(tensor.name))
    if n_head is None:
        yield from dequantised(tensor)
    else:
        yield half_split(np.concatenate(list(dequantised(tensor))), n_head)


def safetensors_header(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """Return the head of a safetensors file of bfloat16 tensors that lie one after the other.

    The head is padded so that the data start on a boundary of `DATA_ALIGNMENT` bytes of the file.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dims in shapes.items():
        start, end = end, end + 2 * int(np.prod(dims))
        entries[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_weights(tensors: dict[str, "ReaderTensor"], config: dict[str, Any], path: Path) -> None:
    """Write model.safetensors, one block of rows after the other: the model is never whole in memory."""
    plan = sources(config)
    shapes = {}
    for name, parts in plan.items():
        first = shape(tensors[parts[0]])
        shapes[name] = (sum(shape(tensors[part])[0] for part in parts), *first[1:])
    with open(path, "wb") as file:
        file.write(safetensors_header(shapes))
        for parts in plan.values():
            for part in parts:
                for rows in phi3_rows(tensors[part], config):
                    file.write(rows.tobytes())


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer.json, tokenizer_config.json


def vocabulary(reader: "GGUFReader", path: Path) -> tuple[dict[str, int], list[tuple[str, str]], list[str]]:
    """Return the ids of the tokens, the merges in order of rank, and the control tokens."""
    tokens = value(reader, path, "tokenizer.ggml.tokens", list)
    types = value(reader, path, "tokenizer.ggml.token_type", list)
    merges = []
    vocab = {token: i for i, token in enumerate(tokens)}
    require(path, "number of different tokens", len(vocab), len(tokens))
    require(path, "length of tokenizer.ggml.token_type", len(types), len(tokens))
    for merge in value(reader, path, "tokenizer.ggml.merges", list):
        left, _, right = merge.partition(" ")
        if not (left in vocab and right in vocab and left + right in vocab):
            raise NpllmValueError(f"{path}: a merge must join two tokens into a third, got {merge!r}")
        merges.append((left, right))
    return vocab, merges, [token for token, i in vocab.items() if types[i] == CONTROL_TOKEN]


def tokenizer(reader: "GGUFReader", path: Path) -> "Tokenizer":
    """Return the byte-level BPE tokenizer of a GGUF file.

    The pre-tokenizer that GGUF calls `smollm` cuts out every digit, then follows GPT-2's pattern.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    require(path, "tokenizer.ggml.model", value(reader, path, "tokenizer.ggml.model", str), "gpt2")
    require(path, "tokenizer.ggml.pre", value(reader, path, "tokenizer.ggml.pre", str), "smollm")
    vocab, merges, control = vocabulary(reader, path)
    result = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    result.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return result


def tokenizer_config(reader: "GGUFReader", path: Path) -> dict[str, Any]:
    """Return the tokenizer_config.json: special tokens by name, and the chat template where there is one."""
    tokens = value(reader, path, "tokenizer.ggml.tokens", list)
    ids = special_ids(reader, path)
    unknown = value_or(reader, path, "tokenizer.ggml.unknown_token_id", int, None)
    template = value_or(reader, path, "tokenizer.chat_template", str, None)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[ids["bos_token_id"]],
        "eos_token": tokens[ids["eos_token_id"]],
        "pad_token": tokens[ids["pad_token_id"]],
        "unk_token": None if unknown is None else tokens[unknown],
        "model_max_length": value(reader, path, "llama.context_length", int),
        "clean_up_tokenization_spaces": False,
        **({} if template is None else {"chat_template": template}),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, indented, in UTF-8."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def gguf_to_phi3(gguf_path: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Convert a Llama-architecture GGUF file into a Phi-3 checkpoint folder.

    Written are config.json, model.safetensors (bfloat16), tokenizer.json, tokenizer_config.json and
    generation_config.json; config.json comes last, so that a folder without it is an unfinished one.

    Parameters
    ----------
    gguf_path : path
        Any quantisation that the `gguf` package can undo; byte-level BPE vocabulary.
    folder : path
        Made if need be. Files of the same names are replaced.

    Raises
    ------
    MissingExtraError
        If the package `gguf` is not installed.
    NpllmValueError
        If the file is not GGUF, of another architecture, incomplete, or holds what the folder could not express.
    NpllmOSError
        If the file cannot be read or the folder cannot be written.

    Notes
    -----
    bfloat16 keeps 8 bits of a weight's mantissa: a dequantised weight moves by at most 2**-9 of itself.

    Source: GGUF's tensor names and metadata as in ggml's docs/gguf.md; the fused layout of `Phi3ForCausalLM`.
    """
    gguf_path, folder = Path(gguf_path), Path(folder)
    reader = open_gguf(gguf_path)
    config = phi3_config(reader, gguf_path)
    tensors = checked_tensors(reader, gguf_path, config)
    bpe = tokenizer(reader, gguf_path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(tensors, config, folder / "model.safetensors")
        (folder / "tokenizer.json").write_text(bpe.to_str(pretty=False), encoding="utf-8")
        write_json(folder / "tokenizer_config.json", tokenizer_config(reader, gguf_path))
        write_json(folder / "generation_config.json", special_ids(reader, gguf_path))
        write_json(folder / "config.json", config)
    except OSError as error:
        raise NpllmOSError(f"{folder}: cannot be written: {error.strerror or error}") from error
