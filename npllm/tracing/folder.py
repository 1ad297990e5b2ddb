"""The folder of a trace: index.json, and safetensors files with the values of one layer each."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from npllm.checkpoints.safetensors import (
    NUMPY_DTYPES,
    TensorEntry,
    check_file_name,
    read_header,
)
from npllm.checkpoints.tensor_files import TensorFiles
from npllm.config.regular_file import read_text
from npllm.config.strict_json import parse_json, quote
from npllm.errors import NpllmOSError, NpllmTypeError, NpllmValueError
from npllm.tracing.index import check_index

__all__ = [
    "FolderValues",
    "files_of",
    "folder_path",
    "new_folder",
    "read_index",
    "write_index",
    "write_values",
]

Array = Any

INDEX = "index.json"
LARGEST_INDEX = 2**28  # bytes; an index has about 300 kB for each step of 30 layers


def folder_path(folder: Any) -> Path:
    """Return a path; raise NpllmTypeError for what is none."""
    try:
        return Path(folder)
    except TypeError:
        raise NpllmTypeError(f"folder must be a path, got {type(folder).__name__}") from None


def new_folder(path: Any) -> Path:
    """Make the folder that a trace is written to.

    Raises
    ------
    NpllmTypeError
        For what is no path.
    NpllmValueError
        When it holds anything already.
    NpllmOSError
        When it cannot be made.
    """
    folder = folder_path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_used = any(folder.iterdir())
    except OSError as error:
        raise _not_written(folder, error) from None
    if is_used:
        raise NpllmValueError(
            f"{folder}: a trace goes into a new or empty folder, and this one holds files; "
            "name another one, or remove it"
        )
    return folder


def write_values(folder: Path, file: str, values: Mapping[str, Array]) -> None:
    """Write one file of values: NumPy arrays by name.

    Raises
    ------
    NpllmOSError
        When it cannot be written.
    """
    from safetensors.numpy import save_file

    dense = {name: np.ascontiguousarray(x) for name, x in values.items()}
    try:
        save_file(dense, folder / file)
    except (OSError, SafetensorError) as error:
        raise _not_written(folder / file, error) from None


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write index.json: last, so that a folder with an index is complete."""
    try:
        (folder / INDEX).write_text(json.dumps(index) + "\n", encoding="utf-8")
    except OSError as error:
        raise _not_written(folder / INDEX, error) from None


def read_index(folder: Path) -> dict[str, Any]:
    """Read and check index.json.

    Raises
    ------
    NpllmOSError
        When it cannot be read.
    NpllmValueError
        When it is no index of a trace.
    """
    path = folder / INDEX
    index = parse_json(read_text(path, LARGEST_INDEX), path)
    check_index(index, str(path))
    return index


class FolderValues(Mapping[str, Array]):
    """The values of a folder, read when they are asked for: read-only views of the mapped files.

    Parameters
    ----------
    folder : Path
    index : dict
        Checked by `check_index`.

    Raises
    ------
    NpllmOSError
        When a file is missing, truncated or not safetensors.
    NpllmValueError
        When a file is not in the folder, or holds another shape or dtype than the index says.
        Names the file and the tensor.

    Notes
    -----
    What must not happen to the files meanwhile is told in `TensorFiles`.
    """

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self._files = TensorFiles(keeps=False)
        self._entries = _entries(folder, index["values"])

    def __getitem__(self, name: str) -> Array:
        entry = self._entries[name]
        try:
            return self._files.read(entry)
        except NpllmOSError:  # such as too many open files: a copy holds none
            return TensorFiles(is_mapped=False).read(entry)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def files_of(values: Mapping[str, dict[str, Any]]) -> dict[str, list[str]]:
    """List the files of an index with the names that each holds."""
    files: dict[str, list[str]] = {}
    for name, entry in values.items():
        files.setdefault(entry["file"], []).append(name)
    return files


def _entries(folder: Path, values: Mapping[str, dict[str, Any]]) -> dict[str, TensorEntry]:
    """Find each value of the index in the headers of the files."""
    _check_files(folder, values.values())
    headers = {file: read_header(folder / file) for file in files_of(values)}
    found = {name: headers[entry["file"]].get(name) for name, entry in values.items()}
    for name, entry in values.items():
        _check_stored(folder / entry["file"], name, entry, found[name])
    return {name: entry for name, entry in found.items() if entry is not None}


def _check_files(folder: Path, entries: Iterable[dict[str, Any]]) -> None:
    for entry in entries:
        check_file_name(folder / INDEX, entry.get("file"))


def _check_stored(path: Path, name: str, wanted: dict[str, Any], found: TensorEntry | None) -> None:
    """Raise unless a file holds a value as the index describes it."""
    if found is None:
        raise NpllmValueError(f"{path}: {INDEX} says that it holds {quote(name)}, but it does not")
    stored = NUMPY_DTYPES.get(found.dtype), list(found.shape)
    if stored != (wanted["dtype"], wanted["shape"]):
        raise NpllmValueError(
            f"{path}: {quote(name)} must be {quote(wanted['dtype'])} {quote(wanted['shape'])} "
            f"as {INDEX} says, got {found.dtype} {stored[1]}"
        )


def _not_written(path: Path, error: Exception) -> NpllmOSError:
    reason = getattr(error, "strerror", None) or error
    return NpllmOSError(f"{path}: cannot be written ({reason}); name another folder")
