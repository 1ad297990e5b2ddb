"""Prompt lookup decoding: the text is that of a run without it, in fewer passes where it repeats."""

import itertools

import family
import numpy as np
import pytest
import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st

import npllm
from npllm import kernels, ops
from npllm.decoding import loop
from npllm.decoding.prompt_lookup import MOST_WAITING, PromptLookup, continuation
from npllm.errors import NpllmValueError

SETS = {"blockwise": ops.blockwise, "compiled": kernels.compiled_ops()}
sets = pytest.mark.parametrize("name", [name for name, found in SETS.items() if found])


def slowly(ids, n_tokens):
    """The oracle: loops over a list."""
    for n in range(10, 0, -1):
        places = [i for i in range(n, len(ids)) if ids[i - n : i] == ids[-n:]]
        if places:
            i = max((i for i in places if i + n_tokens <= len(ids)), default=places[0])
            return n, ids[i : i + n_tokens]
    return 0, []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(0, 12))
@example([1, 2] * 12, 15)
def test_what_followed_the_longest_and_last_match_is_proposed(ids, n_tokens):
    n, proposed = continuation(np.array(ids), n_tokens)
    assert (n, proposed.tolist()) == slowly(ids, n_tokens)


def started(n_tokens, seconds=1.0):
    """A lookup that knows how long a pass without proposals takes."""
    lookup = PromptLookup(n_tokens)
    assert len(lookup.propose(np.array([1] * 30), 99)) == 0
    lookup.learn(0, 0, seconds)
    return lookup


@pytest.mark.parametrize(
    ("n_same", "n"), [(0, 0), (1, 1), (2, 1), (3, 3), (4, 3), (5, 7), (9, 7), (10, 15), (20, 15)]
)
def test_more_are_proposed_where_more_match(n_same, n):
    same = list(range(100, 100 + n_same))
    ids = np.array([*same, *range(20), 50, *same])
    assert len(started(99).propose(ids, 99)) == n
    assert len(started(5).propose(ids, 99)) == min(5, n)
    assert len(started(99).propose(ids, 2)) == min(2, n)
    assert len(started(99).propose(ids, -1)) == 0


def pauses(lookup, ids, n_kept, seconds, n_time):
    """How many passes are without proposals before each one with them."""
    found = []
    for _ in range(n_time):
        found.append(0)
        while not len(proposed := lookup.propose(ids, 99)):
            found[-1] += 1
            lookup.learn(0, 0, 1.0)
        lookup.learn(len(proposed), n_kept, seconds)
    return found


LONG, SHORT = np.array([1, 2, 3] * 20), np.array([7, 1, 2, 8, 1])


def test_proposals_pause_where_they_do_not_pay():
    assert pauses(started(15), LONG, 15, 9.0, 20) == [0] * 20
    assert pauses(started(15), LONG, 1, 1.9, 20) == [0] * 20
    assert pauses(started(15), LONG, 0, 1.0, 20) == [0] * 20  # nothing is lost
    assert pauses(started(15), LONG, 0, 1.3, 9) == [0, 0, 4, 8, 16, 32, 64, 64, 64]
    assert pauses(started(15), LONG, 0, 99.0, 4) == [0, 4, 16, 64]
    assert pauses(started(1), LONG, 1, 2.0, 6) == [0, 4, 16, 64, 64, 64]  # cannot pay


def test_a_number_of_tokens_pauses_by_itself_and_goes_on_when_it_pays_again():
    lookup = started(15)
    assert pauses(lookup, LONG, 0, 5.0, 4) == [0, 4, 8, 16]
    assert len(lookup.propose(LONG, 99)) == 0 and len(lookup.propose(SHORT, 99)) == 1
    lookup.learn(1, 1, 1.0)
    assert pauses(lookup, LONG, 15, 5.0, 3)[1:] == [0, 0]
    assert pauses(lookup, LONG, 0, 5.0, 20)[-1] == MOST_WAITING


def test_a_pause_is_short_again_behind_proposals_that_paid():
    lookup = started(15)
    assert pauses(lookup, LONG, 0, 5.0, 6)[-1] == 64
    pauses(lookup, LONG, 15, 15.9, 5)
    assert [n for n in pauses(lookup, LONG, 0, 5.0, 6) if n][:2] == [4, 8]


def test_one_pass_that_lost_much_does_not_stop_proposals_that_pay():
    lookup = started(15)
    pauses(lookup, LONG, 15, 15.0, 3)
    lookup.learn(len(lookup.propose(LONG, 99)), 0, 15.5)
    assert len(lookup.propose(LONG, 99)) == 15


def test_one_slow_pass_without_proposals_counts_little():
    lookup = started(15)
    lookup.learn(0, 0, 10.0)
    assert pauses(lookup, LONG, 0, 5.6, 2) == [0, 4]


def test_a_pass_without_proposals_is_measured_now_and_then():
    assert sum(pauses(started(15), LONG, 15, 2.0, 200)) == 200 // 64
    slow_at_first = started(15, seconds=10.0)
    assert max(pauses(slow_at_first, LONG, 0, 9.0, 2000)) == MOST_WAITING


def test_what_was_cut_and_what_no_clock_measured_is_not_counted():
    lookup = started(15)
    lookup.learn(len(lookup.propose(LONG, 2)), 2, 3.5)
    assert len(lookup.propose(LONG, 99)) == 15
    lookup.learn(15, 15, -20.0)
    lookup.learn(0, 0, -20.0)
    lookup.learn(15, 0, 0.0)
    assert pauses(lookup, LONG, 0, 2.0, 3) == [0, 4, 8]


