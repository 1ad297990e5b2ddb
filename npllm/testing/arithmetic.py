"""Rounding models: how a computer that rounds evaluates an operation, as a few numbers."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from npllm.errors import NpllmValueError

__all__ = [
    "GROUPWISE",
    "LAMBDA",
    "Arithmetic",
    "dot_terms",
    "gamma",
    "lost_terms",
    "repeats",
    "sum_terms",
]

Array = Any

LAMBDA = 5.0  # standard deviations that the statistical budget allows
N_CHUNK = 16  # places at which the partial sums of a product are looked at
N_SAMPLE = 128  # entries of a row among which equal ones are counted

UNITS = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "tf32": 2.0**-10,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}
"""Unit roundoff.  tf32 has that of truncation: some hardware cuts the operands."""

TINY = {
    "float64": 2.0**-1022,
    "float32": 2.0**-126,
    "tf32": 2.0**-126,
    "float16": 2.0**-14,
    "bfloat16": 2.0**-126,
}
"""Smallest normal number."""

STEP = {
    "float64": 2.0**-1074,
    "float32": 2.0**-149,
    "tf32": 2.0**-136,
    "float16": 2.0**-24,
    "bfloat16": 2.0**-133,
}
"""Smallest subnormal number: the step of the numbers below TINY."""

LARGEST = {
    "float64": float(np.finfo(np.float64).max),
    "float32": (2 - 2.0**-23) * 2.0**127,
    "tf32": (2 - 2.0**-10) * 2.0**127,
    "float16": 65504.0,
    "bfloat16": (2 - 2.0**-7) * 2.0**127,
}
"""Largest finite number."""

GROUPWISE = {"int8": 127, "int16": 32767}
"""Integers with one scale for each group of adjacent entries: the largest code."""


@dataclass(frozen=True)
class Arithmetic:
    """What is rounded to what while an operation is evaluated.

    Parameters
    ----------
    dtype : str
        Of the output.
    accumulate : str
        In which sums and elementary functions are evaluated: "float64", "float32", "float16" or
        "bfloat16".
    roundings : int
        How often a value is rounded to `dtype` on its way to the output.  1: at the end only; 2:
        Transformers' 16-bit RMSNorm, which rounds the normalised row as well.
    operands : str, optional
        To which the factors of a matrix product are rounded before: "tf32", "bfloat16" or
        "float16"; of a linear map, "int8" or "int16": x alone, as `npllm.quantized.activations`
        does.
    probabilities : str, optional
        To which attention rounds its probabilities before it multiplies the values.
    flush_to_zero : bool
        Subnormal numbers count as zero, as operands and as results: those of JAX on the CPU, of
        CUDA with `-ftz=true`, of compilers' fast mathematics.

    Raises
    ------
    NpllmValueError
        For an unknown dtype or a number of roundings below 1.
    """

    dtype: str = "float32"
    accumulate: str = "float32"
    roundings: int = 1
    operands: str | None = None
    probabilities: str | None = None
    flush_to_zero: bool = False

    def __post_init__(self) -> None:
        for name in ("dtype", "accumulate", "operands", "probabilities"):
            value = getattr(self, name)
            optional = name in ("operands", "probabilities")
            if name == "operands" and value in GROUPWISE:
                continue
            if value not in UNITS and not (optional and value is None):
                raise NpllmValueError(f"{name} must be one of {', '.join(UNITS)}, got {value!r}")
        if not isinstance(self.roundings, int) or self.roundings < 1:
            raise NpllmValueError(
                f"roundings must be an integer of at least 1, got {self.roundings!r}"
            )

    @property
    def u(self) -> float:
        """Unit roundoff of the accumulation."""
        return UNITS[self.accumulate]

    @property
    def u_out(self) -> float:
        """Unit roundoff of the output."""
        return UNITS[self.dtype]

    @property
    def u_operand(self) -> float:
        """Unit roundoff of the factors of a product; 0 where they have none."""
        return UNITS.get(self.operands or "", 0.0)

    def group_errors(self, x: Array, group: int) -> Array:
        """Bound the error of each entry of x that integers with a scale for each group make.

        Half a step, and three roundings of float32; zeros for other operands.
        """
        off = np.zeros(x.shape)
        if self.operands not in GROUPWISE:
            return off
        limit = GROUPWISE[self.operands]
        for start in range(0, x.shape[-1], group):
            part = slice(start, start + group)
            largest = np.max(np.abs(x[..., part]), axis=-1, keepdims=True)
            off[..., part] = largest * (0.5 / limit + 2.0**-22) + 2.0**-100
        return off

    @property
    def u_probability(self) -> float:
        """Unit roundoff of the probabilities; 0 where they stay in the accumulation dtype."""
        names = [name for name in (self.probabilities, self.operands) if name]
        return max((UNITS.get(name, 0.0) for name in names), default=0.0)

    @property
    def tiny(self) -> float:
        """Smallest normal number of the accumulation."""
        return TINY[self.accumulate]

    @property
    def step(self) -> float:
        """Largest error of an operation that underflows: gradually, or to zero."""
        smallest = TINY if self.flush_to_zero else STEP
        return max(smallest[self.accumulate], STEP[self.dtype])

    @property
    def lost(self) -> float:
        """Largest exponential that may come out as 0: wide types are often flushed."""
        return STEP["float16"] if self.accumulate == "float16" else self.tiny

    @property
    def largest(self) -> float:
        """Largest number that the accumulation can hold."""
        return LARGEST[self.accumulate]

    def independent(self, n: int) -> bool:
        """Tell whether n roundings are independent: a long sum of few bits stands still."""
        return n * self.u <= 0.125


def gamma(n: Any, u: float) -> Any:
    """Bound the relative error of n roundings in a row: n u / (1 - n u); infinity where n u >= 1.

    Source: Higham, "Accuracy and Stability of Numerical Algorithms" (2nd ed. 2002), lemma 3.1.
    """
    product = np.asarray(n, dtype=np.float64) * u
    return np.where(product < 1, product / np.maximum(1 - product, 1e-300), np.inf)


def repeats(x: Array, size: Array, u: float) -> Array:
    """Estimate how many entries share the value of an entry, on average over the entries of a row.

        k = 1 + n * max(0, f - 0.02),   f = share of the pairs of entries that are equal and not
        zero

    Equal terms make equal rounding errors, which do not average out: k of them count k**2 where
    independent ones count k.  Terms count as equal where the sum cannot tell them apart: where they
    differ by less than u / 4 of the sum of their absolute values.

    Parameters
    ----------
    x : array [..., n]
    size : array [...]
        Sum of the absolute values of the terms, in units of x.
    u : float
        Unit roundoff of the sum.

    Returns
    -------
    k : float64 array [...]
        About n where all entries are equal, 1 where few are.  Of a long row 128 entries are looked
        at.
    """
    n = x.shape[-1]
    if n < 2:
        return np.ones(x.shape[:-1])
    places = np.arange(n)
    if n > N_SAMPLE:
        places = np.sort(np.random.default_rng(0).choice(n, N_SAMPLE, replace=False))
    grain = u / 4 * np.asarray(size)[..., None]
    sample = np.sort(x[..., places], axis=-1)
    index = np.arange(len(places))
    new = np.concatenate(
        [np.ones_like(sample[..., :1], dtype=bool), np.diff(sample, axis=-1) > grain], axis=-1
    )
    start = np.maximum.accumulate(np.where(new, index, 0), axis=-1)
    n_equal = np.sum(np.where(sample != 0, index - start, 0), axis=-1)  # pairs
    return 1 + n * np.maximum(0.0, 2 * n_equal / (len(places) * (len(places) - 1)) - 0.02)


def lost_terms(p: Array, total: Array, u: float) -> Array:
    """Sum the positive terms that a running sum near `total` rounds away, all in one direction.

        sum_k min(p_k, u total) over p_k < 2 u total

    Parameters
    ----------
    p : float64 array [..., n]
        Not negative.
    total : float64 array [...]
    u : float

    Returns
    -------
    bias : float64 array [...]
    """
    step = u * total[..., None]
    return np.sum(np.where(p < 2 * step, np.minimum(p, step), 0.0), axis=-1)


def sum_terms(p: Array, u: float) -> tuple[Array, Array, Array]:
    """Describe the sum of each row: value, sum of absolute values, variance of the error.

    The variance, in units of u**2, is sum_k s_k**2 + sum_k p_k**2 of the partial sums s_k and the
    terms p_k, for the worst of three orders: as the terms stand, backwards, and at random.

    Parameters
    ----------
    p : float64 array [..., n]
    u : float
        Unit roundoff of the sum.

    Returns
    -------
    total, magnitude, variance : float64 array [...]
    """
    n = p.shape[-1]
    partial = np.cumsum(p, axis=-1)
    total = partial[..., -1] if n else np.zeros(p.shape[:-1])
    squares = np.sum(p * p, axis=-1)
    forwards = np.sum(partial**2, axis=-1)
    backwards = np.sum((total[..., None] - partial) ** 2, axis=-1)
    at_random = n * total**2 / 3 + n * squares / 6
    walk = np.maximum(np.maximum(forwards, backwards), at_random)
    magnitude = np.sum(np.abs(p), axis=-1)
    return total, magnitude, repeats(p, magnitude, u) * walk + squares


def dot_terms(x: Array, w: Array, u: float, n_chunk: int = N_CHUNK) -> tuple[Array, Array, Array]:
    """Describe the sums of a matrix product, as `sum_terms` does, without making the terms.

    Parameters
    ----------
    x : float64 array [..., m, n]
    w : float64 array [..., o, n]
    u : float
        Unit roundoff of the sums.
    n_chunk : int
        Number of places at which the partial sums are looked at.

    Returns
    -------
    total, magnitude, variance : float64 array [..., m, o]
    """
    n, columns = x.shape[-1], np.swapaxes(w, -1, -2)
    total = np.zeros((*np.broadcast_shapes(x.shape[:-2], w.shape[:-2]), x.shape[-2], w.shape[-2]))
    first, second = np.zeros_like(total), np.zeros_like(total)  # sums over k of s_k and of s_k**2
    for places in np.array_split(np.arange(n), min(n, n_chunk) or 1):
        part = slice(places[0], places[-1] + 1) if len(places) else slice(0, 0)
        total = total + x[..., part] @ columns[..., part, :]
        first += len(places) * total
        second += len(places) * total**2
    squares = (x * x) @ (columns * columns)
    backwards = n * total**2 - 2 * total * first + second
    at_random = n * total**2 / 3 + n * squares / 6
    walk = np.maximum(np.maximum(second, backwards), at_random)
    magnitude = np.abs(x) @ np.abs(columns)
    return total, magnitude, _equal_products(x, w, magnitude, u) * walk + squares


def _equal_products(x: Array, w: Array, magnitude: Array, u: float) -> Array:
    """Estimate `repeats` of the terms of a matrix product from those of its two factors."""
    size_x = np.max(magnitude / _typical(w)[..., None, :], axis=-1, initial=0.0)
    size_w = np.max(magnitude / _typical(x)[..., :, None], axis=-2, initial=0.0)
    k_x, k_w = repeats(x, size_x, u), repeats(w, size_w, u)
    return 1 + (k_x[..., :, None] - 1) * (k_w[..., None, :] - 1) / max(x.shape[-1], 1)


def _typical(x: Array) -> Array:
    """Median of the absolute values of a row, of those that are not zero; 1 where all are."""
    ordered = np.sort(np.abs(x), axis=-1)
    n_zero = np.sum(ordered == 0, axis=-1, keepdims=True)
    middle = np.minimum((n_zero + x.shape[-1]) // 2, x.shape[-1] - 1)
    median = np.take_along_axis(ordered, middle, axis=-1)[..., 0]
    return np.where(median > 0, median, 1.0)


def condition_of(magnitude: Array, y: Array) -> Array:
    """Divide the sum of the absolute terms by the absolute value; 1 where both are zero."""
    return np.where(magnitude == 0, 1.0, magnitude / np.abs(y))
