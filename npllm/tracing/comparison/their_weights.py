"""The parameters of a port: reading them, and putting fused and split projections side by side."""

from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from npllm.arrays import DTYPES, to_numpy
from npllm.checkpoints.safetensors import SAFETENSORS_DTYPES, read_entries, read_header
from npllm.checkpoints.tensor_files import TensorFiles
from npllm.config.config import Config
from npllm.config.strict_json import printable
from npllm.errors import NpllmOSError, NpllmTypeError
from npllm.testing.libraries import on_host
from npllm.tracing.comparison.parameters import BIASES

__all__ = ["SPLIT", "Pair", "array_of", "open_weights", "pairs_of"]

Array = Any

MODULES = {
    "input_layernorm": "",
    "qkv_proj": "self_attn.",
    "o_proj": "self_attn.",
    "post_attention_layernorm": "",
    "gate_up_proj": "mlp.",
    "down_proj": "mlp.",
}
SPLIT = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class Pair:
    """A parameter under the name that the port gives it.

    Parameters
    ----------
    name : str
        Of the tensor, with ".weight" or ".bias".
    field : str
        The name in `npllm.tracing.graph` of what it is, or is a part of; biases with ".bias".
    ours : array
        The part of our parameter that it should be.
    """

    def __init__(self, name: str, field: str, ours: Array) -> None:
        self.name, self.field, self.ours = name, field, ours


class _File(Mapping[str, Array]):
    """The tensors of safetensors files, each read when it is asked for."""

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self._files = TensorFiles()
        self._entries = {n: e for n, e in entries.items() if e.dtype in SAFETENSORS_DTYPES}

    def __getitem__(self, name: str) -> Array:
        return self._files.read(self._entries[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def open_weights(source: Any) -> Mapping[str, Array]:
    """Open a safetensors file, a folder of them, or a mapping.

    Raises
    ------
    NpllmOSError
        When it cannot be read.
    NpllmTypeError
        For what is none of the three.
    """
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, str | PathLike):
        raise NpllmTypeError(
            "weights must be a mapping from names to arrays, a safetensors file or a folder, got "
            f"{type(source).__name__}"
        )
    path = Path(source)
    if path.is_dir():
        return _File(read_entries(path))
    if not path.is_file():
        raise NpllmOSError(f"{path}: no such file or folder")
    return _File(read_header(path))


def array_of(source: Mapping[str, Any], name: str) -> Array:
    """Return a tensor as a NumPy array of a float type.

    Raises
    ------
    NpllmTypeError
    """
    x = to_numpy(on_host(source[name]))
    if str(x.dtype) not in DTYPES:
        raise NpllmTypeError(
            f"weights: {printable(name[:200])} must be an array of {', '.join(DTYPES)}, "
            f"got {x.dtype}"
        )
    return x


def pairs_of(names: Any, params: Any, config: Config) -> Iterator[Pair]:
    """List what a port's file should hold, by the names it uses: fused or split projections.

    Parameters
    ----------
    names : collection of str
        Of the port's tensors.
    params : Params
    config : Config
    """
    is_tied = params.lm_head is params.embed_tokens
    for leaf in ("embed_tokens", "norm", "lm_head"):
        node = leaf if leaf == "lm_head" else f"model.{leaf}"
        if leaf != "lm_head" or not is_tied or f"{node}.weight" in names:
            yield Pair(f"{node}.weight", node, getattr(params, leaf))
    for number, layer in enumerate(params.layers):
        for leaf, module in MODULES.items():
            node = f"model.layers.{number}.{module}{leaf}"
            split = SPLIT.get(leaf, ()) if f"{node}.weight" not in names else ()
            split = split if split and config.model_type == "llama" else _named(node, split, names)
            yield from _parts(node, "weight", getattr(layer, leaf), split, config)
            bias = getattr(layer, BIASES[leaf]) if leaf in BIASES else None
            if bias is not None:
                yield from _parts(node, "bias", bias, split, config)


def _named(node: str, split: tuple[str, ...], names: Any) -> tuple[str, ...]:
    """The parts, where the port has any of them."""
    front = node.rpartition(".")[0]
    return split if any(f"{front}.{part}.weight" in names for part in split) else ()


def _parts(
    node: str, kind: str, ours: Array, split: tuple[str, ...], config: Config
) -> Iterator[Pair]:
    """One pair, or one for each part of what we have fused."""
    field = node if kind == "weight" else f"{node}.bias"
    if not split:
        yield Pair(f"{node}.{kind}", field, ours)
        return
    front, d = node.rpartition(".")[0], config.head_dim
    sizes = [config.intermediate_size] * 2
    if len(split) == 3:
        sizes = [config.num_attention_heads * d] + [config.num_key_value_heads * d] * 2
    start = 0
    for part, n_rows in zip(split, sizes, strict=True):
        yield Pair(f"{front}.{part}.{kind}", field, ours[start : start + n_rows])
        start += n_rows
