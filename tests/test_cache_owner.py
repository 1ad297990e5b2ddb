"""A cache serves the model that made it, one call at a time, and is copied with all that it is
bound to.
"""

import copy
import dataclasses
import pickle
import threading

import family
import numpy as np
import pytest
from close import close
from tiny import model, random_ids

import npllm
from npllm import ops
from npllm.cache import KVCache
from npllm.errors import NpllmRuntimeError, NpllmTypeError, NpllmValueError
from npllm.ops import mask

IDS = random_ids(1, 9)


def like(m, **changes):
    """A model on the same weights with other entries of config.json."""
    return npllm.Model(dataclasses.replace(m.config, **changes), m.params, ops=ops.blockwise)


def used_by(m):
    """A cache with a few tokens in it."""
    cache = m.new_cache()
    m(IDS[:, :5], cache=cache)
    return cache


BASE = model(ops=ops.blockwise)
WINDOW = BASE.with_mask(mask.sliding_window(3))
OTHERS = {
    "other weights": (model(ops=ops.blockwise, seed=1), BASE, "other weights"),
    "other dtype": (model(ops=ops.blockwise, dtype=np.float64), BASE, "other weights"),
    "a mask": (WINDOW, BASE, "under another mask, .*checkpoint's own"),
    "no mask": (BASE, WINDOW, "under another mask, the checkpoint's own"),
    "another mask": (BASE.with_mask(mask.sliding_window(4)), WINDOW, "under another mask"),
    "another mask in one layer": (
        BASE.with_mask([WINDOW.mask, mask.causal()]),
        WINDOW,
        "under another mask",
    ),
    "fewer layers": (
        BASE,
        model(ops=ops.blockwise, num_hidden_layers=3),
        "num_hidden_layers = 2, .* 3",
    ),
    "more layers": (
        model(ops=ops.blockwise, num_hidden_layers=3),
        BASE,
        "num_hidden_layers = 3, .* 2",
    ),
    "more heads": (
        model(ops=ops.blockwise, num_key_value_heads=4),
        BASE,
        "num_key_value_heads = 4, .* 2",
    ),
    "a longer context": (
        BASE,
        like(BASE, max_position_embeddings=16),
        "max_position_embeddings = 64, .* 16",
    ),
    "a window": (like(BASE, sliding_window=3), BASE, "sliding_window = 3, .* None"),
    "another eps": (like(BASE, rms_norm_eps=1e-3), BASE, "rms_norm_eps"),
}


@pytest.mark.parametrize("fill", [used_by, lambda m: m.new_cache()], ids=["used", "empty"])
@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("front", ["__call__", "model"])
def test_a_cache_of_another_model_is_refused(case, fill, front):
    other, mine, says = OTHERS[case]
    cache = fill(other)
    before = cache.state
    with pytest.raises(NpllmValueError, match=says):
        getattr(mine, front)(IDS[:, 5:], cache=cache)
    assert cache.state is before
    other(IDS[:, 5:], cache=cache)  # its own model may go on


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: KVCache(1, 3, 64), "n_layer = 3, the model 2"),
        (lambda: KVCache(1, 1, 64), "n_layer = 1, the model 2"),
        (lambda: KVCache(1, 2, 65), "room for 65 tokens, .* is 64"),
        (lambda: KVCache(1, 2, 64, 5), "window of 5 keys, the model sees all"),
    ],
)
def test_a_cache_made_by_hand_must_have_the_sizes_of_the_model(made, says):
    with pytest.raises(NpllmValueError, match=says):
        BASE(IDS, cache=made())


def test_a_context_of_16_never_takes_24_tokens():
    m = model(ops=ops.blockwise, max_position_embeddings=16, original_max_position_embeddings=16)
    ids = random_ids(1, 24)
    caches = [m.new_cache(), KVCache(1, 2, 16), KVCache(1, 2, 10), KVCache(1, 2, 64)]
    for cache in caches:
        for start in range(0, 24, 8):
            try:
                m(ids[:, start : start + 8], cache=cache)
            except NpllmValueError:
                continue
        assert cache.n_ctx <= 16
    assert [cache.n_ctx for cache in caches] == [16, 16, 8, 0]


def test_a_cache_made_by_hand_belongs_to_the_model_of_its_first_call():
    cache = KVCache(1, 2, 32)
    with pytest.raises(NpllmValueError):
        BASE(np.array([[-1]]), cache=cache)
    assert cache.owner is None, "a call that failed has not happened"
    BASE(IDS[:, :5], cache=cache)
    with pytest.raises(NpllmValueError, match="other weights"):
        OTHERS["other weights"][0](IDS[:, 5:], cache=cache)
    close(BASE(IDS[:, 5:], cache=cache), BASE(IDS)[:, 5:], times=2)


@pytest.mark.parametrize(
    "copied",
    [
        lambda m: npllm.Model(m.config, m.params, ops=ops.reference),
        lambda m: like(m, eos_token_id=(5,), pad_token_id=3),
        lambda m: m.with_mask(None),
        copy.copy,
    ],
    ids=["other ops", "other tokens", "the same mask", "copy.copy"],
)
def test_a_copy_on_the_same_weights_under_the_same_mask_goes_on(copied):
    close(copied(BASE)(IDS[:, 5:], cache=used_by(BASE)), BASE(IDS)[:, 5:], times=2)


