"""Compiling and launching, and what the kernels ask of an array: type, alignment, strides."""

import functools
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from npllm.arrays import DTYPES

__all__ = [
    "ALIGNMENT",
    "ENTRIES",
    "NULL",
    "OLDEST_TENSOR_CORES",
    "OPTIONS",
    "STORED",
    "aligned",
    "compiled",
    "entry",
    "even_rows",
    "has_tensor_cores",
    "launch",
    "pointer",
    "source",
    "steps",
]

Array = Any

OPTIONS = ("-std=c++17",)  # CuPy adds its own, -ftz=true among them
# dtype -> its name in common.cu
ENTRIES = {DTYPES["float32"]: "float", DTYPES["bfloat16"]: "bf16", DTYPES["float16"]: "f16"}
STORED = ENTRIES | {np.dtype(np.int8): "i8"}  # of the weights of products
# source -> the files whose functions it uses, beside common.cu
INCLUDED = {
    "attention_mma": ("mma",),
    "rms_norm": ("parts",),
    "split": ("parts",),
    "swiglu": ("parts",),
    "linear": ("product",),
    "linear_blocks": ("blocks", "product"),
    "embed_blocks": ("blocks",),
}
OLDEST_TENSOR_CORES = 80  # compute capability of the first tensor cores for bfloat16
NULL = np.uint64(0)  # the pointer of an argument that is left out
ALIGNMENT = 16  # bytes: what one load of a kernel fetches


def launch(kernel: str, definitions: tuple, n_blocks: int, n_threads: int, *arguments: Any) -> None:
    """Run a kernel on the current stream.

    Parameters
    ----------
    kernel : str
        Name of the function, and of its source.
    definitions : tuple of (str, value)
        The variant: macros, one of `npllm.kernels.cuda.VARIANTS`.
    n_blocks, n_threads : int
    *arguments : array or NumPy scalar
        Numbers are NumPy scalars of the width that the kernel expects.
    """
    compiled(kernel, definitions)((n_blocks,), (n_threads,), arguments)


@functools.cache
def compiled(kernel: str, definitions: tuple) -> Any:
    """Compile one variant; CuPy keeps the binary in its own cache between runs as well."""
    import cupy

    options = (*OPTIONS, *(f"-D{name}={value}" for name, value in definitions))
    return cupy.RawModule(code=source(kernel), options=options).get_function(kernel)


@functools.cache
def has_tensor_cores() -> bool:
    """Tell whether the device has tensor cores that take bfloat16."""
    import cupy

    return int(cupy.cuda.Device().compute_capability) >= OLDEST_TENSOR_CORES


def source(kernel: str) -> str:
    """Return the CUDA C++ text of a kernel, what it shares with the others included."""
    folder = Path(__file__).parent
    names = ("common", *INCLUDED.get(kernel, ()), kernel)
    return "".join((folder / f"{name}.cu").read_text(encoding="utf-8") for name in names)


def entry(x: Any) -> str | None:
    """Name the type of a device array's entries in CUDA; None for another type, and on the host."""
    return None if isinstance(x, np.ndarray) else ENTRIES.get(getattr(x, "dtype", None))


def pointer(x: Array | None) -> Any:
    """Return the argument for an array that may be left out."""
    return NULL if x is None else x


def aligned(x: Array, xp: Any) -> Array:
    """Return `x`, or a copy, in one piece that begins at a multiple of 16 bytes."""
    x = xp.ascontiguousarray(x)
    return x if x.data.ptr % ALIGNMENT == 0 else xp.astype(x, x.dtype)


def even_rows(x: Array, xp: Any, alignment: int = 1) -> tuple[Array, int]:
    """Return `x`, or a copy, with rows at equal distances, and that distance in entries.

    Parameters
    ----------
    x : array [..., d]
    xp : module
    alignment : int
        Every row must begin at a multiple of so many bytes.
    """
    strides = steps(x)
    lead = [(n, step) for n, step in zip(x.shape[:-1], strides[:-1], strict=True) if n > 1]
    distance = lead[-1][1] if lead else 0
    even = all(outer == n * inner for (_, outer), (n, inner) in pairwise(lead))
    whole = x.shape[-1] == 1 or strides[-1] == 1
    if (
        even
        and whole
        and x.data.ptr % alignment == 0
        and distance * x.dtype.itemsize % alignment == 0
    ):
        return x, distance
    return aligned(x, xp), x.shape[-1]


def steps(x: Array) -> tuple[int, ...]:
    """Return the strides of an array in entries."""
    itemsize = x.dtype.itemsize
    return tuple(stride // itemsize for stride in x.strides)
