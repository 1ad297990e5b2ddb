"""Weights on their way to a GPU: through two pinned buffers, of which one is filled while the other is copied."""

import numpy as np

__all__ = ["Upload"]

BUFFER_BYTES = 2**25  # of each buffer: large enough for the full rate of the bus, small beside any checkpoint


class Upload:
    """Copies arrays of mapped files to the current CUDA device, piece by piece.

    The host never holds a tensor whole: a piece goes from the file's pages into a pinned buffer, and from there to the device
    while the next piece fills the other buffer.

    Parameters
    ----------
    xp : module
        CuPy.
    n_bytes : int, optional
        Of each buffer; default: 32 MiB.

    Notes
    -----
    The copies are queued on the current stream, so that whatever runs there later sees them done.  Call `finish` at the end.

    Source: "CUDA C++ Best Practices Guide", section 10.1.2, asynchronous and overlapping transfers.
    """

    def __init__(self, xp, n_bytes=None):
        self._xp, self._n_bytes = xp, BUFFER_BYTES if n_bytes is None else n_bytes
        self._buffers = [xp.cuda.alloc_pinned_memory(self._n_bytes) for _ in range(2)]
        self._copied = [xp.cuda.Event(disable_timing=True) for _ in range(2)]  # when the buffer may be filled again
        self._turn = 0

    def stack(self, views, dtype, advance=None):
        """Copy host arrays to the device, their rows below each other.

        Parameters
        ----------
        views : list of NumPy arrays
            In one piece each, and equal but for their first axis.  The list is emptied, so that a mapping ends with its copy.
        dtype : dtype
            Of the result; entries are converted on the way.
        advance : function (n_bytes), optional
            Is told of every piece, in bytes of the source.

        Returns
        -------
        x : CuPy array
        """
        first = views[0]
        shape = (sum(view.shape[0] for view in views), *first.shape[1:]) if first.ndim else ()
        x, start = self._xp.empty(shape, dtype=dtype), 0
        while views:
            view = views.pop(0).reshape(-1)
            for at in range(0, view.size, self._n_bytes // dtype.itemsize):
                piece = view[at : at + self._n_bytes // dtype.itemsize]
                self._copy(piece, x, (start + at) * dtype.itemsize, dtype)
                if advance:
                    advance(piece.nbytes)
            start += view.size
            del view
        return x

    def _copy(self, piece, x, offset, dtype):
        """Put a piece into the buffer whose turn it is, and queue its copy."""
        buffer, copied = self._buffers[self._turn], self._copied[self._turn]
        copied.synchronize()
        np.frombuffer(buffer, dtype, piece.size)[:] = piece
        stream = self._xp.cuda.get_current_stream()
        (x.data + offset).copy_from_host_async(buffer.ptr, piece.size * dtype.itemsize, stream)
        copied.record(stream)
        self._turn = 1 - self._turn

    def finish(self):
        """Wait for the last copies, and give the buffers back."""
        for copied in self._copied:
            copied.synchronize()
        self._buffers = []
        self._xp.get_default_pinned_memory_pool().free_all_blocks()
