"""LoRA: a linear map plus a product of two thin matrices, which a fine-tune has trained."""

from collections.abc import Callable
from typing import Any

from npllm.arrays import array_namespace, expect_shape, ieee_semantics
from npllm.ops.linear import linear
from npllm.ops.residual import add

__all__ = ["lora_linear", "low_rank"]

Array = Any


@ieee_semantics
def lora_linear(
    x: Array, weight: Array, a: Array, b: Array, scale: float, bias: Array | None = None
) -> Array:
    """Multiply by a weight matrix and by a low-rank update of it, and add the two.

        y = x W^T + bias + scale * (x A^T) B^T
        scale = alpha / d_rank;  alpha / sqrt(d_rank) for rsLoRA

    Parameters
    ----------
    x : array [..., d_in]
    weight : array [d_out, d_in]
        W, of the base model.  Or a `PackedMatrix`.
    a : array [d_rank, d_in]
        A, in the orientation of the file: `lora_A.weight`.
    b : array [d_out, d_rank]
        B: `lora_B.weight`.  Zeros change nothing.
    scale : float
    bias : array [d_out], optional

    Returns
    -------
    y : array [..., d_out]
        A new array in the dtype of `x`.

    Raises
    ------
    NpllmValueError
        When the shapes do not fit.

    Notes
    -----
    The product with x comes first: 2 d_rank (d_in + d_out) operations a row, where B A would
    take 2 d_rank d_in d_out once, and memory for a second weight matrix.  Each product computes and
    rounds as `linear`.

    Source: "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al. 2021), section 4.1; "A
    Rank Stabilization Scaling Factor for Fine-Tuning with LoRA" (Kalajdzievski 2023), section 3;
    `peft.tuners.lora.layer.Linear`.
    """
    array_namespace(x, weight, a, b, bias)
    expect_shape("weight", weight, d_out=None, d_in=None)
    d_out, d_in = weight.shape
    expect_shape("a", a, d_rank=None, d_in=d_in)
    expect_shape("b", b, d_out=d_out, d_rank=a.shape[0])
    return add(linear(x, weight, bias), low_rank(x, a, b, scale))


def low_rank(
    x: Array, a: Array, b: Array, scale: float, product: Callable[..., Array] = linear
) -> Array:
    """Multiply each row by A, then by B: y = scale * (x A^T) B^T.

    Parameters
    ----------
    x : array [..., d_in]
    a : array [d_rank, d_in]
    b : array [d_out, d_rank]
    scale : float
    product : function
        An implementation of `linear`.

    Returns
    -------
    y : array [..., d_out]
        In the dtype of `x`.
    """
    y = product(product(x, a), b)
    return y if scale == 1 else y * scale
