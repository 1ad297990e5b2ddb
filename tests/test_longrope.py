"""LongRoPE with a cache: whatever came before, the last logits of a row are those of that row
alone, computed anew.
"""

import family
import numpy as np
import pytest
from close import close
from hypothesis import given, settings
from hypothesis import strategies as st
from seeds import draws

import npllm
from npllm.models import rope

N_ORIGINAL = 8
CONTENTS = {
    "longrope": family.longrope(N_ORIGINAL),
    "with a window": family.longrope(N_ORIGINAL, sliding_window=5),
    "partial": family.longrope(
        N_ORIGINAL,
        partial_rotary_factor=0.5,
        rope_scaling={"type": "longrope", "short_factor": [1.0, 1.2], "long_factor": [1.4, 5.0]},
    ),
}
kinds = st.sampled_from(sorted(CONTENTS))
runs = st.lists(st.integers(1, 7), min_size=1, max_size=7)  # lengths of consecutive calls
batches = st.lists(
    st.integers(1, 12), min_size=1, max_size=4
)  # tokens of each row in the first call


@pytest.fixture(scope="module", autouse=True)
def _small_caches():
    """Arrays of 4 slots at first, so that they are replaced and moved along in short runs too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(npllm.cache.state, "SMALLEST_CAPACITY", 4)
        yield


def _model(kind="longrope", dtype="float64"):
    return family.model(CONTENTS[kind], dtype)


def _check(model, kind_of_check, lengths, chunks, seed, prefill):
    """Run left-padded rows through one cache, chunk by chunk; compare the last logits of every row
    after every call.
    """
    rng = np.random.default_rng(seed)
    rows = [list(rng.integers(3, 60, length)) for length in lengths]
    cache, new = model.new_cache(len(rows)), family.padded(rows)[0]
    mask = family.padded(rows)[1]
    with family.prefill_chunk(prefill):
        for n_next in [*chunks, None]:
            last = model(new, attention_mask=mask, cache=cache, logits_to_keep=1)[:, 0]
            close(last, np.stack([family.alone(model, row) for row in rows]), times=kind_of_check)
            if n_next is None:
                return
            new = rng.integers(3, 60, (len(rows), n_next))
            rows = [[*row, *more] for row, more in zip(rows, new, strict=True)]
            mask = np.concatenate([mask, np.ones_like(new)], axis=1)


@given(
    kind=kinds, lengths=batches, chunks=runs, seed=st.integers(0, 99), prefill=st.integers(1, 16)
)
@settings(max_examples=draws(25, 60))
def test_cached_logits_are_those_of_each_row_alone_for_any_batch_and_chunking(
    kind, lengths, chunks, seed, prefill
):
    """spec 8.14, 8.15, 8.17, 8.18, 8.19: rows cross by their own length, padded or not, in float64."""
    _check(_model(kind), 1, lengths, chunks, seed, prefill)


@given(kind=kinds, lengths=batches, chunks=runs, seed=st.integers(0, 99))
def test_cached_logits_in_float32_are_those_of_each_row_alone(kind, lengths, chunks, seed):
    """Within 1e-5 of the largest logit."""
    _check(_model(kind, "float32"), 2, lengths, chunks, seed, 512)


@given(
    kind=kinds,
    lengths=st.lists(st.integers(1, 20), min_size=2, max_size=4),
    seed=st.integers(0, 99),
)
def test_a_row_does_not_depend_on_its_neighbours(kind, lengths, seed):
    """spec 8.19, 8.26: no cache; each row goes by its own length."""
    model, rng = _model(kind), np.random.default_rng(seed)
    rows = [rng.integers(3, 60, length) for length in lengths]
    ids, mask = family.padded(rows)
    logits = model(ids, attention_mask=mask)
    for row, together in zip(rows, logits, strict=True):
        close(together[-len(row) :], model(row[None])[0])


def test_length_original_is_short_and_one_more_is_long_for_all_positions():
    """spec 8.14."""
    content = CONTENTS["longrope"]
    model, ids = _model(), family.ids_of(_model().config, (1, 16))
    scaling = content["rope_scaling"]
    short, long = (
        family.model(
            content
            | {
                "rope_scaling": scaling
                | {"short_factor": scaling[name], "long_factor": scaling[name]}
            }
        )
        for name in ("short_factor", "long_factor")
    )
    close(model(ids[:, :8]), short(ids[:, :8]), times=0)
    close(model(ids[:, :9]), long(ids[:, :9]), times=0)
    assert np.abs(model(ids[:, :9])[:, 1:8] - model(ids[:, :8])[:, 1:]).max() > 0.05


def test_the_factor_scales_the_rotated_channels_below_the_switch_too():
    """spec 8.6: at length 5, with factors of 1, longrope differs from the default."""
    ones = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
    model = family.model(family.longrope(rope_scaling=ones))
    plain = family.model(family.longrope(rope_scaling=None))
    by_hand = family.model(family.longrope(rope_scaling=ones | {"attention_factor": 1.0}))
    ids = family.ids_of(model.config, (1, 5))
    assert np.abs(model(ids)[:, 1:] - plain(ids)[:, 1:]).max() > 0.01
    close(by_hand(ids), plain(ids), times=0)


def test_channels_that_do_not_turn_are_not_scaled():
    """spec 8.6, 8.10: the rest of the head passes through as it was; the first d_rope channels are
    q and k times the factor at 0.
    """
    model = _model("partial")
    seen = {}
    model(np.array([[5]]), tap=lambda name, x: seen.setdefault(name, x))
    qkv, q = (
        seen["model.layers.0.self_attn.qkv_proj"][0, 0],
        seen["model.layers.0.self_attn.q"][0, :, 0],
    )
    before = qkv[: q.size].reshape(q.shape)
    close(q[:, 4:], before[:, 4:], times=0)
    close(q[:, :4], before[:, :4] * rope.attention_factor(model.config))


def _computed_anew(model):
    """A list that gains, for each call that computes rows anew, how many: the model makes a cache
    for them.
    """
    counts, new_cache = [], model.new_cache
    model.new_cache = lambda n, **how: counts.append(n) or new_cache(n, **how)
    return counts


def _fresh(kind="longrope"):
    model = _model(kind)
    return npllm.Model(model.config, model.params)


def test_a_row_is_computed_anew_once_and_at_its_own_length():
    """spec 8.16: first the longer row, later the shorter one, never again."""
    model = _fresh()
    ids, mask = family.padded([[5] * 6, [7] * 3])
    cache, after = model.new_cache(2), []
    counts = _computed_anew(model)
    for _ in range(9):
        model(ids, attention_mask=mask, cache=cache)
        after.append((sum(counts), *cache.rope_variant.tolist()))
        ids, mask = np.array([[9], [9]]), np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
    assert after == [(0, 0, 0)] * 3 + [(1, 1, 0)] * 3 + [(2, 1, 1)] * 3


def test_a_prompt_that_is_long_from_the_start_is_never_computed_anew():
    """spec 8.17."""
    model = _fresh()
    cache = model.new_cache()
    counts = _computed_anew(model)
    for ids in ([[4] * 9], [[5]], [[6]]):
        model(np.array(ids), cache=cache)
    assert counts == [] and cache.rope_variant.tolist() == [1]


def test_a_shorter_prompt_afterwards_is_short_again():
    """spec 8.16: nothing sticks to the model."""
    model, ids = _fresh(), family.ids_of(_model().config, (1, 20))
    before = model(ids[:, :6])
    model(ids)
    cache = model.new_cache()
    for i in range(20):
        model(ids[:, i : i + 1], cache=cache)
    scaling = CONTENTS["longrope"]["rope_scaling"]
    short = family.model(
        CONTENTS["longrope"] | {"rope_scaling": scaling | {"long_factor": scaling["short_factor"]}}
    )
    close(short(ids[:, :6]), before, times=0)
    close(model(ids[:, :6]), before, times=0)
    close(model(ids[:, :6], cache=model.new_cache()), before, times=0)


def test_a_call_that_is_long_in_the_middle_of_its_chunks_is_long_for_all_of_them():
    """spec 8.17: the choice looks at the whole prompt before it is cut."""
    model, ids = _fresh(), family.ids_of(_model().config, (2, 30))
    with family.prefill_chunk(4):
        close(model(ids, cache=model.new_cache(2)), model(ids))


def _raw(model, ids):
    """Last logits with a cache whose keys keep the rotation of their own call."""
    cache = model.new_cache()
    for i in range(ids.shape[1]):
        if i == model.config.original_max_position_embeddings:
            cache.rope_variant[:] = 1  # as if the keys had been rotated with the long factors
        last = model(ids[:, i : i + 1], cache=cache)
    return last[0, -1]


def test_keys_left_as_they_were_would_be_wrong():
    """spec 8.15: the raw cache differs by far more than rounding."""
    model, ids = _model(), family.ids_of(_model().config, (1, 9))
    largest = np.abs(family.alone(model, ids[0])).max()
    assert np.abs(_raw(model, ids) - family.alone(model, ids[0])).max() > 0.01 * largest


def test_keys_rotated_again_would_be_wrong_beyond_the_first_layer():
    """spec 8.15: deeper keys depend on hidden states that were computed with the short factors;
    with one layer it is enough.
    """
    for n_layer, enough in ((1, True), (3, False)):
        model = family.model(family.longrope(num_hidden_layers=n_layer))
        ids = family.ids_of(model.config, (1, 9))
        cache = model.new_cache()
        model(ids[:, :8], cache=cache)
        old, new = (rope.frequencies(model.config, choice).astype(np.float64) for choice in (0, 1))
        scale = rope.attention_factor(model.config)
        turn_back, turn_on = (npllm.ops.rope_tables(np.arange(8), x, 1.0) for x in (-old, new))
        for keys, _, _ in map(cache.kept, range(n_layer)):
            plain = npllm.ops.apply_rope(keys[:, :, :8] / scale, *turn_back)
            keys[:, :, :8] = npllm.ops.apply_rope(plain, *turn_on) * scale
        cache.rope_variant[:] = 1
        error = np.abs(model(ids[:, 8:], cache=cache)[0, -1] - family.alone(model, ids[0])).max()
        assert (error < 1e-9) if enough else error > 0.01, (n_layer, error)


@given(start=st.integers(0, 30), n=st.integers(1, 12), split=st.integers(1, 11))
def test_explicit_positions_choose_the_factors_and_match_a_shifted_run(start, n, split):
    """spec 8.21: [n_seq], [1, n_seq] and [n_batch, n_seq] say the same; a cache sees the largest
    position so far.
    """
    model, ids = _model(), family.ids_of(_model().config, (2, n), seed=start)
    positions = np.arange(start, start + n)
    whole = model(ids, position_ids=positions)
    close(model(ids, position_ids=positions[None]), whole, times=0)
    close(model(ids, position_ids=np.stack([positions] * 2)), whole)
    cache, split = model.new_cache(2), min(split, n)
    for part in (slice(0, split), slice(split, n)):
        if ids[:, part].size:
            last = model(ids[:, part], position_ids=positions[part], cache=cache)
    close(last[:, -1], whole[:, -1])
    counted = model(ids, position_ids=np.stack([positions, np.arange(n)]))
    close(counted[0], whole[0])
    close(counted[1], model(ids[1:])[0])


def test_explicit_positions_beyond_the_original_length_are_long():
    """spec 8.21: five tokens at 4 ... 8 use the long factors, at 3 ... 7 the short ones."""
    model, ids = _model(), family.ids_of(_model().config, (1, 5))
    long = family.model(
        CONTENTS["longrope"]
        | {
            "rope_scaling": CONTENTS["longrope"]["rope_scaling"]
            | {"short_factor": [*family.N_LONG]}
        }
    )
    close(
        model(ids, position_ids=np.arange(4, 9)), long(ids, position_ids=np.arange(4, 9)), times=0
    )
    close(model(ids, position_ids=np.arange(4, 9)), long(ids), times=100)  # distances alone matter
    close(model(ids, position_ids=np.arange(3, 8)), model(ids), times=100)


def test_positions_that_go_back_do_not_make_the_row_short_again():
    """spec 8.21: the cached tokens count too, as in one pass over all of them; Transformers looks
    at the call's own positions.
    """
    model, ids, positions = (
        _model(),
        family.ids_of(_model().config, (1, 8)),
        np.array([5, 6, 7, 8, 9, 2, 3, 4]),
    )
    cache = model.new_cache()
    model(ids[:, :5], position_ids=positions[:5], cache=cache)
    close(
        model(ids[:, 5:], position_ids=positions[5:], cache=cache),
        model(ids, position_ids=positions)[:, 5:],
    )


def test_positions_default_to_the_number_of_cached_tokens():
    """spec 8.21."""
    model, ids = _model(), family.ids_of(_model().config, (1, 7))
    caches = model.new_cache(), model.new_cache()
    for cache, given_ in zip(caches, (None, np.arange(4, 7)), strict=True):
        model(ids[:, :4], cache=cache)
        last = model(ids[:, 4:], cache=cache, position_ids=given_)
        close(last, model(ids)[:, 4:])


@given(
    kind=kinds,
    n_calls=st.integers(1, 12),
    lengths=st.lists(st.integers(1, 10), min_size=2, max_size=2),
    then=st.integers(1, 6),
)
@settings(max_examples=draws(15, 40))
def test_a_call_that_fails_midway_leaves_the_cache_usable(kind, n_calls, lengths, then):
    """At any layer, in any chunk, while a row is computed anew or not: the next call goes on as if
    nothing had happened.
    """
    model = _model(kind)
    seen = list(family.ids_of(model.config, (2, lengths[0]), seed=n_calls))
    cache = model.new_cache(2)
    with family.prefill_chunk(3):
        model(np.array(seen), cache=cache)
        lost = family.ids_of(model.config, (2, lengths[1]), seed=99)
        try:
            family.failing(model, n_calls)(lost, cache=cache)
            seen = [[*row, *more] for row, more in zip(seen, lost, strict=True)]
        except family.Broken:
            assert cache.n_ctx == lengths[0]
        for seed in range(2):
            new = family.ids_of(model.config, (2, then), seed=seed)
            seen = [[*row, *more] for row, more in zip(seen, new, strict=True)]
            last = model(new, cache=cache)[:, -1]
            close(last, np.stack([family.alone(model, row) for row in seen]))


def test_a_long_call_that_fails_does_not_leave_long_keys_behind_a_short_one():
    """The row was already computed anew for the length that never came; the shorter call that
    follows finds it out.
    """
    model, ids = _model(), family.ids_of(_model().config, (1, 12))
    cache = model.new_cache()
    model(ids[:, :6], cache=cache)
    with pytest.raises(family.Broken):
        family.failing(model, 4)(
            ids[:, 6:12], cache=cache
        )  # 2 layers for the cached row, then the second layer of the call
    close(model(ids[:, 6:7], cache=cache)[0, -1], family.alone(model, ids[0, :7]))


@pytest.mark.parametrize("n_calls", [1, 2, 3, 4, 5])
def test_a_first_call_that_fails_leaves_the_cache_empty_and_usable(n_calls):
    model = _model("with a window")
    cache, ids = model.new_cache(), family.ids_of(model.config, (1, 14))
    with family.prefill_chunk(4):
        with pytest.raises(family.Broken):
            family.failing(model, n_calls)(ids, cache=cache)
        assert cache.n_ctx == 0
        close(model(ids[:, :11], cache=cache)[:, -1], model(ids[:, :11])[:, -1])


def test_generate_crosses_like_a_full_recompute():
    """spec 8.15, 8.18: with and without a cache, padded or alone, the same tokens."""
    model = _model()
    rows = [list(family.ids_of(model.config, (n,), seed=n)) for n in (7, 4)]
    ids, mask = family.padded(rows)
    together = model.generate(ids, attention_mask=mask, max_new_tokens=12)
    assert np.array_equal(
        together, model.generate(ids, attention_mask=mask, max_new_tokens=12, use_cache=False)
    )
    for row, both in zip(rows, together, strict=True):
        single = model.generate(np.array([row]), max_new_tokens=12)[0]
        n_new = len(single) - len(row)
        assert np.array_equal(both[7 : 7 + n_new], single[len(row) :])
