"""The CUDA set with bfloat16 activations: products and attention of many rows in one part.

With 17 rows and more, x, queries, keys, values and the weights of attention are rounded to
bfloat16 where they are multiplied; sums, norms and the residual stream stay float32.
"""

from dataclasses import replace
from functools import cache, partial, wraps
from math import prod
from typing import Any

from npllm.kernels.cuda import gemm, prefill
from npllm.kernels.cuda.attention import attention_in_parts
from npllm.kernels.cuda.linear import linear, linear_add, norm_linear, norm_swiglu
from npllm.kernels.cuda.rope import rope_attention
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


def _by_rows(few: Any, many: Any) -> Any:
    """A kernel for the rows that are not rounded, and one for more."""

    @wraps(few)
    def run(x: Array, *args: Any, **options: Any) -> Any:
        return (few if prod(x.shape[:-1]) < FEWEST_ROWS else many)(x, *args, **options)

    return run


def _none(*_: Any) -> Any:
    return NotImplemented


def _rounded_attention(q: Array, k: Array, v: Array, **options: Any) -> Any:
    """Attend in one part; q [..., n_head, n_seq, d_head] counts its tokens."""
    n_rows = prod(q.shape[:-3]) * q.shape[-2]
    return attention_in_parts(gemm.PARTS if n_rows < FEWEST_ROWS else 1, q, k, v, **options)


@cache
def rounded_cuda(base: Ops) -> Ops:
    """Return the CUDA set with products and attention of 17 rows and more in bfloat16.

    Parameters
    ----------
    base : Ops
        The CUDA set.

    Returns
    -------
    ops : Ops
        With the kernels of decoding, which round nothing.
    """
    one_part = {
        name: partial(getattr(prefill, name), n_parts=1)
        for name in ("norm_linear", "linear_add", "mlp_block")
    }
    return replace(
        base,
        linear=bfloat16_linear,
        attention=_rounded_attention,
        rope_attention=_by_rows(rope_attention, partial(rope_attention, n_parts=1)),
        norm_linear=_by_rows(norm_linear, one_part["norm_linear"]),
        norm_swiglu=_by_rows(norm_swiglu, _none),
        linear_add=_by_rows(linear_add, one_part["linear_add"]),
        mlp_block=_by_rows(_none, one_part["mlp_block"]),
        name=f"{base.name} (bfloat16 activations)",
        activations="bfloat16",
    )
