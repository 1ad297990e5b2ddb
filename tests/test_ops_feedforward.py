"""silu and swiglu."""

import numpy as np
import oracles
import pytest
from close import close
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from strategies import FLOATS, batches, compute_dtypes, dtypes, normal, sizes

from npllm.errors import NpllmValueError
from npllm.ops import silu, swiglu

EXTREMES = np.array(
    [-1e4, -750, -709, -104, -88, -87, -1, -1e-9, 0, 1e-9, 1, 88, 89, 709, 710, 1e4]
)


@given(
    st.data(),
    dtypes,
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    st.sampled_from([0.1, 1.0, 30.0]),
)
def test_silu_equals_the_formula(data, dtype, shape, scale):
    x = data.draw(normal(shape, dtype, scale)) if shape else np.asarray(scale, dtype)
    close(silu(x), oracles.silu(x), dtype=dtype)


@pytest.mark.parametrize("name", FLOATS)
def test_silu_of_extremes_is_exact_enough_and_warns_of_nothing(name):
    x = EXTREMES.astype(FLOATS[name])
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        for one, desired in zip(silu(x), oracles.silu(x), strict=True):
            tiny = abs(desired) < 1e-7 if name == "float16" else abs(desired) < 1e-36
            close(one, one if tiny else np.asarray(desired), dtype=name)
            assert abs(float(one)) <= 1e-7 or not tiny


@given(st.data(), compute_dtypes)
def test_silu_of_x_less_silu_of_minus_x_is_x(data, dtype):
    x = data.draw(normal(9, dtype, 3.0))
    close(silu(x) - silu(-x), x)


@given(st.data(), dtypes, dtypes, batches, sizes)
def test_swiglu_gates_the_second_by_the_first(data, gate_dtype, up_dtype, batch, d_ff):
    gate, up = (
        data.draw(normal((*batch, d_ff), gate_dtype, 3.0)),
        data.draw(normal((*batch, d_ff), up_dtype)),
    )
    close(swiglu(gate, up), oracles.swiglu(gate, up), dtype=gate_dtype)


def test_a_closed_gate_lets_nothing_through():
    gate, up = np.array([-1e4, 0.0], np.float32), np.array([5.0, 5.0], np.float32)
    close(swiglu(gate, up), np.zeros(2, np.float32))
    close(swiglu(up, gate) == 0, np.array([False, True]))


@given(st.data())
def test_swiglu_is_linear_in_up(data):
    gate, up = data.draw(normal(5, np.float64)), data.draw(normal(5, np.float64))
    close(swiglu(gate, 3 * up), 3 * swiglu(gate, up))


@pytest.mark.parametrize(("gate", "up"), [((2, 3), (2, 4)), ((2, 3), (3,)), ((2, 3), (1, 3))])
def test_shapes_that_differ_raise_with_both_sides(gate, up):
    with pytest.raises(NpllmValueError, match=r"gate.*got gate .* and up "):
        swiglu(np.ones(gate), np.ones(up))
