"""Writing a GGUF file: metadata, then one tensor at a time, under the final name when complete."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from npllm.arrays import is_packed, widen
from npllm.checkpoints.disk import require_space_for
from npllm.checkpoints.extras import import_extra
from npllm.checkpoints.gguf.ggml_types import TYPES
from npllm.checkpoints.gguf.read_back import check_read_back
from npllm.checkpoints.gguf.reader import FLOATS
from npllm.checkpoints.gguf.sources import GGUFSource, SourceTensor
from npllm.checkpoints.gguf.tensor_types import NUMBERS, FileType, ModelSizes, tensor_type
from npllm.errors import NpllmOSError, NpllmValueError
from npllm.progress import progress_bar
from npllm.quantized.block_packing import quantize_blocks
from npllm.quantized.block_weight import BlockWeight

__all__ = ["converted", "write_gguf"]

Array = Any
ALIGNMENT = 32  # bytes: tensors start at multiples
QUANTIZATION_VERSION = 2  # of the block formats
BAND = 2**22  # entries to convert at a time
UINT32, INT32, FLOAT32 = 4, 5, 6  # types of metadata
BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = 7, 8, 9, 10, 11, 12


def write_gguf(source: GGUFSource, output: Path, wanted: FileType, *, progress: bool) -> None:
    """Write a checkpoint as a GGUF file.

    Parameters
    ----------
    source : GGUFSource
    output : Path
        Replaced if it exists, in one step.
    wanted : FileType
    progress : bool
        Show a bar on stderr.

    Raises
    ------
    MissingExtraError
        When the package `gguf` is not installed.
    NpllmValueError
        When a tensor holds what its type cannot, or the file would not load as it should.
    NpllmOSError
        When the file cannot be written; an incomplete one is removed.
    """
    sizes = _model_sizes(source)
    kinds = {name: tensor_type(name, x.shape, wanted, sizes) for name, x in source.tensors.items()}
    with _complete_or_nothing(output) as partial:
        writer = _start(source, partial, wanted, kinds)
        try:
            _write_header(writer, source, partial, output)
            _write_tensors(writer, source, kinds, progress)
        finally:
            writer.close()


def _model_sizes(source: GGUFSource) -> ModelSizes:
    """Return what the choice of types depends on."""
    config = source.config
    is_tied = "output.weight" not in source.tensors
    shares = config.num_key_value_heads != config.num_attention_heads
    return ModelSizes(config.num_hidden_layers, is_tied, shares)


@contextlib.contextmanager
def _complete_or_nothing(output: Path) -> Iterator[Path]:
    """Yield a path beside the output that is renamed at the end, and removed after an error."""
    try:
        handle, name = tempfile.mkstemp(prefix=f"{output.name}.partial-", dir=output.parent)
        os.close(handle)
        partial = Path(name)
        try:
            yield partial
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
            partial.chmod(0o666 & ~_umask())
            os.replace(partial, output)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        if isinstance(error, NpllmOSError):
            raise
        reason = error.strerror or str(error)
        raise NpllmOSError(
            f"{output}: cannot be written ({reason}): make room or name another place"
        ) from error


def _umask() -> int:
    """Return the permissions that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _start(source: GGUFSource, partial: Path, wanted: FileType, kinds: dict[str, str]) -> Any:
    """Make a writer that knows all metadata, and shape and type of every tensor."""
    gguf = import_extra("gguf", "writing GGUF")
    logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)
    writer = gguf.GGUFWriter(partial, source.config.model_type)
    general = {
        "general.file_type": wanted.number,
        "general.quantization_version": QUANTIZATION_VERSION,
    }
    for key, value in (source.metadata | general).items():
        _add(gguf, writer, key, value)
    shapes = {name: (x.shape, "F32") for name, x in source.rope.items()}
    shapes |= {name: (x.shape, kinds[name]) for name, x in source.tensors.items()}
    for name, (shape, kind) in shapes.items():
        writer.add_tensor_info(
            name,
            shape,
            np.dtype(np.float32),  # of what is in memory: the shape is not that of bytes
            _stored_bytes(shape, kind),
            raw_dtype=gguf.GGMLQuantizationType[kind],
        )
    return writer


