"""softmax, the filters from logits to logits, greedy, and the draw."""

import math
from unittest import mock

import numpy as np
import oracles
import pytest
from close import close
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import FLOATS, batches, compute_dtypes, dtypes, normal

from npllm import arrays
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.ops import greedy, min_p, repetition_penalty, sample, softmax, temperature, top_k, top_p

F64 = np.dtype("float64")
QUARTERS = np.zeros(
    4
)  # equal logits: the only probabilities that are exact with every library's exp
ABOVE = math.nextafter
probabilities = st.floats(0, 1)
units = st.floats(0, 1, exclude_max=True)


@st.composite
def logit_rows(draw, batch=batches, dtype=compute_dtypes):
    """Rows of logits; some rows with ties, some with excluded entries, none without any entry."""
    dtype, shape = draw(dtype), (*draw(batch), draw(st.integers(1, 9)))
    logits = draw(normal(shape, dtype, 3.0))
    if draw(st.booleans()):
        logits = np.round(logits)
    if draw(st.booleans()):
        excluded = draw(normal(shape)) > 0.7
        excluded[..., draw(st.integers(0, shape[-1] - 1))] = False
        logits = np.where(excluded, np.asarray(-np.inf, dtype), logits)
    return logits


def by_row(oracle, logits, *arguments):
    rows = [
        oracle(row.tolist(), *arguments) for row in logits.reshape(-1, logits.shape[-1]).astype(F64)
    ]
    return np.array(rows, F64).reshape(logits.shape)


# ------------------------------------------------------------------------------------------------------------------------- softmax


@given(logit_rows(dtype=dtypes))
def test_softmax_equals_the_formula(logits):
    close(softmax(logits), by_row(oracles.softmax, logits), dtype=logits.dtype)


@given(logit_rows(), st.integers(-3, 3))
def test_softmax_sums_to_one_and_a_shift_changes_nothing(logits, power):
    y = softmax(logits)
    close(y.sum(axis=-1), np.ones(logits.shape[:-1], logits.dtype))
    close(softmax(logits + logits.dtype.type(2.0**power)), y)


@given(st.data(), compute_dtypes, st.integers(-3, 2))
def test_softmax_runs_along_any_axis(data, dtype, axis):
    x = data.draw(normal((2, 3, 4), dtype))
    close(softmax(x, axis=axis), np.moveaxis(softmax(np.moveaxis(x, axis, -1)), -1, axis))


@pytest.mark.parametrize("name", FLOATS)
def test_softmax_of_huge_scores_and_of_none(name):
    x = np.array([[1e4, -1e4, 1e4], [-np.inf, 0, -np.inf], [-np.inf] * 3]).astype(FLOATS[name])
    close(softmax(x), np.array([[0.5, 0, 0.5], [0, 1, 0], [0, 0, 0]]), dtype=name)


# ------------------------------------------------------------------------------------------------------------------------- filters


@given(logit_rows(), st.integers(1, 12))
def test_top_k_keeps_what_fewer_than_k_exceed(logits, k):
    close(top_k(logits, k), by_row(oracles.top_k, logits, k), dtype=logits.dtype, times=0)


def test_top_k_keeps_ties_with_the_last_one_kept():
    close(top_k(np.array([1.0, 3.0, 2.0, 2.0, 0.0]), 2), np.array([-np.inf, 3, 2, 2, -np.inf]))


@given(logit_rows(), probabilities)
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, p):
    probability = by_row(oracles.softmax, logits)
    sums = np.cumsum(-np.sort(-probability, axis=-1), axis=-1)
    assume((abs(sums - p) > 1e-12).all())  # where rounding decides, see the exact cases below
    close(
        top_p(logits, p),
        by_row(oracles.top_p, logits, p) if p < 1 else logits,
        dtype=logits.dtype,
        times=0,
    )


@pytest.mark.parametrize(
    ("p", "n_kept"),
    [
        (0.0, 1),
        (0.25, 1),
        (ABOVE(0.25, 1), 2),
        (0.5, 2),
        (ABOVE(0.5, 1), 3),
        (0.75, 3),
        (ABOVE(0.75, 1), 4),
        (1.0, 4),
    ],
)
def test_top_p_keeps_the_token_that_reaches_p_and_none_after_it_and_low_ids_first(p, n_kept):
    close(np.isfinite(top_p(QUARTERS, p)), np.arange(4) < n_kept)


def top_p_of_all(logits, p):
    """The same by a sort of the whole vocabulary."""
    order = np.argsort(-logits, axis=-1, kind="stable")
    ranked = np.take_along_axis(softmax(logits.astype(F64)), order, axis=-1)
    before = np.cumsum(ranked, axis=-1) - ranked
    before[..., 1:] = np.cumsum(ranked, axis=-1)[..., :-1]
    kept = np.take_along_axis(
        (before < p) | (np.arange(logits.shape[-1]) == 0), np.argsort(order, axis=-1), axis=-1
    )
    return np.where(kept, logits, np.asarray(-np.inf, logits.dtype))


