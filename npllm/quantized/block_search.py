"""Scales and minimums that round a group of numbers to a few bits with the least squared error."""

import numpy as np

__all__ = [
    "as_columns",
    "first_multiples",
    "first_scale",
    "first_steps",
    "search_affine",
    "search_multiples",
    "search_scale",
]

SHRINKS = np.linspace(0.7, 1.15, 19, dtype=np.float32)  # of the range that covers all numbers
# Added to two multiples; the first candidate is what rounding each alone gives.
NEIGHBOURS = np.array([(a, b) for a in (0, -1, 1) for b in (0, -1, 1)], np.float32)
LARGEST_MULTIPLE = 63


def search_scale(x: np.ndarray, low: int, high: int) -> np.ndarray:
    """Find the scale of each group.

        minimise over d:  sum_i (x[i] - d * q[i])**2,   q[i] = round(x[i] / d) in low ... high

    Parameters
    ----------
    x : float32 array [..., n]
    low, high : int
        The range of the integers; the entry of largest size may be mapped to `low`.

    Returns
    -------
    d : float32 array [...]
        0 where all numbers are 0; may be negative.

    Notes
    -----
    Each candidate fixes the integers; the best scale for these is sum(x q) / sum(q q), and the
    error is sum(x x) - sum(x q)**2 / sum(q q).  Groups are columns while they are searched, so that
    sums are over rows.

    Source: `make_qx_quants` in ggml-quants.c has the same aim; the search is our own.
    """
    columns = as_columns(x)
    base = first_scale(columns, low)
    best, most = base, np.full(base.shape, -1.0)
    q = np.empty_like(columns)
    for shrink in SHRINKS:
        np.divide(columns, _nonzero(base * shrink), out=q)
        np.clip(np.rint(q, out=q), low, high, out=q)
        sum_qq, sum_qx = _products(q, q), _products(q, columns)
        d = np.divide(sum_qx, sum_qq, out=np.zeros_like(base), where=sum_qq > 0)
        explained = d.astype(np.float64) * sum_qx
        best, most = np.where(explained > most, d, best), np.maximum(explained, most)
    return best.reshape(x.shape[:-1])


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
    Sums are of the distances from the smallest number, and the equations in float64, since large
    numbers would cancel.

    Source: `make_qkx2_quants` in ggml-quants.c has the same aim; the search is our own.
    """
    columns = as_columns(x)
    base, smallest = first_steps(columns, high, below=below)
    distance = columns - smallest
    best, least = [base, np.zeros_like(base)], np.full(base.shape, np.inf)
    sum_x, q = distance.sum(axis=0), np.empty_like(columns)
    for shrink in SHRINKS:
        np.divide(distance, _nonzero(base * shrink), out=q)
        np.minimum(np.rint(q, out=q), high, out=q)
        totals = q.sum(axis=0), sum_x, _products(q, q), _products(q, distance)
        sums = [total.astype(np.float64) for total in totals]
        d, m = _line(sums, len(columns), -smallest if below else None)
        error = _error(d, m, sums, len(columns))
        is_better = error < least
        best = [np.where(is_better, new, old) for new, old in zip((d, m), best, strict=True)]
        least = np.minimum(error, least)
    d, m = (part.astype(np.float32).reshape(x.shape[:-1]) for part in best)
    return d, m + smallest.reshape(d.shape)


def search_multiples(
    x: np.ndarray,
    line: tuple[np.ndarray, np.ndarray],
    steps: tuple[np.ndarray, np.ndarray],
    high: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Round the scale and the minimum of each group to multiples of two steps.

        minimise over sc, m:  sum_i (x[i] - (d * sc * q[i] - d_min * m))**2
        q[i] = round((x[i] + d_min * m) / (d * sc)) in 0 ... high
        sc = round(scale / d) + a,   m = round(-minimum / d_min) + b,   a, b in -1, 0, 1

    Parameters
    ----------
    x : float32 array [..., n]
    line : two float32 arrays [...]
        scale, at least 0, and minimum, at most 0.
    steps : two float32 arrays [...]
        d and d_min, at least 0.
    high : int

    Returns
    -------
    sc, m : int32 array [...]
        In 0 ... 63.

    Notes
    -----
    Both have errors of up to half a step; to round them together makes the error of Q4_K 2 % and
    that of Q5_K 4 % smaller.
    """
    columns, first = as_columns(x), first_multiples(line, steps)
    step, step_min = (part.reshape(-1) for part in steps)
    best, least = list(first), np.full(step.shape, np.inf, np.float32)
    q = np.empty_like(columns)
    for neighbour in NEIGHBOURS:
        sc, m = (np.clip(x + n, 0, LARGEST_MULTIPLE) for x, n in zip(first, neighbour, strict=True))
        d, below = step * sc, step_min * m
        np.divide(columns + below, np.where(d == 0, np.float32(np.inf), d), out=q)
        np.clip(np.rint(q, out=q), 0, high, out=q)
        rest = columns - (d * q - below)
        error = _products(rest, rest)
        is_better = error < least
        best = [np.where(is_better, new, old) for new, old in zip((sc, m), best, strict=True)]
        least = np.minimum(error, least)
    sc, m = (part.astype(np.int32).reshape(x.shape[:-1]) for part in best)
    return sc, m


