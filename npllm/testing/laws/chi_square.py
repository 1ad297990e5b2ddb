"""Pearson's chi-square test, its tail in closed form: no approximation of the gamma function."""

import math
from typing import Any

import numpy as np

from npllm.errors import NpllmValueError

__all__ = ["FEWEST", "chi_square", "tail"]

Array = Any

FEWEST = 25.0  # expected draws of a bin; rarer tokens share one


def tail(x: float, n_free: int) -> float:
    """Return the probability that a chi-square variable exceeds x.

        Q(x; 2 m) = exp(-x/2) sum_{i < m} (x/2)**i / i!
        Q(x; 2 m + 1) = erfc(sqrt(x/2)) + exp(-x/2) sum_{i < m} (x/2)**(i + 1/2) / gamma(i + 3/2)

    Parameters
    ----------
    x : float
    n_free : int
        Degrees of freedom, at least 1.

    Notes
    -----
    Source: Abramowitz and Stegun, "Handbook of Mathematical Functions" (1964), 26.4.4 and 26.4.5.
    """
    if n_free < 1:
        raise NpllmValueError(f"n_free must be at least 1, got {n_free}")
    half = x / 2
    if half <= 0:
        return 1.0
    is_odd = n_free % 2
    total = math.erfc(math.sqrt(half)) if is_odd else 0.0
    for i in range(n_free // 2):
        power = i + is_odd / 2
        total += math.exp(power * math.log(half) - half - math.lgamma(power + 1))
    return min(total, 1.0)


def chi_square(ids: Array, probabilities: Array) -> float:
    """Return the probability of draws at least as uneven as these.

        X = sum_i (n_i - n p_i)**2 / (n p_i);   the value is Q(X; bins - 1)

    Parameters
    ----------
    ids : integer array [n_draw]
    probabilities : float64 array [n_vocab]
        Tokens with fewer than 25 expected draws share a bin.

    Returns
    -------
    p : float
        0 where a token of probability 0 was drawn; 1 where there is one bin.
    """
    counts = np.bincount(ids, minlength=len(probabilities))
    if (counts[probabilities == 0] > 0).any():
        return 0.0
    expected = probabilities * len(ids)
    rare = expected < FEWEST
    counted = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    if wanted[-1] < FEWEST:  # too few even together: add them to the smallest bin
        smallest = int(np.argmin(wanted[:-1]))
        counted[smallest] += counted[-1]
        wanted[smallest] += wanted[-1]
        counted, wanted = counted[:-1], wanted[:-1]
    if len(wanted) < 2:
        return 1.0
    return tail(float(np.sum((counted - wanted) ** 2 / wanted)), len(wanted) - 1)
