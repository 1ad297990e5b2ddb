"""GGUF files: metadata values, and tensors as rows of bfloat16.  Llama architecture only."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from npllm.checkpoints.extras import import_extra
from npllm.errors import NpllmOSError, NpllmValueError

if TYPE_CHECKING:
    from gguf import ReaderTensor

__all__ = ["GGUFFile", "dequantized_rows", "tensor_kind", "tensor_shape"]

ROWS_AT_ONCE = 4096  # of a matrix: bounds the memory of dequantization


class GGUFFile:
    """A memory-mapped GGUF file that holds a Llama-architecture model.

    Parameters
    ----------
    path : Path

    Raises
    ------
    MissingExtraError
        When the package `gguf` is not installed.
    NpllmOSError
        When the file cannot be read.
    NpllmValueError
        When it is not GGUF, incomplete, or of another architecture.
    """

    def __init__(self, path: Path) -> None:
        gguf = import_extra("gguf", "reading GGUF")
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
        except OSError as error:
            raise NpllmOSError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise NpllmValueError(f"{path}: not a complete GGUF file: {error}") from error
        self._fields = reader.fields
        self.tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in reader.tensors}
        architecture = self.value("general.architecture", str)
        self.require("general.architecture", architecture, "llama")

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
        if key not in self._fields:
            raise NpllmValueError(
                f"{self.path}: the GGUF metadata has no {key!r}; a Llama model must have it"
            )
        found = self._fields[key].contents()
        if kind is float and isinstance(found, int):
            found = float(found)
        if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
            raise NpllmValueError(
                f"{self.path}: {key} must be {kind.__name__}, "
                f"got {type(found).__name__}: {str(found)[:60]}"
            )
        return found

    def value_or(self, key: str, kind: type, default: Any) -> Any:
        """Return one metadata value, or a default where the file does not have it."""
        return self.value(key, kind) if key in self._fields else default

    def require(self, what: str, got: object, wanted: object) -> None:
        """Raise unless a value is the one that the conversion is written for."""
        if got != wanted:
            raise NpllmValueError(
                f"{self.path}: {what} must be {wanted!r}, got {got!r}; "
                "other GGUF files are not converted"
            )

    def special_ids(self) -> dict[str, int]:
        """Return the begin, end and padding ids; begin and padding default to the end id."""
        eos = self.value("tokenizer.ggml.eos_token_id", int)
        ids = {
            "bos_token_id": self.value_or("tokenizer.ggml.bos_token_id", int, eos),
            "eos_token_id": eos,
            "pad_token_id": self.value_or("tokenizer.ggml.padding_token_id", int, eos),
        }
        n_vocab = len(self.value("tokenizer.ggml.tokens", list))
        if not all(0 <= i < n_vocab for i in ids.values()):
            raise NpllmValueError(
                f"{self.path}: special ids must be below n_vocab = {n_vocab}, got {ids}"
            )
        return ids


def tensor_kind(name: str) -> str:
    """Return the kind of a tensor by its name: `attn_q` for `blk.3.attn_q.weight`."""
    return name.split(".")[-2]


def tensor_shape(tensor: "ReaderTensor") -> tuple[int, ...]:
    """Return the shape of a tensor, slowest axis first."""
    return tuple(int(n) for n in reversed(tensor.shape))


def dequantized_rows(tensor: "ReaderTensor") -> Iterator[np.ndarray]:
    """Yield the rows of a tensor in bfloat16, a block of rows at a time.

    Raises
    ------
    NpllmValueError
        When the `gguf` package cannot dequantize the tensor's type.
    """
    from gguf.quants import dequantize

    for start in range(0, len(tensor.data), ROWS_AT_ONCE):
        try:
            rows = dequantize(tensor.data[start : start + ROWS_AT_ONCE], tensor.tensor_type)
        except NotImplementedError as error:
            raise NpllmValueError(
                f"{tensor.name} is stored as {tensor.tensor_type.name}: {error}"
            ) from error
        yield rows.astype(ml_dtypes.bfloat16)
