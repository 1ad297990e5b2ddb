"""npllm.arrays: the backend switch, and the widening of 16-bit floats."""

import sys

import ml_dtypes
import numpy as np
import optional
import pytest
from close import close
from hypothesis import given
from strategies import FLOATS, dtypes

from npllm import arrays
from npllm.errors import MissingExtraError, NpllmError, NpllmTypeError, NpllmValueError

strict = optional.module("array_api_strict")
EVERY_PATTERN = np.arange(2**16, dtype=np.uint16)


def test_namespace_is_the_library_of_the_arrays():
    assert arrays.array_namespace(np.ones(1), None, np.float32(1)) is np
    assert arrays.array_namespace(None, strict.asarray([1.0])) is strict


def test_a_mixture_of_libraries_raises_and_names_both():
    with pytest.raises(NpllmTypeError, match=r"of array_api_strict and .* of numpy"):
        arrays.array_namespace(np.ones(1), strict.asarray([1.0]))


@pytest.mark.parametrize("x", [[1.0], 1.0, "x", (1,)])
def test_what_is_no_array_raises_and_names_its_type(x):
    with pytest.raises(NpllmTypeError, match=type(x).__name__):
        arrays.array_namespace(np.ones(1), x)


def test_no_array_at_all_raises():
    with pytest.raises(NpllmTypeError, match="at least one array"):
        arrays.array_namespace(None, None)


def test_widening_bfloat16_is_exact_for_every_bit_pattern():
    wide = arrays.widen(EVERY_PATTERN.view(ml_dtypes.bfloat16))
    desired = (EVERY_PATTERN.astype(np.uint32) << 16).view(np.float32)
    number = ~np.isnan(desired)
    assert wide.dtype == np.float32 and np.isnan(wide[~number]).all()
    close(wide[number].view(np.uint32), desired[number].view(np.uint32))


def test_widening_float16_is_exact_for_every_bit_pattern():
    narrow = EVERY_PATTERN.view(np.float16)
    number = ~np.isnan(narrow)
    close(arrays.widen(narrow)[number].astype(np.float16).view(np.uint16), EVERY_PATTERN[number])


@given(dtypes)
def test_widen_keeps_what_is_wide_and_computes_in_float32_at_least(dtype):
    x = np.ones(3, dtype)
    wide = arrays.widen(x)
    assert wide.dtype == (np.float64 if dtype == np.float64 else np.float32)
    assert (wide is x) == (dtype in (np.float32, np.float64))
    close(arrays.widen(x, np.float64), np.ones(3))


@pytest.mark.parametrize("dtype", [np.int64, bool, np.complex64])
def test_widen_refuses_what_is_no_float(dtype):
    with pytest.raises(NpllmTypeError, match=np.dtype(dtype).name):
        arrays.widen(np.ones(3, dtype))


@given(dtypes, dtypes)
def test_compute_dtype_is_float64_where_any_array_is(a, b):
    got = arrays.compute_dtype(np.ones(1, a), None, np.ones(1, b))
    assert got == (np.float64 if np.float64 in (a, b) else np.float32)


@pytest.mark.parametrize("name", FLOATS)
def test_dtype_named_finds_the_four_floats(name):
    assert arrays.dtype_named(name) == FLOATS[name]


@pytest.mark.parametrize("name", ["float8", None, [], np.float32])
def test_dtype_named_refuses_others(name):
    with pytest.raises(NpllmValueError, match="bfloat16, float16, float32, float64"):
        arrays.dtype_named(name)


@pytest.mark.parametrize(
    ("dtype", "answer"),
    [
        ("int8", True),
        ("uint32", True),
        ("int64", True),
        ("bool", False),
        ("float32", False),
        (ml_dtypes.bfloat16, False),
    ],
)
def test_is_integer_knows_bool_and_floats_from_integers(dtype, answer):
    assert arrays.is_integer(np.ones(1, dtype)) is answer


def test_is_integer_knows_other_libraries():
    assert arrays.is_integer(strict.asarray([1])) and not arrays.is_integer(strict.asarray([1.0]))


def test_host_range_is_smallest_and_largest():
    assert arrays.host_range(np.array([[3, -2], [5, 0]])) == (-2, 5)
    assert arrays.host_range(np.array([], np.int64)) is None
    assert (
        arrays.host_range(strict.asarray([1, 2])) is None
    )  # not looked at: it might live on a device


