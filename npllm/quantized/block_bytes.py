"""Numbers that the bytes of a block hold: half precision, signed bytes, nibbles, bits.

Array API only: there is no view of bytes as another type, so a number is computed from its bits.
"""

from typing import Any

from npllm.arrays import array_namespace

__all__ = ["bits_of", "half_precision", "low_then_high", "signed"]

Array = Any


def half_precision(pair: Array) -> Array:
    """Read a float16 from its two bytes, the lower byte first.

        bits = sign (1) | e (5) | f (10)
        y = (-1)**sign * (1024 + f) * 2**(e - 25)    0 < e < 31: normal
        y = (-1)**sign * f * 2**-24                  e = 0: subnormal, or zero
        y = infinity where f = 0, else NaN           e = 31

    Parameters
    ----------
    pair : uint8 array [..., 2]

    Returns
    -------
    y : float32 array [..., 1]
        Exact.

    Notes
    -----
    (1024 + f) * 2**e is an integer below 2**41 with 11 significant bits, which float32 holds.

    Source: IEEE 754-2019, section 3.4, binary16.
    """
    xp = array_namespace(pair)
    wide = xp.astype(pair, xp.int64)
    bits = wide[..., 0:1] + 256 * wide[..., 1:2]
    fraction, exponent = bits & 1023, (bits >> 10) & 31
    integer = xp.where(exponent == 0, 2 * fraction, (1024 + fraction) << exponent)
    y = xp.astype(integer, xp.float32) * 2.0**-25
    special = xp.where(fraction == 0, xp.full_like(y, xp.inf), xp.full_like(y, xp.nan))
    sign = 1.0 - 2.0 * xp.astype(bits >> 15, xp.float32)
    return sign * xp.where(exponent == 31, special, y)


def signed(byte: Array) -> Array:
    """Read bytes as integers in -128 ... 127, in two's complement.

        y = (b XOR 128) - 128

    Parameters
    ----------
    byte : uint8 array [...]

    Returns
    -------
    y : float32 array [...]
    """
    xp = array_namespace(byte)
    return xp.astype(byte ^ 128, xp.float32) - 128.0


def low_then_high(byte: Array) -> Array:
    """Split bytes into 4-bit numbers: all low nibbles of the last axis, then all high ones.

    Parameters
    ----------
    byte : uint8 array [..., n]

    Returns
    -------
    y : uint8 array [..., 2*n]
        In 0 ... 15.
    """
    return array_namespace(byte).concat([byte & 15, byte >> 4], axis=-1)


def bits_of(byte: Array, start: int, n_bits: int) -> Array:
    """Read the bits start ... start + n_bits - 1 of each byte, the lowest being bit 0.

    Parameters
    ----------
    byte : uint8 array [...]
    start, n_bits : int

    Returns
    -------
    y : uint8 array [...]
        In 0 ... 2**n_bits - 1.
    """
    return (byte >> start) & (2**n_bits - 1)
