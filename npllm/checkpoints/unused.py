"""Tensors that a file holds and a model does not use: compare them with the used ones, or warn."""

from os import PathLike
from typing import Any

import numpy as np

from npllm import ops
from npllm.arrays import DTYPES, widen
from npllm.config.config import Config
from npllm.config.strict_json import printable
from npllm.models import rope
from npllm.progress import warn

__all__ = ["are_rope_frequencies", "same_values", "warn_of_unused"]

BLOCK = 2**20  # entries to compare at a time
ROUNDING = {"bfloat16": 2**-7, "float16": 2**-9}  # twice the largest relative rounding error
AS_COMPUTED = 1e-5  # relative difference between the float32 formulas of libraries

Array = Any


def warn_of_unused(folder: str | PathLike[str], names: list[str], reason: str) -> None:
    """Warn, in one line, that tensors of a file are not used."""
    if names:
        shown = ", ".join(printable(name[:200]) for name in sorted(names)[:3])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warn(f"{folder}: not used: {shown}{more}; {reason}")


def same_values(one: Array, other: Array) -> bool:
    """Return whether two stored matrices hold the same numbers; stop at the first difference.

    Parameters
    ----------
    one, other : NumPy array [n, d]
        Contiguous, of float types.  Equal types are compared by their bits, different ones by
        their values in float64.

    Returns
    -------
    same : bool
        NaN with the same bits counts as the same.
    """
    n_rows = max(1, BLOCK // max(1, one.shape[1]))
    blocks = (slice(start, start + n_rows) for start in range(0, len(one), n_rows))
    if one.dtype == other.dtype:
        return all(
            np.array_equal(one[rows].view(np.uint8), other[rows].view(np.uint8)) for rows in blocks
        )
    return all(
        np.array_equal(widen(one[rows], np.float64), widen(other[rows], np.float64))
        for rows in blocks
    )


def are_rope_frequencies(stored: Array, config: Config) -> bool:
    """Return whether a stored buffer `inv_freq` holds frequencies that follow from config.json.

    Parameters
    ----------
    stored : NumPy array [d_rope/2]
        Of any float type.
    config : Config

    Returns
    -------
    known : bool
        True for the frequencies of a short sequence, of the longest, and for those before any
        scaling, which older versions of Transformers stored.
    """
    parameters = config.rope_parameters
    choices = (rope.frequency_choice(config, length) for length in (1, config.context_length))
    known = [rope.frequencies(config, choice) for choice in choices]
    known.append(ops.rope_frequencies(config.d_rope, parameters.rope_theta))
    name = stored.dtype.name
    if name not in DTYPES or stored.shape != known[0].shape:
        return False
    wide, rtol = widen(stored, np.float64), ROUNDING.get(name, AS_COMPUTED)
    return any(np.allclose(wide, frequencies, rtol=rtol, atol=0) for frequencies in known)
