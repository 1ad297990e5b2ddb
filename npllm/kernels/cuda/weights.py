"""Which weights the kernels of a product read, and in what form they are handed over."""

from typing import Any, NamedTuple

import numpy as np

from npllm.arrays import is_packed
from npllm.kernels.cuda import launching
from npllm.kernels.cuda.launching import ALIGNMENT, STORED, aligned
from npllm.quantized.block_formats import FORMATS
from npllm.quantized.block_weight import BlockWeight
from npllm.quantized.int8 import Int8Weight
from npllm.quantized.stacked import StackedWeight

__all__ = [
    "BLOCKS",
    "WORD",
    "Operand",
    "is_in_place",
    "is_read",
    "operand",
    "parts_of",
    "put_in_place",
]

Array = Any

BLOCKS = tuple(FORMATS)  # the formats of blocks.cu
WORD = 4  # bytes; a matrix in blocks is read by words


class Operand(NamedTuple):
    """A weight as a kernel takes it."""

    suffix: str  # of the kernel's name: "" or "_blocks"
    entry: str  # the macro ENTRY
    values: Array
    scales: Array | None  # float32


def parts_of(weight: Any) -> list[Any]:
    """Return the matrices whose rows make a weight: itself, unless it is stacked."""
    if not isinstance(weight, StackedWeight):
        return [weight]
    return [one for part in weight.parts for one in parts_of(part)]


def _has_known_type(weight: Any) -> bool:
    """Tell whether a matrix, no stacked one, is on a device and of a type and width to read.

    A row must be whole packs of 16 bytes, or whole blocks in a matrix of whole words; scales of
    int8 must be float32, to which `Int8Weight.to` widens them on the way to a device.
    """
    if isinstance(weight, BlockWeight):
        on_device = not isinstance(weight.blocks, np.ndarray)
        return on_device and weight.format in BLOCKS and weight.nbytes % WORD == 0
    values = weight.values if isinstance(weight, Int8Weight) else weight
    if isinstance(weight, Int8Weight) and weight.scales.dtype != np.float32:
        return False
    if isinstance(values, np.ndarray) or getattr(values, "dtype", None) not in STORED:
        return False
    whole = values.ndim == 2 and values.shape[1] * values.dtype.itemsize % ALIGNMENT == 0
    return whole and (not is_packed(weight) or values is not weight)


def is_read(weight: Any) -> bool:
    """Tell whether the kernels take a weight, by the type and width of each of its parts.

    Gain and bias have one type for all parts: float32 beside packed ones.
    """
    parts = parts_of(weight)
    if not all(map(_has_known_type, parts)):
        return False
    return len(parts) == 1 or all(is_packed(x) or x.dtype == np.float32 for x in parts)


def is_in_place(weight: Any) -> bool:
    """Tell whether the arrays of a weight are contiguous, at a multiple of 16 bytes, not empty."""
    if is_packed(weight):
        return all(map(is_in_place, weight.arrays))
    whole = weight.ndim == 2 and launching.steps(weight) == (weight.shape[1], 1)
    return whole and weight.size > 0 and weight.data.ptr % ALIGNMENT == 0


def put_in_place(weight: Any, xp: Any) -> Any:
    """Return the weight, or a copy, contiguous and at a multiple of 16 bytes."""
    if isinstance(weight, StackedWeight):
        return StackedWeight(tuple(put_in_place(part, xp) for part in weight.parts))
    if isinstance(weight, BlockWeight):
        return BlockWeight(aligned(weight.blocks, xp), weight.format)
    if is_packed(weight):
        return Int8Weight(aligned(weight.values, xp), xp.ascontiguousarray(weight.scales))
    return aligned(weight, xp)


def operand(weight: Any) -> Operand:
    """Take a weight of a known type apart."""
    if isinstance(weight, BlockWeight):
        return Operand("_blocks", weight.format, weight.blocks, None)
    if is_packed(weight):
        return Operand("", "i8", weight.values, weight.scales)
    return Operand("", STORED[weight.dtype], weight, None)
