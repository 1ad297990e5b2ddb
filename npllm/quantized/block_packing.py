"""From float matrices to blocks: scales are searched, integers rounded, bits packed.

The inverse of the `widen_*` functions, which define the layouts.
"""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from npllm.arrays import expect_shape, widen
from npllm.errors import NpllmValueError
from npllm.quantized import block_search
from npllm.quantized.block_formats import FORMATS
from npllm.quantized.block_weight import BlockWeight
from npllm.threads import run_blocks

__all__ = ["FALLBACKS", "join_blocks", "quantize_blocks", "quantize_with_fallback", "search_module"]

FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""For rows whose length is no multiple of 256: a format of at least as many bits, as llama.cpp."""

BAND = 2**17  # entries that a thread quantizes at a time: what a search holds fits the cache
LARGEST_HALF = 65504.0


def quantize_blocks(weight: Any, name: str) -> BlockWeight:
    """Round a matrix to blocks of a format, with scales of least squared error.

    Parameters
    ----------
    weight : array [d_out, d_in]
        NumPy, of a float type, or packed; finite.
    name : str
        A key of `npllm.quantized.block_formats.FORMATS`.

    Returns
    -------
    packed : BlockWeight

    Raises
    ------
    NpllmValueError
        When the format is unknown, d_in is no multiple of its block, or `weight` holds NaN,
        infinity, or numbers whose scale exceeds float16.
    """
    expect_shape("weight", weight, d_out=None, d_in=None)
    if name not in FORMATS:
        raise NpllmValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    layout, (d_out, d_in) = FORMATS[name], weight.shape
    if d_in % layout.n_entries:
        raise NpllmValueError(
            f"d_in must be a multiple of the {layout.n_entries} entries of a {name} block, "
            f"got {d_in}"
        )
    blocks = np.empty((d_out, d_in // layout.n_entries * layout.n_bytes), np.uint8)
    n_rows = max(1, BAND // max(1, d_in))

    def pack_band(start: int) -> None:
        rows = np.asarray(widen(weight[start : start + n_rows], np.float32))
        if not np.isfinite(rows).all():
            raise NpllmValueError(
                "a weight that holds NaN or infinity cannot be rounded to blocks; "
                "`npllm inspect --check-finite` names every such tensor"
            )
        packed = PACK[name](rows.reshape(-1, layout.n_entries))
        blocks[start : start + n_rows] = packed.reshape(len(rows), -1)

    run_blocks(pack_band, range(0, d_out, n_rows))
    return BlockWeight(blocks, name)


def quantize_with_fallback(weight: Any, name: str) -> BlockWeight:
    """Round a matrix to blocks of a format, or of its fallback where the rows do not fit.

    Parameters and errors are those of `quantize_blocks`.

    Notes
    -----
    Source: `llama_tensor_get_type` in llama.cpp.
    """
    fits = name not in FALLBACKS or np.ndim(weight) != 2 or weight.shape[1] % 256 == 0
    return quantize_blocks(weight, name if fits else FALLBACKS[name])


@cache
def search_module() -> Any:
    """Return the module that searches scales: the compiled one where Numba can be imported."""
    try:
        return importlib.import_module("npllm.kernels.cpu.block_search")
    except ImportError:
        return block_search


def join_blocks(raw: np.ndarray, values: np.ndarray, name: str) -> np.ndarray:
    """Put integers and their scale into blocks of Q4_0, Q5_0 or Q8_0.

        w = d * values

    Parameters
    ----------
    raw : uint8 array [n, 2]
        The bytes of d, little-endian float16.
    values : integer array [n, 32]
        In -8 ... 7, -16 ... 15 or -128 ... 127.
    name : str

    Returns
    -------
    blocks : uint8 array [n, n_bytes]
    """
    if name == "Q8_0":
        return np.concatenate([raw, values.astype(np.int8).view(np.uint8)], axis=-1)
    n_bits = int(name[1])
    q = values + 2 ** (n_bits - 1)
    return np.concatenate([raw, *_fifth(q, n_bits), _pack_nibbles(q)], axis=-1)


def _half(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round to float16: the value in float32 [n, 1], and its bytes [n, 2]."""
    if np.abs(x).max(initial=0) > LARGEST_HALF:
        raise NpllmValueError(f"a scale must be at most {LARGEST_HALF:g}, got {np.abs(x).max():g}")
    half = x.reshape(-1, 1).astype("<f2")
    return half.astype(np.float32), half.view(np.uint8)


def _steps(x: np.ndarray, d: np.ndarray, low: int, high: int) -> np.ndarray:
    """Round x / d to integers in low ... high; 0 where d is 0."""
    steps = x / np.where(d == 0, np.float32(np.inf), d)
    return np.clip(np.rint(steps, out=steps), low, high, out=steps).astype(np.int32)


