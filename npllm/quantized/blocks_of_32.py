"""Formats of GGUF with 32 adjacent entries of a row in a block, and one scale for them.

Notes
-----
Every formula rounds where `gguf.quants.dequantize` does: each product and sum to float32.

Source: `block_q4_0` ... `block_q8_0` in ggml-common.h, `dequantize_row_*` in ggml-quants.c.
"""

from typing import Any

from npllm.arrays import array_namespace, ieee_semantics
from npllm.quantized.block_bytes import bits_of, half_precision, low_then_high, signed

__all__ = ["widen_q4_0", "widen_q4_1", "widen_q5_0", "widen_q5_1", "widen_q8_0"]

Array = Any


@ieee_semantics
def widen_q8_0(blocks: Array) -> Array:
    """Widen Q8_0: 8 bits and a scale, 8.5 bits an entry.

        bytes 0, 1: d, float16      bytes 2 ... 33: q[0] ... q[31], signed
        w[i] = d * q[i]

    Parameters
    ----------
    blocks : uint8 array [..., 34]

    Returns
    -------
    w : float32 array [..., 32]
    """
    return half_precision(blocks[..., 0:2]) * signed(blocks[..., 2:34])


@ieee_semantics
def widen_q4_0(blocks: Array) -> Array:
    """Widen Q4_0: 4 bits and a scale, 4.5 bits an entry.

        bytes 0, 1: d, float16      bytes 2 ... 17: b[0] ... b[15]
        q[i] = low nibble of b[i],   q[i + 16] = high nibble of b[i]
        w[i] = d * (q[i] - 8)

    Parameters
    ----------
    blocks : uint8 array [..., 18]

    Returns
    -------
    w : float32 array [..., 32]
    """
    xp = array_namespace(blocks)
    q = low_then_high(blocks[..., 2:18])
    return half_precision(blocks[..., 0:2]) * (xp.astype(q, xp.float32) - 8.0)


@ieee_semantics
def widen_q4_1(blocks: Array) -> Array:
    """Widen Q4_1: 4 bits, a scale and a minimum, 5 bits an entry.

        bytes 0, 1: d, float16      bytes 2, 3: m, float16      bytes 4 ... 19: b[0] ... b[15]
        q[i] = low nibble of b[i],   q[i + 16] = high nibble of b[i]
        w[i] = d * q[i] + m

    Parameters
    ----------
    blocks : uint8 array [..., 20]

    Returns
    -------
    w : float32 array [..., 32]
    """
    xp = array_namespace(blocks)
    d, m = half_precision(blocks[..., 0:2]), half_precision(blocks[..., 2:4])
    return d * xp.astype(low_then_high(blocks[..., 4:20]), xp.float32) + m


@ieee_semantics
def widen_q5_0(blocks: Array) -> Array:
    """Widen Q5_0: 5 bits and a scale, 5.5 bits an entry.

        bytes 0, 1: d, float16      bytes 2 ... 5: h      bytes 6 ... 21: b[0] ... b[15]
        q[i] = nibble i + 16 * (bit i of h),   nibbles as in Q4_0,   h little-endian
        w[i] = d * (q[i] - 16)

    Parameters
    ----------
    blocks : uint8 array [..., 22]

    Returns
    -------
    w : float32 array [..., 32]
    """
    xp = array_namespace(blocks)
    q = _five_bits(blocks[..., 2:6], blocks[..., 6:22])
    return half_precision(blocks[..., 0:2]) * (xp.astype(q, xp.float32) - 16.0)


@ieee_semantics
def widen_q5_1(blocks: Array) -> Array:
    """Widen Q5_1: 5 bits, a scale and a minimum, 6 bits an entry.

        bytes 0, 1: d, float16   bytes 2, 3: m, float16   bytes 4 ... 7: h   bytes 8 ... 23: b
        q[i] = nibble i + 16 * (bit i of h),   nibbles as in Q4_0,   h little-endian
        w[i] = d * q[i] + m

    Parameters
    ----------
    blocks : uint8 array [..., 24]

    Returns
    -------
    w : float32 array [..., 32]
    """
    xp = array_namespace(blocks)
    d, m = half_precision(blocks[..., 0:2]), half_precision(blocks[..., 2:4])
    return d * xp.astype(_five_bits(blocks[..., 4:8], blocks[..., 8:24]), xp.float32) + m


def _five_bits(fifth: Array, nibbles: Array) -> Array:
    """Put a fifth bit above each nibble.

    Parameters
    ----------
    fifth : uint8 array [..., 4]
        Bit i of the little-endian 32-bit integer belongs to entry i.
    nibbles : uint8 array [..., 16]

    Returns
    -------
    q : uint8 array [..., 32]
    """
    xp = array_namespace(fifth, nibbles)
    bits = xp.stack([bits_of(fifth, n, 1) for n in range(8)], axis=-1)
    high = xp.reshape(bits, (*fifth.shape[:-1], 32))  # [..., 4, 8] -> [..., 32]
    return low_then_high(nibbles) | (high << 4)
