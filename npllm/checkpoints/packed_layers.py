"""Matrices that GPTQ or compressed-tensors store as several tensors: their names, shapes, values.

GPTQ             qweight, qzeros, scales, g_idx
pack-quantized   weight_packed, weight_scale, weight_shape, weight_zero_point, weight_g_idx
int-quantized    weight, weight_scale, weight_zero_point      (naive-quantized is the same)
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from npllm.arrays import native, widen
from npllm.checkpoints.safetensors import SAFETENSORS_DTYPES, TensorEntry
from npllm.checkpoints.tensor_files import TensorFiles
from npllm.config.quantization import Quantization
from npllm.errors import NpllmValueError
from npllm.quantized.bit_stream import count_words, unpack
from npllm.quantized.regrouping import pack_groups

__all__ = ["PackedLayer", "packed_layers", "read_layer", "zero_biases"]

Array = Any

WEIGHT = ".weight"
SCALES = ("F16", "BF16", "F32")
INDICES = ("I32", "I64")
MARKERS = {  # a tensor that only a packed matrix has
    "gptq": "qweight",
    "gptq_v2": "qweight",
    "pack-quantized": "weight_packed",
    "int-quantized": "weight_scale",
    "naive-quantized": "weight_scale",
}


class Part(NamedTuple):
    """A tensor that a packed matrix consists of."""

    shape: tuple[int, ...]
    dtypes: Collection[str]  # as safetensors spells them
    is_optional: bool = False


class PackedLayer(NamedTuple):
    """A packed matrix of a checkpoint."""

    name: str  # of the matrix in a checkpoint of floats: "model.layers.0.mlp.down_proj.weight"
    shape: tuple[int, int]  # [d_out, d_in]
    quantization: Quantization
    entries: dict[str, TensorEntry]  # last part of a tensor's name -> entry

    @property
    def n_bytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(x.stop - x.start for x in self.entries.values())

    @property
    def kind(self) -> str:
        """Its type, for a reader."""
        return f"{self.quantization.method} int{self.quantization.n_bits}"

    @property
    def parts(self) -> dict[str, Part]:
        """The tensors that it should have, by the last part of the name."""
        return parts_of(self.quantization, self.shape)

    def tensor_name(self, leaf: str) -> str:
        """The name of one of its tensors in the file."""
        return f"{self.name.removesuffix(WEIGHT)}.{leaf}"


def parts_of(quantization: Quantization, shape: tuple[int, int]) -> dict[str, Part]:
    """List the tensors of a packed matrix.

    Parameters
    ----------
    quantization : Quantization
    shape : tuple of int
        [d_out, d_in].

    Returns
    -------
    parts : dict of str to Part
        By the last part of the name.
    """
    (d_out, d_in), n_bits = shape, quantization.n_bits
    n_group = quantization.count_groups(d_in)
    if quantization.method == "gptq":
        return {
            "qweight": Part((count_words(d_in, n_bits), d_out), ("I32",)),
            "qzeros": Part((n_group, count_words(d_out, n_bits)), ("I32",)),
            "scales": Part((n_group, d_out), SCALES),
            "g_idx": Part((d_in,), INDICES, is_optional=True),
        }
    scales = (1,) if quantization.has_one_scale else (d_out, n_group)
    parts = {"weight_scale": Part(scales, SCALES)}
    is_stream = quantization.format == "pack-quantized"
    if is_stream:
        parts["weight_packed"] = Part((d_out, count_words(d_in, n_bits)), ("I32",))
        parts["weight_shape"] = Part((2,), INDICES)
    else:
        parts["weight"] = Part((d_out, d_in), ("I8",))
    if not quantization.is_symmetric:
        packed = Part((count_words(d_out, n_bits), n_group), ("I32",))
        plain = Part(scales, ("I8",))
        is_packed = is_stream and not quantization.has_one_scale
        parts["weight_zero_point"] = packed if is_packed else plain
    parts["weight_g_idx"] = Part((d_in,), INDICES, is_optional=True)
    return parts


def packed_layers(
    entries: Mapping[str, TensorEntry],
    matrices: Mapping[str, tuple[int, ...]],
    quantization: Quantization | None,
) -> dict[str, PackedLayer]:
    """List the packed matrices of a checkpoint.

    A matrix is packed where the file holds its codes, and a linear map of a layer also where it
    holds neither codes nor floats.

    Parameters
    ----------
    entries : dict of str to TensorEntry
    matrices : dict of str to tuple of int
        Names and shapes of the matrices in a checkpoint of floats.
    quantization : Quantization or None

    Returns
    -------
    layers : dict of str to PackedLayer
        By the name of the matrix.
    """
    layers: dict[str, PackedLayer] = {}
    if quantization is None:
        return layers
    for name, shape in matrices.items():
        if len(shape) != 2 or not name.endswith(WEIGHT):
            continue
        base, entry = name.removesuffix(WEIGHT), entries.get(name)
        is_expected = ".layers." in name and entry is None
        is_integer = entry is not None and entry.dtype not in SAFETENSORS_DTYPES
        if is_expected or is_integer or f"{base}.{MARKERS[quantization.format]}" in entries:
            leaves = parts_of(quantization, (shape[0], shape[1]))
            held = {x: entries[f"{base}.{x}"] for x in leaves if f"{base}.{x}" in entries}
            layers[name] = PackedLayer(name, (shape[0], shape[1]), quantization, held)
    return layers


def zero_biases(entries: Mapping[str, TensorEntry], layers: Collection[str]) -> set[str]:
    """List the biases of packed layers that are 0, which old files have for every layer."""
    files, found = TensorFiles(), set()
    for name in layers:
        bias = f"{name.removesuffix(WEIGHT)}.bias"
        entry = entries.get(bias)
        if entry and entry.dtype in SAFETENSORS_DTYPES and not files.read(entry).any():
            found.add(bias)
    return found


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


Codes = Callable[[slice], np.ndarray]


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