def test_to_numpy_copies_nothing_that_is_on_the_host():
    x = np.ones(2)
    assert arrays.to_numpy(x) is x and arrays.asarray(x, np) is x


def test_a_round_trip_through_another_library_keeps_the_values():
    x = np.arange(6.0).reshape(2, 3)
    there = arrays.asarray(x, strict)
    assert arrays.array_namespace(there) is strict
    close(arrays.to_numpy(there), x)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((2, 3), {"n": 2, "d": 3}),
        ((2, 3), {"n": None, "d": 3}),
        ((3,), {"dots": None, "d": 3}),
        ((5, 2, 3), {"dots": None, "d": 3}),
    ],
)
def test_expect_shape_accepts_these_sizes_and_no_other_last_one(shape, axes):
    assert arrays.expect_shape("x", np.ones(shape), **axes) is None
    with pytest.raises(NpllmValueError):
        arrays.expect_shape("x", np.ones((*shape[:-1], 4)), **axes)


@pytest.mark.parametrize(
    ("shape", "axes", "message"),
    [
        ((3071,), {"d_model": 3072}, r"x must be \[d_model\] = \[3072\], got \[3071\]"),
        ((2, 3), {"d": 3}, r"x must be \[d\] = \[3\], got \[2, 3\]"),
        (
            (3,),
            {"dots": None, "n": None, "d": 3},
            r"x must be \[\.\.\., n, d\] = \[\.\.\., n, 3\], got \[3\]",
        ),
        (
            (4, 2),
            {"dots": None, "n": None, "d": 3},
            r"x must be \[\.\.\., n, d\] = \[\.\.\., n, 3\], got \[4, 2\]",
        ),
    ],
)
def test_expect_shape_raises_with_both_sides_in_axis_names(shape, axes, message):
    with pytest.raises(NpllmValueError, match=message):
        arrays.expect_shape("x", np.ones(shape), **axes)


def test_backends_are_found_by_name():
    assert arrays.backend_namespace("numpy") is np


@pytest.mark.parametrize("name", ["torch", None, "NumPy"])
def test_an_unknown_backend_raises_and_names_the_known_ones(name):
    with pytest.raises(NpllmValueError, match="numpy, cupy"):
        arrays.backend_namespace(name)


def test_cupy_that_is_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(MissingExtraError, match=r"\.\[cuda\]"):
        arrays.backend_namespace("cupy")


def test_cupy_without_a_device_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", _cupy_with(0))
    with pytest.raises(NpllmValueError, match="CUDA device"):
        arrays.backend_namespace("cupy")
    monkeypatch.setitem(sys.modules, "cupy", cupy := _cupy_with(1))
    assert arrays.backend_namespace("cupy") is cupy


def test_cupy_without_a_driver_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", _cupy_with(None))
    with pytest.raises(NpllmValueError, match="no driver"):
        arrays.backend_namespace("cupy")


@pytest.mark.parametrize("found", [None, "missing", 0])
def test_auto_is_numpy_where_cupy_driver_or_device_is_missing(monkeypatch, found):
    monkeypatch.setitem(sys.modules, "cupy", None if found == "missing" else _cupy_with(found))
    assert arrays.backend_namespace("auto") is np


def test_auto_is_cupy_where_there_is_a_device(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", cupy := _cupy_with(1))
    assert arrays.backend_namespace("auto") is cupy


@pytest.mark.parametrize("xp", [np, strict])
def test_a_stable_order_keeps_equal_entries_as_they_stand(xp):
    order = arrays.stable_argsort(xp.asarray([2.0, 1.0] * 50), xp)
    close(arrays.to_numpy(order), np.array([*range(1, 100, 2), *range(0, 100, 2)]))


@pytest.mark.parametrize("error", [NpllmTypeError, NpllmValueError, MissingExtraError])
def test_every_error_is_an_npllm_error_and_the_built_in_one(error):
    assert issubclass(error, NpllmError) and issubclass(error, TypeError | ValueError | ImportError)


class _Runtime:
    class CUDARuntimeError(RuntimeError):
        pass

    def __init__(self, n):
        self.n = n

    def getDeviceCount(self):
        if self.n is None:
            raise self.CUDARuntimeError("cudaErrorInsufficientDriver")
        return self.n


def _cupy_with(n_devices):
    class Cupy:
        __version__ = "0"

        class cuda:
            runtime = _Runtime(n_devices)

    return Cupy
