"""Writing safetensors files: the header first, then tensor by tensor."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from npllm.arrays import DTYPES
from npllm.checkpoints.safetensors import NUMPY_DTYPES

__all__ = ["safetensors_header", "write_tensors"]

DATA_ALIGNMENT = 64  # bytes of the file: the first tensor starts at a multiple
Layout = Mapping[str, tuple[str, tuple[int, ...]]]


def safetensors_header(layout: Layout) -> bytes:
    """Return the header of a safetensors file of contiguous tensors.

    Parameters
    ----------
    layout : dict of str to (str, tuple of int)
        Name -> dtype, as safetensors spells it, and shape; in the order of the data.

    Returns
    -------
    header : bytes
        Padded: the data start at a multiple of `DATA_ALIGNMENT` bytes of the file.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name, (dtype, shape) in layout.items():
        start, stop = stop, stop + _n_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _n_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    name = NUMPY_DTYPES[dtype]
    return math.prod(shape) * np.dtype(DTYPES.get(name, name)).itemsize


def write_tensors(
    path: Path,
    layout: Layout,
    read: Callable[[str], np.ndarray],
    written: Callable[[str], None],
) -> None:
    """Write a safetensors file; one tensor at a time is in memory.

    Parameters
    ----------
    path : Path
    layout : dict of str to (str, tuple of int)
        As in `safetensors_header`.
    read : function (name) -> array
        Of the dtype and shape that the layout says.
    written : function (name)
        Called when the tensor is in the file.
    """
    with open(path, "wb") as file:
        file.write(safetensors_header(layout))
        for name in layout:
            x = read(name)
            little = x.astype(x.dtype.newbyteorder("<"), copy=False)
            file.write(np.ascontiguousarray(little).reshape(-1).view(np.uint8).data)
            written(name)
