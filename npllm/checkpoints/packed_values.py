"""What the tensors of a packed matrix hold, as one weight: codes, zero points, scales, groups."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from npllm.arrays import native, widen
from npllm.checkpoints.packed_layers import PackedLayer
from npllm.checkpoints.tensor_files import TensorFiles
from npllm.errors import NpllmValueError
from npllm.quantized.bit_stream import unpack
from npllm.quantized.regrouping import pack_groups

__all__ = ["read_layer"]

Array = Any
Codes = Callable[[slice], np.ndarray]


def read_layer(layer: PackedLayer, files: TensorFiles) -> Array:
    """Read a packed matrix, as blocks where they hold the same values.

    Parameters
    ----------
    layer : PackedLayer
        With every tensor that it should have, of the right shape and dtype.
    files : TensorFiles

    Returns
    -------
    weight : BlockWeight, PermutedWeight or GroupedWeight
        No view of the files.

    Raises
    ------
    NpllmValueError
        When scales are not finite, or indices, codes, padding or zero points are not what the
        configuration says; names file and tensor.
    """
    tensors = {leaf: files.read(entry) for leaf, entry in layer.entries.items()}
    read = _gptq if layer.quantization.method == "gptq" else _compressed
    codes_of, zeros, scales = read(layer, tensors)
    _check_zeros(layer, zeros)
    leaf = "scales" if "scales" in tensors else "weight_scale"
    with np.errstate(over="ignore", invalid="ignore"):
        if not np.isfinite(widen(scales) * np.float32(2.0**layer.quantization.n_bits)).all():
            raise _wrong(layer, leaf, "must be finite, times every code, got NaN or infinity")
    groups = _groups(layer, tensors)
    return pack_groups(codes_of, zeros, scales, groups, layer.quantization.n_bits)


def _gptq(
    layer: PackedLayer, tensors: Mapping[str, np.ndarray]
) -> tuple[Codes, np.ndarray, np.ndarray]:
    """Codes, zero points and scales of GPTQ, [d_out, ...].

    The stored zero point is z - 1 in the format "gptq": 1 is added to each.  GPTQModel subtracts
    and adds in whole words of 2, 4 or 8 bits a code, so that z = 0 borrows from the next one and
    the sum carries to it; with 3 bits, modulo 8.

    Source: `convert_gptq_v1_to_v2_format_module` and `_shift_gptq_qzeros` in GPTQModel.
    """
    (d_out, d_in), n_bits = layer.shape, layer.quantization.n_bits
    qweight, qzeros = tensors["qweight"], tensors["qzeros"]
    is_less = layer.quantization.format == "gptq"
    if is_less and 8 % n_bits == 0:
        ones = np.uint32(sum(1 << bit for bit in range(0, 32, n_bits)))
        qzeros = (np.ascontiguousarray(qzeros).view("<u4") + ones).view("<i4")
    zeros = unpack(qzeros, n_bits)[:, :d_out].astype(np.int16)
    if is_less and 8 % n_bits:
        zeros = (zeros + 1) % 2**n_bits

    def codes_of(rows: slice) -> np.ndarray:
        codes = unpack(qweight[:, rows].T, n_bits)
        return _unpadded(layer, "qweight", codes, d_in)

    return codes_of, _rows(zeros.T), native(_rows(tensors["scales"].T))


def _compressed(
    layer: PackedLayer, tensors: Mapping[str, np.ndarray]
) -> tuple[Codes, np.ndarray, np.ndarray]:
    """Codes, zero points and scales of compressed-tensors, [d_out, ...].

    A signed integer is stored, in a stream of bits as a code that is larger by 2**(n_bits - 1);
    that is the code here for all.
    """
    (d_out, d_in), n_bits = layer.shape, layer.quantization.n_bits
    offset = 2 ** (n_bits - 1)
    _check_shape(layer, tensors)
    scales = np.broadcast_to(tensors["weight_scale"], _shape_of_scales(layer))
    stored = tensors.get("weight_zero_point")
    if stored is None:
        zeros = np.full(scales.shape, offset, np.int16)
    elif stored.dtype == np.int8:
        zeros = np.broadcast_to(stored, scales.shape).astype(np.int16) + np.int16(offset)
    else:
        codes = unpack(stored.T, n_bits)
        zeros = _unpadded(layer, "weight_zero_point", codes, d_out).T.astype(np.int16)

    def codes_of(rows: slice) -> np.ndarray:
        if "weight_packed" in tensors:
            codes = unpack(tensors["weight_packed"][rows], n_bits)
            return _unpadded(layer, "weight_packed", codes, d_in)
        codes = tensors["weight"][rows].astype(np.int16) + offset
        _check_range(layer, "weight", codes - offset)
        return codes.astype(np.uint8)

    return codes_of, _rows(zeros), native(_rows(scales))


def _shape_of_scales(layer: PackedLayer) -> tuple[int, int]:
    """[d_out, n_group]."""
    return layer.shape[0], layer.quantization.count_groups(layer.shape[1])


def _rows(x: np.ndarray) -> np.ndarray:
    """Copy to memory, row by row."""
    return np.array(x, order="C")


def _groups(layer: PackedLayer, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """The group of each column; without g_idx, i // group_size."""
    d_in, quantization = layer.shape[1], layer.quantization
    adjacent = (np.arange(d_in) // (quantization.group_size or max(1, d_in))).astype(np.int32)
    leaf = "g_idx" if quantization.method == "gptq" else "weight_g_idx"
    stored = tensors.get(leaf)
    is_unset = stored is not None and leaf != "g_idx" and bool((stored == -1).all())
    if stored is None or is_unset:  # compressed-tensors fills one that is not used with -1
        return adjacent
    n_group = quantization.count_groups(d_in)
    if d_in and not 0 <= stored.min() <= stored.max() < n_group:
        raise _wrong(
            layer,
            leaf,
            f"must lie in 0 ... n_group - 1 = {n_group - 1}, got {stored.min()} ... {stored.max()}",
        )
    return stored.astype(np.int32)


def _unpadded(layer: PackedLayer, leaf: str, codes: np.ndarray, n_codes: int) -> np.ndarray:
    """Cut off the codes that fill the last word, which must be 0."""
    if codes[:, n_codes:].any():
        raise _wrong(layer, leaf, f"must hold 0 after the {n_codes} codes of a row, got other bits")
    return codes[:, :n_codes]


def _check_shape(layer: PackedLayer, tensors: Mapping[str, np.ndarray]) -> None:
    """Raise unless `weight_shape` says what config.json says."""
    stored = tensors.get("weight_shape")
    if stored is not None and tuple(stored.tolist()) != layer.shape:
        raise _wrong(layer, "weight_shape", f"must be {list(layer.shape)}, got {stored.tolist()}")


def _check_range(layer: PackedLayer, leaf: str, values: np.ndarray) -> None:
    """Raise unless integers fit the bits of a code."""
    limit = 2 ** (layer.quantization.n_bits - 1)
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    if not -limit <= low <= high < limit:
        raise _wrong(layer, leaf, f"must lie in {-limit} ... {limit - 1}, got {low} ... {high}")


def _check_zeros(layer: PackedLayer, zeros: np.ndarray) -> None:
    """Raise unless zero points fit the bits of a code, and a symmetric one is in the middle."""
    quantization = layer.quantization
    middle = 2 ** (quantization.n_bits - 1)
    if quantization.method != "gptq":
        return _check_range(layer, "weight_zero_point", zeros - middle)
    if quantization.is_symmetric and (zeros != middle).any():
        found = int(zeros[zeros != middle][0])
        raise _wrong(
            layer,
            "qzeros",
            f"must stand for the zero point {middle} (config.json says sym: true), got {found}; "
            f"is checkpoint_format {quantization.format} right? gptq stores z - 1, gptq_v2 z",
        )
    return None


def _wrong(layer: PackedLayer, leaf: str, what: str) -> NpllmValueError:
    """Make the error for a tensor."""
    return NpllmValueError(f"{layer.entries[leaf].file}: {layer.tensor_name(leaf)} {what}")
