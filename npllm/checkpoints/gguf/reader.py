"""GGUF files: metadata values, and tensors as rows of bytes."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from npllm.arrays import DTYPES, widen
from npllm.checkpoints.extras import import_extra
from npllm.checkpoints.gguf.ggml_types import TYPES
from npllm.checkpoints.gguf.header import TensorRange, parse_header
from npllm.config.regular_file import open_regular
from npllm.config.strict_json import printable
from npllm.errors import NpllmError, NpllmOSError, NpllmValueError
from npllm.quantized.block_formats import FORMATS
from npllm.quantized.block_weight import BlockWeight

__all__ = ["FLOATS", "GGUFFile", "GGUFTensor", "dequantized_rows", "is_gguf", "tensor_kind"]

ARCHITECTURES = ("llama", "phi3")
FLOATS = {"F32": DTYPES["float32"], "F16": DTYPES["float16"], "BF16": DTYPES["bfloat16"]}
READ = (*FLOATS, *FORMATS)  # types that a model runs on
ROWS_AT_ONCE = 4096  # of a matrix: bounds the memory of dequantization
# Beside `eos`, the tokens that end an answer in llama.cpp.
END_NAMES = ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")
END_TEXTS = frozenset(
    ("<|end|>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
)


class GGUFTensor(NamedTuple):
    """A tensor of a mapped GGUF file."""

    name: str
    kind: str  # name of GGML's type, such as "Q4_K"
    shape: tuple[int, ...]  # slowest axis first
    rows: np.ndarray  # uint8 [n_rows, bytes of a row], a view of the mapped file

    @property
    def stored(self) -> Any:
        """The tensor as it is stored: a float array, or a `BlockWeight`.

        Raises
        ------
        NpllmValueError
            When it is of a type that has no definition here.
        """
        if self.kind in FORMATS and len(self.shape) == 2:
            return BlockWeight(self.rows, self.kind)
        if self.kind in FORMATS:
            return BlockWeight(self.rows, self.kind).widened().reshape(self.shape)
        if self.kind in FLOATS:
            dtype = FLOATS[self.kind].newbyteorder("<")
            is_aligned = self.rows.ctypes.data % dtype.itemsize == 0
            rows = self.rows if is_aligned else self.rows.copy()
            return rows.view(dtype).reshape(self.shape)
        raise NpllmValueError(
            f"{printable(self.name[:100])} is stored as {self.kind}, which is not implemented; "
            f"npllm runs on {', '.join(READ)}: use a file of the same model in one of these types"
        )


class GGUFFile:
    """A memory-mapped GGUF file that holds a model of the architecture llama or phi3.

    Parameters
    ----------
    path : Path

    Raises
    ------
    NpllmOSError
        When the file cannot be read or is no regular file.
    NpllmValueError
        When it is not GGUF, incomplete, contradicts itself, or is of another architecture.

    Notes
    -----
    The file must stay as it is while arrays view it, as `TensorFiles` says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        sizes = {number: (kind.n_entries, kind.n_bytes) for number, kind in TYPES.items()}
        try:
            with open_regular(path) as file:
                data = np.memmap(file, np.uint8, mode="r")
            header = parse_header(data, sizes)
        except NpllmError:
            raise
        except OSError as error:
            raise NpllmOSError(f"{path}: cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise NpllmValueError(
                f"{path}: not a complete GGUF file: {printable(str(error))}"
            ) from None
        self.metadata = header.metadata
        self.tensors = {
            name: GGUFTensor(name, TYPES[at.kind].name, at.shape, _rows(data, at))
            for name, at in header.tensors.items()
        }
        self.n_bytes = len(data)
        self.architecture = self.value("general.architecture", str)
        if self.architecture not in ARCHITECTURES:
            raise NpllmValueError(
                f"{path}: general.architecture must be one of {', '.join(ARCHITECTURES)}, "
                f"got {printable(self.architecture[:60])!r}, which is not implemented"
            )
        version = self.value_or("general.quantization_version", int, 2)
        self.require("general.quantization_version", version, 2)

    def own(self, name: str) -> str:
        """Return the key of a value of this architecture: `llama.block_count`."""
        return f"{self.architecture}.{name}"

    def value(self, key: str, kind: type) -> Any:
        """Return one metadata value.

        Parameters
        ----------
        key : str
            Must be present.
        kind : type
            int, float, str or list; an integer is accepted as a float.

        Raises
        ------
        NpllmValueError
            When the key is missing or the value is of another type.
        """
        if key not in self.metadata:
            raise NpllmValueError(
                f"{self.path}: the GGUF metadata has no {key!r}; a model must have it"
            )
        found = self.metadata[key]
        if kind is float and isinstance(found, int):
            found = float(found)
        if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
            raise NpllmValueError(
                f"{self.path}: {key} must be {kind.__name__}, "
                f"got {type(found).__name__}: {printable(str(found)[:60])}"
            )
        return found

    def values(self, key: str, kind: type) -> list[Any]:
        """Return a metadata value that is a list of strings or of integers.

        Raises
        ------
        NpllmValueError
            When the key is missing or the value is of another type.
        """
        found = self.value(key, list)
        if not all(type(x) is kind for x in found):
            raise NpllmValueError(f"{self.path}: {key} must be a list of {kind.__name__}")
        return found

    def value_or(self, key: str, kind: type, default: Any) -> Any:
        """Return one metadata value, or a default where the file does not have it."""
        return self.value(key, kind) if key in self.metadata else default

    def require(self, what: str, got: object, wanted: object) -> None:
        """Raise unless a value is the one that the conversion is written for."""
        if got != wanted:
            raise NpllmValueError(
                f"{self.path}: {what} must be {wanted!r}, got {got!r}; "
                "other GGUF files are not read"
            )

    def special_ids(self) -> dict[str, Any]:
        """Return the begin, end and padding ids, as config.json holds them.

        Begin and padding default to the end id.  The end is a list where the file names several
        ids that end an answer.

        Raises
        ------
        NpllmValueError
            When an id is missing or no index into the vocabulary.

        Notes
        -----
        Source: the ids of `special_eog_ids` that llama.cpp reads from metadata (llama-vocab.cpp).
        """
        eos = self.token_id("eos")
        ends = [self.token_id(name) for name in END_NAMES if self.has_token_id(name)]
        ends = [*dict.fromkeys([eos, *ends])]
        return {
            "bos_token_id": self.token_id("bos") if self.has_token_id("bos") else eos,
            "eos_token_id": ends if len(ends) > 1 else eos,
            "pad_token_id": self.token_id("padding") if self.has_token_id("padding") else eos,
        }

    def stop_ids(self) -> list[int]:
        """Return the ids that end an answer, by metadata or by their text, eos first.

        Notes
        -----
        The converter writes no id for `<|end|>` of Phi-3; llama.cpp goes by the texts of tokens.

        Source: `special_eog_ids` in llama.cpp's llama-vocab.cpp.
        """
        named = [self.token_id(name) for name in ("eos", *END_NAMES) if self.has_token_id(name)]
        tokens = self.values("tokenizer.ggml.tokens", str)
        return [*dict.fromkeys([*named, *(i for i, x in enumerate(tokens) if x in END_TEXTS)])]

    def has_token_id(self, name: str) -> bool:
        """Return whether the metadata name the id of a special token."""
        return f"tokenizer.ggml.{name}_token_id" in self.metadata

    def token_id(self, name: str) -> int:
        """Return the id of a special token: `eos`, `bos`, ...; it must be in the vocabulary."""
        key = f"tokenizer.ggml.{name}_token_id"
        token, n_vocab = self.value(key, int), len(self.value("tokenizer.ggml.tokens", list))
        if not 0 <= token < n_vocab:
            raise NpllmValueError(
                f"{self.path}: special ids must be below n_vocab = {n_vocab}, got {key} = {token}"
            )
        return token


