"""Products of many rows with a bfloat16 weight on the tensor cores, as in a prefill.

    x = x_1 + x_2 + x_3,   each x_p in bfloat16 (split.cu)
    y = sum_p x_p @ weight.T,   the smallest part first

The sum of the parts is x itself, and a product of two bfloat16 numbers is exact in float32, in
which the products are added.  So y differs from the float32 product by the order and the rounding
of its sums alone:

    |y - x @ weight.T| <= (d_in + 3) * 2**-23 * (|x_1| + |x_2| + |x_3|) @ |weight.T|

where an addition may truncate, as those of tensor cores do.  It is three products at the rate of
16-bit matrices, and reads the weight as it is stored; the definition widens it, and multiplies at
the rate of float32.  One part, x rounded, is what activations="bfloat16" asks for.
"""

import functools
from math import prod
from typing import Any

import numpy as np

from npllm.arrays import DTYPES, array_namespace, is_packed, widen
from npllm.kernels.cuda import launching
from npllm.kernels.cuda.launching import entry

__all__ = [
    "PARTS",
    "empty_parts",
    "is_matrix",
    "library",
    "multiplied",
    "multiplies",
    "product",
    "split",
]

Array = Any

PARTS = 3  # in which float32 has no more bits
THREADS = 256
BFLOAT16, FLOAT32 = 14, 0  # cudaDataType_t: CUDA_R_16BF, CUDA_R_32F
AS_IT_IS, TRANSPOSED = 0, 1  # cublasOperation_t
SUMS_IN_FLOAT32, ANY_ALGORITHM = 68, -1  # CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT


@functools.cache
def library() -> tuple[Any, Any] | None:
    """Return CuPy's module of cuBLAS and what gives its handle; None on older devices."""
    if not launching.has_tensor_cores():
        return None
    import cupy
    from cupy_backends.cuda.libs import cublas

    return cublas, cupy.cuda.device.get_cublas_handle


def multiplies(x: Array, weight: Any) -> bool:
    """Tell whether `product` takes these: float32 rows and a bfloat16 matrix, not empty."""
    fits = is_matrix(weight) and entry(x) == "float" and x.ndim > 0 and x.size > 0
    return bool(fits and x.shape[-1:] == weight.shape[1:] and library() is not None)


def is_matrix(weight: Any) -> bool:
    """Tell whether a weight is a bfloat16 matrix on the device, not empty."""
    if is_packed(weight) or entry(weight) != "bf16":
        return False
    return bool(weight.ndim == 2 and weight.size > 0)


def product(x: Array, weight: Array, bias: Array | None = None, n_parts: int = PARTS) -> Array:
    """Multiply rows by a transposed bfloat16 matrix on the tensor cores.

    Parameters
    ----------
    x : float32 array [..., d_in]
    weight : bfloat16 array [d_out, d_in]
    bias : array [d_out], optional
    n_parts : int
        3: x as it is; 1: rounded to bfloat16.

    Returns
    -------
    y : float32 array [..., d_out]
    """
    y = multiplied(split(x, n_parts), weight, bias)
    return array_namespace(y).reshape(y, (*x.shape[:-1], weight.shape[0]))


def empty_parts(x: Array, d: int, n_parts: int) -> Array:
    """Return room for the parts of as many rows as x has, of d entries [n_parts, n_rows, d]."""
    shape = (n_parts, prod(x.shape[:-1]), d)
    return array_namespace(x).empty(shape, dtype=DTYPES["bfloat16"])


def split(x: Array, n_parts: int) -> Array:
    """Return the bfloat16 parts [n_parts, n_rows, d] of float32 rows [..., d]."""
    parts, n = empty_parts(x, x.shape[-1], n_parts), np.int64(x.size)
    x = array_namespace(x).ascontiguousarray(x)
    n_blocks = -(-x.size // THREADS)
    launching.launch("split", (("PARTS", n_parts),), n_blocks, THREADS, x, parts, n)
    return parts


def multiplied(
    parts: Array, weight: Array, bias: Array | None = None, residual: Array | None = None
) -> Array:
    """Return residual + sum_p parts[p] @ weight.T + bias, float32 [n_rows, d_out]; the smallest
    part first.
    """
    xp, (d_out, _) = array_namespace(parts, weight, bias), weight.shape
    weight = xp.ascontiguousarray(weight)
    if residual is None:
        y = xp.empty((parts.shape[1], d_out), dtype=xp.float32)
    else:
        rows = xp.ascontiguousarray(xp.reshape(residual, (-1, d_out)))
        y = xp.astype(rows, xp.float32)  # a copy, in the order of rows
    for p in reversed(range(len(parts))):
        add_product(parts[p], weight, y, is_first=residual is None and p == len(parts) - 1)
    return y if bias is None else y + widen(bias, xp.float32)


def add_product(x: Array, weight: Array, y: Array, *, is_first: bool) -> None:
    """Add x @ weight.T to y [n, d_out], or write it there; both factors in bfloat16.

    cuBLAS counts along columns: its y is [d_out, n], its weight [d_in, d_out] and transposed.
    """
    cublas, handle = library()  # type: ignore[misc]
    (n_rows, d_in), d_out = x.shape, weight.shape[0]
    one, beta = np.ones(1, np.float32), np.full(1, not is_first, np.float32)
    cublas.gemmEx(
        handle(),
        TRANSPOSED,
        AS_IT_IS,
        d_out,
        n_rows,
        d_in,
        one.ctypes.data,
        weight.data.ptr,
        BFLOAT16,
        d_in,
        x.data.ptr,
        BFLOAT16,
        d_in,
        beta.ctypes.data,
        y.data.ptr,
        FLOAT32,
        d_out,
        SUMS_IN_FLOAT32,
        ANY_ALGORITHM,
    )