def test_one_rule_object_is_one_mask_however_it_is_given():
    rule = WINDOW.mask
    for same in (BASE.with_mask(rule), BASE.with_mask([rule] * 2), BASE.with_mask((rule, rule))):
        close(same(IDS[:, 5:], cache=used_by(WINDOW)), WINDOW(IDS)[:, 5:], times=2)


@pytest.mark.parametrize("cache", [{}, [], "cache", ops])
def test_what_is_no_cache_is_refused_by_its_type(cache):
    with pytest.raises(
        NpllmTypeError, match=f"cache must be a KVCache, .* got {type(cache).__name__}"
    ):
        BASE(IDS, cache=cache)


def test_a_layer_that_does_not_exist_is_refused_by_the_range():
    cache, k = KVCache(1, 2, 8), np.zeros((1, 2, 3, 8), np.float32)
    for layer in (2, -1):
        with pytest.raises(
            NpllmValueError, match=f"layer must lie in 0 ... n_layer - 1 = 1, got {layer}"
        ):
            cache.append(layer, k, k)


def test_float64_is_not_rounded_to_what_the_cache_holds():
    cache, k = KVCache(1, 1, 8), np.zeros((1, 2, 3, 8), np.float32)
    cache.append(0, k, k)
    with pytest.raises(
        NpllmValueError, match="holds values in float32, which would round the float64"
    ):
        cache.append(0, k, k.astype(np.float64))


# --------------------------------------------------------------------------------------------------------------- one call at a time


def test_a_second_call_meanwhile_is_refused_and_the_first_goes_on():
    cache, entered, leave, seen = BASE.new_cache(), threading.Event(), threading.Event(), []

    def tap(name, x):
        if name == "model.layers.1.mlp.swiglu":
            entered.set()
            assert leave.wait(30)
        return x

    thread = threading.Thread(target=lambda: seen.append(BASE(IDS[:, :5], cache=cache, tap=tap)))
    thread.start()
    assert entered.wait(30)
    for call in (
        lambda: BASE(IDS[:, :2], cache=cache),
        lambda: BASE.model(IDS[:, :2], cache=cache),
        lambda: cache.reorder([0, 0]),
    ):
        with pytest.raises(NpllmRuntimeError, match="in use by another call"):
            call()
    assert cache.n_ctx == 0, "what another call is doing is not to be seen"
    leave.set()
    thread.join()
    close(seen[0], BASE(IDS[:, :5]), times=2)
    close(BASE(IDS[:, 5:], cache=cache), BASE(IDS)[:, 5:], times=2)


def test_a_tap_cannot_use_the_cache_of_its_own_call():
    cache = BASE.new_cache()
    with pytest.raises(NpllmRuntimeError, match="in use by another call"):
        BASE(IDS, cache=cache, tap=lambda _, x: (BASE(IDS[:, :1], cache=cache), x)[1])
    assert cache.n_ctx == 0
    BASE(IDS, cache=cache)


def test_threads_that_race_for_a_cache_are_refused_or_come_one_after_another():
    cache, n, refused = BASE.new_cache(), 6, []

    def race():
        try:
            BASE(IDS[:, :3], cache=cache)
        except NpllmRuntimeError:
            refused.append(1)

    threads = [threading.Thread(target=race) for _ in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = n - len(refused)
    assert done >= 1 and cache.n_ctx == 3 * done
    whole = np.concatenate([IDS[:, :3]] * done + [IDS[:, 5:]], axis=1)
    close(BASE(IDS[:, 5:], cache=cache), BASE(whole)[:, 3 * done :], times=2)


# ------------------------------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, KVCache.copy])
@pytest.mark.parametrize("kind", ["plain", "window", "longrope"])
def test_a_copy_goes_its_own_way(copied, kind):
    changes = {"window": {"sliding_window": 3}, "longrope": family.longrope()}.get(kind, {})
    m, ids = model(ops=ops.blockwise, **changes), random_ids(1, 14)
    cache = m.new_cache()
    m(ids[:, :5], cache=cache)
    other = copied(cache)
    m(random_ids(1, 4, seed=7), cache=other)
    close(m(ids[:, 5:], cache=cache)[:, -1], m(ids)[:, -1], times=2)
    assert other.owner is cache.owner and other.n_ctx == 9


def test_a_pickled_cache_goes_on_without_the_weights():
    cache = used_by(BASE)
    data = pickle.dumps(cache)
    assert len(data) < cache.n_bytes + 4096
    again = pickle.loads(data)
    close(BASE(IDS[:, 5:], cache=again), BASE(IDS[:, 5:], cache=cache), times=0)


@pytest.mark.parametrize("case", OTHERS)
def test_a_pickled_cache_belongs_to_the_weights_and_the_mask_it_came_from(case):
    other, mine, says = OTHERS[case]
    again = pickle.loads(pickle.dumps(used_by(other)))
    with pytest.raises(NpllmValueError, match=says):
        mine(IDS[:, 5:], cache=again)
    assert again.n_ctx == 5
    other(IDS[:, 5:], cache=again)
