"""One way to compare two arrays: what they are first, their values last."""

import numpy as np

# Largest accepted |actual - desired|, as a fraction of the largest |desired|: a few units of the
# last place of each dtype.
TOLERANCE = {"float64": 1e-12, "float32": 5e-6, "float16": 2e-3, "bfloat16": 1.6e-2}

# The smallest positive number of each dtype: below it a result rounds to zero.
UNDERFLOW = {"float64": 5e-324, "float32": 1.5e-45, "float16": 6e-8, "bfloat16": 1e-40}


def close(actual, desired, *, dtype=None, times=1.0):
    """Raise AssertionError unless two arrays agree in library, dtype, shape and values; say which
    of them differs.

    Parameters
    ----------
    actual, desired : array
    dtype : dtype or str, optional
        What `actual` must have, where `desired` comes from a float64 oracle.  None: the dtype of
        `desired`.
    times : float
        Multiplies the tolerance of that dtype: the one knob, for long sums and large scores.  0
        asks for equal bits (but for the sign of a zero).

    Notes
    -----
    NaN on either side never passes.  Infinities must stand in the same places.  Integers and
    booleans must be equal.
    """
    __tracebackhide__ = True
    _same("array library", _library(actual), _library(desired))
    name = _dtype_name(actual)
    _same("dtype", name, _dtype_name(desired) if dtype is None else _dtype_name(dtype))
    _same("shape", tuple(actual.shape), tuple(desired.shape))
    got, want = _on_host(actual), _on_host(desired)
    if name not in TOLERANCE:
        return _report("is not equal", got != want, got, want)
    got, want = got.astype(np.float64), want.astype(np.float64)
    _report("actual holds NaN", np.isnan(got), got, want)
    _report("desired holds NaN", np.isnan(want), got, want)
    _report("infinities differ", (np.isinf(got) | np.isinf(want)) & (got != want), got, want)
    finite = np.isfinite(want)
    largest = np.max(np.abs(want), where=finite, initial=0.0)
    error = np.abs(np.subtract(got, want, where=finite, out=np.zeros_like(want)))
    tolerance = times * (TOLERANCE[name] * largest + UNDERFLOW[name])
    _report(
        f"|actual - desired| reaches {error.max(initial=0.0):.3g}, tolerance {tolerance:.3g} "
        f"({times:g} x {TOLERANCE[name]:g} of the largest |desired| {largest:.3g})",
        error > tolerance,
        got,
        want,
    )


def _same(what, got, want):
    __tracebackhide__ = True
    if got != want:
        raise AssertionError(f"{what} differs: actual {got}, desired {want}")


def _report(what, wrong, got, want):
    __tracebackhide__ = True
    if np.any(wrong):
        first = tuple(int(n) for n in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{what} in {np.count_nonzero(wrong)} of {np.size(wrong)} entries, first at {list(first)}: "
            f"actual {got[first]!r}, desired {want[first]!r}"
        )


def _library(x):
    if type(x).__module__ == "cupy":  # CuPy's arrays do not name their library
        return "cupy"
    if not hasattr(x, "__array_namespace__"):
        return f"none ({type(x).__module__}.{type(x).__qualname__})"
    return x.__array_namespace__().__name__


def _dtype_name(x):
    x = np.dtype(x) if isinstance(x, (str, type)) else getattr(x, "dtype", x)
    return str(x).rsplit(".", 1)[-1]


def _on_host(x):
    return x.get() if hasattr(x, "get") else np.asarray(x)
