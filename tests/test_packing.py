"""Packing: a valid, tight placement; documents in one row score as they do alone; restarting
positions is not what separates them.
"""

import itertools
import math

import family
import numpy as np
import pytest
import tiny
from close import close
from hypothesis import given, settings
from hypothesis import strategies as st
from seeds import draws
from strategies import seeds
from test_mask_rules import in_float32

from npllm.analysis.packing import layout, pack, score_packed, utilisation
from npllm.errors import NpllmError, NpllmValueError
from npllm.ops.mask import causal, documents, sliding_window, strided

jobs = st.integers(1, 30).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=30), st.just(capacity))
)

# ------------------------------------------------------------------------------------------------------------------------ the packer


@given(jobs)
def test_every_document_stands_once_in_a_row_that_has_room(job):
    lengths, capacity = job
    rows = pack(lengths, capacity)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert all(row and sum(lengths[n] for n in row) <= capacity for row in rows)


@given(jobs)
def test_rows_are_those_of_first_fit_decreasing(job):
    """The textbook form: take the longest that is left, put it into the first row where it fits,
    ties by number.
    """
    lengths, capacity = job
    rows, left = [], list(enumerate(lengths))
    while left:
        number, length = max(left, key=lambda item: (item[1], -item[0]))
        left.remove((number, length))
        for row in rows:
            if sum(lengths[n] for n in row) + length <= capacity:
                row.append(number)
                break
        else:
            rows.append([number])
    assert pack(lengths, capacity) == rows


def fewest_rows(lengths, capacity):
    """The best there is, by trying every row for every document."""
    best = len(lengths)

    def place(n, room):
        nonlocal best
        if len(room) >= best:
            return
        if n == len(lengths):
            best = len(room)
            return
        for row in {left: row for row, left in enumerate(room) if left >= lengths[n]}.values():
            place(n + 1, [left - lengths[n] * (at == row) for at, left in enumerate(room)])
        place(n + 1, [*room, capacity - lengths[n]])

    place(0, [])
    return best


@given(
    st.integers(4, 20).flatmap(
        lambda capacity: st.tuples(
            st.lists(st.integers(1, capacity), min_size=1, max_size=8), st.just(capacity)
        )
    )
)
def test_no_more_rows_than_eleven_ninths_of_the_best_plus_six_ninths(job):
    best = fewest_rows(*job)
    assert best <= len(pack(*job)) <= 11 / 9 * best + 6 / 9
    assert best >= math.ceil(sum(job[0]) / job[1])


def test_the_longest_first_is_not_always_the_best():
    """6 + 3 + 2 and 4 + 4 + 3 fill two rows; 6 with the first 4 leaves a hole."""
    lengths = [6, 4, 4, 3, 3, 2]
    assert fewest_rows(lengths, 11) == 2
    assert pack(lengths, 11) == [[0, 1], [2, 3, 4], [5]]
    assert pack([5, 9, 3, 8], 12) == [[1, 2], [3], [0]]


@given(jobs)
def test_utilisation_is_the_share_of_slots_that_hold_tokens(job):
    lengths, capacity = job
    rows = pack(lengths, capacity)
    if rows:
        tokens, _, labels = layout(rows, [[7] * n for n in lengths])
        assert utilisation(rows, lengths) == (labels > 0).sum() / labels.size == (tokens > 0).mean()
    else:
        assert utilisation(rows, lengths) == 1


@pytest.mark.parametrize(
    ("lengths", "number", "got"), [([3, 0, 2], 1, 0), ([3, 2, 11], 2, 11), ([-1], 0, -1)]
)
def test_documents_that_are_empty_or_too_long_raise(lengths, number, got):
    with pytest.raises(
        NpllmValueError,
        match=rf"document {number} must have 1 \.\.\. capacity = 10 tokens, got {got}",
    ):
        pack(lengths, 10)


@given(jobs, seeds)
def test_a_layout_holds_each_document_with_its_own_positions_and_label(job, seed):
    lengths, capacity = job
    rng = np.random.default_rng(seed)
    ids = [rng.integers(1, 50, n).tolist() for n in lengths]
    rows = pack(lengths, capacity)
    if not rows:
        return
    tokens, positions, labels = layout(rows, ids)
    for r, row in enumerate(rows):
        at = 0
        for label, number in enumerate(row, 1):
            here = slice(at, at + lengths[number])
            assert tokens[r, here].tolist() == ids[number]
            assert positions[r, here].tolist() == list(range(lengths[number]))
            assert set(labels[r, here].tolist()) == {label}
            at += lengths[number]
        assert not labels[r, at:].any() and not tokens[r, at:].any()


# ------------------------------------------------------------------------------------------------------------------------ the scores