def _pack_nibbles(q: np.ndarray) -> np.ndarray:
    """Put the first half of the last axis into low nibbles, the second into high ones."""
    low, high = np.split(q.astype(np.uint8) & 15, 2, axis=-1)
    return low | high << 4


def _symmetric(n_bits: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function that packs Q4_0 or Q5_0."""
    low = -(2 ** (n_bits - 1))

    def pack(x: np.ndarray) -> np.ndarray:
        d, raw = _half(search_module().search_scale(x, low, -low - 1))
        return join_blocks(raw, _steps(x, d, low, -low - 1), f"Q{n_bits}_0")

    return pack


def _affine(n_bits: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function that packs Q4_1 or Q5_1."""
    high = 2**n_bits - 1

    def pack(x: np.ndarray) -> np.ndarray:
        scale, minimum = search_module().search_affine(x, high, below=False)
        (d, raw_d), (m, raw_m) = _half(scale), _half(minimum)
        q = _steps(x - m, d, 0, high)
        return np.concatenate([raw_d, raw_m, *_fifth(q, n_bits), _pack_nibbles(q)], axis=-1)

    return pack


def _fifth(q: np.ndarray, n_bits: int) -> list[np.ndarray]:
    """Pack the fifth bits of 32 integers into 4 bytes; nothing where there are 4 bits."""
    return [] if n_bits == 4 else [np.packbits((q >> 4).astype(np.uint8), -1, "little")]


def _pack_q8_0(x: np.ndarray) -> np.ndarray:
    """Pack Q8_0."""
    d, raw = _half(np.abs(x).max(axis=-1) / 127)
    return join_blocks(raw, _steps(x, d, -127, 127), "Q8_0")


def _sub_blocks(n_bits: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function that packs Q4_K or Q5_K."""
    high = 2**n_bits - 1

    def pack(x: np.ndarray) -> np.ndarray:
        parts = x.reshape(-1, 8, 32)
        scale, minimum = search_module().search_affine(parts, high, below=True)
        scale = np.maximum(scale, 0)
        (d, raw_d), (d_min, raw_min) = _half(scale.max(-1) / 63), _half((-minimum).max(-1) / 63)
        steps = np.repeat(d, 8, axis=-1), np.repeat(d_min, 8, axis=-1)
        sc, m = search_module().search_multiples(parts, (scale, minimum), steps, high)
        q = _steps(parts + (d_min * m)[..., None], (d * sc)[..., None], 0, high)
        nibbles = _pack_nibbles(q.reshape(-1, 4, 64)).reshape(-1, 128)
        fifth = [] if n_bits == 4 else [_columns(q >> 4, 1)]
        return np.concatenate([raw_d, raw_min, _pack_scales(sc, m), *fifth, nibbles], axis=-1)

    return pack


def _columns(bits: np.ndarray, width: int) -> np.ndarray:
    """Put row s of the last but one axis at bit width * s of a byte for each column."""
    shifts = width * np.arange(bits.shape[-2])[:, None]
    return np.sum(bits << shifts, axis=-2).astype(np.uint8)


def _pack_scales(sc: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Pack eight scales and eight minimums of 6 bits into 12 bytes."""
    first = sc[:, :4] | sc[:, 4:] >> 4 << 6
    second = m[:, :4] | m[:, 4:] >> 4 << 6
    third = sc[:, 4:] & 15 | (m[:, 4:] & 15) << 4
    return np.concatenate([first, second, third], axis=-1).astype(np.uint8)


def _pack_q6_k(x: np.ndarray) -> np.ndarray:
    """Pack Q6_K."""
    parts = x.reshape(-1, 16, 16)
    scale = search_module().search_scale(parts, -32, 31)
    d, raw = _half(np.abs(scale).max(-1) / 127)
    sc = _steps(scale, d, -127, 127)
    q = (_steps(parts, (d * sc)[..., None], -32, 31) + 32).reshape(-1, 2, 4, 32)
    low = _pack_nibbles(q.reshape(-1, 2, 128)).reshape(-1, 128)
    high = _columns(q >> 4, 2).reshape(-1, 64)
    return np.concatenate([low, high, sc.astype(np.int8).view(np.uint8), raw], axis=-1)


PACK = {
    "Q4_0": _symmetric(4),
    "Q5_0": _symmetric(5),
    "Q4_1": _affine(4),
    "Q5_1": _affine(5),
    "Q8_0": _pack_q8_0,
    "Q4_K": _sub_blocks(4),
    "Q5_K": _sub_blocks(5),
    "Q6_K": _pack_q6_k,
}
