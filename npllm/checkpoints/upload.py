"""Copies of mapped files to a GPU, by way of two pinned buffers in alternation."""

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["Upload"]

Array = Any
BUFFER_BYTES = 2**25  # of each buffer: enough for the full bandwidth of the bus


class Upload:
    """Copies arrays of mapped files to the current CUDA device, block by block.

    A block is copied from the file's pages into a pinned buffer, and from there to the device while
    the next block fills the other buffer.  The host never holds a whole tensor.

    Parameters
    ----------
    xp : module
        CuPy.
    n_bytes : int, optional
        Of each buffer; default: 32 MiB.

    Notes
    -----
    The copies are queued on the current stream, so later work on that stream sees them done.  Call
    `finish` at the end.

    Source: "CUDA C++ Best Practices Guide", section 10.1.2, asynchronous and overlapping transfers.
    """

    def __init__(self, xp: Any, n_bytes: int | None = None) -> None:
        self._xp = xp
        self._n_bytes = BUFFER_BYTES if n_bytes is None else n_bytes
        self._buffers = [xp.cuda.alloc_pinned_memory(self._n_bytes) for _ in range(2)]
        # Recorded after the copy from a buffer, which may be filled again when it is done.
        self._copied = [xp.cuda.Event(disable_timing=True) for _ in range(2)]
        self._next = 0

    def stack(
        self,
        views: list[np.ndarray],
        dtype: np.dtype,
        advance: Callable[[int], None] | None = None,
    ) -> Array:
        """Copy host arrays to the device, concatenated along their rows.

        Parameters
        ----------
        views : list of NumPy arrays
            Contiguous, with equal shapes except for their first axis.  The list is emptied, so
            that a tensor in memory is freed after its copy.
        dtype : dtype
            Of the result; entries are converted on the host.
        advance : function (n_bytes), optional
            Called for every block, with its bytes in the source.

        Returns
        -------
        x : CuPy array
        """
        first = views[0]
        shape = (sum(view.shape[0] for view in views), *first.shape[1:]) if first.ndim else ()
        x = self._xp.empty(shape, dtype=dtype)
        n_entries = self._n_bytes // dtype.itemsize
        offset = 0
        while views:
            view = views.pop(0).reshape(-1)
            for start in range(0, view.size, n_entries):
                block = view[start : start + n_entries]
                self._copy(block, x, (offset + start) * dtype.itemsize, dtype)
                if advance:
                    advance(block.nbytes)
            offset += view.size
            del view
        return x

    def _copy(self, block: np.ndarray, x: Array, offset: int, dtype: np.dtype) -> None:
        """Fill the next buffer, and queue its copy to byte `offset` of x."""
        buffer, copied = self._buffers[self._next], self._copied[self._next]
        copied.synchronize()
        np.frombuffer(buffer, dtype, block.size)[:] = block
        stream = self._xp.cuda.get_current_stream()
        (x.data + offset).copy_from_host_async(buffer.ptr, block.size * dtype.itemsize, stream)
        copied.record(stream)
        self._next = 1 - self._next

    def finish(self) -> None:
        """Wait for the last copies, and free the buffers."""
        for copied in self._copied:
            copied.synchronize()
        self._buffers = []
        self._xp.get_default_pinned_memory_pool().free_all_blocks()
