"""From codes, zero points and scales of groups to a matrix that kernels read, without rounding."""

from collections.abc import Callable
from typing import Any

import numpy as np

from npllm.arrays import widen
from npllm.quantized.block_formats import FORMATS
from npllm.quantized.block_packing import join_blocks
from npllm.quantized.block_weight import BlockWeight
from npllm.quantized.grouped import GroupedWeight
from npllm.quantized.permuted import PermutedWeight
from npllm.threads import run_blocks

__all__ = ["exact_format", "pack_groups"]

Array = Any

BAND = 2**20  # entries that a thread packs at a time
BLOCK = 32  # entries of a block
LIMITS = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127)}
"""Formats of w = d * q, smallest first, and the integers q that each holds."""


def pack_groups(
    codes_of: Callable[[slice], np.ndarray],
    zeros: np.ndarray,
    scales: np.ndarray,
    groups: np.ndarray,
    n_bits: int,
) -> BlockWeight | PermutedWeight | GroupedWeight:
    """Pack codes with scales and zero points of groups of columns; every value stays as it is.

        weight[o, i] = scales[o, groups[i]] * (codes[o, i] - zeros[o, groups[i]])

    Parameters
    ----------
    codes_of : function (slice of rows) -> uint8 array [n_rows, d_in]
        In 0 ... 2**n_bits - 1.  Called by several threads.
    zeros : int16 array [d_out, n_group]
    scales : array [d_out, n_group]
        Finite; float16, bfloat16 or float32.
    groups : int32 array [d_in]
    n_bits : int

    Returns
    -------
    packed : BlockWeight, PermutedWeight or GroupedWeight
        In `exact_format`, where there is one; else so with its columns sorted by their groups.
    """
    name = exact_format(zeros, scales, groups, n_bits)
    order = np.argsort(groups, kind="stable")
    if name is None and exact_format(zeros, scales, groups[order], n_bits):
        return PermutedWeight(
            pack_groups(lambda x: codes_of(x)[:, order], zeros, scales, groups[order], n_bits),
            order,
        )
    if name is None:
        return _grouped(codes_of, zeros, scales, groups, n_bits)
    d_out, n_block, layout = len(zeros), len(groups) // BLOCK, FORMATS[name]
    half, of_block = scales.astype("<f2"), groups[::BLOCK]
    low_byte = zeros.astype(np.uint8)  # a difference in -128 ... 127 is right modulo 256
    blocks = np.empty((d_out, n_block * layout.n_bytes), np.uint8)

    def pack(rows: slice) -> None:
        codes = codes_of(rows).reshape(-1, n_block, BLOCK)
        values = (codes - low_byte[rows][:, of_block, None]).view(np.int8)
        raw = half[rows][:, of_block].reshape(-1, 1).view(np.uint8)
        blocks[rows] = join_blocks(raw, values.reshape(-1, BLOCK), name).reshape(len(codes), -1)

    _in_bands(pack, d_out, len(groups))
    return BlockWeight(blocks, name)


def exact_format(
    zeros: np.ndarray, scales: np.ndarray, groups: np.ndarray, n_bits: int
) -> str | None:
    """Return the smallest block format that holds a matrix exactly; None where none does.

    A block has 32 columns of one group, a scale that float16 holds, and codes - zeros within the
    integers of the format for whatever codes.  Parameters are those of `pack_groups`.
    """
    if len(groups) % BLOCK or not zeros.size:
        return None
    if (groups.reshape(-1, BLOCK) != groups[::BLOCK, None]).any():
        return None
    with np.errstate(over="ignore"):
        if (widen(scales.astype(np.float16)) != widen(scales, np.float32)).any():
            return None
    low, high = -int(zeros.max()), 2**n_bits - 1 - int(zeros.min())
    return next((x for x, (least, most) in LIMITS.items() if least <= low <= high <= most), None)


def _grouped(
    codes_of: Callable[[slice], np.ndarray],
    zeros: np.ndarray,
    scales: np.ndarray,
    groups: np.ndarray,
    n_bits: int,
) -> GroupedWeight:
    """Subtract the zero points."""
    low, high = -int(zeros.max(initial=0)), 2**n_bits - 1 - int(zeros.min(initial=0))
    dtype = np.int8 if -128 <= low <= high <= 127 else np.int16
    values = np.empty((len(zeros), len(groups)), dtype)

    def pack(rows: slice) -> None:
        values[rows] = codes_of(rows).astype(np.int16) - zeros[rows][:, groups]

    _in_bands(pack, len(zeros), len(groups))
    return GroupedWeight(values, scales, groups)


def _in_bands(pack: Callable[[slice], None], d_out: int, d_in: int) -> None:
    """Call a function for bands of rows, on several threads."""
    n_rows = max(1, BAND // max(1, d_in))
    run_blocks(
        lambda start: pack(slice(start, min(start + n_rows, d_out))), range(0, d_out, n_rows)
    )
