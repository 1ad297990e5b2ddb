"""Numbers as the page holds them: plain lists, rounded to what is shown."""

from typing import Any

import numpy as np

__all__ = ["significant", "thousandths"]

Array = Any

N_DIGITS = 5  # of numbers that the page shows with four; 7 of those shown to three decimals


def significant(x: Any, n_digits: int = N_DIGITS) -> Any:
    """Round to significant digits.

    Parameters
    ----------
    x : float or array [...]
    n_digits : int

    Returns
    -------
    rounded : float or nested list of float
        Of the same shape.  Whole numbers are integers, which are shorter in JSON.
    """
    if np.ndim(x):
        return [significant(row, n_digits) for row in np.asarray(x).tolist()]
    value = float(f"{float(x):.{n_digits}g}")
    return int(value) if value == int(value) and abs(value) < 1e15 else value


def thousandths(weights: Array) -> list[list[int]]:
    """Round attention weights to thousandths, as integers; zeros at the end of a row are left out.

    Parameters
    ----------
    weights : array [n_seq, n_ctx]

    Returns
    -------
    rows : list of list of int
        Row n holds the weights of query n, up to the last that is not 0.
    """
    rounded = np.rint(np.asarray(weights, np.float64) * 1000).astype(int)
    return [np.trim_zeros(row, "b").tolist() for row in rounded]
