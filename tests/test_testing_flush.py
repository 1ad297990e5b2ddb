"""Arithmetic that flushes subnormal numbers to zero: named as such, and passed where asked for."""

import numpy as np
import pytest

import npllm
from npllm import ops, testing
from npllm.testing.arithmetic_models import FLUSHED

SMALLEST = 2.0**-126


def flushed(x):
    return np.where(np.abs(x) < SMALLEST, 0, x).astype(x.dtype)


def attention(q, k, v, *, mask):
    return flushed(ops.attention(q, k, flushed(v), mask=mask))


def linear(x, weight, bias=None):
    return flushed(ops.linear(flushed(x), flushed(weight), bias))


def rms_norm(x, weight, eps):
    return flushed(ops.rms_norm(flushed(x), weight, eps))


def swiglu(gate, up):
    return flushed(ops.swiglu(flushed(gate), flushed(up)))


def apply_rope(x, cos, sin):
    return flushed(ops.apply_rope(flushed(x), cos, sin))


def embed(ids, weight):
    return flushed(ops.embed(ids, weight))


FUNCTIONS = {fn.__name__: fn for fn in (attention, linear, rms_norm, swiglu, apply_rope, embed)}


@pytest.mark.parametrize("op", FUNCTIONS)
def test_a_function_that_flushes_is_told_so_and_no_convention_is_accused(op):
    with pytest.raises(testing.LawBroken) as caught:
        testing.check(op, FUNCTIONS[op], max_examples=100, seed=3)
    diagnosis = caught.value.diagnosis
    assert "subnormal" in str(caught.value)
    assert (diagnosis.status, diagnosis.names) == ("wrong", [])
    assert diagnosis.model.endswith(FLUSHED)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_it_passes_where_that_arithmetic_is_asked_for(op):
    report = testing.check(op, FUNCTIONS[op], max_examples=50, seed=3, flush_to_zero=True)
    assert report.used <= 1
    assert report.n_undecided < report.n_trial / 10


def test_no_inputs_are_drawn_of_which_flushing_leaves_nothing():
    """Of this seed's 30 cases 16 were subnormal: their budget exceeds every value."""
    features = {"gqa", "window", "cache", "scale"}
    report = testing.check(
        "attention", ops.attention, features, max_examples=30, seed=18, flush_to_zero=True
    )
    assert report.n_undecided == 0


def test_a_wrong_mask_is_still_named_where_flushing_is_asked_for():
    def early(q, k, v, *, mask):
        return flushed(ops.attention(q, k, v, mask=lambda i, j: mask(i, j + 1)))

    with pytest.raises(testing.LawBroken) as caught:
        testing.check_attention(early, seed=3, max_examples=100, flush_to_zero=True)
    assert caught.value.diagnosis.names == ["C9 one key early"]


def values(n=64):
    return np.random.default_rng(0).standard_normal(n).astype(np.float32)


def test_a_replay_keeps_the_arithmetic():
    with pytest.raises(testing.LawBroken) as caught:
        testing.check_linear(lambda x, w, bias=None: linear(x, w, bias) * 2, flush_to_zero=True)
    assert caught.value.case["flush_to_zero"] is True


@pytest.mark.parametrize("scale", [1e-39, 1e-36])
def test_subnormal_numbers_that_are_wrong_are_not_explained_by_flushing(scale):
    x, weight = (values() * scale)[:, None], np.ones((1, 1), np.float32)
    found = testing.verdict("linear", {"x": x, "weight": weight}, x / 2)
    assert found.status == "wrong"
    words = "float32 accumulation, intermediate results that are subnormal"
    assert found.model == (words if scale < SMALLEST else None)


def test_bits_that_an_intermediate_result_loses_are_told_so():
    def weight_first(x, weight, eps):
        return weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)

    with pytest.raises(testing.LawBroken) as caught:
        testing.check_rms_norm(weight_first, seed=3)
    assert caught.value.diagnosis.names == []
    assert caught.value.diagnosis.model.endswith("intermediate results that are subnormal")
    testing.check_rms_norm(weight_first, seed=3, flush_to_zero=True)


def test_an_operand_that_is_flushed_counts_with_its_factor():
    """1e-39 times 1e20 is an ordinary number: a large error, and the right one."""
    x, weight = values()[None] * np.float32(1e-39), np.full((1, 64), 1e20, np.float32)
    inputs = {"x": x, "weight": weight}
    y = linear(x, weight)
    assert testing.verdict("linear", inputs, y).status == "wrong"
    assert testing.verdict("linear", inputs, y).model.endswith(FLUSHED)
    assert testing.verdict("linear", inputs, y, flush_to_zero=True).status != "wrong"
    assert testing.verdict("linear", inputs, y + 1e-10, flush_to_zero=True).status == "wrong"


def test_inputs_without_subnormal_numbers_have_the_same_budget_but_for_the_floor():
    inputs = {"x": values()[None], "weight": np.eye(64, dtype=np.float32)}
    plain, flushing = (testing.budget("linear", inputs, flush_to_zero=on) for on in (False, True))
    np.testing.assert_allclose(flushing.statistical, plain.statistical, rtol=0, atol=65 * SMALLEST)


@pytest.mark.parametrize(
    ("op", "option"), [("sampler", "flush_to_zero"), ("linear", "flush_to_nought")]
)
def test_an_option_that_would_be_ignored_raises(op, option):
    with pytest.raises(npllm.NpllmError, match=option):
        testing.check(op, linear, **{option: True})
