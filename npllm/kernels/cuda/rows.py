"""Kernels that work row by row: the norm, and the gate."""

from typing import Any

import numpy as np

from npllm.arrays import array_namespace
from npllm.kernels.cuda import launching
from npllm.kernels.cuda.launching import entry, even_rows
from npllm.ops import blockwise

__all__ = ["MOST", "launch_norm", "launch_swiglu", "norm_fits", "rms_norm", "swiglu"]

Array = Any

THREADS = 256
EACH = 4  # entries of a thread of swiglu.cu
MOST = 2**31  # entries that a kernel counts in 32 bits


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Normalise and scale each row in one pass: the twin of `npllm.ops.rms_norm`."""
    if not norm_fits(x, weight):
        return blockwise.rms_norm(x, weight, eps)
    y = array_namespace(x, weight).empty(x.shape, dtype=np.float32)
    launch_norm(x, weight, eps, y)
    return y


def swiglu(gate: Array, up: Array) -> Array:
    """Gate one projection by the SiLU of another in one pass: the twin of `npllm.ops.swiglu`."""
    fits = entry(gate) == entry(up) == "float" and gate.shape == up.shape
    if not (fits and gate.ndim and 0 < gate.size < MOST):
        return blockwise.swiglu(gate, up)
    y = array_namespace(gate, up).empty(gate.shape, dtype=np.float32)
    launch_swiglu(gate, up, y)
    return y


def norm_fits(x: Array, weight: Array) -> bool:
    """Tell whether the kernel of the norm takes these."""
    typed = entry(weight) is not None and entry(x) == "float"
    return bool(typed and x.ndim and x.size and weight.shape == x.shape[-1:])


def launch_norm(x: Array, weight: Array, eps: float, y: Array) -> None:
    """Launch rms_norm.cu: y is float32 [...], or bfloat16 parts [n_parts, n_rows, d_model]."""
    xp = array_namespace(x, weight)
    x, weight, d_model = xp.ascontiguousarray(x), xp.ascontiguousarray(weight), x.shape[-1]
    variant = (("ENTRY", entry(weight)), ("PARTS", n_parts_of(y)))
    n_rows, numbers = x.size // d_model, (np.int64(d_model), np.float32(eps))
    launching.launch("rms_norm", variant, n_rows, THREADS, x, weight, y, *numbers)


def launch_swiglu(gate: Array, up: Array, y: Array) -> None:
    """Launch swiglu.cu: y is float32 [...], or bfloat16 parts [n_parts, n_rows, d_ff]."""
    xp = array_namespace(gate, up)
    (gate, gate_row), (up, up_row) = even_rows(gate, xp), even_rows(up, xp)
    d_ff = gate.shape[-1]
    launching.launch(
        "swiglu",
        (("PARTS", n_parts_of(y)),),
        gate.size // d_ff * -(-d_ff // (EACH * THREADS)),
        THREADS,
        gate,
        up,
        y,
        np.uint32(gate.size),
        np.uint32(d_ff),
        np.int64(gate_row),
        np.int64(up_row),
    )


def n_parts_of(y: Array) -> int:
    """Count the bfloat16 parts that an output has; 0: it is float32."""
    return 0 if entry(y) == "float" else len(y)
