"""A few tokens through half a layer, all layers, or all layers and lm_head, in one kernel.

Decoding a small model is bound by Python call overhead: between two kernels the memory would be
idle for longer than reading the weights of a layer takes.
"""

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from npllm.kernels.cpu.attention_step import attend_step
from npllm.kernels.cpu.block_gemv import widen_rows
from npllm.kernels.cpu.gated import gated_product
from npllm.kernels.cpu.gemv import add_product, rows_of_bias
from npllm.kernels.cpu.launching import kernel
from npllm.kernels.cpu.layout import EMPTY
from npllm.kernels.cpu.simd import load_scalar
from npllm.kernels.cpu.simd_arrays import array_at, channels_of_weight, is_int8, rows_of_weight
from npllm.quantized.int8 import GROUP

__all__ = ["attention_step", "layers_step", "logits_step", "mlp_step"]

Array = Any


@kernel()
def mlp_step(
    x: Array,
    gain: Array,
    eps: float,
    gate_up: Array,
    gate_up_scales: Array,
    gate_up_bias: Array,
    down: Array,
    down_scales: Array,
) -> None:
    """Add down @ swiglu of the halves of rms_norm(x) @ gate_up.T to x [n, d_model], in place."""
    y = np.empty((len(x), channels_of_weight(down)), np.float32)
    gated_product(gate_up, gate_up_scales, x, gain, eps, gate_up_bias, y)
    add_product(down, down_scales, y, gain[:0], np.float32(0), x)


@kernel()
def attention_step(
    x: Array,
    gain: Array,
    eps: float,
    qkv_weight: Array,
    qkv_scales: Array,
    qkv_bias: Array,
    cos: Array,
    sin: Array,
    keys: Array,
    values: Array,
    bounds: Array,
    seen: Array,
    n_head: int,
    o_weight: Array,
    o_scales: Array,
) -> None:
    """Add to x [n_batch, n_seq, d_model], in place: o_weight @ attention of heads of rms_norm(x) @
    qkv_weight.T.
    """
    n_batch, n_seq, _ = x.shape
    n = n_batch * n_seq
    rows = x.reshape(n, -1)
    qkv = rows_of_bias(n, rows_of_weight(qkv_weight), qkv_bias)
    add_product(qkv_weight, qkv_scales, rows, gain, eps, qkv)
    y = np.empty((n_batch, n_seq, channels_of_weight(o_weight)), np.float32)
    heads = qkv.reshape(n_batch, n_seq, -1)
    attend_step(heads, cos, sin, keys, values, bounds, seen, n_head, y)
    add_product(o_weight, o_scales, y.reshape(n, -1), gain[:0], np.float32(0), rows)


@kernel()
def layers_step(
    x: Array,
    first: tuple[Array, ...],
    table: Array,
    eps: float,
    cos: Array,
    sin: Array,
    bounds: Array,
    seen: Array,
    n_head: int,
) -> None:
    """Take x [n_batch, n_seq, d_model], a few tokens, through all layers, in place.

    first: of the first layer, gain, weight and scales of qkv_proj and of o_proj, gain, weight and
    scales of gate_up_proj and of down_proj, keys, values; table [n_layer, 12]: where those of each
    layer lie.
    """
    rows = x.reshape(x.shape[0] * x.shape[1], x.shape[2])
    for at in table:
        attention_step(
            x,
            array_at(first[0], at[0]),
            eps,
            array_at(first[1], at[1]),
            array_at(first[2], at[2]),
            EMPTY,
            cos,
            sin,
            array_at(first[10], at[10]),
            array_at(first[11], at[11]),
            bounds,
            seen,
            n_head,
            array_at(first[3], at[3]),
            array_at(first[4], at[4]),
        )
        mlp_step(
            rows,
            array_at(first[5], at[5]),
            eps,
            array_at(first[6], at[6]),
            array_at(first[7], at[7]),
            EMPTY,
            array_at(first[8], at[8]),
            array_at(first[9], at[9]),
        )


@kernel()
def logits_step(
    ids: Array,
    embedding: Array,
    embedding_scales: Array,
    layers: tuple[Any, ...],
    gain: Array,
    head: Array,
    head_scales: Array,
    n_keep: int,
) -> Array:
    """Compute head @ rms_norm(x), [n_batch * n_keep, n_vocab], of the last n_keep tokens of each
    row; x from `layers_step` and, before, the rows of ids [n_batch, n_seq] in the embedding.

    layers: what `layers_step` takes besides x.
    """
    n_batch, n_seq = ids.shape
    x = np.empty((n_batch, n_seq, channels_of_weight(embedding)), np.float32)
    embed_rows(embedding, embedding_scales, ids.reshape(ids.size), x.reshape(ids.size, -1))
    layers_step(x, *layers)
    kept = np.empty((n_batch * n_keep, x.shape[2]), np.float32)
    for k in range(len(kept)):
        for i in range(x.shape[2]):
            kept[k, i] = x[k // n_keep, n_seq - n_keep + k % n_keep, i]
    logits = np.zeros((len(kept), rows_of_weight(head)), np.float32)
    add_product(head, head_scales, kept, gain, layers[2], logits)
    return logits


def embed_rows(weight: Array, scales: Array, ids: Array, y: Array) -> None:
    """Write the rows of a weight with some numbers to those of y."""
    raise NotImplementedError("kernels call this")


@overload(embed_rows, strict=False)  # which would compare annotations
def _choose_embedding(weight: Any, scales: Any, ids: Any, y: Any) -> Any:  # noqa: ARG001
    def of_blocks(weight: Array, scales: Array, ids: Array, y: Array) -> None:  # noqa: ARG001
        widen_rows(weight, ids, y)

    def of_entries(weight: Array, scales: Array, ids: Array, y: Array) -> None:
        n, d = y.shape
        for k in range(n):
            for i in range(d):
                at = ids[k] * d + i
                entry = load_scalar(weight, at)
                y[k, i] = entry * load_scalar(scales, at // GROUP) if is_int8(weight) else entry

    return of_blocks if weight.dtype == types.int64 else of_entries
