"""Kernels that work row by row: the norm, and the gate."""

from typing import Any

import numpy as np

from npllm.arrays import array_namespace
from npllm.kernels.cuda import launching
from npllm.kernels.cuda.launching import entry, even_rows
from npllm.ops import blockwise

__all__ = ["MOST", "rms_norm", "swiglu"]

Array = Any

THREADS = 256
MOST = 2**31  # entries that a kernel counts in 32 bits


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Normalise and scale each row in one pass: the twin of `npllm.ops.rms_norm`."""
    name = entry(weight)
    if not (name and entry(x) == "float" and x.ndim and x.size and weight.shape == x.shape[-1:]):
        return blockwise.rms_norm(x, weight, eps)
    xp = array_namespace(x, weight)
    x, weight = xp.ascontiguousarray(x), xp.ascontiguousarray(weight)
    y, d_model = xp.empty(x.shape, dtype=xp.float32), x.shape[-1]
    launching.launch(
        "rms_norm",
        (("ENTRY", name),),
        x.size // d_model,
        THREADS,
        x,
        weight,
        y,
        np.int64(d_model),
        np.float32(eps),
    )
    return y


def swiglu(gate: Array, up: Array) -> Array:
    """Gate one projection by the SiLU of another in one pass: the twin of `npllm.ops.swiglu`."""
    fits = entry(gate) == entry(up) == "float" and gate.shape == up.shape
    if not (fits and gate.ndim and 0 < gate.size < MOST):
        return blockwise.swiglu(gate, up)
    xp = array_namespace(gate, up)
    (gate, gate_row), (up, up_row) = even_rows(gate, xp), even_rows(up, xp)
    y = xp.empty(gate.shape, dtype=xp.float32)
    launching.launch(
        "swiglu",
        (),
        -(-y.size // THREADS),
        THREADS,
        gate,
        up,
        y,
        np.uint32(y.size),
        np.uint32(gate.shape[-1]),
        np.int64(gate_row),
        np.int64(up_row),
    )
    return y
