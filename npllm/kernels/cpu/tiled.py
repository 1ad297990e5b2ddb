"""The set in plain NumPy: every operation in blocks that fit a core's cache, on all threads."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from npllm import ops
from npllm.arrays import ieee_semantics
from npllm.kernels.cpu.fits import STORED, is_float32
from npllm.kernels.cpu.tiled_attention import blockwise_attention
from npllm.kernels.cpu.tiled_linear import linear, spans
from npllm.threads import run_blocks

__all__ = ["TILED", "rms_norm", "rope_tables", "swiglu"]

Array = Any

BLOCK_ROWS = 2**16  # entries of an activation that one thread takes at a time


@ieee_semantics
def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Compute `npllm.ops.rms_norm` in blocks of rows."""
    if not (
        is_float32(x)
        and x.size
        and type(weight) is np.ndarray
        and weight.shape == x.shape[-1:]
        and weight.dtype in STORED
    ):
        return ops.rms_norm(x, weight, eps)
    rows, gain = x.reshape(-1, x.shape[-1]), weight.astype(np.float32, copy=False)
    y = np.empty(rows.shape, np.float32)

    def norm(span: slice) -> None:
        root = np.sqrt(
            np.vecdot(rows[span], rows[span])[:, None] / np.float32(rows.shape[-1])
            + np.float32(eps)
        )
        np.divide(rows[span], root, out=y[span])
        y[span] *= gain

    over_rows(norm, rows)
    return y.reshape(x.shape)


@ieee_semantics
def swiglu(gate: Array, up: Array) -> Array:
    """Compute `npllm.ops.swiglu` in blocks of rows."""
    if not is_float32(gate, up) or gate.shape != up.shape or gate.size == 0:
        return ops.swiglu(gate, up)
    gates, ups = (x.reshape(-1, x.shape[-1]) for x in (gate, up))
    y = np.empty(gates.shape, np.float32)

    def gated(span: slice) -> None:
        g, part = gates[span], y[span]
        np.abs(g, out=part)
        np.negative(part, out=part)
        np.exp(part, out=part)  # of -|x|: cannot overflow
        denominator = part + 1
        np.copyto(part, 1, where=g >= 0)
        part /= denominator
        part *= g
        part *= ups[span]

    over_rows(gated, gates)
    return y.reshape(gate.shape)


@ieee_semantics
def rope_tables(positions: Array, inv_freq: Array, scale: Any = 1.0) -> tuple[Array, Array]:
    """Compute `npllm.ops.rope_tables` with the phases in float64.

    In float32 a phase of 200 is off by up to 8e-6, which is a hundred times a rounding of its
    cosine.
    """
    if not (is_float32(inv_freq) and type(positions) is np.ndarray):
        return ops.rope_tables(positions, inv_freq, scale)
    cos, sin = ops.rope_tables(positions, inv_freq.astype(np.float64), scale)
    return cos.astype(np.float32), sin.astype(np.float32)


def over_rows(function: Callable[[slice], None], rows: Array) -> None:
    """Call a function on slices of rows; a few rows are not worth a thread."""
    blocks = spans(len(rows), max(1, BLOCK_ROWS // max(1, rows.shape[-1])))
    if len(blocks) == 1:
        function(blocks[0])
    else:
        run_blocks(function, blocks)


TILED = replace(
    ops.reference,
    name="tiled",
    linear=linear,
    rms_norm=rms_norm,
    rope_tables=rope_tables,
    swiglu=swiglu,
    attention=blockwise_attention,
)
