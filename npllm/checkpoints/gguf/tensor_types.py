"""Which type each tensor of a GGUF file gets: llama.cpp's mixes, by the name of a file type."""

import difflib
from typing import NamedTuple

from npllm.checkpoints.gguf.ggml_types import TYPES
from npllm.checkpoints.gguf.reader import FLOATS, tensor_kind
from npllm.config.strict_json import quote
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.quantized.block_packing import FALLBACKS

__all__ = ["FILE_TYPES", "NUMBERS", "FileType", "ModelSizes", "file_type_named", "tensor_type"]

NUMBERS = {kind.name: number for number, kind in TYPES.items()}
N_ENTRIES = {kind.name: kind.n_entries for kind in TYPES.values()}
FIRST_LAYERS = 4  # whose value projections get more bits in Q4_K_S


class FileType(NamedTuple):
    """What a file's name says of the types of its tensors."""

    name: str
    number: int  # general.file_type
    kind: str  # of most matrices


FILE_TYPES = {
    name: FileType(name, number, kind)
    for name, number, kind in (
        ("f32", 0, "F32"),
        ("f16", 1, "F16"),
        ("bf16", 32, "BF16"),
        ("q8_0", 7, "Q8_0"),
        ("q6_k", 18, "Q6_K"),
        ("q5_k_m", 17, "Q5_K"),
        ("q5_k_s", 16, "Q5_K"),
        ("q5_1", 9, "Q5_1"),
        ("q5_0", 8, "Q5_0"),
        ("q4_k_m", 15, "Q4_K"),
        ("q4_k_s", 14, "Q4_K"),
        ("q4_1", 3, "Q4_1"),
        ("q4_0", 2, "Q4_0"),
    )
}
"""Name of a file type -> its number and the type of most matrices, largest first.

Source: `LlamaFileType` of the package gguf.
"""


class ModelSizes(NamedTuple):
    """What the choice of types depends on."""

    n_layer: int
    is_tied: bool  # the output matrix is the embedding matrix
    shares_heads: bool = False  # fewer key/value heads than query heads


def file_type_named(name: str) -> FileType:
    """Return a file type by its name, in lower or upper case.

    Raises
    ------
    NpllmTypeError
        When the name is no string.
    NpllmValueError
        When there is none of that name; lists all, and the nearest one.
    """
    if not isinstance(name, str):
        raise NpllmTypeError(f"file_type must be a str, got {type(name).__name__}")
    if name.lower() in FILE_TYPES:
        return FILE_TYPES[name.lower()]
    near = difflib.get_close_matches(name.lower(), FILE_TYPES, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise NpllmValueError(
        f"file_type must be one of {', '.join(FILE_TYPES)}, got {quote(name)}{meant}"
    )


def tensor_type(name: str, shape: tuple[int, ...], wanted: FileType, sizes: ModelSizes) -> str:
    """Choose the type of a tensor as llama.cpp does.

    Vectors stay float32.  In a float file type all matrices have it.  In the others:

        output.weight, or token_embd.weight where it is tied: Q6_K, in a file of Q8_0 Q8_0
        attn_v, attn_qkv, ffn_down of the K formats: more bits in some layers
        all other matrices: the type of the file

    and where a row is no multiple of the 256 entries of a block, the fallback of the type.

    Parameters
    ----------
    name : str
        As in the file: `blk.3.attn_v.weight`.
    shape : tuple of int
        [d_out, d_in] of a matrix.
    wanted : FileType
    sizes : ModelSizes

    Returns
    -------
    kind : str
        A name of `npllm.checkpoints.gguf.ggml_types.TYPES`.

    Notes
    -----
    Of later rules for the same tensor none is reached in llama.cpp; `attn_qkv` counts as `attn_v`,
    which it did not before 2026.

    Source: `llama_tensor_get_type_impl` and `tensor_type_fallback` in llama.cpp's llama-quant.cpp.
    """
    if len(shape) < 2:
        return "F32"
    if wanted.kind in FLOATS:
        return wanted.kind
    is_output = name == "output.weight" or (name == "token_embd.weight" and sizes.is_tied)
    kind = _output_type(wanted, shape) if is_output else _layer_type(name, wanted, sizes)
    return _with_fallback(kind, shape[-1])


def _output_type(wanted: FileType, shape: tuple[int, ...]) -> str:
    """Return the type of the output matrix."""
    fits = shape[-1] % N_ENTRIES[wanted.kind] == 0
    return "Q8_0" if wanted.kind == "Q8_0" or not fits else "Q6_K"


def _layer_type(name: str, wanted: FileType, sizes: ModelSizes) -> str:
    """Return the type of any other matrix."""
    kind = tensor_kind(name)
    if kind in ("attn_v", "attn_qkv"):
        chosen = _sensitive_type(name, wanted, sizes, FIRST_LAYERS)
        is_70b = sizes.n_layer == 80 and sizes.shares_heads and kind == "attn_v"
        return "Q5_K" if is_70b and chosen == "Q4_K" else chosen
    if kind == "ffn_down":
        return _sensitive_type(name, wanted, sizes, sizes.n_layer // 8)
    return wanted.kind


def _sensitive_type(name: str, wanted: FileType, sizes: ModelSizes, n_first: int) -> str:
    """Return the type of a matrix whose error matters most."""
    layer = int(name.split(".")[1])
    if wanted.name in ("q4_k_m", "q5_k_m"):
        return "Q6_K" if _has_more_bits(layer, sizes.n_layer) else wanted.kind
    return "Q5_K" if wanted.name == "q4_k_s" and layer < n_first else wanted.kind


def _has_more_bits(layer: int, n_layer: int) -> bool:
    """Tell whether a layer is among the first and last eighth, or is a third one between."""
    eighth = n_layer // 8
    return layer < eighth or layer >= 7 * n_layer // 8 or (layer - eighth) % 3 == 2


def _with_fallback(kind: str, width: int) -> str:
    """Return the type, or its fallback where a row is no whole number of blocks."""
    if width % N_ENTRIES[kind] == 0:
        return kind
    kind = FALLBACKS.get(kind, kind)
    return kind if width % N_ENTRIES[kind] == 0 else "F16"