def first_multiples(
    line: tuple[np.ndarray, np.ndarray], steps: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Round scale / d and -minimum / d_min of each group: float32 [n_group]; 0 where a step is."""
    scale, minimum = (part.reshape(-1) for part in line)
    pairs = zip((scale, -minimum), (part.reshape(-1) for part in steps), strict=True)
    sc, m = (
        np.clip(np.rint(x / np.where(d == 0, np.float32(np.inf), d)), 0, LARGEST_MULTIPLE)
        for x, d in pairs
    )
    return sc, m


def as_columns(x: np.ndarray) -> np.ndarray:
    """Return the groups [..., n] as columns: [n, n_group]."""
    return np.ascontiguousarray(x.reshape(-1, x.shape[-1]).T)


def first_scale(columns: np.ndarray, low: int) -> np.ndarray:
    """Return the scale of each column that maps its number of largest size to `low`."""
    at = np.argmax(np.abs(columns), axis=0, keepdims=True)
    return np.take_along_axis(columns, at, axis=0)[0] / low


def first_steps(columns: np.ndarray, high: int, *, below: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the scale of each column that covers its range, and its smallest number."""
    smallest, largest = columns.min(axis=0), columns.max(axis=0)
    smallest = np.minimum(smallest, 0) if below else smallest
    return (largest - smallest) / high, smallest


def _nonzero(d: np.ndarray) -> np.ndarray:
    """Return divisors: 1 where a scale is 0, and all numbers of the group with it."""
    return np.where(d == 0, np.float32(1), d)


def _products(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the scalar products of columns."""
    return np.einsum("ng,ng->g", x, y)


def _line(
    sums: list[np.ndarray], n: int, largest: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Fit x = d * q + m by least squares; m at most `largest` where that is given."""
    sum_q, sum_x, sum_qq, sum_qx = sums
    determinant = n * sum_qq - sum_q**2
    d = np.divide(
        n * sum_qx - sum_q * sum_x, determinant, where=determinant > 0, out=np.zeros_like(sum_x)
    )
    m = (sum_x - d * sum_q) / n
    if largest is not None:
        rest = sum_qx - largest * sum_q
        bounded = np.divide(rest, sum_qq, where=sum_qq > 0, out=np.zeros_like(sum_x))
        d, m = np.where(m > largest, bounded, d), np.minimum(m, largest)
    return d, m


def _error(d: np.ndarray, m: np.ndarray, sums: list[np.ndarray], n: int) -> np.ndarray:
    """Return sum (x - d q - m)**2 less sum x**2; the terms cancel."""
    sum_q, sum_x, sum_qq, sum_qx = sums
    linear = d * sum_qx + m * sum_x
    return d * d * sum_qq + 2 * d * m * sum_q + n * m * m - 2 * linear
