"""Prompt lookup decoding: the text is that of a run without it, in fewer passes where it repeats."""

import family
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import npllm
from npllm import kernels, ops
from npllm.decoding.prompt_lookup import MOST_PROPOSED, MOST_WAITING, PromptLookup, continuation
from npllm.errors import NpllmValueError

SETS = {"blockwise": ops.blockwise, "compiled": kernels.compiled_ops()}
sets = pytest.mark.parametrize("name", [name for name, found in SETS.items() if found])


def slowly(ids, n_tokens):
    """The oracle: loops over a list."""
    for n in (3, 2):
        places = [i for i in range(n, len(ids)) if ids[i - n : i] == ids[-n:]]
        if places:
            i = max((i for i in places if i + n_tokens <= len(ids)), default=places[0])
            return ids[i : i + n_tokens]
    return []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(0, 12))
def test_what_followed_the_longest_and_last_match_is_proposed(ids, n_tokens):
    assert continuation(np.array(ids), n_tokens).tolist() == slowly(ids, n_tokens)


def test_fewer_are_proposed_where_few_are_kept_and_none_for_a_while_where_none_is():
    lookup, ids = PromptLookup(10), np.array([1, 2, 3] * 20)
    assert len(lookup.propose(ids, 99)) == 10
    lookup.learn(10, 2)
    assert len(lookup.propose(ids, 99)) == 5
    assert len(lookup.propose(ids, 3)) == 3
    lookup.learn(3, 3)
    assert len(lookup.propose(ids, 99)) == 7
    pauses = []
    for _ in range(9):
        lookup.learn(7, 0)
        pauses.append(0)
        while not len(lookup.propose(ids, 99)):
            pauses[-1] += 1
    assert pauses == [1, 3, 7, 15, 31, 63, *[MOST_WAITING] * 3]
    assert len(PromptLookup(99).propose(ids, 99)) == MOST_PROPOSED == 15
    assert len(PromptLookup(10).propose(ids, 0)) == len(PromptLookup(10).propose(ids, -3)) == 0


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


def test_a_text_that_repeats_takes_fewer_passes():
    base = tiny.model(ops=ops.blockwise)
    model = Cycle(base.config, base.params, ops=base.ops)
    ids = np.array([[5, 6, 7, 8, 9, 10, 5, 6, 7, 8, 9, 10, 5]])
    wanted = model.generate(ids, max_new_tokens=40)
    assert model.passes == (13, *[1] * 39)
    model.passes = ()
    assert model.generate(ids, max_new_tokens=40, prompt_lookup_num_tokens=8).tolist() == (
        wanted.tolist()
    )
    assert model.passes == (13, 7, 9, 9, 9, 5)  # each pass gives as many tokens as it reads


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
