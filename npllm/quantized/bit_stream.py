"""Codes of a few bits in a stream of bytes, as GPTQ and compressed-tensors pack them."""

import numpy as np

__all__ = ["count_words", "unpack"]

WORD = 32  # bits


def count_words(n_codes: int, n_bits: int) -> int:
    """Count the 32-bit words that hold so many codes."""
    return -(-n_codes * n_bits // WORD)


def unpack(words: np.ndarray, n_bits: int) -> np.ndarray:
    """Unpack rows of 32-bit words to the codes that they hold.

        bit b of code i = bit (i * n_bits + b) mod 32 of word (i * n_bits + b) div 32,  b < n_bits

    The first code is in the lowest bits of the first word.  Codes of 3 bits may lie in two words.

    Parameters
    ----------
    words : int32 array [n_rows, n_word]
    n_bits : int
        2, 3, 4 or 8.

    Returns
    -------
    codes : uint8 array [n_rows, n_word * 32 // n_bits]

    Notes
    -----
    Source: `pack_to_int32` in compressed-tensors; `pack` of `QuantLinear` in AutoGPTQ, which packs
    columns in place of rows.
    """
    raw = np.ascontiguousarray(words, "<i4").view(np.uint8)  # [n_rows, 4 * n_word]
    n_rows, n_byte = raw.shape
    if 8 % n_bits == 0:
        codes = np.empty((n_rows, n_byte, 8 // n_bits), np.uint8)
        for i in range(8 // n_bits):
            codes[..., i] = raw >> i * n_bits & 2**n_bits - 1
        return codes.reshape(n_rows, -1)
    n_codes = 8 * n_byte // n_bits
    bits = np.unpackbits(raw, axis=-1, bitorder="little")[:, : n_codes * n_bits]
    bits = bits.reshape(n_rows, n_codes, n_bits)
    return np.packbits(bits, axis=-1, bitorder="little")[..., 0]
