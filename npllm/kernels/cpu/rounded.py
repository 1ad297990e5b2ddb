"""The compiled set with rounded activations: what differs from `dispatch` and `compiled`.

A product of few rows is memory-bound and stays float32's; one of many rows is `rounded_gemm`'s.
With bfloat16, attention of many tokens is `rounded_attention`'s.  What these kernels are not made
for is composed of the definitions in `npllm.ops.rounded`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from npllm.kernels import FEW_ROWS
from npllm.kernels.cpu import compiled, dispatch, gemm
from npllm.kernels.cpu.fits import is_float32
from npllm.kernels.cpu.layout import EMPTY, row_major_copy, rows_of
from npllm.kernels.cpu.operands import fits_gain, fits_gated, fits_product, gain_bits
from npllm.kernels.cpu.rope_attention import fits_rope, rope_attention_many
from npllm.kernels.cpu.rounded_attention import attend_rounded
from npllm.kernels.cpu.rounded_gemm import COLUMNS, fits_rounded, rounded_product
from npllm.models.params import LayerParams
from npllm.ops import Ops, Step
from npllm.ops.rounded import rounded_attention, rounded_linear
from npllm.quantized.activations import is_rounded_for
from npllm.quantized.permuted import PermutedWeight

__all__ = ["rounded_compiled"]

Array = Any


def is_rounded(kind: str, x: Array, weight: Array) -> bool:
    """Tell whether a product is one that a kind of activations rounds."""
    return x.size > FEW_ROWS * weight.shape[1] and is_rounded_for(weight, kind)


def fits(x: Array, weight: Array, bias: Array) -> bool:
    """Tell whether a product that is rounded is one that the kernels are made for."""
    return bool(gemm.panel_columns()) and fits_product(x, weight, bias) and fits_rounded(weight)


def product(kind: str, x: Array, weight: Array, gain: Array = EMPTY, eps: float = 0.0) -> Array:
    """The product of rows, normalised where there is a gain, as panels in a buffer."""
    panels = gemm.packed(rows_of(x), gain_bits(gain, weight), eps, COLUMNS)
    return rounded_product(panels, weight, kind, len(rows_of(x)))


def as_rows(panels: Array, x: Array, d_out: int) -> Array:
    """Panels as a new array [..., d_out]."""
    n = x.size // x.shape[-1]
    return gemm.unpacked(panels, np.empty((n, d_out), np.float32)).reshape(*x.shape[:-1], d_out)


def linear(x: Array, weight: Array, bias: Array = None, *, activations: str) -> Array:
    """Compute `npllm.ops.rounded.rounded_linear`."""
    if not is_rounded(activations, x, weight):
        return dispatch.linear(x, weight, bias)
    if isinstance(weight, PermutedWeight) and is_float32(x) and x.shape[-1] == weight.shape[1]:
        x, weight = np.take(x, weight.order, axis=-1), weight.base
    if not fits(x, weight, bias):
        return rounded_linear(x, weight, bias, activations=activations)
    return dispatch.add_bias(as_rows(product(activations, x, weight), x, len(weight)), bias)


def norm_linear(
    x: Array, norm_weight: Array, eps: float, weight: Array, bias: Array = None, *, activations: str
) -> Any:
    """Compute rms_norm, then linear."""
    if not is_rounded(activations, x, weight):
        return dispatch.norm_linear(x, norm_weight, eps, weight, bias)
    if not (fits(x, weight, bias) and fits_gain(x, norm_weight)):
        return NotImplemented
    y = product(activations, x, weight, norm_weight, eps)
    return dispatch.add_bias(as_rows(y, x, len(weight)), bias)


def norm_swiglu(
    x: Array, norm_weight: Array, eps: float, weight: Array, bias: Array = None, *, activations: str
) -> Any:
    """Compute rms_norm, linear, and swiglu of the two halves."""
    if not is_rounded(activations, x, weight):
        return dispatch.norm_swiglu(x, norm_weight, eps, weight, bias)
    if not (fits(x, weight, bias) and fits_gated(x, norm_weight, weight, bias)):
        return NotImplemented
    both, d_ff = product(activations, x, weight, norm_weight, eps), len(weight) // 2
    return as_rows(dispatch.gate_panels(both, d_ff, bias), x, d_ff)


def linear_add(
    x: Array, weight: Array, residual: Array, bias: Array = None, *, activations: str
) -> Any:
    """Compute linear, then add."""
    if not is_rounded(activations, x, weight):
        return dispatch.linear_add(x, weight, residual, bias)
    d_out = len(weight)
    same = is_float32(residual) and residual.shape == (*x.shape[:-1], d_out)
    if not (same and fits(x, weight, bias)):
        return NotImplemented
    y = row_major_copy(residual.reshape(-1, d_out))
    gemm.add_unpacked(product(activations, x, weight), y)
    return dispatch.add_bias(y, bias).reshape(residual.shape)


def rope_attention(qkv: Array, step: Step) -> Any:
    """Rotate, append, and attend: many tokens with operands in bfloat16."""
    few = qkv.size <= FEW_ROWS * qkv.shape[-1]
    fitting = is_float32(qkv) and fits_rope(qkv.shape, *step[:4])
    if few or not fitting or hasattr(step.cache, "drafts"):
        return compiled.rope_attention(qkv, step)
    return rope_attention_many(qkv, step, attend_rounded)


def attention_block(x: Array, layer: LayerParams, step: Step, *, activations: str) -> Any:
    """Compute the first half of a layer; for many tokens q, k and v stay in a buffer."""
    qkv_proj, o_proj = layer.qkv_proj, layer.o_proj
    rounded = [is_rounded(activations, x, qkv_proj), is_rounded_for(o_proj, activations)]
    if not rounded[0]:
        plain = x.size <= FEW_ROWS * x.shape[-1] or not (rounded[1] or activations == "bfloat16")
        return compiled.attention_block(x, layer, step) if plain else NotImplemented
    known = compiled.fits_attention(x, layer, step) and fits(x, qkv_proj, layer.qkv_bias)
    if not (known and (not rounded[1] or fits_rounded(o_proj))):
        return NotImplemented
    both = partial(product, activations), partial(linear_add, activations=activations)
    attend = rope_attention if activations == "bfloat16" else compiled.rope_attention
    return compiled.attention_of_many(x, layer, step, *both, attend)


def mlp_block(x: Array, layer: LayerParams, step: Step, *, activations: str) -> Any:
    """Compute the second half of a layer, in panels from the norm to the sum."""
    gate_up, down = layer.gate_up_proj, layer.down_proj
    gain, biases = layer.post_attention_layernorm, (layer.gate_up_bias, layer.down_bias)
    rounded = [is_rounded(activations, x, gate_up), is_rounded_for(down, activations)]
    if not rounded[0]:
        few = x.size <= FEW_ROWS * x.shape[-1]
        return compiled.mlp_block(x, layer, step) if few or not rounded[1] else NotImplemented
    known = rounded[1] and compiled.fits_mlp(x, gain, gate_up, down, *biases)
    if not (known and fits(x, gate_up, biases[0]) and fits_rounded(down)):
        return NotImplemented
    both = product(activations, x, gate_up, gain, step.eps)
    gated = dispatch.gate_panels(both, len(gate_up) // 2, biases[0])
    y = row_major_copy(rows_of(x))
    gemm.add_unpacked(rounded_product(gated, down, activations, len(y)), y)
    return dispatch.add_bias(y, biases[1]).reshape(x.shape)


KERNELS: dict[str, Callable[..., Any]] = {
    "linear": linear,
    "norm_linear": norm_linear,
    "norm_swiglu": norm_swiglu,
    "linear_add": linear_add,
    "attention_block": attention_block,
    "mlp_block": mlp_block,
}


def rounded_compiled(activations: str) -> Ops:
    """Return the compiled set with a kind of activations other than "float32"."""
    bound: dict[str, Any] = {
        name: partial(kernel, activations=activations) for name, kernel in KERNELS.items()
    }
    if activations == "bfloat16":
        attend = partial(rounded_attention, attend=compiled.COMPILED.attention)
        bound |= {"rope_attention": rope_attention, "attention": attend}
    name = f"{compiled.COMPILED.name} ({activations} activations)"
    return replace(compiled.COMPILED, **bound, name=name, activations=activations)
