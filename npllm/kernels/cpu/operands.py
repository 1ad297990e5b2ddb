"""What the compiled kernels take: weights, gains and biases as arrays that Numba knows."""

from typing import Any

import numpy as np

from npllm.arrays import DTYPES
from npllm.kernels.cpu import fits
from npllm.kernels.cpu.block_gemv import block_table, fits_blocks
from npllm.kernels.cpu.layout import EMPTY, frozen, is_row_major, row_major
from npllm.quantized.block_weight import BlockWeight
from npllm.quantized.int8 import GROUP, Int8Weight
from npllm.quantized.stacked import StackedWeight

__all__ = [
    "BLOCKS",
    "as_bits",
    "bias_or_empty",
    "fits_gain",
    "fits_gated",
    "fits_product",
    "fits_weight",
    "gain_bits",
    "kernel_operands",
    "widened_to_fit",
]

Array = Any

BLOCKS = BlockWeight, StackedWeight
NO_SCALES = frozen(np.zeros((0, 0), np.float32))
NO_GAIN = {np.dtype(x): frozen(np.zeros(0, x)) for x in (np.uint16, np.int16, np.float32)}
BITS = {DTYPES["bfloat16"]: np.uint16, DTYPES["float16"]: np.int16, DTYPES["float32"]: np.float32}


def as_bits(x: Array) -> Array:
    """View a stored array as a dtype that Numba knows."""
    return frozen(x.view(BITS[x.dtype]))


def kernel_operands(weight: Any) -> tuple[Array, Array]:
    """Return the entries of a weight, and their scales where it is in 8 bits, for a kernel; of one
    in blocks, its table.
    """
    if isinstance(weight, BLOCKS):
        return block_table(weight), NO_SCALES
    if isinstance(weight, Int8Weight):
        return row_major(weight.values), as_bits(row_major(weight.scales))
    return as_bits(weight), NO_SCALES


def gain_bits(gain: Array, weight: Any) -> Array:
    """View a gain as a dtype that Numba knows; none, an empty array, as the weight's dtype, which
    a gain usually has: every type more would compile each kernel once more.
    """
    if len(gain):
        return as_bits(gain)
    if isinstance(weight, BLOCKS):
        return NO_GAIN[np.dtype(np.float32)]
    return NO_GAIN[np.dtype(np.uint16 if isinstance(weight, Int8Weight) else BITS[weight.dtype])]


def bias_or_empty(bias: Array) -> Array:
    """Return a bias in float32; an empty array for none."""
    return EMPTY if bias is None else row_major(bias.astype(np.float32, copy=False))


def widened_to_fit(x: Array, weight: Any) -> tuple[Array, Any]:
    """Return x and a weight with columns of zeros more where the kernels take wider ones only: int8
    in whole groups, floats in pairs.  Other operands are returned as they are.

    Without it the array library would multiply, which sums a row in another order in company.  The
    wider int8 weight is kept with the weight, which is immutable.  An array of floats is widened in
    each call: its entries may change between calls (a writable array, a view of one), so that a
    kept copy could be stale; published models have even widths.
    """
    is_int8 = isinstance(weight, Int8Weight)
    if not (is_int8 or type(weight) is np.ndarray) or not fits.is_float32(x) or weight.ndim != 2:
        return x, weight
    d_in = weight.shape[1]
    n_more = -d_in % (GROUP if is_int8 else 2)
    if not n_more or x.shape[-1] != d_in:
        return x, weight
    x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, n_more)])
    return x, weight.in_whole_groups if is_int8 else np.pad(weight, [(0, 0), (0, n_more)])


def fits_product(x: Array, weight: Array, bias: Array = None) -> bool:
    """Tell whether a product is one that the kernels are made for, also of a weight in 8 bits."""
    return fits.is_float32(x) and x.size > 0 and fits_weight(weight, x.shape[-1], bias)


def fits_weight(weight: Any, d_in: int, bias: Array = None) -> bool:
    """Tell whether a weight is one that the kernels are made for."""
    if isinstance(weight, BLOCKS):
        return fits_blocks(weight) and weight.shape[1] == d_in > 0 and fits.fits_bias(bias, weight)
    if isinstance(weight, Int8Weight):
        return (
            type(weight.values) is np.ndarray
            and weight.values.dtype == np.int8
            and weight.scales.dtype in (np.float16, np.float32)
            and weight.shape[1] == d_in > 0
            and d_in % GROUP == 0
            and len(weight) > 0
            and is_row_major(weight.values)
            and is_row_major(weight.scales)
            and fits.fits_bias(bias, weight)
        )
    return fits.fits_weight(weight, d_in, bias)


def fits_gain(x: Array, gain: Array) -> bool:
    """Tell whether a gain is one that the kernels are made for."""
    return (
        type(gain) is np.ndarray
        and gain.shape == x.shape[-1:]
        and gain.dtype in BITS
        and is_row_major(gain)
    )


def fits_gated(x: Array, gain: Array, weight: Array, bias: Array) -> bool:
    """Tell whether norm, weight and gate are what the kernels are made for."""
    return fits_product(x, weight, bias) and fits_gain(x, gain) and len(weight) % 2 == 0