@given(
    st.data(),
    compute_dtypes,
    st.integers(1, 3),
    st.integers(1, 200),
    st.integers(1, 40),
    st.booleans(),
    st.floats(0, 1, exclude_max=True),
)
def test_top_p_behind_top_k_sorts_what_is_left_and_gives_the_same(
    data, dtype, n_batch, n_vocab, k, ties, p
):
    """Rows of which top_k leaves more and fewer; the result bit for bit that of a sort of all."""
    logits = data.draw(normal((n_batch, n_vocab), dtype, 3.0))
    logits = top_k(np.round(logits) if ties else logits, k)
    sorted_sizes, sort = [], arrays.stable_argsort
    with mock.patch.object(
        arrays, "stable_argsort", lambda x, xp: (sorted_sizes.append(x.shape[-1]), sort(x, xp))[1]
    ):
        close(top_p(logits, p), top_p_of_all(logits, p), times=0)
    assert sorted_sizes == [np.isfinite(logits).sum(axis=-1).max()]


@given(logit_rows(), probabilities)
def test_min_p_keeps_what_is_p_times_as_likely_as_the_likeliest(logits, p):
    probability = by_row(oracles.softmax, logits)
    assume(
        (abs(probability - p * probability.max(axis=-1, keepdims=True)) > 1e-6).all()
        if 0 < p < 1
        else p == 0
    )
    close(min_p(logits, p), by_row(oracles.min_p, logits, p), dtype=logits.dtype, times=0)


def test_min_p_keeps_the_boundary():
    close(min_p(QUARTERS, 1.0), QUARTERS)
    for p, kept in ((0.25 - 1e-9, [0, 1, 2]), (0.25 + 1e-9, [0, 2])):
        close(np.flatnonzero(np.isfinite(min_p(np.log([1.0, 0.25, 0.5, 0.1]), p))), np.array(kept))


@given(logit_rows(), st.data(), st.sampled_from([0.5, 1.0, 1.3]))
def test_a_penalty_makes_seen_tokens_less_likely_whatever_their_sign(logits, data, penalty):
    seen = data.draw(normal(logits.shape)) > 0
    y = repetition_penalty(logits, seen, penalty)
    rows = [
        oracles.repetition_penalty(*pair, penalty)
        for pair in zip(
            logits.reshape(-1, logits.shape[-1]).tolist(),
            seen.reshape(-1, logits.shape[-1]).tolist(),
            strict=True,
        )
    ]
    close(y, np.array(rows, F64).reshape(logits.shape), dtype=logits.dtype)
    close(np.where(seen, 0, y), np.where(seen, 0, logits), times=0) if np.isfinite(
        logits
    ).all() else None
    if penalty == 1.0:
        close(y, logits, times=0)


@given(logit_rows(), st.sampled_from([0.1, 0.7, 1.0, 3.0]))
def test_temperature_divides(logits, t):
    close(temperature(logits, t), logits.astype(F64) / t, dtype=logits.dtype)


@given(logit_rows())
def test_filters_never_exclude_the_most_likely_token_and_change_no_other_number(logits):
    best = np.argmax(logits, axis=-1)[..., None]
    for y in (
        top_k(logits, 1),
        top_p(logits, 0.0),
        min_p(logits, 1.0),
        top_k(logits, 3),
        top_p(logits, 0.6),
        min_p(logits, 0.4),
    ):
        close(
            np.take_along_axis(y, best, axis=-1), np.take_along_axis(logits, best, axis=-1), times=0
        )
        close(np.where(np.isneginf(y), np.asarray(-np.inf, y.dtype), logits), y, times=0)


@given(logit_rows())
def test_filters_that_keep_all_change_nothing(logits):
    for y in (
        top_k(logits, logits.shape[-1]),
        top_k(logits, 99),
        top_p(logits, 1.0),
        min_p(logits, 0.0),
        temperature(logits, 1.0),
    ):
        close(y, logits, times=0)


def test_top_p_of_one_keeps_even_what_rounding_would_lose():
    close(top_p(np.array([0.0, -100.0]), 1.0), np.array([0.0, -100.0]), times=0)


@pytest.mark.parametrize(
    ("filter", "value"),
    [
        (top_k, 0),
        (top_k, -1),
        (top_p, -0.1),
        (top_p, 1.1),
        (top_p, math.nan),
        (min_p, -0.1),
        (min_p, 1.1),
        (min_p, math.nan),
        (temperature, 0),
        (temperature, -1.0),
        (temperature, math.nan),
    ],
)
def test_values_out_of_range_raise_and_are_named(filter, value):
    with pytest.raises(NpllmValueError, match=f"{filter.__name__} must .*got {value}"):
        filter(np.zeros(3), value)