def alone(model, ids):
    """Log-probability of every token after the first, one document at a time, by a loop over its
    tokens.
    """
    logits = np.asarray(model(np.array([ids]))[0], dtype=np.float64)
    return np.array(
        [row[token] - np.logaddexp.reduce(row) for row, token in zip(logits, ids[1:], strict=False)]
    )


def some_documents(seed, *, n=7, longest=20, n_vocab=60):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, n_vocab, length).tolist() for length in rng.integers(1, longest + 1, n)]


MODELS = {
    "full": lambda: tiny.model(dtype=np.float64),
    "window": lambda: tiny.model(dtype=np.float64, sliding_window=4),
    "mixed stack": lambda: tiny.model(dtype=np.float64).with_mask(
        [sliding_window(3), causal() & strided(5)]
    ),
    "long": lambda: family.model(family.longrope(8)),
}


@pytest.mark.parametrize("name", MODELS)
@given(seeds, st.integers(20, 50), st.integers(1, 4))
@settings(max_examples=draws(6, 15))
def test_packed_documents_score_as_they_do_alone(name, seed, capacity, n_rows):
    model, ids = MODELS[name](), some_documents(seed)
    scores = score_packed(model, ids, capacity=capacity, n_rows=n_rows)
    assert [len(score) for score in scores] == [len(document) - 1 for document in ids]
    for score, document in zip(scores, ids, strict=True):
        assert (score.shape, score.dtype) == ((len(document) - 1,), np.float64)
        if len(score):
            close(score, alone(model, document), times=100)


def test_several_documents_do_share_a_row():
    """The law above would hold of a packer that never packs."""
    counted = tiny.Counted()
    model, ids = tiny.model(ops=counted.ops, dtype=np.float64), some_documents(0, n=8, longest=6)
    score_packed(model, ids, capacity=60)
    assert counted.calls["decoder_layers"] == 1, "one pass"


def packed_by_hand(model, ids, *, restart, apart):
    """Hidden states of two documents in one row: with positions that restart or go on, with or
    without the rule.
    """
    n = [len(document) for document in ids]
    positions = np.concatenate([np.arange(n[0]), np.arange(n[1])]) if restart else np.arange(sum(n))
    rule = causal() & documents(np.repeat([[0, 1]], n, axis=1)) if apart else causal()
    return model.with_mask(rule).model(np.array([ids[0] + ids[1]]), position_ids=positions)[
        0, n[0] :
    ]


def test_restarting_the_positions_alone_leaks():
    """Convention C19: the second document still sees the first; under RoPE only the rule keeps them
    apart, restart or not.
    """
    model = tiny.model(dtype=np.float64)
    ids = [document for document in some_documents(3, longest=12) if len(document) > 4][:2]
    desired = model.model(np.array([ids[1]]))[0]
    close(packed_by_hand(model, ids, restart=True, apart=True), desired, times=10)
    close(packed_by_hand(model, ids, restart=False, apart=True), desired, times=1000)
    for restart in (True, False):
        leaked = packed_by_hand(model, ids, restart=restart, apart=False)
        assert np.abs(leaked - desired).max() > 0.1
    other = [[(n + 5) % 50 + 3 for n in ids[0]], ids[1]]
    changes = [
        np.abs(
            packed_by_hand(model, other, restart=True, apart=apart)
            - packed_by_hand(model, ids, restart=True, apart=apart)
        ).max()
        for apart in (False, True)
    ]
    assert changes[0] > 0.1 and changes[1] == 0


def test_nothing_to_score_gives_nothing():
    model = tiny.model()
    assert score_packed(model, []) == []
    assert [score.tolist() for score in score_packed(model, [[5]])] == [[]]


@pytest.mark.parametrize(
    ("ids", "options"),
    [
        ([[5], []], {}),
        ([[5] * 65], {}),
        ([[5] * 9], {"capacity": 8}),
        ([[5, 99]], {}),
        (["a text"], {}),
        ([[5]] * 80, {"capacity": 70}),
    ],
)
def test_documents_that_cannot_be_scored_raise(ids, options):
    """Empty, beyond the context, beyond the row, not in the vocabulary, text without a tokenizer, a
    row beyond the context.
    """
    with pytest.raises(NpllmError):
        score_packed(tiny.model(), ids, **options)


@pytest.mark.weights
def test_packed_texts_score_as_they_do_alone_on_the_default_checkpoint(default_folder):
    model = in_float32(default_folder)
    texts = [
        "The capital of France is Paris.",
        "One, two, three, four, five.",
        "Water boils at",
        "a",
    ]
    scores = score_packed(model, texts)
    for text, score in zip(texts, scores, strict=True):
        ids = model.tokenizer.encode(text)
        assert len(score) == len(ids) - 1
        if len(score):
            assert np.abs(score - alone(model, ids)).max() < 1e-4
