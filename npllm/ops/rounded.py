"""Products and attention with rounded activations: what `npllm.load(activations=...)` means."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

from npllm.arrays import array_namespace, round_to, widen
from npllm.ops.attention import attention
from npllm.ops.linear import linear
from npllm.ops.opset import Ops
from npllm.quantized.activations import activation_group, is_rounded_for, rounded_values
from npllm.quantized.permuted import PermutedWeight

__all__ = ["FEWEST_ROWS", "rounded_attention", "rounded_linear", "rounded_ops"]

Array = Any

FEWEST_ROWS = 17  # a product of fewer is bound by memory, and rounds nothing


def rounded_linear(
    x: Array, weight: Array, bias: Array = None, *, activations: str = "float32"
) -> Array:
    """Multiply each row, rounded, by the transposed weight matrix, and add a bias.

        y = linear(x', weight, bias),   x' = rounded_values(x, activations, group)

    Parameters
    ----------
    x : array [..., d_in]
    weight : array [d_out, d_in]
        Or a `PackedMatrix`, whose `activation_group` is the group; of a `PermutedWeight` the
        entries of x are grouped in the order of its base.
    bias : array [d_out], optional
    activations : str
        One of `npllm.quantized.activations.ACTIVATIONS`.

    Returns
    -------
    y : array [..., d_out]

    Raises
    ------
    NpllmValueError
        When the shapes do not fit.

    Notes
    -----
    Three kinds of products are those of `linear`: of fewer than 17 rows, decoding among them, which
    is bound by reading the weights; with a weight to which `activations` does not apply
    (`is_rounded_for`); of float64.

    The integers of a group, and of a weight in the same group, have exact sums of products in 32
    bits, so that a kernel rounds once a group where this definition rounds every product.  A
    product of two bfloat16 numbers is exact in float32; the instruction VDPBF16PS adds the odd one
    of each pair of channels first, and reads and returns subnormal numbers as 0.
    """
    few = prod(x.shape[:-1]) < FEWEST_ROWS
    if few or not is_rounded_for(weight, activations) or x.dtype != array_namespace(x).float32:
        return linear(x, weight, bias)
    if isinstance(weight, PermutedWeight):
        x, weight = array_namespace(x).take(x, weight.order, axis=-1), weight.base
    rounded = rounded_values(x, activations, activation_group(weight))
    return linear(rounded, weight, bias)


def rounded_attention(
    q: Array, k: Array, v: Array, *, attend: Callable = attention, **options: Any
) -> Any:
    """Attend with queries, keys and values rounded to bfloat16.

        y = attention(q', k', v', ...),   x' = the nearest bfloat16, ties to even

    Parameters
    ----------
    q : array [..., n_head, n_seq, d_head]
    k : array [..., n_kv_head, n_ctx, d_head]
    v : array [..., n_kv_head, n_ctx, d_value]
    attend : function
        `attention` itself, or another form of it.
    **options
        Of `attention`.

    Returns
    -------
    y : array [..., n_head, n_seq, d_value]
        Or what `attention` returns.

    Notes
    -----
    Of fewer than 17 tokens and of float64, nothing is rounded.

    A kernel rounds exp(s - m), m the maximum so far, to bfloat16 as well where it is multiplied,
    not where it is summed: each weight moves by 2**-9 of itself at most.
    """
    few = prod(q.shape[:-3]) * q.shape[-2] < FEWEST_ROWS
    if few or q.dtype != array_namespace(q).float32:
        return attend(q, k, v, **options)
    operands = (round_to(widen(x, q.dtype), "bfloat16") for x in (q, k, v))
    return attend(*operands, **options)


def rounded_ops(ops: Ops, activations: str) -> Ops:
    """Return a set whose linear maps are `rounded_linear`, and with "bfloat16" its attention
    `rounded_attention`, without the slots that contain one.

    Parameters
    ----------
    ops : Ops
    activations : str
        Another one than "float32".

    Returns
    -------
    rounded : Ops
    """
    new = ops.replace(linear=partial(rounded_linear, activations=activations))
    if activations == "bfloat16":
        new = new.replace(attention=partial(rounded_attention, attend=ops.attention))
    name = f"{ops.name} ({activations} activations)"
    return replace(new, name=name, replaced=ops.replaced, activations=activations)
