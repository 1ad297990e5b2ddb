"""The header of a GGUF file: metadata, and where the tensors are.

Every count and every offset is compared with the size of the file before it is used.
"""

import math
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = Any

__all__ = ["GGUFHeader", "TensorRange", "parse_header"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_AXES = 4
KEY_BYTES = 13  # at least, of a key and its value: length, type, one byte
TENSOR_INFO_BYTES = 24  # at least, of the entry of a tensor
ALIGNMENT = 32  # of the tensors, unless general.alignment says otherwise
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}  # type of a value -> format of struct, little-endian
STRING, ARRAY = 8, 9


class TensorRange(NamedTuple):
    """Where a tensor is in the file."""

    name: str
    kind: int  # GGML's number of the type
    shape: tuple[int, ...]  # slowest axis first
    start: int  # bytes from the beginning of the file
    stop: int


class TensorInfo(NamedTuple):
    """What the header says of a tensor."""

    shape: tuple[int, ...]  # slowest axis first
    kind: int
    offset: int  # from the beginning of the data


class GGUFHeader(NamedTuple):
    """What the header of a GGUF file says."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorRange]


def parse_header(data: Array, block_sizes: dict[int, tuple[int, int]]) -> GGUFHeader:
    """Parse the header of a GGUF file.

    Parameters
    ----------
    data : NumPy array [n_bytes]
        uint8, the whole file.
    block_sizes : dict of int to tuple of int
        GGML's number of a type -> entries and bytes of one block.

    Returns
    -------
    header : GGUFHeader

    Raises
    ------
    ValueError
        When the file is not GGUF of version 2 or 3, little-endian, or contradicts itself.

    Notes
    -----
    Arrays of arrays are refused, as in llama.cpp.

    Source: docs/gguf.md in ggml.
    """
    cursor = _Cursor(memoryview(data))
    if bytes(cursor.read_bytes(4)) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = cursor.scalar("I")
    if version not in VERSIONS:
        raise ValueError(f"its version must be 2 or 3, little-endian, got {version}")
    n_tensors = cursor.count(TENSOR_INFO_BYTES, "tensors")
    n_keys = cursor.count(KEY_BYTES, "metadata values")
    metadata = _unique(_read_value, n_keys, cursor, "metadata value")
    entries = _unique(_read_tensor_info, n_tensors, cursor, "tensor")
    start = _align(cursor.position, metadata.get("general.alignment", ALIGNMENT))
    tensors = {
        name: _locate(name, entry, start, len(data), block_sizes) for name, entry in entries.items()
    }
    _check_overlap(tensors)
    return GGUFHeader(metadata, tensors)


class _Cursor:
    """Reads a buffer from its beginning, and never beyond its end."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.position = 0

    def read_bytes(self, n_bytes: int) -> memoryview:
        """Return the next bytes."""
        stop = self.position + n_bytes
        if stop > len(self.data):
            raise ValueError(
                f"at byte {self.position} it should have {n_bytes} more bytes, but it has "
                f"{len(self.data) - self.position}"
            )
        taken = self.data[self.position : stop]
        self.position = stop
        return taken

    def scalar(self, code: str) -> Any:
        """Read a number in a format of `struct`, little-endian."""
        (x,) = struct.unpack("<" + code, self.read_bytes(struct.calcsize("<" + code)))
        return x

    def count(self, n_bytes: int, what: str) -> int:
        """Read a number of things that have at least so many bytes each."""
        n = self.scalar("Q")
        n_left = len(self.data) - self.position
        if n * n_bytes > n_left:
            raise ValueError(f"it should have {n} {what}, but only {n_left} bytes are left")
        return n

    def text(self) -> str:
        """Read a string of UTF-8."""
        start = self.position
        raw = bytes(self.read_bytes(self.count(1, "bytes of text")))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"the text at byte {start} is not UTF-8 ({error.reason})") from None


def _unique(read: Callable[[_Cursor], Any], n: int, cursor: _Cursor, what: str) -> dict[str, Any]:
    """Read n named things; no two of the same name."""
    found: dict[str, Any] = {}
    for _ in range(n):
        name = cursor.text()
        if name in found:
            raise ValueError(f"it has two {what}s of the name {name[:100]!r}")
        found[name] = read(cursor)
    return found


def _read_value(cursor: _Cursor) -> Any:
    """Read the type of a metadata value, and the value."""
    kind = cursor.scalar("I")
    if kind == ARRAY:
        return _read_array(cursor)
    if kind == STRING:
        return cursor.text()
    return cursor.scalar(_scalar_code(kind))


def _read_array(cursor: _Cursor) -> list[Any]:
    """Read a list of strings or of numbers."""
    kind = cursor.scalar("I")
    if kind == ARRAY:
        raise ValueError("it holds an array of arrays, which no Llama model has")
    if kind == STRING:
        n = cursor.count(8, "texts")
        return [cursor.text() for _ in range(n)]
    code = "<" + _scalar_code(kind)
    n = cursor.count(struct.calcsize(code), "numbers")
    return np.frombuffer(cursor.read_bytes(n * struct.calcsize(code)), code).tolist()


def _scalar_code(kind: int) -> str:
    """Return the format of a type of value."""
    if kind not in SCALARS:
        raise ValueError(f"a metadata value has the unknown type {kind}")
    return SCALARS[kind]


def _read_tensor_info(cursor: _Cursor) -> TensorInfo:
    """Read shape, type and offset of a tensor."""
    n_axes = cursor.scalar("I")
    if n_axes > MOST_AXES:
        raise ValueError(f"a tensor must have at most {MOST_AXES} axes, got {n_axes}")
    shape = tuple(cursor.scalar("Q") for _ in range(n_axes))[::-1]
    return TensorInfo(shape, cursor.scalar("I"), cursor.scalar("Q"))


def _align(position: int, alignment: Any) -> int:
    """Return the first multiple of the alignment that is not before a position."""
    is_power = type(alignment) is int and alignment > 0 and not alignment & (alignment - 1)
    if not is_power:
        raise ValueError(f"general.alignment must be a power of two, got {str(alignment)[:60]}")
    return -(-position // alignment) * alignment


def _locate(
    name: str,
    entry: TensorInfo,
    data_start: int,
    n_bytes: int,
    block_sizes: dict[int, tuple[int, int]],
) -> TensorRange:
    """Compute where a tensor begins and ends; its offset counts from `data_start`."""
    shown, shape, kind = name[:100], entry.shape, entry.kind
    if kind not in block_sizes:
        raise ValueError(f"the tensor {shown!r} has the unknown type {kind}")
    n_entries, block_bytes = block_sizes[kind]
    width = shape[-1] if shape else 1
    if min(shape, default=1) < 1 or width % n_entries:
        raise ValueError(
            f"the tensor {shown!r} of shape {list(shape)} must have rows of whole blocks of "
            f"{n_entries} entries"
        )
    start = data_start + entry.offset
    stop = start + math.prod(shape) // n_entries * block_bytes
    if stop > n_bytes:
        raise ValueError(
            f"the tensor {shown!r} ends at byte {stop}, but the file has {n_bytes} bytes"
        )
    return TensorRange(name, kind, shape, start, stop)


def _check_overlap(tensors: dict[str, TensorRange]) -> None:
    """Raise where two tensors share bytes."""
    stop, before = 0, ""
    for place in sorted(tensors.values(), key=lambda place: (place.start, place.stop)):
        if place.start < stop:
            raise ValueError(f"the tensors {before[:100]!r} and {place.name[:100]!r} overlap")
        stop, before = place.stop, place.name
