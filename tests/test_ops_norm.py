"""rms_norm: rows of root mean square 1, then scaled."""

import numpy as np
import oracles
import pytest
from close import close
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, compute_dtypes, dtypes, normal, sizes

from npllm.errors import NpllmValueError
from npllm.ops import rms_norm


@given(
    st.data(),
    dtypes,
    dtypes,
    batches,
    sizes,
    st.sampled_from([0.0, 1e-6, 1e-5, 0.5]),
    st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_rms_norm_equals_the_formula(data, x_dtype, w_dtype, batch, d_model, eps, scale):
    x, weight = (
        data.draw(normal((*batch, d_model), x_dtype, scale)),
        data.draw(normal(d_model, w_dtype)),
    )
    close(rms_norm(x, weight, eps), oracles.rms_norm(x, weight, eps), dtype=x_dtype)


@given(st.data(), compute_dtypes, sizes, st.integers(-20, 20))
def test_the_length_of_a_row_does_not_matter(data, dtype, d_model, power):
    x, weight = data.draw(normal((4, d_model), dtype)), data.draw(normal(d_model, dtype))
    close(rms_norm(x * dtype.type(2.0**power), weight, 0.0), rms_norm(x, weight, 0.0))


@given(st.data(), compute_dtypes, sizes)
def test_the_mean_square_of_a_row_becomes_one(data, dtype, d_model):
    y = rms_norm(data.draw(normal((4, d_model), dtype)), np.ones(d_model, dtype), 0.0)
    close(np.mean(y * y, axis=-1), np.ones(4, dtype))


@given(dtypes, sizes)
def test_a_row_of_zeros_stays_zero(dtype, d_model):
    close(
        rms_norm(np.zeros((2, d_model), dtype), np.ones(d_model, dtype), 1e-5),
        np.zeros((2, d_model), dtype),
    )


def test_eps_stands_inside_the_root():
    close(rms_norm(np.array([3.0]), np.array([1.0]), 7.0), np.array([0.75]))


def test_large_float16_inputs_do_not_overflow():
    x = np.full((1, 8), 60000, np.float16)
    close(rms_norm(x, np.ones(8, np.float16), 1e-5), np.ones((1, 8), np.float16))


def test_the_product_with_the_gain_is_rounded_once():
    x, weight = np.array([[1.0, 3.0]], np.float16), np.array([1 / 3, 1 / 3], np.float16)
    desired = oracles.rms_norm(x, weight, 1e-5).astype(np.float16)
    close(rms_norm(x, weight, 1e-5), desired, times=0)


def test_rows_do_not_meet():
    x = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    alone = rms_norm(x[:1], np.ones(2, np.float32), 1e-5)
    close(rms_norm(x, np.ones(2, np.float32), 1e-5)[:1], alone, times=0)


@pytest.mark.parametrize("shape", [(3,), (1,), (1, 4)])
def test_a_gain_of_another_width_raises_with_both_sides(shape):
    with pytest.raises(NpllmValueError, match=r"weight must be \[d_model\] = \[4\], got"):
        rms_norm(np.ones((2, 4)), np.ones(shape), 1e-5)
