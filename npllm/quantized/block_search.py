"""Scales and minimums that round a group of numbers to a few bits with the least squared error."""

import numpy as np

__all__ = ["search_affine", "search_scale"]

SHRINKS = np.linspace(0.7, 1.15, 19, dtype=np.float32)  # of the range that covers all numbers


def search_scale(x: np.ndarray, low: int, high: int) -> np.ndarray:
    """Find the scale of each group.

        minimise over d:  sum_i (x[i] - d * q[i])**2,   q[i] = round(x[i] / d) in low ... high

    Parameters
    ----------
    x : float32 array [..., n]
    low, high : int
        The integers that there are; the number of largest size may come to lie at `low`.

    Returns
    -------
    d : float32 array [...]
        0 where all numbers are 0; may be negative.

    Notes
    -----
    Each candidate fixes the integers; the best scale for these is sum(x q) / sum(q q).

    Source: `make_qx_quants` in ggml-quants.c has the same aim; the search is our own.
    """
    at = np.argmax(np.abs(x), axis=-1, keepdims=True)
    base = np.take_along_axis(x, at, axis=-1)[..., 0] / low
    best, least = base, np.full(base.shape, np.inf, np.float32)
    for shrink in SHRINKS:
        q = _rounded(x, base * shrink, low, high)
        norm = np.sum(q * q, axis=-1)
        d = np.divide(np.sum(x * q, axis=-1), norm, out=np.zeros_like(base), where=norm > 0)
        error = np.sum((x - d[..., None] * q) ** 2, axis=-1)
        best, least = np.where(error < least, d, best), np.minimum(error, least)
    return best


def search_affine(x: np.ndarray, high: int, *, below: bool) -> tuple[np.ndarray, np.ndarray]:
    """Find the scale and the minimum of each group.

        minimise over d, m:  sum_i (x[i] - d * q[i] - m)**2
        q[i] = round((x[i] - m) / d) in 0 ... high

    Parameters
    ----------
    x : float32 array [..., n]
    high : int
    below : bool
        The minimum must not be above 0, as the K formats have it.

    Returns
    -------
    d, m : float32 array [...]

    Notes
    -----
    Each candidate fixes the integers; the best scale and minimum for these solve two equations.

    Source: `make_qkx2_quants` in ggml-quants.c has the same aim; the search is our own.
    """
    smallest, largest = x.min(axis=-1), x.max(axis=-1)
    smallest = np.minimum(smallest, 0) if below else smallest
    base = (largest - smallest) / high
    best = [base, smallest]
    least = np.full(smallest.shape, np.inf, np.float32)
    for shrink in SHRINKS:
        q = _rounded(x - smallest[..., None], base * shrink, 0, high)
        d, m = _line(x, q, below)
        error = np.sum((x - d[..., None] * q - m[..., None]) ** 2, axis=-1)
        is_better = error < least
        best = [np.where(is_better, new, old) for new, old in zip((d, m), best, strict=True)]
        least = np.minimum(error, least)
    return best[0], best[1]


def _line(x: np.ndarray, q: np.ndarray, below: bool) -> tuple[np.ndarray, np.ndarray]:
    """Fit x = d * q + m by least squares; m at most 0 where it must be."""
    n = x.shape[-1]
    sum_q, sum_x = q.sum(axis=-1), x.sum(axis=-1)
    sum_qq, sum_qx = (q * q).sum(axis=-1), (q * x).sum(axis=-1)
    determinant = n * sum_qq - sum_q**2
    d = np.divide(
        n * sum_qx - sum_q * sum_x, determinant, where=determinant > 0, out=np.zeros_like(sum_x)
    )
    m = (sum_x - d * sum_q) / n
    if below:
        through_zero = np.divide(sum_qx, sum_qq, where=sum_qq > 0, out=np.zeros_like(sum_x))
        d, m = np.where(m > 0, through_zero, d), np.minimum(m, 0)
    return d, m


def _rounded(x: np.ndarray, d: np.ndarray, low: int, high: int) -> np.ndarray:
    """Round x / d to integers in low ... high; 0 where d is 0."""
    d = d[..., None]
    steps = np.divide(x, d, out=np.zeros_like(x), where=d != 0)
    return np.clip(np.rint(steps), low, high)
