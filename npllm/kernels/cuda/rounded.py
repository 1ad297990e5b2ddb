"""The CUDA set with bfloat16 activations: products of many rows with one part of x."""

from dataclasses import replace
from functools import cache, wraps
from math import prod
from typing import Any

from npllm.kernels.cuda import gemm
from npllm.kernels.cuda.linear import linear, linear_add, norm_linear, norm_swiglu
from npllm.ops import Ops
from npllm.ops.rounded import FEWEST_ROWS, rounded_linear

__all__ = ["rounded_cuda"]

Array = Any


def bfloat16_linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """Round x to bfloat16 and multiply: the twin of `rounded_linear(activations="bfloat16")`."""
    if prod(x.shape[:-1]) < FEWEST_ROWS:
        return linear(x, weight, bias)
    if gemm.multiplies(x, weight):
        return gemm.product(x, weight, bias, n_parts=1)
    return rounded_linear(x, weight, bias, activations="bfloat16")


def _of_few_rows(kernel: Any) -> Any:
    """A fused kernel for the rows that are not rounded; more take the parts."""

    @wraps(kernel)
    def run(x: Array, *args: Any) -> Any:
        return kernel(x, *args) if prod(x.shape[:-1]) < FEWEST_ROWS else NotImplemented

    return run


@cache
def rounded_cuda(base: Ops) -> Ops:
    """Return the CUDA set with products of 17 rows and more in bfloat16.

    Parameters
    ----------
    base : Ops
        The CUDA set.

    Returns
    -------
    ops : Ops
        With the kernels of decoding, which round nothing.
    """
    return replace(
        base,
        linear=bfloat16_linear,
        norm_linear=_of_few_rows(norm_linear),
        norm_swiglu=_of_few_rows(norm_swiglu),
        linear_add=_of_few_rows(linear_add),
        name=f"{base.name} (bfloat16 activations)",
        activations="bfloat16",
    )
