"""The tensors of a GGUF file as `Params`: packed as they are stored, or in another type."""

from collections.abc import Callable
from typing import Any

import numpy as np

from npllm.arrays import asarray
from npllm.checkpoints.gguf.layout import check_tensors, expected_tensors, layer_kinds
from npllm.checkpoints.gguf.reader import GGUFFile, GGUFTensor, tensor_kind
from npllm.checkpoints.tensor_files import release_mapped
from npllm.config.config import Config
from npllm.errors import NpllmValueError
from npllm.models.params import LayerParams, Params
from npllm.progress import progress_bar
from npllm.quantized.block_weight import BlockWeight
from npllm.quantized.dtypes import check_dtype, convert
from npllm.quantized.stacked import StackedWeight, stack

__all__ = ["half_split", "interleaved", "load_gguf_params"]

Array = Any


def load_gguf_params(
    gguf: GGUFFile,
    config: Config,
    *,
    dtype: str | None = None,
    xp: Any = np,
    mmap: bool = True,
    progress: bool = False,
) -> Params:
    """Load the weights of a GGUF file.

    Parameters
    ----------
    gguf : GGUFFile
    config : Config
        From its metadata.
    dtype : str, optional
        "bfloat16", "float16", "float32", "float64", "int8" or "int4": every matrix is widened and
        rounded to it.  Default: as stored, in blocks.
    xp : module
        The array library of the weights.
    mmap : bool
        False: copy every tensor into memory.
    progress : bool
        Show a bar on stderr.

    Returns
    -------
    params : Params
        As stored and with NumPy: views of the mapped file, but for matrices that are put together
        or reordered; those are copied in blocks, and the pages of the file given back.

    Raises
    ------
    NpllmValueError
        When tensors are missing, unknown, of another shape or of a type that is not implemented,
        or hold what the wanted type cannot; names the file and the tensors.

    Notes
    -----
    Rows of a matrix are packed one by one: to put matrices together, and to bring the query and
    key rows of Llama into half-split order, moves bytes and unpacks none.

    Source: `tensor_mapping.py` of the package gguf; `LlamaModel.permute` in
    convert_hf_to_gguf.py.
    """
    check_dtype(dtype)
    check_tensors(gguf, expected_tensors(config, gguf.architecture))
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    heads = heads if gguf.architecture == "llama" else {}
    with progress_bar(gguf.n_bytes, "loading", wanted=progress) as advance:

        def read(names: list[str]) -> Array:
            parts = [gguf.tensors[name] for name in names]
            x = _read(gguf, parts, heads, dtype, mmap)
            advance(sum(part.rows.nbytes for part in parts), gguf.path.name)
            return asarray(x, xp)

        return _assemble(config, layer_kinds(gguf.architecture), read)


def _assemble(
    config: Config, fields: dict[str, list[str]], read: Callable[[list[str]], Array]
) -> Params:
    """Read all tensors: the layers first, then the rest."""
    layers = tuple(
        LayerParams(
            **{
                field: read([f"blk.{number}.{kind}.weight" for kind in kinds])
                for field, kinds in fields.items()
            }
        )
        for number in range(config.num_hidden_layers)
    )
    embedding, norm = read(["token_embd.weight"]), read(["output_norm.weight"])
    output = embedding if config.tie_word_embeddings else read(["output.weight"])
    return Params(embedding, layers, norm, output)


def _read(
    gguf: GGUFFile, parts: list[GGUFTensor], heads: dict[str, int], dtype: str | None, mmap: bool
) -> Array:
    """Read tensors as one array or packed matrix."""
    try:
        stored = [_ordered(part, heads) for part in parts]
    except NpllmValueError as error:
        raise NpllmValueError(f"{gguf.path}: {error}") from None
    x = stack(stored)
    try:
        x = convert(x, dtype)
    except NpllmValueError as error:  # NaN cannot be quantised
        raise NpllmValueError(f"{gguf.path}: {parts[0].name}: {error}") from None
    if any(_shares(x, part.rows) for part in parts):
        return x if mmap else _copy(x)
    for part in parts:
        release_mapped(part.rows)
    return x


def _ordered(part: GGUFTensor, heads: dict[str, int]) -> Array:
    """Return a tensor as it is stored, its rows in half-split RoPE order."""
    n_head = heads.get(tensor_kind(part.name))
    if n_head is None:
        return part.stored
    return part._replace(rows=half_split(part.rows, n_head)).stored


def half_split(weight: np.ndarray, n_head: int) -> np.ndarray:
    """Reorder the rows of a q or k projection from interleaved to half-split RoPE order.

        y[h, i] = w[h, 2 i],  y[h, i + d_head / 2] = w[h, 2 i + 1]      for i < d_head / 2

    GGUF rotates the channel pairs (2 i, 2 i + 1), Phi-3 the pairs (i, i + d_head / 2); the pair
    keeps its angle i.

    Parameters
    ----------
    weight : array [n_head * d_head, d_row]
        Entries of a row, or its bytes.
    n_head : int
        Heads in these rows: `n_kv_head` for k.

    Returns
    -------
    y : array [n_head * d_head, d_row]
        A copy.

    Raises
    ------
    NpllmValueError
        When the rows are not `n_head` heads of even width.

    Notes
    -----
    Source: the inverse of `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    n_rows, d_row = weight.shape
    if n_rows % (2 * n_head):
        raise NpllmValueError(
            f"weight must have n_head * d_head rows, {n_head} heads of even "
            f"width, got {n_rows} rows"
        )
    pairs = weight.reshape(n_head, n_rows // n_head // 2, 2, d_row)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(n_rows, d_row)


def interleaved(weight: np.ndarray, n_head: int) -> np.ndarray:
    """Reorder the rows of a q or k projection from half-split to interleaved RoPE order.

        y[h, 2 i] = w[h, i],  y[h, 2 i + 1] = w[h, i + d_head / 2]      for i < d_head / 2

    The inverse of `half_split`; parameters, result and errors are alike.

    Notes
    -----
    Source: `LlamaModel.permute` in llama.cpp's converter.
    """
    n_rows, d_row = weight.shape
    if n_rows % (2 * n_head):
        raise NpllmValueError(
            f"weight must have n_head * d_head rows, {n_head} heads of even "
            f"width, got {n_rows} rows"
        )
    halves = weight.reshape(n_head, 2, n_rows // n_head // 2, d_row)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(n_rows, d_row)


def _shares(x: Array, rows: np.ndarray) -> bool:
    """Tell whether a tensor views the bytes of the file."""
    if isinstance(x, StackedWeight):
        return any(_shares(part, rows) for part in x.parts)
    held = x.blocks if isinstance(x, BlockWeight) else x
    return isinstance(held, np.ndarray) and np.may_share_memory(held, rows)


def _copy(x: Array) -> Array:
    """Copy what is stored, so that no later change of the file matters."""
    if isinstance(x, StackedWeight):
        return StackedWeight(tuple(map(_copy, x.parts)))
    return BlockWeight(x.blocks.copy(), x.format) if isinstance(x, BlockWeight) else x.copy()
