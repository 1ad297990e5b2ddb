"""Normalisation of the vector at each position."""

from typing import Any

from npllm.arrays import array_namespace, compute_dtype, expect_shape, ieee_semantics, widen

__all__ = ["layer_norm", "rms_norm"]

Array = Any


@ieee_semantics
def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Divide each row by its root mean square, then scale it.

        y[..., i] = weight[i] * x[..., i] / sqrt(mean_j x[..., j]**2 + eps)

    Parameters
    ----------
    x : array [..., d_model]
    weight : array [d_model]
        One gain for each channel.
    eps : float
        Keeps a row of zeros finite; is added inside the root.  Phi-3 uses 1e-5.  With 0, a row of
        zeros gives NaN.

    Returns
    -------
    y : array [..., d_model]
        A new array in the dtype of `x`.

    Raises
    ------
    NpllmValueError
        When `weight` does not have the width of `x`.

    Notes
    -----
    Computes in float32 (float64 when either input is) and rounds once, at the end.  Transformers
    rounds the normalised row to the dtype of `x` before it multiplies by `weight`; with float32
    activations the two are the same.

    Source: "Root Mean Square Layer Normalization" (Zhang and Sennrich 2019), equation 4;
    `Phi3RMSNorm` in Transformers.
    """
    xp = array_namespace(x, weight)
    expect_shape("x", x, dots=None, d_model=None)
    expect_shape("weight", weight, d_model=x.shape[-1])
    dtype = compute_dtype(x, weight)
    wide = widen(x, dtype)
    mean_square = _mean(wide * wide, xp)
    y = widen(weight, dtype) * (wide / xp.sqrt(mean_square + eps))
    return y if y.dtype == x.dtype else xp.astype(y, x.dtype)


@ieee_semantics
def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """Shift each row to mean 0 and scale it to variance 1, then scale and shift every channel.

        mu = mean_j x[..., j],   var = mean_j (x[..., j] - mu)**2
        y[..., i] = weight[i] * (x[..., i] - mu) / sqrt(var + eps) + bias[i]

    Parameters
    ----------
    x : array [..., d_model]
    weight : array [d_model]
    bias : array [d_model]
    eps : float
        Stands inside the root.  With 0, a row of equal entries gives NaN.

    Returns
    -------
    y : array [..., d_model]
        A new array in the dtype of `x`.

    Raises
    ------
    NpllmValueError
        When `weight` or `bias` does not have the width of `x`.

    Notes
    -----
    Computes in float32 (float64 when any input is) and rounds once.

    Source: "Layer Normalization" (Ba et al. 2016), equation 4; `torch.nn.LayerNorm`.
    """
    xp = array_namespace(x, weight, bias)
    expect_shape("x", x, dots=None, d_model=None)
    expect_shape("weight", weight, d_model=x.shape[-1])
    expect_shape("bias", bias, d_model=x.shape[-1])
    dtype = compute_dtype(x, weight, bias)
    wide = widen(x, dtype)
    centred = wide - _mean(wide, xp)
    variance = _mean(centred * centred, xp)
    y = widen(weight, dtype) * (centred / xp.sqrt(variance + eps)) + widen(bias, dtype)
    return y if y.dtype == x.dtype else xp.astype(y, x.dtype)


def _mean(x: Array, xp: Any) -> Array:
    """Mean of each row, [..., 1]; 0 for a row without entries, of which libraries warn or raise."""
    if x.shape[-1] == 0:
        return xp.zeros((*x.shape[:-1], 1), dtype=x.dtype)
    return xp.mean(x, axis=-1, keepdims=True)
