"""The residual stream: every half of a block adds to it, nothing replaces it."""

from typing import Any

from npllm.arrays import array_namespace, compute_dtype, ieee_semantics, widen
from npllm.errors import NpllmValueError

__all__ = ["add"]

Array = Any


@ieee_semantics
def add(x: Array, y: Array) -> Array:
    """Add the output of a half block to the residual stream.

        z = x + y

    Parameters
    ----------
    x : array [..., d_model]
        The stream.
    y : array [..., d_model]

    Returns
    -------
    z : array [..., d_model]
        A new array in the dtype of `x`.

    Raises
    ------
    NpllmValueError
        When the shapes differ: a stream does not broadcast.

    Notes
    -----
    Computes in float32 (float64 when either input is) and rounds once.  It is an op, and not a `+`
    in the model, since it is a place where engines round (`npllm.ops.emulate`) and where kernels
    fuse.

    Source: "Deep Residual Learning for Image Recognition" (He et al. 2015), equation 1;
    `Phi3DecoderLayer` in Transformers.
    """
    xp = array_namespace(x, y)
    if x.shape != y.shape:
        raise NpllmValueError(
            "x and y must have one shape [..., d_model], "
            f"got x {list(x.shape)} and y {list(y.shape)}"
        )
    dtype = compute_dtype(x, y)
    z = widen(x, dtype) + widen(y, dtype)
    return z if z.dtype == x.dtype else xp.astype(z, x.dtype)
