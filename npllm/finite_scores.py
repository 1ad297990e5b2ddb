"""Checks that scores are finite, before a token is chosen or a figure computed from them.

NaN has no place in an order: `argmax` returns its index, a sort puts it last, a sum becomes NaN.
Whatever chooses a token or reports a number passes its scores through here first.
"""

from typing import Any

import numpy as np

from npllm.arrays import array_namespace, expect_entries, to_numpy, widen
from npllm.errors import NpllmValueError

__all__ = ["FROM_MODEL", "check_finite", "check_scores"]

Array = Any
FROM_MODEL = (
    "are the weights finite (`npllm inspect --check-finite` tells), and the operations that "
    "were replaced?"
)


def check_scores(scores: Array, name: str, hint: str = "", *, wait: bool = False) -> Array:
    """Return scores of which every row is a distribution; raise otherwise.

        -inf < max_i scores[..., i] < inf

    Parameters
    ----------
    scores : array [..., n_vocab]
        Logits or log-probabilities; -inf excludes an entry.
    name : str
        What they are, for the message.
    hint : str
        Where to look, for the message.
    wait : bool
        Look at an array on a device as well, which waits for it.  Default: on the host only.

    Returns
    -------
    scores : array [..., n_vocab]
        The argument itself.

    Raises
    ------
    NpllmValueError
        When a row holds NaN or +inf, or nothing but -inf.
    """
    expect_entries(name, scores)
    if not (wait or isinstance(scores, np.ndarray)):
        return scores
    xp = array_namespace(scores)
    largest = xp.max(widen(scores), axis=-1)
    if bool(to_numpy(xp.all((largest > -xp.inf) & (largest < xp.inf)))):
        return scores
    rows = to_numpy(widen(scores)).reshape(-1, scores.shape[-1])
    first = int(np.argmin(np.isfinite(rows.max(axis=-1))))
    wanted = "must hold no NaN, no +inf, and in every row one number above -inf"
    raise NpllmValueError(_message(name, wanted, first, rows, hint))


def check_finite(x: Array, name: str, hint: str = "") -> Array:
    """Return an array on the host of which every entry is finite; raise otherwise.

    Parameters
    ----------
    x : array [..., n]
        NumPy.
    name, hint
        As in `check_scores`.

    Returns
    -------
    x : array [..., n]
        The argument itself.

    Raises
    ------
    NpllmValueError
        When an entry is NaN or infinite.
    """
    finite = np.isfinite(x)
    if finite.all():
        return x
    rows = x.reshape(-1, x.shape[-1])
    first = int(np.argmin(finite.reshape(rows.shape).all(axis=-1)))
    raise NpllmValueError(_message(name, "must be finite", first, rows, hint))


def _message(name: str, wanted: str, first: int, rows: Array, hint: str) -> str:
    """Say which row is the first bad one and what it holds."""
    row = rows[first]
    counts = {"NaN": np.isnan(row), "+inf": row == np.inf, "-inf": row == -np.inf}
    found = ", ".join(f"{kind} in {n.sum()}" for kind, n in counts.items() if n.any())
    text = f"{name} {wanted}, got {found} of {len(row)} entries of row {first} of {len(rows)}"
    return f"{text}; {hint}" if hint else text
