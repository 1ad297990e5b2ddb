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

__all__ = ["PARTS", "library", "multiplies", "product"]

Array = Any

PARTS = 3  # in which float32 has no more bits
THREADS = 256
BFLOAT16, FLOAT32 = 14, 0  # cudaDataType_t: CUDA_R_16BF, CUDA_R_32F
AS_IT_IS, TRANSPOSED = 0, 1  # cublasOperation_t
SUMS_IN_FLOAT32, ANY_ALGORITHM = 68, -1  # CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT
OLDEST = 80  # compute capability of the first tensor cores for bfloat16


@functools.cache
def library() -> tuple[Any, Any] | None:
    """Return CuPy's module of cuBLAS and what gives its handle; None on older devices."""
    import cupy

    if int(cupy.cuda.Device().compute_capability) < OLDEST:
        return None
    from cupy_backends.cuda.libs import cublas

    return cublas, cupy.cuda.device.get_cublas_handle


def multiplies(x: Array, weight: Any) -> bool:
    """Tell whether `product` takes these: float32 rows and a bfloat16 matrix, not empty."""
    if is_packed(weight) or entry(weight) != "bf16" or entry(x) != "float" or weight.ndim != 2:
        return False
    fits = x.ndim > 0 and x.shape[-1:] == weight.shape[1:] and x.size > 0 and weight.size > 0
    return fits and library() is not None


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
    xp, (d_out, d_in) = array_namespace(x, weight, bias), weight.shape
    n_rows = prod(x.shape[:-1])
    parts = xp.empty((n_parts, n_rows, d_in), dtype=DTYPES["bfloat16"])
    x_there, n = xp.ascontiguousarray(x), x.size
    variant = (("PARTS", n_parts),)
    launching.launch("split", variant, -(-n // THREADS), THREADS, x_there, parts, np.int64(n))
    y = xp.empty((n_rows, d_out), dtype=xp.float32)
    weight = xp.ascontiguousarray(weight)
    for p in reversed(range(n_parts)):
        add_product(parts[p], weight, y, is_first=p == n_parts - 1)
    if bias is not None:
        y = y + widen(bias, xp.float32)
    return xp.reshape(y, (*x.shape[:-1], d_out))


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
