"""A model whose matrices are in a block format, made without packing any: for speed alone."""

from typing import Any

import numpy as np

from npllm.quantized.block_formats import FORMATS
from npllm.quantized.block_packing import quantize_blocks
from npllm.quantized.block_weight import BlockWeight

PRODUCTS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
OTHERS = ("embed_tokens", "lm_head")


def in_blocks(model: Any, name: str) -> Any:
    """A model of the shapes of another, on the device, with all matrices in a format.

    The rows of a matrix are copies of one random row: to pack 4 billion entries takes minutes.
    """
    import npllm

    params = model.params
    layers = tuple(
        layer._replace(**{x: _alike(getattr(layer, x), name) for x in PRODUCTS})
        for layer in params.layers
    )
    others = {x: _alike(getattr(params, x), name) for x in OTHERS}
    return npllm.Model(model.config, params._replace(layers=layers, **others))


def matrix_bytes(model: Any) -> int:
    """Bytes of weights that a token reads: all matrices but the table of embeddings."""
    layers = model.params.layers
    return sum(getattr(one, x).nbytes for one in layers for x in PRODUCTS) + (
        model.params.lm_head.nbytes
    )


def _alike(weight: Any, name: str) -> BlockWeight:
    """A matrix of the shape of another in a block format, all rows alike."""
    import cupy

    d_out, d_in = weight.shape
    name = name if d_in % FORMATS[name].n_entries == 0 else "Q8_0"
    row = np.random.default_rng(0).standard_normal((1, d_in), dtype=np.float32) * 0.02
    blocks = cupy.asarray(quantize_blocks(row, name).blocks)
    whole = cupy.broadcast_to(blocks, (d_out, blocks.shape[1]))
    return BlockWeight(cupy.ascontiguousarray(whole), name)
