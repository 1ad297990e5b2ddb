"""A matrix with low-rank updates of blocks of its rows: a weight under a LoRA adapter."""

from dataclasses import dataclass
from typing import Any

from npllm.arrays import (
    array_namespace,
    asarray,
    compute_dtype,
    expect_shape,
    ieee_semantics,
    is_packed,
    widen,
)
from npllm.errors import NpllmValueError
from npllm.quantized.packed import PackedMatrix

__all__ = ["AdaptedWeight", "LowRank", "rounded"]

Array = Any
BAND = 2**22  # entries of a weight that are merged at a time


@dataclass(frozen=True, eq=False)
class LowRank:
    """A low-rank update of some rows of a matrix.

        rows first ... first + n_rows - 1 of the weight += scale * b @ a

    Parameters
    ----------
    a : array [d_rank, d_in]
    b : array [n_rows, d_rank]
    scale : float
    first : int
        Its first row: that of the block of a split projection inside the fused matrix.

    Raises
    ------
    NpllmValueError
        When the shapes do not fit.
    """

    a: Array
    b: Array
    scale: float
    first: int = 0

    def __post_init__(self) -> None:
        expect_shape("a", self.a, d_rank=None, d_in=None)
        expect_shape("b", self.b, n_rows=None, d_rank=self.a.shape[0])

    @property
    def stop(self) -> int:
        """The row after its last one."""
        return self.first + self.b.shape[0]

    def rows(self, start: int, stop: int) -> "LowRank | None":
        """Return the update of rows start ... stop - 1, counted from start; None for no row."""
        low, high = max(start, self.first), min(stop, self.stop)
        if low >= high:
            return None
        kept = self.b[low - self.first : high - self.first, :]
        return LowRank(self.a, kept, self.scale, low - start)

    def product(self, dtype: Any) -> Array:
        """Return scale * b @ a in a compute dtype."""
        return (widen(self.b, dtype) @ widen(self.a, dtype)) * self.scale


@dataclass(frozen=True, eq=False, repr=False)
class AdaptedWeight(PackedMatrix):
    """A matrix under a LoRA adapter, which stands in the place of its base in `Params`.

        weight = base + sum over the updates of scale * b @ a, each in its block of rows

    `npllm.models.adapted.linear` multiplies by it without forming it, with the products of the
    model's set of operations; `widened` forms it.

    Parameters
    ----------
    base : array [d_out, d_in] or PackedMatrix
    updates : tuple of LowRank
        Of different rows, in ascending order.

    Raises
    ------
    NpllmValueError
        When the shapes do not fit, or updates overlap.

    Notes
    -----
    Immutable.

    Source: "LoRA" (Hu et al. 2021), section 4.1.
    """

    base: Any
    updates: tuple[LowRank, ...]

    def __post_init__(self) -> None:
        expect_shape("base", self.base, d_out=None, d_in=None)
        d_out, d_in = self.base.shape
        stop = 0
        for update in self.updates:
            expect_shape("a", update.a, d_rank=None, d_in=d_in)
            if not stop <= update.first < update.stop <= d_out:
                raise NpllmValueError(
                    f"an update must lie in rows {stop} ... d_out - 1 = {d_out - 1}, got rows "
                    f"{update.first} ... {update.stop - 1}"
                )
            stop = update.stop

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """[d_out, d_in]."""
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the base."""
        return self.base.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the base and of all factors."""
        return sum(x.nbytes for x in self.arrays)

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The base, then the factors of each update."""
        return (self.base, *(x for update in self.updates for x in (update.a, update.b)))

    @property
    def facts(self) -> str:
        """What tells two of these apart besides their arrays."""
        places = [(update.first, update.scale) for update in self.updates]
        return f"AdaptedWeight {places}"

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        """Return the library that base and factors belong to."""
        return array_namespace(*self.arrays)

    def rows(self, span: slice) -> Any:
        """Return the rows of a slice; the base's own where no update reaches them."""
        start, stop, step = span.indices(len(self))
        if step != 1:
            raise NpllmValueError(f"rows of an adapted weight are sliced with step 1, got {step}")
        chosen = [update.rows(start, stop) for update in self.updates]
        updates = tuple(update for update in chosen if update is not None)
        base = self.base[start : max(start, stop), :]
        return AdaptedWeight(base, updates) if updates else base

    def take(self, numbers: Array) -> Any:
        """Return the rows with the given numbers, a 1-D integer array, widened."""
        xp = array_namespace(self.base, numbers)
        base = self.base
        rows = base.take(numbers) if is_packed(base) else xp.take(base, numbers, axis=0)
        y = widen(rows, compute_dtype(self.base))
        for update in self.updates:
            inside = (numbers >= update.first) & (numbers < update.stop)
            local = xp.where(inside, numbers - update.first, xp.zeros_like(numbers))
            some = LowRank(update.a, xp.take(update.b, local, axis=0), update.scale)
            y = y + xp.where(inside[:, None], some.product(y.dtype), xp.zeros_like(y))
        return y

    def widened(self) -> Array:
        """Return the values of all rows: float32, or float64 where the base is."""
        xp, dtype = array_namespace(*self.arrays), compute_dtype(self.base)
        parts, start = [], 0
        for update in self.updates:
            parts.append(widen(self.base[start : update.first, :], dtype))
            block = self.base[update.first : update.stop, :]
            parts.append(widen(block, dtype) + update.product(dtype))
            start = update.stop
        parts.append(widen(self.base[start:, :], dtype))
        return xp.concat([x for x in parts if x.shape[0]] or parts, axis=0)

    def merged(self) -> Array:
        """Return the sum as one matrix in the dtype of the base, computed band by band.

        Raises
        ------
        NpllmValueError
            When the base is stored in int8 or in blocks; when an entry is too large for the dtype.
        """
        base: Any = self.base
        while isinstance(base, AdaptedWeight):
            base = base.base
        if is_packed(base):
            raise NpllmValueError(
                f"a weight stored as {type(base).__name__} takes no sum: merge weights in floats "
                '(npllm.load(..., dtype="bfloat16" or "float32")), or run unmerged'
            )
        n_rows = max(1, BAND // self.shape[1])
        bands = (self[start : start + n_rows, :] for start in range(0, len(self), n_rows))
        xp, dtype = array_namespace(*self.arrays), base.dtype
        wide = (widen(band, compute_dtype(base)) for band in bands)
        return xp.concat([rounded(band, dtype) for band in wide], axis=0)

    def to(self, xp: Any) -> "AdaptedWeight":
        """Return the same weight in another array library."""
        updates = (
            LowRank(asarray(x.a, xp), asarray(x.b, xp), x.scale, x.first) for x in self.updates
        )
        return AdaptedWeight(asarray(self.base, xp), tuple(updates))


@ieee_semantics
def rounded(x: Array, dtype: Any) -> Array:
    """Round to a float dtype, of the same or fewer bits; finite numbers stay finite.

    Parameters
    ----------
    x : array [...]
    dtype : dtype

    Returns
    -------
    y : array [...]
        `x` itself where it has that dtype.

    Raises
    ------
    NpllmValueError
        When an entry is larger than the dtype holds.
    """
    if x.dtype == dtype:
        return x
    xp, wide = array_namespace(x), widen(x)
    y = xp.astype(wide, dtype)
    fits = xp.isfinite(widen(y)) | ~xp.isfinite(wide)
    if not bool(xp.all(fits)):
        largest = float(xp.max(xp.abs(xp.where(fits, xp.zeros_like(wide), wide))))
        raise NpllmValueError(f"{largest:g} is larger than {dtype} can hold")
    return y
