"""Special functions that are in neither NumPy nor the array API."""

from collections.abc import Sequence
from typing import Any

from npllm.arrays import array_namespace, ieee_semantics, widen

__all__ = ["erf", "erfc"]

Array = Any

# Coefficients of Cody's three rational approximations, highest power first but for the last, which
# comes first.
SMALL = (
    (
        1.85777706184603153e-1,
        3.16112374387056560e00,
        1.13864154151050156e02,
        3.77485237685302021e02,
        3.20937758913846947e03,
    ),
    (
        1.0,
        2.36012909523441209e01,
        2.44024637934444173e02,
        1.28261652607737228e03,
        2.84423683343917062e03,
    ),
)
MIDDLE = (
    (
        2.15311535474403846e-8,
        5.64188496988670089e-1,
        8.88314979438837594e00,
        6.61191906371416295e01,
        2.98635138197400131e02,
        8.81952221241769090e02,
        1.71204761263407058e03,
        2.05107837782607147e03,
        1.23033935479799725e03,
    ),
    (
        1.0,
        1.57449261107098347e01,
        1.17693950891312499e02,
        5.37181101862009858e02,
        1.62138957456669019e03,
        3.29079923573345963e03,
        4.36261909014324716e03,
        3.43936767414372164e03,
        1.23033935480374942e03,
    ),
)
LARGE = (
    (
        1.63153871373020978e-2,
        3.05326634961232344e-1,
        3.60344899949804439e-1,
        1.25781726111229246e-1,
        1.60837851487422766e-2,
        6.58749161529837803e-4,
    ),
    (
        1.0,
        2.56852019228982242e00,
        1.87295284992346725e00,
        5.27905102951428412e-1,
        6.05183413124413191e-2,
        2.33520497626869185e-3,
    ),
)
SEAM = 0.46875  # between the first two
ONE_OVER_SQRT_PI = 0.5641895835477562869


@ieee_semantics
def erf(x: Array) -> Array:
    """Compute the error function.

        erf(x) = 2 / sqrt(pi) * integral from 0 to x of exp(-t**2) dt

    Parameters
    ----------
    x : array [...]

    Returns
    -------
    y : array [...]
        In the dtype of `x`.

    Notes
    -----
    Computes in float64 and rounds once; relative error below 5e-16.  With y = |x| and rational
    functions R_1, R_2, R_3: y * R_1(y**2) up to 0.46875; 1 - exp(-y**2) * R_2(y) up to 4; 1 -
    exp(-y**2) / y * (1 / sqrt(pi) - R_3(1 / y**2) / y**2) beyond.

    Source: "Rational Chebyshev Approximations for the Error Function" (Cody 1969).
    """
    xp = array_namespace(x)
    wide = widen(x, xp.float64)
    y = xp.abs(wide)
    magnitude = xp.where(y <= SEAM, _erf_near_0(y, xp), 1 - _erfc_beyond(y, xp))
    return _rounded(xp.where(wide < 0, -magnitude, magnitude), x)


@ieee_semantics
def erfc(x: Array) -> Array:
    """Compute the complement of the error function.

        erfc(x) = 1 - erf(x) = 2 / sqrt(pi) * integral from x to infinity of exp(-t**2) dt

    Parameters
    ----------
    x : array [...]

    Returns
    -------
    y : array [...]
        In the dtype of `x`.

    Notes
    -----
    Computes in float64 and rounds once.  Far above 0, where 1 - erf(x) would cancel, the relative
    error is that of exp(-x**2), whose argument is rounded: below 2e-13 where y is a normal number.

    Source: "Rational Chebyshev Approximations for the Error Function" (Cody 1969).
    """
    xp = array_namespace(x)
    wide = widen(x, xp.float64)
    y = xp.abs(wide)
    tail = xp.where(y <= SEAM, 1 - _erf_near_0(y, xp), _erfc_beyond(y, xp))
    return _rounded(xp.where(wide < 0, 2 - tail, tail), x)


def _erf_near_0(y: Array, xp: Any) -> Array:
    """Compute erf(y) for 0 <= y <= SEAM."""
    near = xp.minimum(y, xp.full_like(y, SEAM))
    return near * _ratio(near * near, SMALL)


def _erfc_beyond(y: Array, xp: Any) -> Array:
    """Compute 1 - erf(y) for y > SEAM."""
    far = xp.maximum(y, xp.full_like(y, 4.0))
    mid = xp.minimum(xp.maximum(y, xp.full_like(y, SEAM)), xp.full_like(y, 4.0))
    z = 1 / (far * far)
    large = xp.exp(-far * far) / far * (ONE_OVER_SQRT_PI - z * _ratio(z, LARGE))
    return xp.where(y <= 4, xp.exp(-mid * mid) * _ratio(mid, MIDDLE), large)


def _rounded(y: Array, x: Array) -> Array:
    """Round a result to the dtype of `x`."""
    return y if y.dtype == x.dtype else array_namespace(y).astype(y, x.dtype)


def _ratio(t: Array, coefficients: Any) -> Array:
    """Evaluate one polynomial over another by Horner's rule."""
    top, bottom = (_horner(t, series) for series in coefficients)
    return top / bottom


def _horner(t: Array, series: Sequence[float]) -> Array:
    value = series[0] + 0 * t
    for coefficient in series[1:]:
        value = value * t + coefficient
    return value
