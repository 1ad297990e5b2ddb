"""Scores of many texts: several in a pass, each as if alone."""

import numpy as np
import pytest
import test_rows_alone as alone
import tiny
from close import close
from hypothesis import given
from hypothesis import strategies as st

import npllm
from npllm import kernels, ops
from npllm.analysis import score_batches as module
from npllm.analysis.packing import score_packed
from npllm.analysis.score import score
from npllm.analysis.score_batches import score_batches
from npllm.errors import NpllmValueError
from npllm.evaluation.continuations import score_continuations

lengths = st.lists(st.integers(2, 64), min_size=1, max_size=12)


def texts_of(some, seed=0):
    draw = np.random.default_rng(seed).integers
    return [draw(3, 61, n).tolist() for n in some]


def by_number(model, texts):
    found = dict(score_batches(model, texts))
    assert sorted(found) == list(range(len(texts)))
    return [found[number] for number in range(len(texts))]


def check(model, texts, times=0.0):
    for text, found in zip(texts, by_number(model, texts), strict=True):
        want = score(model, text)
        np.testing.assert_array_equal(found.ids, want.ids)
        close(found.log_probs, want.log_probs, times=times)


def passes(model, texts, monkeypatch):
    """Shapes of the forward passes."""
    shapes, run = [], type(model).model

    def counted(self, ids, **options):
        shapes.append(np.shape(ids))
        return run(self, ids, **options)

    monkeypatch.setattr(type(model), "model", counted)
    list(score_batches(model, texts))
    return shapes


@given(alone.made, lengths, st.integers(0, 9))
def test_a_text_has_the_bits_that_it_has_alone(which, some, seed):
    if kernels.compiled_ops() is None:
        pytest.skip(kernels.why_not_compiled())
    check(alone.model(*which), texts_of(some, seed))


@given(lengths, st.integers(0, 9))
def test_and_so_with_weights_in_8_bits(some, seed):
    if kernels.compiled_ops() is None:
        pytest.skip(kernels.why_not_compiled())
    check(alone.model_in_8_bits(), texts_of(some, seed))


@pytest.mark.parametrize("name", ["reference", "blockwise"])
def test_other_sets_differ_by_roundings_of_the_library(name):
    check(tiny.model(ops=name), texts_of([30, 29, 30, 25, 9, 8, 2, 2]), times=1e7)  # of float32


def test_texts_share_passes_without_much_padding(monkeypatch):
    model = tiny.model(ops="blockwise")
    some = [40] * 3 + [31, 30] + [18] * 2 + [17] * 2 + [9, 3, 3, 3]
    shapes = passes(model, texts_of(some), monkeypatch)
    assert shapes == [(4, 39), (1, 29), (2, 17), (1, 16), (1, 16), (1, 8), (3, 2)]
    monkeypatch.setattr(module, "TOKENS", 80)
    assert passes(model, texts_of([40] * 5), monkeypatch) == [(2, 39), (2, 39), (1, 39)]


def test_a_text_of_several_windows_is_scored_by_itself(monkeypatch):
    model = tiny.model(ops="blockwise")
    check(model, texts_of([150, 90, 65, 64, 63]), times=1e7)
    assert passes(model, texts_of([65, 65, 64, 63]), monkeypatch)[-1] == (2, 63)


def test_under_a_mask_of_the_caller_only_equal_lengths(monkeypatch):
    model = tiny.model(ops="blockwise").with_mask(ops.mask.prefix_lm(40))
    check(model, texts_of([30, 29, 30, 28]), times=1e7)
    assert passes(model, texts_of([30, 29, 30, 28]), monkeypatch) == [(2, 29), (1, 28), (1, 27)]


def test_frequencies_by_length(monkeypatch):
    rope = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = tiny.model(ops="blockwise", rope_scaling=rope, original_max_position_embeddings=32)
    check(model, texts_of([34, 33, 32, 31]), times=1e7)
    assert passes(model, texts_of([34, 33, 32, 31]), monkeypatch) == [(1, 33), (3, 32)]


@pytest.mark.parametrize("token", [61, -1])
def test_the_last_token_of_a_text_is_one_of_the_vocabulary(token):
    model = tiny.model(ops="blockwise")
    calls = [
        lambda: score(model, [3, 4, token]),
        lambda: score_packed(model, [[3, 4, token]]),
        lambda: score_continuations(model, [([3], [4, token])]),
    ]
    for call in calls:
        with pytest.raises(NpllmValueError, match=rf"vocab_size - 1 = 60, got .*{token}"):
            call()


def test_a_text_that_fails_fails_alone():
    plain = tiny.model(ops="blockwise")
    table = np.array(plain.params.embed_tokens)
    table[7] = np.nan
    model = npllm.Model(plain.config, plain.params._replace(embed_tokens=table), ops="blockwise")
    texts = [[5, 7, 6, 5], [5, 6, 8, 9], [5, 6, 4, 61 + 5], [3, 3, 3, 3]]
    found = by_number(model, texts)
    assert [type(x) is NpllmValueError for x in found] == [True, False, True, False]
    texts[0][1], texts[3][1] = 6, 99
    found = by_number(model, texts)
    assert [isinstance(x, NpllmValueError) for x in found] == [False, False, True, True]
    close(found[1].log_probs, score(plain, texts[1]).log_probs, times=1e7)