def test_places_that_lie_far_behind_others_are_not_looked_at():
    ids = np.array([5, 6, 7, *[8, 7] * 5000, 5, 6, 7])
    assert continuation(ids, 2)[0] == 1
    assert continuation(ids[4000:], 2)[0] == 1
    assert continuation(np.array([5, 6, 7, *[8, 7] * 50, 5, 6, 7]), 2)[0] == 3


def test_seconds_are_beside_those_of_recent_passes_without_proposals():
    lookup = started(15, seconds=10.0)
    for _ in range(40):
        lookup.learn(0, 0, 1.0)
    assert pauses(lookup, LONG, 0, 9.0, 2) == [0, 4]


class Counted(npllm.Model):
    """Counts passes and the tokens that go through them."""

    passes = ()

    def last_logits(self, ids, valid, cache=None, *, n_keep=1):
        self.passes = (*self.passes, ids.shape[1])
        return super().last_logits(ids, valid, cache, n_keep=n_keep)


def counted(model):
    return Counted(
        model.config, model.params, ops=model.ops, generation_config=model.generation_config
    )


CONFIGS = {
    "plain": tiny.config_dict(),
    "window": tiny.config_dict(sliding_window=5),
    "longrope": family.longrope(16),
}


@sets
@settings(max_examples=25)
@given(
    st.sampled_from(list(CONFIGS)), st.integers(0, 99), st.integers(2, 12), st.integers(1, 10),
    st.sampled_from([None, 0.2, 1.0]), st.data(),
)  # fmt: skip
def test_the_text_is_that_of_a_run_without_it(name, config, seed, n_prompt, n, temperature, data):
    model = counted(family.model(CONFIGS[config], dtype="float32").on(SETS[name]))
    few = np.random.default_rng(seed).integers(3, 3 + data.draw(st.integers(1, 4)), (1, n_prompt))
    options = {"max_new_tokens": 24, "temperature": temperature, "seed": seed}
    options |= data.draw(
        st.sampled_from([{}, {"repetition_penalty": 0.5}, {"no_repeat_ngram_size": 4}])
    )
    mask = np.ones((1, n_prompt), bool)
    mask[0, : data.draw(st.integers(0, n_prompt - 1))] = False
    wanted = model.generate(few, attention_mask=mask, **options)
    got = model.generate(few, attention_mask=mask, prompt_lookup_num_tokens=n, **options)
    assert got.tolist() == wanted.tolist()


class Cycle(Counted):
    """Says 5, 6, ... 10, 5, 6, ... whatever its weights are."""

    def last_logits(self, ids, valid, cache=None, *, n_keep=1):
        logits = np.zeros_like(super().last_logits(ids, valid, cache, n_keep=n_keep))
        following = 5 + (ids[:, -n_keep:] - 4) % 6
        np.put_along_axis(logits, following[..., None], 9.0, axis=-1)
        return logits


def test_a_text_that_repeats_takes_fewer_passes(monkeypatch):
    monkeypatch.setattr(loop, "working_seconds", itertools.count().__next__)  # all take as long
    base = tiny.model(ops=ops.blockwise)
    model = Cycle(base.config, base.params, ops=base.ops)
    ids = np.array([[5, 6, 7, 8, 9, 10, 5, 6, 7, 8, 9, 10, 5]])
    wanted = model.generate(ids, max_new_tokens=40)
    assert model.passes == (13, *[1] * 39)
    model.passes = ()
    assert model.generate(ids, max_new_tokens=40, prompt_lookup_num_tokens=8).tolist() == (
        wanted.tolist()
    )
    assert model.passes == (13, 1, 7, 9, 9, 9, 4)  # each pass gives as many tokens as it reads


@pytest.mark.parametrize("n_taken", [1, 3, 5, 12])
def test_a_caller_who_stops_leaves_no_token_that_was_not_verified(n_taken):
    base = tiny.model(ops=ops.blockwise)
    model, cache = Cycle(base.config, base.params, ops=base.ops), base.new_cache(1)
    ids, options = np.array([[5, 6, 7, 8, 9, 10] * 3]), {"max_new_tokens": 40, "cache": cache}
    steps = iter(loop.start(model, ids, prompt_lookup_num_tokens=8, **options))
    for _ in range(n_taken):
        next(steps)
    steps.close()
    assert cache.n_ctx == 18 + n_taken - 1


def test_the_end_of_the_context_and_a_stop_id_end_it_too():
    model = counted(tiny.model(ops=ops.blockwise))
    ids = np.array([[5, 6, 7] * 20])
    with pytest.warns(UserWarning, match="room for 4"):
        got = model.generate(ids, max_new_tokens=9, prompt_lookup_num_tokens=8)
    with pytest.warns(UserWarning, match="room for 4"):
        assert got.tolist() == model.generate(ids, max_new_tokens=9).tolist()


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ([[3, 4], [5, 6]], {}, "one prompt at a time.*got 2 prompts"),
        ([[3, 4]], {"use_cache": False}, "prompt_lookup_num_tokens = 3 .*use_cache is False"),
        ([[3, 4]], {"num_beams": 2}, "prompt_lookup_num_tokens = 3 .*num_beams is 2"),
    ],
)
def test_what_it_cannot_go_with_is_named(prompt, options, says):
    with pytest.raises(NpllmValueError, match=says):
        tiny.model().generate(np.array(prompt), prompt_lookup_num_tokens=3, **options)


def test_a_number_below_one_is_refused():
    with pytest.raises(NpllmValueError, match="prompt_lookup_num_tokens must be"):
        tiny.model().generate(np.array([[3, 4]]), prompt_lookup_num_tokens=0)
