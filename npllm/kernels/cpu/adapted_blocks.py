"""Halves of a layer under a LoRA adapter: what their kernels are called with."""

from typing import Any

import numpy as np

from npllm.kernels.cpu.adapted import (
    adapted_attention_step,
    adapted_mlp_step,
    low_rank_operands,
)
from npllm.kernels.cpu.launching import launch
from npllm.kernels.cpu.layout import row_major
from npllm.kernels.cpu.operands import as_bits, bias_or_empty, kernel_operands
from npllm.models.params import LayerParams
from npllm.ops import Step

__all__ = ["launch_adapted_attention", "launch_adapted_mlp"]

Array = Any


def launch_adapted_attention(
    y: Array, layer: LayerParams, base: LayerParams, step: Step, tokens: tuple[Array, ...]
) -> None:
    """Add the first half of a layer to a few rows y, in place; base: the layer without updates."""
    launch(
        adapted_attention_step,
        y,
        as_bits(base.input_layernorm),
        wide(base.input_layernorm),
        np.float32(step.eps),
        *kernel_operands(base.qkv_proj),
        bias_or_empty(base.qkv_bias),
        *low_rank_operands(layer.qkv_proj),
        *tokens,
        step.n_head,
        *kernel_operands(base.o_proj),
        *low_rank_operands(layer.o_proj),
    )


def launch_adapted_mlp(y: Array, layer: LayerParams, base: LayerParams, eps: float) -> None:
    """Add the second half of a layer to a few rows y, in place; base: the layer without updates."""
    launch(
        adapted_mlp_step,
        y,
        as_bits(base.post_attention_layernorm),
        wide(base.post_attention_layernorm),
        np.float32(eps),
        *kernel_operands(base.gate_up_proj),
        bias_or_empty(base.gate_up_bias),
        *low_rank_operands(layer.gate_up_proj),
        *kernel_operands(base.down_proj),
        *low_rank_operands(layer.down_proj),
    )


def wide(gain: Array) -> Array:
    """A gain in float32, for the kernel's low-rank products."""
    return row_major(gain.astype(np.float32, copy=False))
