"""Linear maps and embeddings of a layer, with or without a LoRA adapter on their weight.

The products are those of the model's set of operations, so that a set, a kernel or a replaced
operation needs to know nothing of adapters.
"""

from typing import Any

from npllm.arrays import array_namespace, widen
from npllm.ops import Ops
from npllm.ops.low_rank import low_rank
from npllm.quantized.adapted import AdaptedWeight

__all__ = ["embed", "linear"]

Array = Any


def linear(ops: Ops, x: Array, weight: Any, bias: Array | None = None) -> Array:
    """Multiply by a weight; by an adapted one as `npllm.ops.lora_linear` does.

        y = x W^T + bias;   y[..., rows of an update] += scale * (x A^T) B^T

    Parameters
    ----------
    ops : Ops
    x : array [..., d_in]
    weight : array [d_out, d_in], PackedMatrix or AdaptedWeight
    bias : array [d_out], optional

    Returns
    -------
    y : array [..., d_out]
    """
    if not isinstance(weight, AdaptedWeight):
        return ops.linear(x, weight, bias)
    y = ops.linear(x, weight.base, bias)
    blocks = [(u.first, low_rank(x, u.a, u.b, u.scale, ops.linear)) for u in weight.updates]
    return ops.add(y, _side_by_side(blocks, y))


def embed(ops: Ops, ids: Array, weight: Any) -> Array:
    """Look up rows of an embedding matrix; of an adapted one with the update of each row.

        y = W[ids];   y += scale * B[ids] A

    Parameters
    ----------
    ops : Ops
    ids : integer array [...]
    weight : array [n_vocab, d_model], PackedMatrix or AdaptedWeight

    Returns
    -------
    y : array [..., d_model]

    Notes
    -----
    Source: `peft.tuners.lora.layer.Embedding`, whose lora_embedding_A is B^T here, and whose
    lora_embedding_B is A^T.
    """
    if not isinstance(weight, AdaptedWeight):
        return ops.embed(ids, weight)
    y = ops.embed(ids, weight.base)
    (update,) = weight.updates  # of all rows
    rows = widen(ops.embed(ids, update.b), y.dtype)
    a_transposed = array_namespace(update.a).matrix_transpose(update.a)
    rows = ops.linear(rows, a_transposed)
    return ops.add(y, rows * update.scale)


def _side_by_side(blocks: list[tuple[int, Array]], y: Array) -> Array:
    """Blocks of channels at their places in an array like y, zeros between them."""
    xp = array_namespace(y)
    parts, start = [], 0
    for first, block in blocks:
        if first > start:
            parts.append(xp.zeros((*y.shape[:-1], first - start), dtype=y.dtype))
        parts.append(block)
        start = first + block.shape[-1]
    if start < y.shape[-1]:
        parts.append(xp.zeros((*y.shape[:-1], y.shape[-1] - start), dtype=y.dtype))
    return parts[0] if len(parts) == 1 else xp.concat(parts, axis=-1)