def _add(gguf: Any, writer: Any, key: str, value: Any) -> None:
    """Add one metadata value; lists hold one type, and empty ones are left out."""
    if isinstance(value, list) and not value:
        return
    number = ARRAY if isinstance(value, list) else _value_type(value)
    inner = gguf.GGUFValueType(_value_type(*value)) if number == ARRAY else None
    writer.add_key_value(key, value, gguf.GGUFValueType(number), inner)


def _value_type(*values: Any) -> int:
    """Return GGUF's type of values: integers of a list are signed, a single one is not."""
    first = values[0]
    if isinstance(first, bool):
        return BOOL
    if isinstance(first, str):
        return STRING
    if isinstance(first, int):
        if len(values) == 1 and first >= 0:
            return UINT32 if first < 2**32 else UINT64
        return INT32 if all(-(2**31) <= x < 2**31 for x in values) else INT64
    return FLOAT32


def _stored_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Return the bytes of a tensor in a type."""
    layout = TYPES[NUMBERS[kind]]
    return prod(shape) // layout.n_entries * layout.n_bytes


def _write_header(writer: Any, source: GGUFSource, partial: Path, output: Path) -> None:
    """Write metadata and RoPE tensors, and read them back from a file of the final size.

    What cannot be read back as it was is found before hours of work on the weights.
    """
    total = sum(_padded(x.nbytes) for tensors in writer.tensors for x in tensors.values())
    require_space_for(output, total)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0]
    start = _padded(file.tell())
    for x in source.rope.values():
        writer.write_tensor_data(np.ascontiguousarray(widen(x, np.float32)))
    file.flush()
    os.truncate(partial, start + total)
    check_read_back(partial, source, output)


def _padded(n_bytes: int) -> int:
    """Round up to a multiple of the alignment."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def _write_tensors(writer: Any, source: GGUFSource, kinds: dict[str, str], progress: bool) -> None:
    """Convert and write all tensors, one at a time."""
    total = sum(x.n_bytes for x in source.tensors.values())
    with progress_bar(total, "quantizing", wanted=progress) as advance:
        for name, x in source.tensors.items():
            raw = _raw(source.path, name, x, kinds[name])
            writer.write_tensor_data(raw)
            x.release()
            advance(x.n_bytes, name)


def _raw(path: Path, name: str, x: SourceTensor, kind: str) -> np.ndarray:
    """Return the bytes of a tensor in a type; the same bytes where it has that type."""
    try:
        y = converted(x.read(), kind, is_same=x.kind == kind)
    except NpllmValueError as error:
        raise NpllmValueError(f"{path}: {name}: {error}") from None
    y = y.blocks if is_packed(y) else y
    return np.ascontiguousarray(y).reshape(-1).view(np.uint8)


def converted(x: Array, kind: str, *, is_same: bool = False) -> Array:
    """Convert a tensor to a type of GGML.

    Parameters
    ----------
    x : array [...] or PackedMatrix
    kind : str
        "F32", "F16", "BF16" or a block format.
    is_same : bool
        `x` is stored in that type already.

    Returns
    -------
    y : array or BlockWeight

    Raises
    ------
    NpllmValueError
        When `x` holds numbers that the type does not: too large ones; NaN or infinity in blocks.
    """
    if is_same or (isinstance(x, BlockWeight) and x.format == kind):
        return x
    if kind not in FLOATS:
        return quantize_blocks(x, kind)
    y = np.empty(x.shape, FLOATS[kind].newbyteorder("<"))
    n_rows = max(1, BAND // max(1, x.shape[-1])) if x.ndim == 2 else len(x)
    for start in range(0, len(x), n_rows):
        _round(widen(x[start : start + n_rows]), y[start : start + n_rows], kind)
    return y


def _round(x: np.ndarray, y: np.ndarray, kind: str) -> None:
    """Round finite numbers to finite ones."""
    with np.errstate(over="ignore"):
        y[...] = x
    if np.count_nonzero(np.isfinite(y)) < np.count_nonzero(np.isfinite(x)):
        raise NpllmValueError(
            f"{np.abs(x[np.isfinite(x)]).max():g} is larger than {kind} can hold; bf16 and f32 can"
        )
