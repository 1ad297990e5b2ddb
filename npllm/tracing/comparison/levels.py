"""The arithmetic that a run may have followed: levels from the strictest to the loosest.

A run in float32 rounds once an operation.  Transformers in 16 bits rounds two or three times inside
RMSNorm, SwiGLU, RoPE and attention.  A trace that was computed in float32 and stored in 16 bits
holds inputs that are rounded as well.  None of these is a mistake; which one explains a value is
said.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from npllm.arrays import DTYPES
from npllm.testing.arithmetic import LAMBDA, STEP, UNITS

__all__ = ["ROUNDING", "SHORT", "Level", "levels_of", "run_dtype"]

Array = Any

SHORT = ("bfloat16", "float16")
ROUNDING = LAMBDA / 3**0.5  # standard deviations that are allowed, of a rounding by at most 1
SHARE = 0.8  # of them that a 16-bit type must hold


class Level(NamedTuple):
    """An arithmetic.

    Parameters
    ----------
    dtype : str
        Of the values.
    accumulate : str
    roundings : int
        How often an operation rounds on its way.
    is_stored : bool
        The recorded inputs were rounded when they were stored.
    """

    dtype: str
    accumulate: str = "float32"
    roundings: int = 1
    is_stored: bool = False

    def arithmetic(self, op: str) -> dict[str, Any]:
        """Arguments of `npllm.testing.budget`."""
        found: dict[str, Any] = {"dtype": self.dtype, "accumulate": self.accumulate}
        found["roundings"] = self.roundings
        if op == "attention" and self.roundings > 1:
            found["probabilities"] = self.dtype
        return found

    @property
    def own_share(self) -> float:
        """How many budgets our own evaluation and theirs need: 2 where both are float64."""
        return 2.0 if self.accumulate == "float64" else 1.0

    def error_of(self, x: Array) -> Array:
        """Errors that recorded values have; None where they have none."""
        if not self.is_stored:
            return None
        return ROUNDING * (UNITS[self.dtype] * np.abs(x) + STEP[self.dtype])

    def __str__(self) -> str:
        if self.is_stored:
            return f"stored in {self.dtype}"
        words = {1: "one rounding", 2: "two roundings", 3: "three roundings"}
        if self.dtype in SHORT:
            return f"{self.dtype}, {words[self.roundings]}"
        return self.dtype + ("" if self.accumulate == self.dtype else f", {self.accumulate} sums")


def levels_of(dtype: str, run: str) -> list[Level]:
    """List the levels that may explain a value.

    Parameters
    ----------
    dtype : str
        Of the array.
    run : str
        In which the run computed, empty where that is not known; 16-bit values are often handed
        over as float32.
    """
    if run in SHORT and dtype in ("float32", "float64"):
        dtype = run
    if dtype == "float64":
        return [Level(dtype, "float64"), Level(dtype)]
    if dtype not in SHORT:
        return [Level(dtype)]
    levels = [Level(dtype, roundings=n) for n in (1, 2, 3)]
    return levels if run == dtype else [*levels, Level(dtype, is_stored=True)]


def run_dtype(index: Any, values: Iterable[Array]) -> str:
    """Name the dtype that a run computed in.

    Parameters
    ----------
    index : mapping
        Its `dtype` is believed where it is a 16-bit type.
    values : iterable of array
        A few of what was recorded: a run that rounds to 16 bits and keeps float32 arrays shows
        here.

    Returns
    -------
    name : str
        Empty where 16-bit arrays may be those of the run, or only have been stored so.
    """
    said = str(index.get("dtype") or "").removeprefix("torch.")
    if said in SHORT:
        return said
    names = [(str(x.dtype), [short for short in SHORT if _holds(short, x)]) for x in values]
    for short in SHORT:
        held = sum(short in shorts for _, shorts in names)
        if names and held >= SHARE * len(names):
            return short
    if said in DTYPES:
        return said
    found = {name for name, _ in names}
    return found.pop() if len(found) == 1 and not found.intersection(SHORT) else ""


def _holds(short: str, x: Array) -> bool:
    """Tell whether a 16-bit type holds every value of a wider array."""
    if str(x.dtype) != "float32":
        return False
    sample = x.reshape(-1)[: 2**14]
    with np.errstate(over="ignore", invalid="ignore"):
        same = sample.astype(DTYPES[short]).astype(np.float32) == sample
    return bool((same | ~np.isfinite(sample)).all())
