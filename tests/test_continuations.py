"""Log-probabilities of continuations: trees of common prefixes equal each sequence by itself."""

import numpy as np
import pytest
import tiny
from close import close
from hypothesis import given
from hypothesis import strategies as st

import npllm
from npllm import ops
from npllm.errors import NpllmValueError
from npllm.evaluation.continuations import score_continuations
from npllm.evaluation.prefix_tree import PrefixTree, trees

words = st.lists(st.integers(3, 5), min_size=1, max_size=7)


def by_hand(model, context, continuation):
    """Log-probabilities of one continuation, and whether it is greedy: one plain forward pass."""
    ids = [*context, *continuation]
    logits = model([ids[:-1]])[0].astype(np.float64)[-len(continuation) :]
    log_probs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1))[:, None]
    log_probs -= logits.max(-1, keepdims=True)
    rows = np.arange(len(continuation))
    return log_probs[rows, continuation], bool((logits.argmax(-1) == continuation).all())


def check(model, pairs, **options):
    for found, pair in zip(score_continuations(model, pairs, **options), pairs, strict=True):
        want, is_greedy = by_hand(model, *pair)
        close(found.log_probs, want, times=1e7)  # float32 logits, in float64
        assert found.is_greedy == is_greedy
        assert found.total == pytest.approx(want.sum(), abs=1e-4)


def pairs_of(rng, n_context=4, n_answer=4, longest=12):
    """Questions that begin alike, with answers that begin alike."""
    draw = lambda n: rng.integers(3, 61, n).tolist()  # noqa: E731
    shared, pairs = draw(5), []
    for _ in range(n_context):
        context = shared + draw(int(rng.integers(1, longest)))
        first = draw(1)
        for _ in range(n_answer):
            pairs.append((context, first + draw(int(rng.integers(0, 4)))))
    return pairs


@given(st.lists(words, min_size=1, max_size=8), st.integers(7, 40))
def test_a_tree_holds_each_sequence_once_and_shares_what_begins_alike(sequences, capacity):
    seen = {}
    for tree in trees(sequences, capacity):
        assert len(tree.ids) <= capacity
        prefixes = set()
        for number, path in tree.paths.items():
            assert tree.ids[path].tolist() == sequences[number]
            assert tree.positions[path].tolist() == list(range(len(path)))
            seen[number] = path
            prefixes |= {tuple(sequences[number][: k + 1]) for k in range(len(path))}
        assert len(tree.ids) == len(prefixes)  # no token stands there twice
    assert sorted(seen) == list(range(len(sequences)))


@given(st.lists(words, min_size=1, max_size=8), st.sampled_from([None, 2, 3]))
def test_the_rule_sees_the_path_and_nothing_else(sequences, window):
    (tree,) = trees(sequences, 1000)
    rule = PrefixTree(tree.stop, tree.positions, window)
    want = np.zeros((len(tree.ids), len(tree.ids)), bool)
    for path in tree.paths.values():
        for depth, slot in enumerate(path):
            first = 0 if window is None else max(0, depth - window + 1)
            want[slot, path[first : depth + 1]] = True
    table = rule.dense(len(tree.ids))
    assert np.array_equal(table, want)
    n = len(want)
    for i in range(0, n, 3):
        for j in range(0, n, 3):
            block = want[i : i + 3, j : j + 3]
            bound = rule.bound(i, min(i + 2, n - 1), j, min(j + 2, n - 1))
            assert bound != 0 or not block.any()
            assert bound != 2 or block.all()


@pytest.mark.parametrize("name", ["reference", "fast"])
def test_scores_are_those_of_each_sequence_by_itself(name):
    model = tiny.model(ops=name)
    check(model, pairs_of(np.random.default_rng(0)))


def test_small_trees_give_the_same():
    model = tiny.model(ops="blockwise")
    check(model, pairs_of(np.random.default_rng(1)), capacity=18)


def test_a_sliding_window_counts_tokens_of_the_path():
    model = tiny.model(ops="blockwise", sliding_window=4)
    check(model, pairs_of(np.random.default_rng(2)))


def test_a_mask_of_the_caller():
    model = tiny.model(ops="blockwise").with_mask(ops.mask.causal() & ops.mask.strided(3))
    check(model, pairs_of(np.random.default_rng(3)))


def test_frequencies_by_length():
    rope = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = tiny.model(ops="blockwise", rope_scaling=rope, original_max_position_embeddings=12)
    check(model, pairs_of(np.random.default_rng(4)))


def test_a_token_is_computed_once():
    counted = tiny.Counted(npllm.ops.blockwise)
    model = tiny.model().on(counted.ops)
    context, lengths = list(range(3, 33)), []

    def embed(ids, weight):
        lengths.append(ids.size)
        return ops.embed(ids, weight)

    pairs = [(context, [t]) for t in (40, 41, 42)] + [(context, [43, 44]), (context[:9], [50])]
    score_continuations(model.with_ops(embed=embed), pairs)
    assert lengths == [len(context) + 1]


def test_the_last_token_needs_no_room():
    model = tiny.model()
    ids = tiny.random_ids(1, 65)[0].tolist()
    check(model, [(ids[:60], ids[60:])])
    with pytest.raises(NpllmValueError, match=r"at most 65 tokens.* 61 \+ 5 = 66"):
        score_continuations(model, [(ids[:61], ids[60:])])


@pytest.mark.parametrize("pair", [([], [3]), ([3], [])])
def test_empty_parts(pair):
    with pytest.raises(NpllmValueError, match="at least one token each"):
        score_continuations(tiny.model(), [pair])


def test_nothing():
    assert score_continuations(tiny.model(), []) == []
