"""CUDA kernels for CuPy arrays: twins of the definitions in `npllm.ops`, with the same results.

A twin takes what it was written for and hands everything else to the definition: float64 always,
and shapes, dtypes and masks that a kernel does not know.  Activations are float32 and sums are
float32; weights, keys and values may also be bfloat16 or float16, weights int8 or blocks of a GGUF
file, which are widened in registers.
Sources (`*.cu`) are compiled by NVRTC at the first use of each variant, and kept.

Subnormal float32 numbers (below 2**-126) count as zero, as operands and as results: CuPy compiles
with -ftz=true.  NaN, infinities and rows without a key give what the definition gives.
"""

from dataclasses import replace

from npllm.kernels.cuda.attention import GROUPS, HEADS, WIDEST, attention
from npllm.kernels.cuda.decode import decode_step
from npllm.kernels.cuda.gemm import PARTS
from npllm.kernels.cuda.launching import ENTRIES, OPTIONS, STORED, source
from npllm.kernels.cuda.linear import (
    MOST_ROWS,
    ROWS,
    linear,
    linear_add,
    mlp_block,
    norm_linear,
    norm_swiglu,
)
from npllm.kernels.cuda.rope import rope_attention
from npllm.kernels.cuda.rows import rms_norm, swiglu
from npllm.kernels.cuda.weights import BLOCKS
from npllm.ops import Ops, blockwise

__all__ = [
    "BLOCKS",
    "CUDA",
    "HEADS",
    "MOST_ROWS",
    "OPTIONS",
    "VARIANTS",
    "WIDEST",
    "attention",
    "cuda_ops",
    "decode_step",
    "linear",
    "linear_add",
    "mlp_block",
    "norm_linear",
    "norm_swiglu",
    "rms_norm",
    "rope_attention",
    "source",
    "swiglu",
]

CUDA = replace(
    blockwise,
    linear=linear,
    rms_norm=rms_norm,
    swiglu=swiglu,
    attention=attention,
    rope_attention=rope_attention,
    norm_linear=norm_linear,
    norm_swiglu=norm_swiglu,
    linear_add=linear_add,
    mlp_block=mlp_block,
    prefill_chunk=2048,
    decode_step=decode_step,
    n_queued=8,
    name="cuda",
)

_TYPES = tuple(ENTRIES.values())
_WIDTHS = tuple(range(32, WIDEST + 1, 32))

# Every variant that can be asked for: kernel -> list of its definitions.
VARIANTS = {
    "linear": [(("ENTRY", name), ("ROWS", rows)) for name in STORED.values() for rows in ROWS],
    "linear_blocks": [(("ENTRY", name), ("ROWS", rows)) for name in BLOCKS for rows in ROWS],
    "rms_norm": [(("ENTRY", name), ("PARTS", n)) for name in _TYPES for n in (0, 1, PARTS)],
    "swiglu": [(("PARTS", n),) for n in (0, 1, PARTS)],
    "rope_append": [(("ENTRY", name),) for name in _TYPES],
    "attention": [(("ENTRY", name), ("HEAD", d_head)) for d_head in HEADS for name in _TYPES],
    "attention_mma": [
        (("ENTRY", name), ("HEAD", d_head), ("PARTS", n))
        for d_head in HEADS
        for name in _TYPES
        for n in (1, PARTS)
    ],
    "attend_one": [
        (("ENTRY", name), ("GROUP", group), ("HEAD", d_head))
        for d_head in _WIDTHS
        for group in GROUPS
        for name in _TYPES
    ],
    "attend_merge": [(("HEAD", d_head),) for d_head in _WIDTHS],
    "split": [(("PARTS", n),) for n in (1, PARTS)],
    "embed": [(("ENTRY", name),) for name in STORED.values()],
    "embed_blocks": [(("ENTRY", name),) for name in BLOCKS],
    "choose": [()],
}


def cuda_ops() -> Ops:
    """Return the set that runs these kernels, and the definitions where there is no kernel.

    Returns
    -------
    ops : Ops
    """
    return CUDA
