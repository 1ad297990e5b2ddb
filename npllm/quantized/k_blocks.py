"""The K formats of GGUF: 256 adjacent entries of a row in a block, sub-blocks with small scales.

A sub-block's scale is an integer of 6 or 8 bits times a float16 of the whole block, so that a
scale for 32 or 16 entries takes few bits.

Notes
-----
Every formula rounds where `gguf.quants.dequantize` does: each product and difference to float32.

Source: `block_q4_K`, `block_q5_K` and `block_q6_K` in ggml-common.h, `get_scale_min_k4` and
`dequantize_row_*` in ggml-quants.c.
"""

from typing import Any

from npllm.arrays import array_namespace, ieee_semantics
from npllm.quantized.block_bytes import bits_of, half_precision, low_then_high, signed

__all__ = ["widen_q4_k", "widen_q5_k", "widen_q6_k"]

Array = Any


@ieee_semantics
def widen_q4_k(blocks: Array) -> Array:
    """Widen Q4_K: 4 bits, a scale and a minimum for 32 entries, 4.5 bits an entry.

        bytes 0, 1: d, float16           bytes 2, 3: d_min, float16
        bytes 4 ... 15: sc[0 ... 7] and m[0 ... 7], 6 bits each, see `_scales_and_minimums`
        bytes 16 ... 143: b[0] ... b[127]
        q[64 c + l] = low nibble of b[32 c + l]        l < 32, c < 4
        q[64 c + 32 + l] = high nibble of b[32 c + l]
        w[i] = (d * sc[i // 32]) * q[i] - d_min * m[i // 32]

    Parameters
    ----------
    blocks : uint8 array [..., 144]

    Returns
    -------
    w : float32 array [..., 256]
    """
    return _scaled(blocks, _nibbles_of_64(blocks[..., 16:144]))


@ieee_semantics
def widen_q5_k(blocks: Array) -> Array:
    """Widen Q5_K: 5 bits, a scale and a minimum for 32 entries, 5.5 bits an entry.

        bytes 0 ... 15: d, d_min, sc, m as in Q4_K
        bytes 16 ... 47: h[0] ... h[31]                bytes 48 ... 175: b[0] ... b[127]
        q[32 s + l] = nibble 32 s + l as in Q4_K + 16 * (bit s of h[l])        l < 32, s < 8
        w[i] = (d * sc[i // 32]) * q[i] - d_min * m[i // 32]

    Parameters
    ----------
    blocks : uint8 array [..., 176]

    Returns
    -------
    w : float32 array [..., 256]
    """
    xp = array_namespace(blocks)
    fifth = blocks[..., 16:48]
    high = xp.stack([bits_of(fifth, s, 1) for s in range(8)], axis=-2)  # [..., 8, 32]
    return _scaled(blocks, _nibbles_of_64(blocks[..., 48:176]) | (high << 4))


@ieee_semantics
def widen_q6_k(blocks: Array) -> Array:
    """Widen Q6_K: 6 bits and a scale for 16 entries, 6.5625 bits an entry.

        bytes 0 ... 127: b         bytes 128 ... 191: h
        bytes 192 ... 207: sc[0 ... 15], signed      bytes 208, 209: d, float16
        q[128 c + 32 s + l] = nibble + 16 * (bits 2 s and 2 s + 1 of h[32 c + l])
        nibble = that of b[64 c + 32 (s mod 2) + l]: low for s < 2, high for s >= 2
        w[i] = (d * sc[i // 16]) * (q[i] - 32)       l < 32, s < 4, c < 2

    Parameters
    ----------
    blocks : uint8 array [..., 210]

    Returns
    -------
    w : float32 array [..., 256]
    """
    xp = array_namespace(blocks)
    n = blocks.shape[:-1]
    low = low_then_high(xp.reshape(blocks[..., 0:128], (*n, 2, 64)))  # [..., 2, 128]
    upper = xp.reshape(blocks[..., 128:192], (*n, 2, 1, 32))
    high = xp.concat([bits_of(upper, 2 * s, 2) for s in range(4)], axis=-2)  # [..., 2, 4, 32]
    q = xp.reshape(low, (*n, 16, 16)) | (xp.reshape(high, (*n, 16, 16)) << 4)
    scale = half_precision(blocks[..., 208:210]) * signed(blocks[..., 192:208])  # [..., 16]
    w = scale[..., None] * (xp.astype(q, xp.float32) - 32.0)
    return xp.reshape(w, (*n, 256))


def _nibbles_of_64(byte: Array) -> Array:
    """Split 128 bytes into 8 rows of 32 nibbles: low and high ones of 32 bytes take turns.

    Parameters
    ----------
    byte : uint8 array [..., 128]

    Returns
    -------
    q : uint8 array [..., 8, 32]
    """
    xp = array_namespace(byte)
    n = byte.shape[:-1]
    return xp.reshape(low_then_high(xp.reshape(byte, (*n, 4, 32))), (*n, 8, 32))


def _scaled(blocks: Array, q: Array) -> Array:
    """Scale each sub-block and subtract its minimum.

        w = (d * sc) * q - d_min * m

    Parameters
    ----------
    blocks : uint8 array [..., n]
        Their first 16 bytes are d, d_min, and the 6-bit scales and minimums.
    q : uint8 array [..., 8, 32]

    Returns
    -------
    w : float32 array [..., 256]
    """
    xp = array_namespace(blocks, q)
    scale, minimum = _scales_and_minimums(blocks[..., 4:16])
    scale = half_precision(blocks[..., 0:2]) * xp.astype(scale, xp.float32)  # [..., 8]
    minimum = half_precision(blocks[..., 2:4]) * xp.astype(minimum, xp.float32)
    w = scale[..., None] * xp.astype(q, xp.float32) - minimum[..., None]
    return xp.reshape(w, (*blocks.shape[:-1], 256))


def _scales_and_minimums(byte: Array) -> tuple[Array, Array]:
    """Unpack eight scales and eight minimums of 6 bits from 12 bytes.

        j < 4:   sc[j] = bits 0-5 of a[j]                    m[j] = bits 0-5 of a[j + 4]
        j >= 4:  sc[j] = low nibble of a[j + 4]  + 16 * (bits 6, 7 of a[j - 4])
                 m[j]  = high nibble of a[j + 4] + 16 * (bits 6, 7 of a[j])

    Parameters
    ----------
    byte : uint8 array [..., 12]
        a[0] ... a[11].

    Returns
    -------
    sc, m : uint8 array [..., 8]
        In 0 ... 63.
    """
    xp = array_namespace(byte)
    first, second, third = byte[..., 0:4], byte[..., 4:8], byte[..., 8:12]
    scale = (third & 15) | (bits_of(first, 6, 2) << 4)
    minimum = (third >> 4) | (bits_of(second, 6, 2) << 4)
    return (
        xp.concat([first & 63, scale], axis=-1),
        xp.concat([second & 63, minimum], axis=-1),
    )
