"""Mask rules: what they show, what their bounds promise, how they combine."""

import itertools

import numpy as np
import pytest
from close import close
from hypothesis import given
from hypothesis import strategies as st
from strategies import coins, rules

from npllm.errors import NpllmError, NpllmTypeError, NpllmValueError
from npllm.ops.mask import ALL, NONE, SOME, Rule, causal, padding, sliding_window

SLOTS = np.arange(-4, 13)
TRUE, FALSE = Rule(lambda i, j: (i == i) & (j == j)), Rule(lambda i, j: (i != i) & (j != j))


def table(rule, i=SLOTS, j=SLOTS):
    return rule(i[:, None], j[None, :])


@given(rules)
def test_a_rule_shows_what_its_formula_says(pair):
    rule, says = pair
    close(table(rule), np.array([[says(int(i), int(j)) for j in SLOTS] for i in SLOTS]))


def test_causal_shows_the_own_slot_and_all_earlier_ones():
    close(table(causal(), np.arange(3), np.arange(3)), np.tri(3, dtype=bool))


@given(st.integers(1, 9), st.integers(0, 30))
def test_a_window_shows_exactly_w_keys_its_own_included(w, i):
    seen = np.flatnonzero(table(sliding_window(w), np.array([i]), np.arange(-10, 40))[0]) - 10
    close(seen, np.arange(i - w + 1, i + 1))


@given(st.integers(17, 40))
def test_a_window_wider_than_the_sequence_is_causal(w):
    close(table(sliding_window(w)), table(causal()))


@pytest.mark.parametrize(("a", "b"), list(itertools.product([FALSE, TRUE], repeat=2)))
def test_and_or_not_follow_their_truth_tables(a, b):
    x, y = table(a), table(b)
    close(table(a & b), x & y)
    close(table(a | b), x | y)
    close(table(~a), ~x)


@given(rules, rules)
def test_de_morgan_holds(one, other):
    a, b = one[0], other[0]
    close(table(~(a & b)), table(~a | ~b))
    close(table(~~a), table(a))


spans = st.tuples(st.integers(-4, 12), st.integers(0, 6)).map(lambda pair: (pair[0], sum(pair)))


@given(rules, st.lists(st.tuples(spans, spans), min_size=8, max_size=8))
def test_bounds_of_a_block_keep_their_promise(pair, blocks):
    rule, says = pair
    for (i_low, i_high), (j_low, j_high) in blocks:
        seen = [says(i, j) for i in range(i_low, i_high + 1) for j in range(j_low, j_high + 1)]
        bound = rule.bound(i_low, i_high, j_low, j_high)
        assert bound in (NONE, SOME, ALL)
        assert bound != NONE or not any(seen)
        assert bound != ALL or all(seen)


@pytest.mark.parametrize(
    "rule",
    [causal(), ~causal(), sliding_window(3), ~sliding_window(3), causal() & ~sliding_window(3)],
)
def test_bounds_of_one_query_and_key_say_all_or_nothing(rule):
    bounds = np.array([[rule.bound(i, i, j, j) for j in SLOTS.tolist()] for i in SLOTS.tolist()])
    close(bounds, np.where(table(rule), ALL, NONE))


@pytest.mark.parametrize("rule", [causal(), ~causal()])
@given(spans, spans)
def test_bounds_of_causal_are_as_tight_as_can_be(rule, i, j):
    seen = table(rule, np.arange(i[0], i[1] + 1), np.arange(j[0], j[1] + 1))
    assert rule.bound(*i, *j) == (ALL if seen.all() else SOME if seen.any() else NONE)


@given(st.integers(1, 9), spans, spans)
def test_bounds_of_a_window_are_as_tight_as_its_two_sides(w, i, j):
    block = (*i, *j)
    ahead, behind = j[0] > i[1], j[1] <= i[0] - w
    inside = j[1] <= i[0] and j[0] > i[1] - w
    assert sliding_window(w).bound(*block) == (NONE if ahead or behind else ALL if inside else SOME)


def test_a_rule_without_a_bound_promises_nothing():
    assert Rule(lambda i, j: i == j).bound(0, 9, 20, 30) == SOME


@given(st.data(), st.integers(1, 3), st.integers(1, 6))
def test_padding_hides_the_same_keys_from_every_head_and_query(data, n_batch, n_ctx):
    valid = data.draw(coins((n_batch, n_ctx)))
    i, j = np.arange(4), data.draw(st.permutations(range(n_ctx)).map(np.array))
    got = table(padding(valid), i, j)
    close(
        np.broadcast_to(got, (n_batch, 1, 4, n_ctx)),
        np.broadcast_to(valid[:, None, None, j], (n_batch, 1, 4, n_ctx)),
    )
    close(table(~padding(valid), i, j), ~got)
    close(table(padding(valid) & causal(), i, j), got & table(causal(), i, j))


@pytest.mark.parametrize("shape", [(3,), (2, 1, 3)])
def test_padding_needs_its_two_axes(shape):
    with pytest.raises(NpllmValueError, match=r"valid must be \[n_batch, n_ctx\]"):
        padding(np.ones(shape, bool))


def test_padding_refuses_numbers_in_place_of_truth():
    with pytest.raises(NpllmTypeError, match="bool"):
        padding(np.array([[0, 1, 1]]))


@pytest.mark.parametrize("w", [0, -1])
def test_a_window_that_sees_nothing_raises(w):
    with pytest.raises(NpllmError, match=f"got {w}"):
        sliding_window(w)
