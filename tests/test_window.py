"""The sliding window: which keys a query sees, and a cache that keeps no more than those."""

import copy
import itertools
from functools import lru_cache

import family
import numpy as np
import pytest
import tiny
from close import close
from hypothesis import given
from hypothesis import strategies as st

import npllm


@pytest.fixture(scope="module", autouse=True)
def _small_caches():
    """Arrays of 4 slots at first, so that they are replaced and moved along in short runs too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(npllm.cache.state, "SMALLEST_CAPACITY", 4)
        yield


def _content(window, n_ctx=64, **changes):
    return tiny.config_dict(
        sliding_window=window,
        max_position_embeddings=n_ctx,
        original_max_position_embeddings=n_ctx,
        **changes,
    )


def _model(window, n_ctx=64, dtype="float64", **changes):
    return family.model(_content(window, n_ctx, **changes), dtype)


@lru_cache
def _one_layer():
    """With one layer, a position depends on exactly the tokens that its query sees."""
    return _model(5, num_hidden_layers=1)


@pytest.mark.parametrize("n_seq", [5, 6, 7])
def test_a_query_sees_exactly_the_last_w_tokens_its_own_included(n_seq):
    """spec 8.22: T = W, W + 1, W + 2; changing token j changes position i just where i - W < j <=
    i.
    """
    model, ids = _one_layer(), family.ids_of(_one_layer().config, (1, n_seq))
    before = model(ids)[0]
    for j in range(n_seq):
        other = ids.copy()
        other[0, j] = (ids[0, j] + 7) % 50 + 3
        changed = np.abs(model(other)[0] - before).max(axis=1) > 0
        assert changed.tolist() == [j <= i < j + 5 for i in range(n_seq)]


@pytest.mark.parametrize("window", [12, 13, 64, 1000])
def test_a_window_as_wide_as_the_sequence_changes_nothing(window):
    """spec 8.23."""
    ids = family.ids_of(_model(None).config, (2, 12))
    close(_model(window)(ids), _model(None)(ids), times=0)
    models = _model(window), _model(None)
    with family.prefill_chunk(5):
        close(*(model(ids, cache=model.new_cache(2)) for model in models), times=0)


def test_the_window_of_mini_4k_changes_only_the_last_row_at_one_token_more():
    """spec 8.27: there W = 2047 and T = 2048; here a hundredth of that, in one layer and in three."""
    window = 20
    for n_layer in (1, 3):
        narrow, full = (_model(w, num_hidden_layers=n_layer) for w in (window, None))
        ids = family.ids_of(full.config, (1, window + 1))
        close(narrow(ids)[:, :-1], full(ids)[:, :-1], times=0)
        assert np.abs(narrow(ids)[:, -1] - full(ids)[:, -1]).max() > 1e-3


@given(
    window=st.integers(1, 9),
    chunk=st.integers(1, 20),
    n_seq=st.integers(1, 40),
    n_batch=st.integers(1, 2),
)
def test_prefill_in_chunks_equals_one_shot_for_chunks_shorter_and_longer_than_the_window(
    window, chunk, n_seq, n_batch
):
    """spec 8.24."""
    model = _model(window)
    ids = family.ids_of(model.config, (n_batch, n_seq), seed=chunk)
    with family.prefill_chunk(chunk):
        close(model(ids, cache=model.new_cache(n_batch)), model(ids))


@given(window=st.integers(1, 9), calls=st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_any_sequence_of_cached_calls_equals_one_shot(window, calls):
    """spec 8.24, 8.28: calls of one token too, from an empty cache."""
    model, cache = _model(window, 128), _model(window, 128).new_cache()
    ids = family.ids_of(model.config, (1, sum(calls)), seed=window)
    starts = np.cumsum([0, *calls])
    parts = [model(ids[:, a:b], cache=cache) for a, b in itertools.pairwise(starts)]
    close(np.concatenate(parts, axis=1), model(ids))


@given(
    window=st.integers(1, 9),
    lengths=st.lists(st.integers(1, 20), min_size=2, max_size=3),
    chunk=st.integers(1, 16),
)
def test_left_padding_takes_slots_of_the_window_and_changes_no_row(window, lengths, chunk):
    """spec 8.25, 8.26: slots between two tokens of a left-padded row are as many as without
    padding.
    """
    model, rng = _model(window), np.random.default_rng(chunk)
    rows = [rng.integers(3, 60, length) for length in lengths]
    ids, mask = family.padded(rows)
    with family.prefill_chunk(chunk):
        logits = model(ids, attention_mask=mask, cache=model.new_cache(len(rows)))
    close(model(ids, attention_mask=mask)[mask == 1], logits[mask == 1])
    for row, together in zip(rows, logits, strict=True):
        close(together[-len(row) :], model(row[None])[0])


def test_a_hole_in_the_mask_takes_slots_of_the_window():
    """spec 8.25: the window counts slots and not tokens."""
    model = _one_layer()
    ids, mask = family.ids_of(model.config, (1, 9)), np.array([[1, 1, 1, 0, 0, 0, 1, 1, 1]])
    before = model(ids, attention_mask=mask)[0]
    seen = []
    for j in range(9):
        other = ids.copy()
        other[0, j] = (ids[0, j] + 7) % 50 + 3
        seen.append(np.abs(model(other, attention_mask=mask)[0, -1] - before[-1]).max() > 0)
    assert np.flatnonzero(seen).tolist() == [
        6,
        7,
        8,
    ]  # slots 4 ... 8 less the padding; two tokens of slots 0 ... 2 would fit


@given(
    window=st.integers(1, 6),
    n=st.integers(1, 20),
    lost=st.integers(1, 20),
    n_calls=st.integers(1, 15),
)
def test_keys_that_a_failed_call_pushed_out_of_the_window_come_back(window, n, lost, n_calls):
    """Its chunks may have dropped what the next call sees: the row is computed anew from its ids."""
    model = _model(window)
    ids, cache = family.ids_of(model.config, (1, 25 + lost), seed=n), model.new_cache()
    with family.prefill_chunk(3):
        model(ids[:, :n], cache=cache)
        try:
            family.failing(model, n_calls)(ids[:, 25:], cache=cache)
        except family.Broken:
            close(model(ids[:, n : n + 2], cache=cache), model(ids[:, : n + 2])[:, n:])


def test_memory_stops_growing():
    """Ten times the tokens, the same bytes; a prompt that came at once leaves no more than the room
    of one call.
    """
    model = _model(8, 4096, "float32")
    cache, ids = model.new_cache(), family.ids_of(model.config, (1, 2000))
    sizes = []
    for start in range(0, 2000, 10):
        model(ids[:, start : start + 10], cache=cache)
        sizes.append(cache.n_bytes)
    assert cache.n_ctx == 2000 and sizes[-1] == sizes[19] == max(sizes)
    full = _model(None, 4096, "float32")
    grown = full.new_cache()
    full(ids, cache=grown)
    assert grown.n_bytes > 20 * cache.n_bytes


def test_the_cache_hands_out_the_slots_that_the_window_can_see():
    """The first query of a call sees W - 1 older keys at most."""
    cache = npllm.cache.KVCache(1, 1, 100, window=5)
    seen = []
    for n in (3, 1, 4, 2, 7):
        x = np.arange(cache.n_ctx, cache.n_ctx + n, dtype=np.float32)[None, None, :, None]
        k, v, slots = cache.append(0, x, -x)
        assert k[0, 0, :, 0].tolist() == list(slots) and v[0, 0, :, 0].tolist() == [
            -s for s in slots
        ]
        seen.append((slots.start, slots.stop))
        cache.advance(
            np.zeros((1, n), int), np.arange(n), np.ones((1, cache.n_ctx + n), bool), np.zeros(1)
        )
    assert seen == [(0, 3), (0, 4), (0, 8), (4, 10), (6, 17)]


def test_caches_share_nothing():
    """spec 8.28: two caches of one model, run in turns; a deep copy goes its own way; a new one
    holds 0 tokens.
    """
    model = _model(6)
    ids = family.ids_of(model.config, (2, 30))
    a, b = model.new_cache(), model.new_cache()
    assert a.n_ctx == 0 and a.n_bytes == 0
    for i in range(0, 20, 5):
        model(ids[:1, i : i + 5], cache=a)
        model(ids[1:, i : i + 5], cache=b)
    c = copy.deepcopy(a)
    close(model(ids[:1, 20:25], cache=a)[:, -1], model(ids[:1, :25])[:, -1])
    other = np.concatenate([ids[:1, :20], ids[1:, 20:22]], axis=1)
    close(model(other[:, 20:], cache=c)[:, -1], model(other)[:, -1])
    close(model(ids[1:, 20:22], cache=b)[:, -1], model(ids[1:, :22])[:, -1])
    close(model(ids[:1, 25:26], cache=a)[:, -1], model(ids[:1, :26])[:, -1])


@pytest.mark.parametrize("window", [None, 4])
def test_the_kept_last_logits_are_the_last_rows_of_all(window):
    """spec 8.29."""
    model, ids = _model(window), family.ids_of(_model(None).config, (2, 9))
    whole = model(ids)
    for n in (1, 3, 9, 20):
        close(model(ids, logits_to_keep=n), whole[:, -n:])
    close(model(ids[:, :1]), whole[:, :1])  # spec 8.28: a prefill of one token


def test_swapping_rows_of_a_batch_swaps_its_logits():
    """spec 8.28: rows do not leak into each other through the cache."""
    model, ids = _model(4), family.ids_of(_model(None).config, (3, 14))
    results = []
    for order in ([0, 1, 2], [2, 0, 1]):
        cache = model.new_cache(3)
        model(ids[order, :9], cache=cache)
        results.append(model(ids[order, 9:], cache=cache))
    close(results[1], results[0][[2, 0, 1]])
