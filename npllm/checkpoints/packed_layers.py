"""Matrices that GPTQ or compressed-tensors store as several tensors: their names and shapes.

GPTQ             qweight, qzeros, scales, g_idx
pack-quantized   weight_packed, weight_scale, weight_shape, weight_zero_point, weight_g_idx
int-quantized    weight, weight_scale, weight_zero_point      (naive-quantized is the same)
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from npllm.checkpoints.safetensors import SAFETENSORS_DTYPES, TensorEntry
from npllm.checkpoints.tensor_files import TensorFiles
from npllm.config.quantization import Quantization
from npllm.quantized.bit_stream import count_words

__all__ = ["PackedLayer", "packed_layers", "zero_biases"]

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
            "g_idx": Part((d_in,), INDICES, not quantization.has_order),
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
    parts["weight_g_idx"] = Part((d_in,), INDICES, not quantization.has_order)
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
