"""The bytes of tensors: views of one mapping per file, or copies.

A mapping holds one file descriptor.  It lives as long as an array that views it.
"""

import mmap
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from npllm.arrays import DTYPES
from npllm.checkpoints.safetensors import NUMPY_DTYPES, TensorEntry
from npllm.errors import NpllmOSError

__all__ = ["TensorFiles", "release_mapped", "view_of"]

Array = Any


class TensorFiles:
    """Reads the tensors of safetensors files; each file is mapped or opened once.

    Parameters
    ----------
    is_mapped : bool
        True: tensors are read-only views of the mapped files.  False: they are read-only copies,
        which no later change of a file can reach.
    keeps : bool
        True: a file stays mapped as long as this object lives.  False: as long as an array views
        it, so that a walk over many files holds few of them open.

    Notes
    -----
    A mapped file must stay as it is while arrays view it.  Where another program overwrites it in
    place, the arrays change; where it is truncated, the operating system ends the process with
    SIGBUS.  A file that is replaced by a rename, or deleted, is safe: the mapping keeps the old
    one.
    """

    def __init__(self, is_mapped: bool = True, *, keeps: bool = True) -> None:
        self._is_mapped = is_mapped
        self._mappings: MutableMapping[Path, np.ndarray] = {} if keeps else WeakValueDictionary()

    def read(self, entry: TensorEntry) -> np.ndarray:
        """Read one tensor of numbers.

        Parameters
        ----------
        entry : TensorEntry
            Of a dtype in `NUMPY_DTYPES`.

        Returns
        -------
        x : NumPy array
            Read-only and little-endian; a copy where the file does not align it to its item size.

        Raises
        ------
        NpllmOSError
            When the file cannot be read, or is shorter than its header says.
        """
        dtype = _stored_dtype(entry)
        if entry.start == entry.stop:
            return np.zeros(entry.shape, dtype)
        raw = self._view(entry) if self._is_mapped else _copy(entry)
        aligned = raw if raw.ctypes.data % dtype.itemsize == 0 else raw.copy()
        aligned.flags.writeable = False
        return np.asarray(aligned).view(dtype).reshape(entry.shape)

    def _view(self, entry: TensorEntry) -> np.ndarray:
        """View the bytes of a tensor in the mapped file."""
        mapping = self._mappings.get(entry.file)
        if mapping is None:
            try:
                mapping = np.memmap(entry.file, np.uint8, mode="r")
            except (OSError, ValueError) as error:
                raise _changed(entry, f"cannot be mapped into memory ({error})") from None
            self._mappings[entry.file] = mapping
        raw = mapping[entry.start : entry.stop]
        if len(raw) != entry.stop - entry.start:
            raise _changed(entry, "cannot be mapped into memory (it ends within a tensor)")
        return raw

    def release_pages(self, entry: TensorEntry) -> None:
        """Give back the memory of a tensor's pages; a view reads them from the file again.

        For tensors that were copied, so that memory does not hold them twice.
        """
        if entry.file in self._mappings:
            release_mapped(self._mappings[entry.file][entry.start : entry.stop])


def release_mapped(view: np.ndarray) -> None:
    """Give back the memory of the pages that a view of a mapped file covers whole.

    The view stays valid: the pages are read from the file again.
    """
    mapping: Any = view
    while isinstance(mapping, np.ndarray):
        mapping = mapping.base
    if isinstance(mapping, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        first = view.ctypes.data - np.frombuffer(mapping, np.uint8).ctypes.data
        start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        n_bytes = first + view.nbytes - start
        if n_bytes > 0:
            mapping.madvise(mmap.MADV_DONTNEED, start, n_bytes)


def view_of(entry: TensorEntry) -> np.ndarray:
    """View one tensor in the mapped file; as `TensorFiles().read(entry)`."""
    return TensorFiles().read(entry)


def _stored_dtype(entry: TensorEntry) -> np.dtype:
    """Return the little-endian dtype of a tensor."""
    name = NUMPY_DTYPES[entry.dtype]
    return (DTYPES[name] if name in DTYPES else np.dtype(name)).newbyteorder("<")


def _copy(entry: TensorEntry) -> np.ndarray:
    """Read the bytes of a tensor into a new array."""
    n_bytes = entry.stop - entry.start
    try:
        raw = np.fromfile(entry.file, np.uint8, n_bytes, offset=entry.start)
    except OSError as error:
        raise _changed(entry, f"cannot be read ({error.strerror or error})") from None
    if len(raw) != n_bytes:
        raise _changed(entry, "cannot be read (it ends within a tensor)")
    return raw


def _changed(entry: TensorEntry, what: str) -> NpllmOSError:
    """Make the error for a file that is not as its header said."""
    return NpllmOSError(f"{entry.file}: {what}; did it change meanwhile?")
