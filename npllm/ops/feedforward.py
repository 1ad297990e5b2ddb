"""The feed-forward half of a block: activation functions and the gated product."""

from typing import Any

from npllm.arrays import array_namespace, compute_dtype, ieee_semantics, widen
from npllm.errors import NpllmValueError
from npllm.ops.special import erfc

__all__ = ["gelu", "relu", "silu", "swiglu"]

Array = Any


@ieee_semantics
def silu(x: Array) -> Array:
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
    Computes in float32 (float64 when `x` is).  The exponential is taken of -|x| only, so that it
    cannot overflow: sigmoid(x) = 1 / (1 + exp(-x)) for x >= 0, and exp(x) / (1 + exp(x)) below.  Of
    -inf the formula, and so the result, is NaN.

    Source: "Gaussian Error Linear Units" (Hendrycks and Gimpel 2016), section 4.3;
    `torch.nn.functional.silu`.
    """
    xp = array_namespace(x)
    wide = widen(x)
    y = _times_sigmoid(wide, wide, xp)
    return y if y.dtype == x.dtype else xp.astype(y, x.dtype)


@ieee_semantics
def swiglu(gate: Array, up: Array) -> Array:
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
    Computes in float32 (float64 when either input is).  In a checkpoint the rows of `gate_up_proj`
    are gate first, then up.

    Source: "GLU Variants Improve Transformer" (Shazeer 2020), equation 5; `Phi3MLP` in
    Transformers.
    """
    xp = array_namespace(gate, up)
    if gate.shape != up.shape:
        raise NpllmValueError(
            "gate and up must have one shape [..., d_ff], "
            f"got gate {list(gate.shape)} and up {list(up.shape)}"
        )
    dtype = compute_dtype(gate, up)
    y = silu(widen(gate, dtype)) * widen(up, dtype)
    return y if y.dtype == gate.dtype else xp.astype(y, gate.dtype)


@ieee_semantics
def relu(x: Array) -> Array:
    """Keep what is positive.

        y = max(x, 0)

    Parameters
    ----------
    x : array [...]

    Returns
    -------
    y : array [...]
        A new array in the dtype of `x`.

    Notes
    -----
    Source: "Rectified Linear Units Improve Restricted Boltzmann Machines" (Nair and Hinton 2010);
    the feed-forward network of "Attention Is All You Need" (Vaswani et al. 2017), equation 2.
    """
    xp = array_namespace(x)
    wide = widen(x)
    y = xp.where(wide > 0, wide, xp.where(wide == wide, xp.zeros_like(wide), wide))  # NaN stays NaN
    return y if y.dtype == x.dtype else xp.astype(y, x.dtype)


@ieee_semantics
def gelu(x: Array, approximate: str = "none") -> Array:
    """Multiply each entry by the probability that a normal variable lies below it.

        y = x * (1 + erf(x / sqrt(2))) / 2                              approximate = "none"
        y = x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))) / 2    approximate = "tanh"

    Parameters
    ----------
    x : array [...]
    approximate : str
        "none" or "tanh".

    Returns
    -------
    y : array [...]
        A new array in the dtype of `x`.

    Raises
    ------
    NpllmValueError
        When `approximate` is neither word.

    Notes
    -----
    The exact form computes in float64 and rounds once; the other in float32 (float64 when `x` is).
    Far below 0, where the sums in the formulas cancel, 1 + erf(t) is computed as erfc(-t) and (1 +
    tanh(t)) / 2 as sigmoid(2 * t).

    Source: "Gaussian Error Linear Units" (Hendrycks and Gimpel 2016), section 2;
    `torch.nn.functional.gelu`.
    """
    xp = array_namespace(x)
    if approximate not in ("none", "tanh"):
        raise NpllmValueError(f'approximate must be "none" or "tanh", got {approximate!r}')
    if approximate == "none":
        wide = widen(x, xp.float64)
        y = wide * erfc(wide * -(0.5**0.5)) / 2
    else:
        wide = widen(x)
        t = (2 / 3.141592653589793) ** 0.5 * (wide + 0.044715 * wide * wide * wide)
        y = _times_sigmoid(wide, 2 * t, xp)
    return y if y.dtype == x.dtype else xp.astype(y, x.dtype)


def _times_sigmoid(x: Array, t: Array, xp: Any) -> Array:
    """Compute x / (1 + exp(-t)); the exponential is of -|t|, which cannot overflow."""
    decay = xp.exp(-xp.abs(t))
    return x * xp.where(t >= 0, xp.ones_like(decay), decay) / (1 + decay)
