"""The feed-forward half of a block: activation functions and the gated product."""

from npllm.arrays import array_namespace, compute_dtype, widen
from npllm.errors import NpllmValueError

__all__ = ["silu", "swiglu"]


def silu(x):
    """Multiply each entry by its logistic sigmoid.

        y = x * sigmoid(x) = x / (1 + exp(-x))

    Parameters
    ----------
    x : array [...]

    Returns
    -------
    y : array [...]
        A new array in the dtype of `x`.

    Notes
    -----
    Computes in float32 (float64 when `x` is).  The exponential is taken of -|x| only, so that it cannot overflow:
    sigmoid(x) = 1 / (1 + exp(-x)) for x >= 0, and exp(x) / (1 + exp(x)) below.

    Source: "Gaussian Error Linear Units" (Hendrycks and Gimpel 2016), section 4.3; `torch.nn.functional.silu`.
    """
    xp = array_namespace(x)
    wide = widen(x)
    decay = xp.exp(-xp.abs(wide))
    y = wide * xp.where(wide >= 0, xp.ones_like(decay), decay) / (1 + decay)
    return y if y.dtype == x.dtype else xp.astype(y, x.dtype)


def swiglu(gate, up):
    """Gate one projection of the hidden state by the SiLU of another.

        y = silu(gate) * up

    Parameters
    ----------
    gate : array [..., d_ff]
    up : array [..., d_ff]

    Returns
    -------
    y : array [..., d_ff]
        A new array in the dtype of `gate`.

    Raises
    ------
    NpllmValueError
        When the shapes differ.

    Notes
    -----
    Computes in float32 (float64 when either input is).  In a checkpoint the rows of `gate_up_proj` are gate first, then up.

    Source: "GLU Variants Improve Transformer" (Shazeer 2020), equation 5; `Phi3MLP` in Transformers.
    """
    xp = array_namespace(gate, up)
    if gate.shape != up.shape:
        raise NpllmValueError(f"gate and up must have one shape [..., d_ff], got gate {list(gate.shape)} and up {list(up.shape)}")
    dtype = compute_dtype(gate, up)
    y = silu(widen(gate, dtype)) * widen(up, dtype)
    return y if y.dtype == gate.dtype else xp.astype(y, gate.dtype)
