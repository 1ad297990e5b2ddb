"""Mask rules as values: equality, hash, repr, pickle, copy."""

import copy
import pickle

import numpy as np
import optional
import pytest
from hypothesis import given, settings
from test_mask_rules import CASES, N, any_rule, every_rule, table

from npllm.errors import NpllmValueError
from npllm.ops import mask
from npllm.ops.mask import Rule, causal, sliding_window

strict = optional.module("array_api_strict")
SLOTS = np.arange(N)


def visible_diagonal(i, j):
    return i == j


def same(a, b):
    """Two rules are one value: `==`, hash, repr, and what they show and promise."""
    assert a == b and not a != b
    assert hash(a) == hash(b) and repr(a) == repr(b) and len({a, b}) == 1
    assert np.array_equal(table(a, SLOTS, SLOTS), table(b, SLOTS, SLOTS))
    for i, j in ((0, 3), (4, 9), (9, 9)):
        assert a.bound(i, i + 2, j, j + 3) == b.bound(i, i + 2, j, j + 3)
    assert a.band == b.band and (a.left_band is None) == (b.left_band is None)


@given(any_rule)
@settings(max_examples=60)
def test_a_rule_survives_pickle_and_copy(pair):
    rule, _ = pair
    rule(SLOTS[:, None], SLOTS[None, :]), rule.band, rule.left_band  # what is cached stays behind
    same(pickle.loads(pickle.dumps(rule)), rule)
    same(copy.deepcopy(rule), rule)
    same(copy.copy(rule), rule)


@every_rule
def test_rules_of_other_parameters_differ(name):
    shown = {
        "bidirectional": [mask.bidirectional(), causal()],
        "causal": [causal(), ~causal(), causal() & causal()],
        "sliding_window": [sliding_window(3), sliding_window(4), causal()],
        "lookback": [mask.lookback(3), mask.lookback(4)],
        "prefix_lm": [mask.prefix_lm(3), mask.prefix_lm(4)],
        "band": [mask.band(1, 2), mask.band(2, 1)],
        "longformer_window": [mask.longformer_window(4), mask.longformer_window(6)],
        "dilated_window": [mask.dilated_window(4, 2), mask.dilated_window(4, 3)],
        "strided": [mask.strided(3), mask.strided(4)],
        "fixed": [mask.fixed(4, 1), mask.fixed(4, 2)],
        "block_local": [mask.block_local(3), mask.block_local(4), mask.strided(3)],
        "global_tokens": [mask.global_tokens([0]), mask.global_tokens([0, 1])],
        "random_blocks": [mask.random_blocks(2, 4, 1, seed) for seed in range(3)],
        "documents": [mask.documents(np.full((2, 3), n)) for n in range(3)],
        "left_padding": [mask.left_padding(np.array(n)) for n in ([0, 1], [1, 0], [1])],
        "padding": [mask.padding(np.full((2, 3), n, bool)) for n in range(2)],
    }
    assert shown.keys() == CASES.keys()
    rules = shown[name]
    assert len(set(rules)) == len(rules) == len({id(r) for r in rules})
    assert all((a == b) == (a is b) for a in rules for b in rules)


@pytest.mark.parametrize(
    "text",
    [
        "bidirectional()",
        "causal()",
        "causal() & sliding_window(4)",
        "~causal()",
        "~(causal() | band(1, 2)) & prefix_lm(3)",
        "causal() & (block_local(3) | global_tokens((0, 5)))",
        "causal() & (causal() & strided(2))",
        "causal() | (causal() | fixed(4, 2))",
        "causal() & causal() | ~~random_blocks(2, 12, 3, 7)",
        "dilated_window(4, 2)",
    ],
)
def test_a_rule_says_how_it_is_made(text):
    rule = eval(text, vars(mask))
    assert repr(rule) == str(rule) == text
    same(rule, eval(text, vars(mask)))


def test_rules_with_arrays_say_dtype_and_shape():
    labels = np.zeros((2, N), np.int32)
    assert repr(causal() & mask.documents(labels)) == f"causal() & documents(<int32 [2, {N}]>)"
    assert repr(mask.padding(labels == 0)) == f"padding(<bool [2, {N}]>)"
    assert repr(mask.left_padding(np.array([1, 2]))) == "left_padding(<int64 [2]>)"


def test_arrays_are_compared_by_library_dtype_shape_and_content():
    labels = np.array([[0, 0, 1]])
    rule = mask.documents(labels)
    assert rule == mask.documents(labels.copy()) and hash(rule) == hash(mask.documents(labels + 0))
    for other in (labels + 1, labels.astype(np.int32), labels[:, :2], np.repeat(labels, 2, axis=0)):
        assert rule != mask.documents(other)
    theirs = strict.asarray(labels)
    assert rule != mask.documents(theirs)
    assert mask.documents(theirs) == mask.documents(strict.asarray(labels))


def test_an_array_that_changes_does_not_change_the_hash():
    labels = np.array([[0, 0, 1]])
    rule = mask.documents(labels)
    before = hash(rule)
    labels[0, 0] = 5
    assert hash(rule) == before and rule != mask.documents(np.array([[0, 0, 1]]))


def test_rules_of_a_function_are_equal_where_the_function_is():
    rule = Rule(visible_diagonal)
    same(rule, Rule(visible_diagonal))
    same(pickle.loads(pickle.dumps(rule & causal())), Rule(visible_diagonal) & causal())
    assert rule != Rule(lambda i, j: i == j) and isinstance(rule, Rule)
    assert repr(rule).startswith("Rule(<function visible_diagonal")


@given(any_rule)
@settings(max_examples=20)
def test_rules_are_frozen(pair):
    rule = pair[0]
    for attribute in ("w", "labels", "one", "visible", "stride"):
        with pytest.raises(AttributeError):
            setattr(rule, attribute, 3)


def test_a_rule_is_no_other_kind_of_value():
    assert causal() != "causal()" and causal() != 1 and causal() is not None
    assert causal() != visible_diagonal


def test_parameters_of_numpy_make_the_same_rule():
    same(sliding_window(np.int64(4)), sliding_window(4))
    same(mask.global_tokens(np.array([5, 0, 5])), mask.global_tokens([0, 5]))


def test_what_the_pickle_holds_is_the_parameters():
    """And not the tables that were made of them."""
    rule = mask.random_blocks(1, 500, 3, 0)
    assert rule.bound(0, 9, 0, 9) in (0, 1)
    assert len(pickle.dumps(rule)) < 300
    with pytest.raises(NpllmValueError):
        mask.random_blocks(1, 2, 3, 0)
