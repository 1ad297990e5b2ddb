"""How far residual streams and logits are from those of the float64 definitions."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from npllm import ops
from npllm.arrays import ieee_semantics

__all__ = ["LogitDistance", "centred_error", "kl_divergence", "relative_error"]

Array = Any


@ieee_semantics
def relative_error(x: Array, gold: Array) -> float:
    """Measure the distance of rows, each relative to its own length.

        error = sqrt(mean over rows of |x - gold|**2 / |gold|**2)

    Parameters
    ----------
    x : array [n, d]
    gold : float64 array [n, d]

    Returns
    -------
    error : float
        A row of zeros that x repeats counts as 0.  NaN or infinity where x holds one.
    """
    wide = x.astype(np.float64)
    squares = np.sum((wide - gold) ** 2, axis=-1)
    lengths = np.sum(gold**2, axis=-1)
    ratios = np.where(squares == 0, 0.0, squares / lengths)
    return float(np.sqrt(np.mean(ratios)))


@ieee_semantics
def centred_error(y: Array, gold: Array) -> Array:
    """Measure the distance of logits, without what all logits of a token have in common.

        d = y - gold;   error = mean over vocabulary of (d - mean over vocabulary of d)**2

    Parameters
    ----------
    y : array [n, n_vocab]
    gold : float64 array [n, n_vocab]

    Returns
    -------
    error : float64 array [n]
    """
    return np.var(y - gold, axis=-1)


@ieee_semantics
def kl_divergence(gold: Array, y: Array) -> Array:
    """Compute how much the distribution of the next token differs, in nats.

        KL = sum over tokens v of p[v] * (log p[v] - log q[v]),   p = softmax(gold), q = softmax(y)

    Parameters
    ----------
    gold, y : array [n, n_vocab]

    Returns
    -------
    divergence : float64 array [n]
        At least 0, but for rounding: of 1e-16 times the largest |logit|.  NaN where y holds one.

    Notes
    -----
    Source: "On Information and Sufficiency" (Kullback and Leibler 1951).
    """
    log_p, log_q = (ops.log_softmax(x.astype(np.float64)) for x in (gold, y))
    return np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)


@dataclass
class LogitDistance:
    """Logits of one arithmetic beside the float64 ones, some tokens at a time.

    `squared` holds `centred_error` of each token.  Only `is_full` measures more: `kl`; `n_same`,
    the number of tokens with the same most likely next token; and the others as `flips`: (token,
    best by gold, best here, margin: gold[best by gold] - gold[best here]).  A token whose logits
    hold NaN is in neither.
    """

    is_full: bool
    squared: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    n_same: int = 0
    flips: list[tuple[int, int, int, float]] = field(default_factory=list)

    def see(self, y: Array, gold: Array) -> None:
        """Measure the logits of the next tokens [n, n_vocab]."""
        first = len(self.squared)
        self.squared += centred_error(y, gold).tolist()
        if not self.is_full:
            return
        self.kl += kl_divergence(gold, y).tolist()
        best, here = gold.argmax(axis=-1), y.argmax(axis=-1)
        is_number = ~np.isnan(y).any(axis=-1)
        self.n_same += int(np.sum(is_number & (best == here)))
        for row in np.flatnonzero(is_number & (best != here)):
            margin = float(gold[row, best[row]] - gold[row, here[row]])
            self.flips.append((first + int(row), int(best[row]), int(here[row]), margin))

    @property
    def error(self) -> float:
        """The root mean square of the centred error over all tokens."""
        return float(np.sqrt(np.mean(self.squared)))
