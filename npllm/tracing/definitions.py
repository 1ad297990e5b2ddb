"""The definitions in a wider dtype than that of the weights, which stay as they are stored."""

from dataclasses import replace
from functools import partial
from typing import Any

from npllm.arrays import array_namespace, dtype_named, widen
from npllm.errors import NpllmValueError
from npllm.ops import Ops, embed, reference, rope_tables

__all__ = ["WIDE", "definitions"]

Array = Any

WIDE = ("float32", "float64")


def definitions(dtype: str) -> Ops:
    """Return the definitions, computing in a dtype whatever the weights are stored in.

    Parameters
    ----------
    dtype : str
        "float32" or "float64".

    Returns
    -------
    ops : Ops
        `npllm.ops.reference`, with the embedding and the tables of RoPE in that dtype: every other
        operation computes in the dtype of what comes in, and widens a weight block by block.

    Raises
    ------
    NpllmValueError
        For another dtype.

    Notes
    -----
    As in the golden bundles, the frequencies of RoPE are rounded to float32, as every
    implementation has them, and the angles, cosines and sines are computed in `dtype`.
    """
    if dtype not in WIDE:
        raise NpllmValueError(f"dtype must be None, float32 or float64, got {dtype!r}")
    return replace(reference, embed=partial(_embed, dtype), rope_tables=partial(_tables, dtype))


def _embed(dtype: str, ids: Array, weight: Array) -> Array:
    """Look up the rows, as `npllm.ops.embed`, in a dtype."""
    return _in(dtype, embed(ids, weight))


def _tables(dtype: str, positions: Array, inv_freq: Array, scale: Any = 1.0) -> tuple[Array, Array]:
    """Tabulate cosine and sine, as `npllm.ops.rope_tables`, in a dtype."""
    return rope_tables(positions, _in(dtype, inv_freq), scale)


def _in(dtype: str, x: Array) -> Array:
    """Convert to a dtype by name."""
    xp = array_namespace(x)
    return widen(x, getattr(xp, dtype, dtype_named(dtype)))
