"""npllm.cache: what is appended comes back, in order, however the arrays behind it grow and move."""

import family
import numpy as np
import pytest
from close import close
from hypothesis import given
from hypothesis import strategies as st
from tiny import model, random_ids

from npllm.cache import KVCache
from npllm.cache.state import SMALLEST_CAPACITY
from npllm.errors import NpllmValueError

N_BATCH, N_KV_HEAD, D_HEAD = 2, 3, 4
windows = st.none() | st.sampled_from([1, 2, 5, 30, 64, 100, 199, 200, 300])
chunks = st.lists(st.integers(1, 90), min_size=1, max_size=12)


def keys(n, start=0, scale=1.0):
    """Keys that say where they belong: every entry of slot s is different from every other."""
    slots = np.arange(start, start + n)[None, None, :, None]
    shape = (
        np.arange(N_BATCH)[:, None, None, None] * 0.5
        + np.arange(N_KV_HEAD)[:, None, None] * 0.1
        + np.arange(D_HEAD) * 0.01
    )
    return (scale * (slots + shape)).astype(np.float32)


def advance(cache, n):
    ids = np.zeros((N_BATCH, n), np.int64)
    positions = np.arange(cache.n_ctx, cache.n_ctx + n)
    cache.advance(
        ids, positions, np.ones((N_BATCH, cache.n_ctx + n), bool), np.zeros(N_BATCH, np.int64)
    )


def append(cache, n, layers=(0, 1)):
    """Append n tokens to all layers; return what each gave back."""
    start = cache.n_ctx
    got = [
        cache.append(layer, keys(n, start, 1 + layer), keys(n, start, -1 - layer))
        for layer in layers
    ]
    advance(cache, n)
    return got


@given(chunks, windows)
def test_append_returns_every_visible_key_and_value_in_order(sizes, window):
    cache = KVCache(N_BATCH, 2, 200, window)
    for n in sizes:
        start = cache.n_ctx
        if start + n > 200:
            break
        oldest = 0 if window is None or window >= 200 else max(0, start - window + 1)
        for layer, (k, v, slots) in enumerate(append(cache, n)):
            assert slots == range(oldest, start + n)
            close(k, keys(start + n - oldest, oldest, 1 + layer), times=0)
            close(v, keys(start + n - oldest, oldest, -1 - layer), times=0)
    assert cache.n_ctx == sum(sizes) or cache.n_ctx + n > 200


