"""linear, split_heads, merge_heads."""

import importlib
import re
from unittest import mock

import numpy as np
import oracles
import pytest
from close import close
from hypothesis import given
from hypothesis import strategies as st
from strategies import FLOATS, batches, compute_dtypes, dtypes, normal, sizes

from npllm import arrays
from npllm.errors import NpllmValueError
from npllm.ops import linear, merge_heads, split_heads

MODULE = importlib.import_module("npllm.ops.linear")


@given(st.data(), dtypes, dtypes, batches, sizes, sizes, st.booleans())
def test_linear_equals_the_sum_over_channels(data, x_dtype, w_dtype, batch, d_in, d_out, with_bias):
    x, weight = (
        data.draw(normal((*batch, d_in), x_dtype)),
        data.draw(normal((d_out, d_in), w_dtype)),
    )
    bias = data.draw(normal(d_out, w_dtype)) if with_bias else None
    close(linear(x, weight, bias), oracles.linear(x, weight, bias), dtype=x_dtype)


@given(st.data(), dtypes, dtypes, sizes, st.integers(1, 12), st.integers(1, 24))
def test_blocks_of_rows_change_nothing(data, x_dtype, w_dtype, d_in, d_out, entries):
    x, weight = data.draw(normal((3, d_in), x_dtype)), data.draw(normal((d_out, d_in), w_dtype))
    whole = linear(x, weight)
    with mock.patch.object(arrays, "HOST_ENTRIES", entries):
        close(linear(x, weight), whole)


@pytest.mark.parametrize("dtype", [name for name in FLOATS if name != "float32"])
def test_a_weight_is_widened_block_by_block_and_never_whole(dtype, monkeypatch):
    seen, widen = [], MODULE.widen
    monkeypatch.setattr(arrays, "HOST_ENTRIES", 64)
    monkeypatch.setattr(MODULE, "widen", lambda x, to=None: (seen.append(x), widen(x, to))[1])
    weight = np.ones((40, 8), FLOATS[dtype])
    x = np.ones((2, 8), np.float32)
    linear(x, weight)
    copied = [
        block.size
        for block in seen
        if block is not x
        and widen(block, np.float64 if dtype == "float64" else np.float32) is not block
    ]
    assert max(copied, default=0) <= 64 and sum(copied) == (
        0 if dtype == "float64" else weight.size
    )


def test_memory_holds_one_widened_block_at_a_time(traced_peak):
    weight, x = np.ones((4096, 1024), FLOATS["bfloat16"]), np.ones((1, 1024), np.float32)
    block = 4 * arrays.HOST_ENTRIES
    assert traced_peak(lambda: linear(x, weight)) < 2.5 * block < 4 * weight.size / 3


@given(compute_dtypes, batches)
def test_empty_batches_and_no_outputs_keep_their_shape(dtype, batch):
    x = np.ones((*batch, 0, 3), dtype)
    assert linear(x, np.ones((2, 3), dtype)).shape == (*batch, 0, 2)
    assert linear(x, np.ones((0, 3), FLOATS["bfloat16"])).shape == (*batch, 0, 0)


@given(st.data(), compute_dtypes, sizes, sizes)
def test_rows_do_not_meet(data, dtype, d_in, d_out):
    weight = data.draw(normal((d_out, d_in), dtype))
    x = data.draw(normal((2, 3, d_in), dtype))
    y = linear(x, weight)
    x[1] = 1e6
    close(linear(x, weight)[0], y[0], times=0)


def test_the_sum_is_at_least_float32_and_rounded_once():
    x = np.array([[2048.0, 1.0, 1.0]], np.float16)  # 2048 + 1 rounds to 2048 in float16
    close(linear(x, np.ones((1, 3), np.float16)), np.array([[2050.0]], np.float16), times=0)
    fine = np.array([[1 + 2.0**-30, 1.0]])  # 1 + 2**-30 rounds to 1 in float32
    close(
        linear(np.array([[1.0, -1.0]], np.float32), fine),
        np.array([[2.0**-30]], np.float32),
        times=0,
    )


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        ((2, 3), (5, 4), None, "x must be [..., d_in] = [..., 4], got [2, 3]"),
        ((2, 4), (5, 4), (4,), "bias must be [d_out] = [5], got [4]"),
        ((2, 4), (5, 4), (1, 5), "bias must be [d_out] = [5], got [1, 5]"),
        ((2, 4), (4,), None, "weight must be [d_out, d_in], got [4]"),
    ],
)
def test_shapes_that_do_not_fit_raise_with_both_sides(x, weight, bias, message):
    with pytest.raises(NpllmValueError, match=re.escape(message)):
        linear(np.ones(x), np.ones(weight), None if bias is None else np.ones(bias))


@given(st.data(), dtypes, batches, st.integers(0, 4), sizes, sizes)
def test_merge_heads_is_the_inverse_of_split_heads(data, dtype, batch, n_seq, n_head, d_head):
    x = data.draw(normal((*batch, n_seq, n_head * d_head), dtype))
    heads = split_heads(x, n_head)
    assert heads.shape == (*batch, n_head, n_seq, d_head)
    close(merge_heads(heads), x, times=0)
    close(split_heads(merge_heads(heads), n_head), heads, times=0)


def test_a_head_is_a_run_of_neighbouring_channels():
    x = np.arange(12).reshape(2, 6)
    close(split_heads(x, 2), np.array([[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10, 11]]]))


@pytest.mark.parametrize("n_head", [0, -2, 4])
def test_a_width_that_is_no_multiple_of_the_heads_raises(n_head):
    with pytest.raises(NpllmValueError, match=f"n_head = {n_head}, got 6"):
        split_heads(np.ones((2, 6)), n_head)


def test_heads_need_their_axes():
    with pytest.raises(NpllmValueError, match="n_seq"):
        split_heads(np.ones(6), 2)
    with pytest.raises(NpllmValueError, match="n_head, n_seq, d_head"):
        merge_heads(np.ones((2, 6)))