def _rows(data: np.ndarray, bounds: TensorRange) -> np.ndarray:
    """View the bytes of a tensor as rows along its last axis."""
    n_rows = math.prod(bounds.shape[:-1])
    return np.asarray(data)[bounds.start : bounds.stop].reshape(n_rows, -1)


def is_gguf(path: Path) -> bool:
    """Tell whether a path names a GGUF file, and no folder."""
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def tensor_kind(name: str) -> str:
    """Return the kind of a tensor by its name: `attn_q` for `blk.3.attn_q.weight`."""
    return name.split(".")[-2]


def dequantized_rows(tensor: GGUFTensor) -> Iterator[np.ndarray]:
    """Yield the rows of a tensor in bfloat16, a block of rows at a time.

    Raises
    ------
    MissingExtraError
        When the type has no definition here, and the package `gguf` is not installed.
    NpllmValueError
        When that package cannot dequantize the type either.
    """
    for start in range(0, len(tensor.rows), ROWS_AT_ONCE):
        rows = tensor.rows[start : start + ROWS_AT_ONCE]
        yield _dequantized(tensor, rows).astype(ml_dtypes.bfloat16)


def _dequantized(tensor: GGUFTensor, rows: np.ndarray) -> np.ndarray:
    """Widen rows of bytes to float32, by the definition or else by the package `gguf`."""
    if tensor.kind in READ:
        part = tensor._replace(rows=rows, shape=(len(rows), tensor.shape[-1]))
        return widen(part.stored, np.float32)
    gguf = import_extra("gguf", f"converting {tensor.kind}")
    quants = import_extra("gguf.quants", f"converting {tensor.kind}")
    try:
        return quants.dequantize(rows, gguf.GGMLQuantizationType[tensor.kind])
    except NotImplementedError as error:
        raise NpllmValueError(f"{tensor.name} is stored as {tensor.kind}: {error}") from error