@pytest.mark.parametrize("penalty", [0, -1.0, math.nan])
def test_a_penalty_that_is_not_positive_raises(penalty):
    with pytest.raises(NpllmValueError, match=f"repetition_penalty must be above 0.*got {penalty}"):
        repetition_penalty(np.zeros(3), np.ones(3, bool), penalty)


def test_what_was_seen_is_told_by_truth_values():
    with pytest.raises(NpllmTypeError, match="seen must be a bool array"):
        repetition_penalty(np.zeros(3), np.array([0, 1, 2]), 1.2)


# ------------------------------------------------------------------------------------------------------------------- the next token


@given(logit_rows())
def test_greedy_takes_the_lowest_id_among_the_largest(logits):
    rows = [row.index(max(row)) for row in logits.reshape(-1, logits.shape[-1]).tolist()]
    close(greedy(logits), np.array(rows, np.int64).reshape(logits.shape[:-1]))


@pytest.mark.parametrize("name", FLOATS)
def test_greedy_reads_every_float(name):
    close(greedy(np.array([[0, 2, 2, 1]], FLOATS[name])), np.array([1]))


@given(logit_rows(), st.data())
def test_sample_takes_the_first_token_whose_cumulated_probability_exceeds_u(logits, data):
    u = np.asarray(
        np.random.default_rng(data.draw(st.integers(0, 2**32 - 1))).random(logits.shape[:-1])
    )
    token = sample(logits, u)
    assert token.shape == logits.shape[:-1] and token.dtype == np.int64
    for at in np.ndindex(token.shape):
        probability = oracles.softmax(logits[at].astype(F64).tolist())
        chosen = int(token[at])
        assert probability[chosen] > 0
        assert math.fsum(probability[:chosen]) <= u[at] + 1e-12
        assert math.fsum(probability[: chosen + 1]) > u[at] - 1e-12


def test_a_grid_of_u_gives_every_token_its_exact_share():
    u = np.arange(64) / 64
    logits = np.array([0, -np.inf, 0, 0, -np.inf, 0, 0, 0, 0, 0])
    close(sample(np.broadcast_to(logits, (64, 10)), u), np.repeat([0, 2, 3, 5, 6, 7, 8, 9], 8))


@pytest.mark.parametrize(
    ("u", "token"), [(0.0, 1), (ABOVE(0.5, 0), 1), (0.5, 3), (ABOVE(1.0, 0), 3)]
)
def test_the_edges_of_a_share_belong_to_the_next_token(u, token):
    close(sample(np.array([-np.inf, 0, -np.inf, 0, -np.inf]), np.asarray(u)), np.int64(token))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_large_vocabulary_is_summed_in_float64(dtype):
    n, tokens = 100_003, np.array([0, 1, 30_000, 99_990, 100_002])
    close(sample(np.zeros((5, n), dtype), (tokens + 0.5) / n), tokens)


@given(logit_rows(batch=st.just(())), units, units)
def test_a_larger_u_never_gives_a_lower_token(logits, a, b):
    low, high = (int(sample(logits, np.asarray(u))) for u in sorted([a, b]))
    assert low <= high


@given(st.integers(2, 60), st.integers(0, 4))
def test_rounding_never_leads_to_an_excluded_token(n, n_excluded):
    logits = np.array([-np.inf] * n_excluded + [0.0] * n + [-np.inf] * n_excluded)
    close(sample(logits, np.asarray(0.0)), np.int64(n_excluded))
    close(sample(logits, np.asarray(ABOVE(1.0, 0))), np.int64(n_excluded + n - 1))


@given(logit_rows(batch=st.just((3,))))
def test_rows_are_drawn_alone(logits):
    u = np.array([0.1, 0.5, 0.9])
    close(
        sample(logits, u),
        np.array([sample(row, np.asarray(v)) for row, v in zip(logits, u, strict=True)]),
    )


@pytest.mark.parametrize("row", [[-np.inf] * 3, [0, np.nan, 0], [np.nan] * 3, [np.inf, 0, 0]])
def test_a_row_without_a_distribution_raises(row):
    with pytest.raises(NpllmValueError, match="row"):
        sample(np.array([[0.0, 1.0, 2.0], row]), np.array([0.5, 0.5]))


@pytest.mark.parametrize("u", [[0.5, 1.0], [0.5, -0.1], [0.5, np.nan]])
def test_a_u_outside_of_its_range_raises(u):
    with pytest.raises(NpllmValueError, match="u must lie in 0 <= u < 1"):
        sample(np.zeros((2, 3)), np.array(u))


@pytest.mark.parametrize("shape", [(), (3,), (2, 1)])
def test_there_is_one_u_for_each_row(shape):
    with pytest.raises(NpllmValueError, match="u must be"):
        sample(np.zeros((2, 3)), np.zeros(shape))
