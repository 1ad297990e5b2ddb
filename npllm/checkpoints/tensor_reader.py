"""Tensors of a safetensors checkpoint as arrays of the wanted dtype, on the host or on a GPU."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from npllm.arrays import asarray, dtype_named, native, widest
from npllm.checkpoints.packed_layers import PackedLayer
from npllm.checkpoints.packed_values import read_layer
from npllm.checkpoints.safetensors import TensorEntry
from npllm.checkpoints.tensor_files import TensorFiles
from npllm.checkpoints.upload import Upload
from npllm.errors import NpllmValueError
from npllm.quantized.dtypes import QUANTIZERS, convert
from npllm.quantized.stacked import stack

__all__ = ["TensorReader"]

Array = Any


class TensorReader:
    """Reads tensors that the headers list.

    Parameters
    ----------
    entries : dict of str to TensorEntry
    dtype : str, optional
        As in `load_params`; None: as stored.
    xp : module
        The array library of the result.
    advance : function (n_bytes, label), optional
        Called after every read, with the bytes read and the name of the file.
    mmap : bool
        True: tensors on the host are views of the mapped files where they keep their dtype.  False:
        copies; see `TensorFiles`.
    packed : dict of str to PackedLayer, optional
        The matrices that are stored in several tensors, by their names in floats.
    """

    def __init__(
        self,
        entries: Mapping[str, TensorEntry],
        dtype: str | None,
        xp: Any,
        advance: Callable[[int, str], None] | None = None,
        *,
        mmap: bool = True,
        packed: Mapping[str, PackedLayer] | None = None,
    ) -> None:
        self.entries = entries
        self.dtype = dtype
        self.xp = xp
        self.advance = advance or (lambda n_bytes, label: None)  # noqa: ARG005
        self.files = TensorFiles(is_mapped=mmap)
        self.packed = packed or {}
        self.upload = Upload(xp) if xp.__name__ == "cupy" else None

    def read(self, names: Collection[str]) -> Array:
        """Read one tensor, or concatenate several along their rows."""
        if any(name in self.packed for name in names):
            return self._read_packed(names)
        views = [self.files.read(self.entries[name]) for name in names]
        if (
            self.upload and self.dtype not in QUANTIZERS
        ):  # quantized on the host, one tensor at a time
            return self._send(self.upload, views, names)
        x = views[0] if len(views) == 1 else self._concatenate(views)
        try:
            x = _convert(x, self.dtype)
        except NpllmValueError as error:  # NaN cannot be quantised
            name = next(iter(names))
            raise NpllmValueError(f"{self.entries[name].file}: {name}: {error}") from None
        for name in names:
            entry = self.entries[name]
            self.advance(entry.stop - entry.start, entry.file.name)
        if getattr(x, "base", None) is None:  # x is no view of the file
            self._release_pages(names)
        return asarray(x, self.xp)

    def _read_packed(self, names: Collection[str]) -> Array:
        """Read matrices of which one at least is packed, and put them below each other."""
        parts = []
        for name in names:
            layer = self.packed.get(name)
            entries = layer.entries.values() if layer else [self.entries[name]]
            parts.append(
                read_layer(layer, self.files) if layer else native(self.files.read(*entries))
            )
            for entry in entries:
                self.advance(entry.stop - entry.start, entry.file.name)
                if layer:
                    self.files.release_pages(entry)
        try:
            return asarray(convert(stack(parts), self.dtype), self.xp)
        except NpllmValueError as error:
            raise NpllmValueError(f"{next(iter(names))}: {error}") from None

    def _release_pages(self, names: Collection[str]) -> None:
        """Give back the memory of the pages of tensors that were copied."""
        for name in names:
            self.files.release_pages(self.entries[name])

    def finish(self) -> None:
        """Wait until all copies to the device are done."""
        if self.upload:
            self.upload.finish()

    def _send(self, upload: Upload, views: list[np.ndarray], names: Collection[str]) -> Array:
        """Copy tensors from the mapped file to the device."""
        dtype = self._common_dtype(views)
        label = self.entries[next(iter(names))].file.name
        x = upload.stack(views, dtype, lambda n_bytes: self.advance(n_bytes, label))
        self._release_pages(names)
        return x

    def _common_dtype(self, views: list[np.ndarray]) -> np.dtype:
        """Return the wanted dtype; else the widest stored one, so that no tensor is rounded."""
        if self.dtype is None or self.dtype in QUANTIZERS:
            return widest(view.dtype for view in views)
        return dtype_named(self.dtype)

    def _concatenate(self, views: list[np.ndarray]) -> np.ndarray:
        """Copy tensors into one array.

        The list is emptied, so that a tensor that was read into memory is freed after its copy.
        """
        dtype = self._common_dtype(views)
        n_rows = sum(view.shape[0] for view in views)
        x = np.empty((n_rows, *views[0].shape[1:]), dtype)
        start = 0
        while views:
            view = views.pop(0)
            x[start : start + view.shape[0]] = view
            start += view.shape[0]
            del view
        return x


def _convert(x: np.ndarray, dtype: str | None) -> Array:
    """Convert to a named dtype; int8 and int4 round matrices and keep other tensors as stored."""
    if dtype in QUANTIZERS:
        return QUANTIZERS[dtype](x) if x.ndim == 2 else x
    return native(x) if dtype is None else x.astype(dtype_named(dtype), copy=False)
