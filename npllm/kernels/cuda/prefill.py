"""Stretches of a layer for many rows, as in a prefill, with bfloat16 weights on the tensor cores.

What is multiplied is written in the bfloat16 parts of `gemm` by the kernel that computes it, and
a copy of the residual stream is what the products are added to.  Beside its four products a layer
has seven kernels and two copies.
"""

from typing import Any

from npllm.arrays import array_namespace
from npllm.kernels.cuda import gemm
from npllm.kernels.cuda.launching import entry
from npllm.kernels.cuda.rows import MOST, launch_norm, launch_swiglu, norm_fits
from npllm.ops import Step

__all__ = ["linear_add", "mlp_block", "norm_linear"]

Array = Any


def norm_linear(
    x: Array,
    norm_weight: Array,
    eps: float,
    weight: Array,
    bias: Array | None = None,
    n_parts: int = gemm.PARTS,
) -> Array:
    """Normalise, split and multiply: the slot `norm_linear` for many rows."""
    if not (_fits(x, weight, bias) and norm_fits(x, norm_weight)):
        return NotImplemented
    y = gemm.multiplied(_normed_parts(x, norm_weight, eps, n_parts), weight, bias)
    return array_namespace(y).reshape(y, (*x.shape[:-1], weight.shape[0]))


def linear_add(
    x: Array,
    weight: Array,
    residual: Array,
    bias: Array | None = None,
    n_parts: int = gemm.PARTS,
) -> Array:
    """Split, multiply and add to the residual stream: the slot `linear_add` for many rows."""
    shape = (*x.shape[:-1], weight.shape[0])
    if not (_fits(x, weight, bias) and entry(residual) == "float" and residual.shape == shape):
        return NotImplemented
    y = gemm.multiplied(gemm.split(x, n_parts), weight, bias, residual)
    return array_namespace(y).reshape(y, shape)


def mlp_block(x: Array, layer: Any, step: Step, n_parts: int = gemm.PARTS) -> Array:
    """Compute the second half of a layer for many rows; the gated rows exist in parts alone.

    gate | up = W_gate_up rms_norm(x);   y = x + W_down (silu(gate) * up)
    """
    gain, weight, down = layer.post_attention_layernorm, layer.gate_up_proj, layer.down_proj
    if not (_fits(x, weight, layer.gate_up_bias) and norm_fits(x, gain)):
        return NotImplemented
    d_ff, n_rows = weight.shape[0] // 2, x.size // x.shape[-1]
    if not gemm.is_matrix(down) or down.shape != (x.shape[-1], d_ff) or n_rows * d_ff >= MOST:
        return NotImplemented
    gate_up = gemm.multiplied(_normed_parts(x, gain, step.eps, n_parts), weight, layer.gate_up_bias)
    gated = gemm.empty_parts(gate_up, d_ff, n_parts)
    launch_swiglu(gate_up[:, :d_ff], gate_up[:, d_ff:], gated)
    y = gemm.multiplied(gated, down, layer.down_bias, x)
    return array_namespace(y).reshape(y, x.shape)


def _fits(x: Array, weight: Any, bias: Array | None) -> bool:
    """Tell whether the tensor cores take a product."""
    return gemm.multiplies(x, weight) and (bias is None or bias.shape == weight.shape[:1])


def _normed_parts(x: Array, gain: Array, eps: float, n_parts: int) -> Array:
    """The parts of rms_norm(x)."""
    parts = gemm.empty_parts(x, x.shape[-1], n_parts)
    launch_norm(x, gain, eps, parts)
    return parts
