"""The same values laid out in memory in other ways, each inside a larger buffer whose other entries
are NaN or out of range.
"""

import numpy as np

BAND = 64  # entries before and behind; a vector of any kernel is shorter
PATTERN = 0xFFC5A5A5  # a NaN that no computation gives


def buffer(size, dtype):
    """Memory whose every entry is what no result may depend on."""
    dtype = np.dtype(dtype)
    if dtype == np.float32:
        return np.full(size, PATTERN, np.uint32).view(np.float32)
    return np.full(size, np.iinfo(dtype).max if dtype.kind in "iu" else np.nan, dtype)


def guarded(shape, dtype):
    """An array [...] in the middle of a buffer."""
    size = int(np.prod(shape))
    return buffer(size + 2 * BAND, dtype)[BAND : BAND + size].reshape(shape)


def filled(view, x):
    """A view of a buffer, filled."""
    view[...] = x
    return view


def contiguous(x):
    return filled(guarded(x.shape, x.dtype), x)


def strided(x):
    return filled(guarded((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)[..., ::2], x)


def backward(x):
    return filled(guarded(x.shape, x.dtype)[..., ::-1], x)


def fortran(x):
    return filled(guarded(x.shape[::-1], x.dtype).T, x)


def broadcast(x):
    """The first entry of the first axis, again and again."""
    return np.broadcast_to(contiguous(x[:1]), x.shape)


def read_only(x):
    x = contiguous(x)
    x.flags.writeable = False
    return x


def unaligned(x):
    size = x.nbytes + 2 * BAND * x.itemsize
    raw = buffer(size // x.itemsize + 1, x.dtype).view(np.uint8)
    start = BAND * x.itemsize + 1
    return filled(raw[start : start + x.nbytes].view(x.dtype).reshape(x.shape), x)


def leading(x):
    """The first two axes stand in memory in the other order."""
    if x.ndim < 2:
        return contiguous(x)
    return filled(guarded((x.shape[1], x.shape[0], *x.shape[2:]), x.dtype).swapaxes(0, 1), x)


def apart(x):
    """Rows are further apart than they are long."""
    return filled(guarded((*x.shape[:-1], x.shape[-1] + 7), x.dtype)[..., 3:-4], x)


def rows_backward(x):
    return filled(guarded(x.shape, x.dtype)[::-1], x)


LAYOUTS = {
    f.__name__: f
    for f in (
        contiguous,
        strided,
        backward,
        fortran,
        broadcast,
        read_only,
        unaligned,
        leading,
        apart,
        rows_backward,
    )
}


def memory_of(x):
    """The buffer that a view belongs to."""
    while x.base is not None:
        x = x.base
    return x


class Allocator:
    """Stands for NumPy, or for `scratch`, in a module of kernels: what it lends has bands, and
    `check` looks at them.
    """

    def __init__(self):
        self.lent = []

    def __getattr__(self, name):
        return getattr(np, name)

    def empty(self, shape, dtype=np.float64):
        x = guarded(shape if isinstance(shape, tuple) else (shape,), dtype)
        self.lent.append(x)
        return x

    def zeros(self, shape, dtype=np.float64):
        return filled(self.empty(shape, dtype), 0)

    def array(self, x, *args, **options):
        x = np.array(x, *args, **options)
        return filled(self.empty(x.shape, x.dtype), x)

    def scratch(self, _, shape, dtype):
        return self.empty(shape, dtype)

    def check(self):
        """Raise unless every band is as it was."""
        for x in self.lent:
            memory, want = memory_of(x).view(np.uint8), memory_of(buffer(1, x.dtype)).view(np.uint8)
            edge = BAND * x.itemsize
            for band in (memory[:edge], memory[len(memory) - edge :]):
                assert (band.reshape(-1, len(want)) == want).all(), (x.shape, x.dtype)