def test_room_grows_by_doubling_up_to_the_context():
    cache, sizes = KVCache(N_BATCH, 1, 200), []
    for _ in range(200):
        append(cache, 1, layers=[0])
        sizes.append(cache.n_bytes // (2 * N_BATCH * N_KV_HEAD * D_HEAD * 4))
    assert sorted(set(sizes)) == [64, 128, 200] and sizes == sorted(sizes)
    assert SMALLEST_CAPACITY == 64


def test_room_does_not_grow_with_the_sequence_under_a_window():
    cache = KVCache(N_BATCH, 1, 100_000, window=50)
    for _ in range(1000):
        append(cache, 1, layers=[0])
    assert cache.n_bytes <= 2 * 128 * 2 * N_BATCH * N_KV_HEAD * D_HEAD * 4


def test_appending_one_by_one_copies_a_number_of_keys_that_is_linear(monkeypatch):
    moved = []
    monkeypatch.setattr(
        "npllm.cache.kv_cache.reallocated",
        lambda x, start, stop, n: (moved.append(stop - start), _moved(x, start, stop, n))[1],
    )
    for window in (None, 50):
        moved.clear()
        cache = KVCache(N_BATCH, 1, 4096, window)
        for _ in range(1000):
            append(cache, 1, layers=[0])
        assert sum(moved) <= 2 * 2 * 1000 + 200, f"window {window}: {sum(moved)} keys moved"


@pytest.mark.parametrize("window", [None, 100])
def test_a_prompt_that_comes_in_chunks_is_not_copied_within_its_pass(monkeypatch, window):
    moved = []
    monkeypatch.setattr(
        "npllm.cache.kv_cache.reallocated",
        lambda x, start, stop, n: (moved.append(stop - start), _moved(x, start, stop, n))[1],
    )
    m = model(max_position_embeddings=2048, sliding_window=window)
    whole, parts = m.new_cache(), m.new_cache()
    ids = random_ids(1, 900)
    with family.prefill_chunk(100):
        want = m(ids[:, :700], cache=whole)
        m(ids[:, 700:], cache=whole)
        assert (not moved) == (window is None)
        for start in range(0, 900, 100):
            part = m(ids[:, start : start + 100], cache=parts)
            if start < 700:
                close(part, want[:, start : start + 100])
    assert whole.n_bytes == parts.n_bytes
    assert moved, "calls of their own are not known beforehand"


def _moved(x, start, stop, capacity):
    new = np.empty((*x.shape[:2], capacity, x.shape[3]), x.dtype)
    new[:, :, : stop - start] = x[:, :, start:stop]
    return new


@given(chunks, windows)
def test_kept_returns_what_the_next_query_sees(sizes, window):
    cache = KVCache(N_BATCH, 3, 200, window)
    for n in sizes:
        if cache.n_ctx + n > 200:
            break
        append(cache, n)
    oldest = 0 if window is None or window >= 200 else max(0, cache.n_ctx - window + 1)
    for layer in (0, 1):
        k, v, slots = cache.kept(layer)
        assert slots == range(oldest, cache.n_ctx)
        close(k, keys(len(slots), oldest, 1 + layer), times=0)
        close(v, keys(len(slots), oldest, -1 - layer), times=0)
    assert cache.kept(2) == (None, None, range(0)), "nothing was appended to this layer"


def test_what_was_given_is_copied():
    cache, k = KVCache(N_BATCH, 1, 64), keys(3)
    stored, _, _ = cache.append(0, k, k)
    k[...] = 0
    close(stored, keys(3), times=0)


def test_layers_do_not_mix():
    cache = KVCache(N_BATCH, 2, 64)
    (k0, v0, _), (k1, v1, _) = append(cache, 3)
    assert not any(np.shares_memory(a, b) for a, b in ((k0, k1), (v0, v1), (k0, v0)))


def test_keys_and_values_may_differ_in_width():
    cache = KVCache(N_BATCH, 1, 64)
    k, v, _ = cache.append(0, keys(3), keys(3)[..., :2])
    assert (k.shape[-1], v.shape[-1]) == (4, 2)


def test_the_cache_keeps_the_dtype_of_the_keys():
    cache = KVCache(N_BATCH, 1, 64)
    k, v, _ = cache.append(0, keys(2).astype(np.float64), keys(2).astype(np.float64))
    assert k.dtype == v.dtype == np.float64


def test_an_append_that_is_not_advanced_is_forgotten():
    cache = KVCache(N_BATCH, 1, 64)
    append(cache, 3, layers=[0])
    cache.append(0, keys(2, scale=9), keys(2, scale=9))
    ((k, _, slots),) = append(cache, 2, layers=[0])
    close(k, keys(5), times=0)
    assert slots == range(5)


def test_advance_records_what_stands_in_each_slot():
    cache = KVCache(N_BATCH, 1, 64)
    valid = np.array([[False, True], [True, True]])
    cache.advance(np.array([[5, 6], [7, 8]]), np.array([[0, 0], [0, 1]]), valid, np.array([0, 0]))
    cache.advance(
        np.array([[1], [2]]),
        np.array([9]),
        np.concatenate([valid, [[True], [True]]], axis=1),
        np.array([0, 1]),
    )
    close(cache.ids, np.array([[5, 6, 1], [7, 8, 2]]))
    close(cache.positions, np.array([[0, 0, 9], [0, 1, 9]]))
    assert (
        cache.n_ctx == 3 and cache.valid.shape == (2, 3) and cache.rope_variant.tolist() == [0, 1]
    )


def test_an_empty_cache_holds_nothing():
    cache = KVCache(N_BATCH, 2, 64)
    assert (cache.n_ctx, cache.n_bytes, cache.valid.shape, cache.ids.shape) == (
        0,
        0,
        (2, 0),
        (2, 0),
    )


def test_overflow_names_cached_new_and_most():
    cache = KVCache(N_BATCH, 1, 10)
    append(cache, 7, layers=[0])
    append(cache, 3, layers=[0])
    with pytest.raises(
        NpllmValueError,
        match=r"10 cached \+ 1 new tokens are 11, .*\(max_position_embeddings\) is 10",
    ):
        cache.append(0, keys(1), keys(1))


def test_another_batch_size_is_refused_by_both_numbers():
    with pytest.raises(
        NpllmValueError, match=r"n_batch = 2 sequences, got 3; .*new_cache\(n_batch=3\)"
    ):
        KVCache(2, 1, 10).check_fits(3, 1)


@pytest.mark.parametrize("n_batch", [0, -1])
def test_a_cache_for_no_sequence_is_refused(n_batch):
    with pytest.raises(NpllmValueError, match=f"n_batch must be an integer in 1 .*, got {n_batch}"):
        model().new_cache(n_batch)


@given(st.integers(1, 150), st.lists(st.integers(1, 60), max_size=3), windows)
def test_replace_rows_takes_over_what_a_coming_query_can_see(n_first, sizes, window):
    mine, theirs = KVCache(N_BATCH, 2, 400, window), KVCache(1, 2, 400, window)
    for n in (n_first, *sizes):
        append(mine, n)
    n = mine.n_ctx
    for layer in range(2):
        theirs.append(layer, keys(n, 0, 7.0 + layer)[1:], keys(n, 0, -7.0 - layer)[1:])
    theirs.advance(np.zeros((1, n)), np.arange(n), np.ones((1, n), bool), np.zeros(1))
    mine.replace_rows([1], theirs)
    for layer, (k, v, slots) in enumerate(append(mine, 1)):
        start = slots.start
        assert start == (0 if window is None else max(0, n - window + 1))
        for x, sign in ((k, 1), (v, -1)):
            close(x[0, :, :-1], keys(n - start, start, sign * (1.0 + layer))[0], times=0)
            close(x[1, :, :-1], keys(n - start, start, sign * (7.0 + layer))[1], times=0)


@given(chunks, windows, st.integers(0, 300), st.integers(1, 20))
def test_a_cropped_cache_goes_on_as_if_the_rest_had_never_been(sizes, window, n_ctx, n_more):
    cache, shorter = (KVCache(N_BATCH, 2, 4096, window) for _ in range(2))
    before = 0
    for n in sizes:
        before = cache.n_ctx
        append(cache, n)
    n_ctx = min(n_ctx, cache.n_ctx)
    first = cache.state.layers[0][2]
    if n_ctx < before and window is not None and max(0, n_ctx - window + 1) < first:
        with pytest.raises(NpllmValueError, match=f"cannot go back to n_ctx = {n_ctx}"):
            cache.crop(n_ctx)
        return
    cache.crop(n_ctx)
    if n_ctx:
        append(shorter, n_ctx)
    assert cache.ids.shape == shorter.ids.shape and cache.n_ctx == n_ctx
    for got, want in zip(append(cache, n_more), append(shorter, n_more), strict=True):
        assert got[2] == want[2]
        for one, other in zip(got[:2], want[:2], strict=True):
            close(one, other, times=0)


def test_a_cache_is_cropped_to_what_it_holds():
    cache = KVCache(N_BATCH, 2, 4096)
    append(cache, 5)
    for n_ctx in (6, -1):
        with pytest.raises(NpllmValueError, match=f"n_ctx.*5.*got {n_ctx}"):
            cache.crop(n_ctx)


def test_a_models_cache_is_as_long_as_its_context():
    m = model(max_position_embeddings=20, sliding_window=6)
    assert (m.new_cache(3).n_batch, m.new_cache().max_slots, m.new_cache().window) == (3, 20, 6)
    cache = m.new_cache()
    m(random_ids(1, 20), cache=cache)
    with pytest.raises(NpllmValueError, match=r"21.*20"):
        m(random_ids(1, 1), cache=cache)
