"""The engine behind the server: each answer is the one that a request gets alone."""

import threading

import numpy as np
import pytest
import served
import tiny
from hypothesis import given
from hypothesis import strategies as st

from npllm import kernels
from npllm.continuous_batching.errors import EndedError, ExpiredError, QueueFullError
from npllm.decoding.prefill import n_read_together, n_reusable, pieces
from npllm.errors import NpllmValueError
from npllm.forward_pass import PREFILL_CHUNK
from npllm.kernels import FEW_ROWS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return served.load(tmp_path_factory.mktemp("served"))


def prompts(n, seed=0):
    """Prompts of unequal length, 1 to 90 tokens."""
    lengths = np.random.default_rng(seed).integers(1, 90, n)
    return [tiny.random_ids(1, k, seed + k, 272)[0].tolist() for k in lengths]


SAMPLED = {"temperature": 0.9, "top_p": 0.95, "top_k": 50}
KINDS = ({}, SAMPLED, {"temperature": 1.5, "min_p": 0.02}, {"repetition_penalty": 1.3})


def exact(model):
    return model.ops is kernels.compiled_ops()


def test_each_answer_is_the_one_that_a_request_gets_alone(model):
    """More requests than rows, of unequal lengths and kinds, so that they join and leave."""
    wanted = [
        {"max_new_tokens": 3 + 5 * (i % 7), "seed": i, **KINDS[i % len(KINDS)]} for i in range(16)
    ]
    with served.engine(model, max_batch=7) as engine:
        asked = [
            served.Asked(engine, ids, **options)
            for ids, options in zip(prompts(16), wanted, strict=True)
        ]
        found = [one.ids() for one in asked]
    assert found == [
        served.alone(model, ids, **options)
        for ids, options in zip(prompts(16), wanted, strict=True)
    ]


def test_even_the_log_probabilities_have_the_same_bits(model):
    options = {"max_new_tokens": 12, "seed": 5, "top_logprobs": 3, **SAMPLED}
    with served.engine(model) as engine:
        asked = [served.Asked(engine, ids, **options) for ids in prompts(16, 3)]
        found = [one.answer() for one in asked]
    for ids, tokens in zip(prompts(16, 3), found, strict=True):
        out = model.generate(np.array([ids]), return_dict_in_generate=True, **options)
        if exact(model):
            assert tuple(tokens) == out.answers[0].tokens
        assert [token.id for token in tokens] == out.answers[0].ids.tolist()


def test_choice_k_is_row_k_of_a_batch_of_the_prompt(model):
    ids, options = prompts(1)[0], {"max_new_tokens": 9, "seed": 8, "temperature": 1.2}
    with served.engine(model) as engine:
        asked = [served.Asked(engine, ids, draw=k, **options) for k in range(3)]
        found = [one.ids() for one in asked]
    batch = model.generate(np.array([ids] * 3), **options)[:, len(ids) :]
    assert found == batch.tolist()
    assert len(set(map(tuple, found))) == 3


def test_a_request_joins_and_leaves_while_another_goes_on(model):
    long, short = prompts(2)
    with served.engine(served.slowed(model, 0.002)) as engine:
        first = served.Asked(engine, long, max_new_tokens=100)
        first.next()
        second = served.Asked(engine, short, max_new_tokens=3)
        assert second.ids() == served.alone(model, short, max_new_tokens=3)
        while not first._events.empty():
            first.next()
        assert first.seen[-1].finish_reason is None
        assert first.ids() == served.alone(model, long, max_new_tokens=100)


def test_one_that_is_given_up_frees_its_row_at_the_next_step(model):
    with served.engine(served.slowed(model, 0.002), max_batch=1) as engine:
        first = served.Asked(engine, [5, 6], max_new_tokens=200)
        first.next()
        second = served.Asked(engine, [7], max_new_tokens=2)
        first.job.cancel()
        assert second.ids() == served.alone(model, [7], max_new_tokens=2)
        while not first._events.empty():
            first.next()
        assert len(first.seen) < 100
        served.wait_until(lambda: engine.gauges()["npllm_running"] == 0)


def test_one_that_waits_and_is_given_up_leaves_the_queue(model):
    with served.engine(served.slowed(model, 0.002), max_batch=1, max_queue=1) as engine:
        served.Asked(engine, [5], max_new_tokens=200).next()
        served.Asked(engine, [6], max_new_tokens=2).job.cancel()
        served.Asked(engine, [7], max_new_tokens=2)
        with pytest.raises(QueueFullError, match="sequences wait"):
            served.Asked(engine, [8], max_new_tokens=2)


def test_a_full_queue_refuses_and_says_when_to_try_again(model):
    with served.engine(served.slowed(model, 0.002), max_batch=1, max_queue=1) as engine:
        asked = [served.Asked(engine, [5], max_new_tokens=50)]
        asked[0].next()
        asked.append(served.Asked(engine, [6], max_new_tokens=2))
        with pytest.raises(QueueFullError, match="1 sequences wait already") as refused:
            served.Asked(engine, [7], max_new_tokens=2)
        assert 1 <= refused.value.seconds <= 30
        assert [len(one.ids()) for one in asked] == [50, 2]


def test_what_takes_too_long_is_ended_at_work_and_in_the_queue(model):
    with served.engine(served.slowed(model, 0.01), max_batch=1, timeout=7) as engine:
        asked = [served.Asked(engine, [5], max_new_tokens=200, deadline=0.0) for _ in range(3)]
        for one in asked:
            with pytest.raises(ExpiredError, match="took more than 7 s"):
                one.answer()
        assert served.Asked(engine, [6], max_new_tokens=2).ids()


def test_the_end_of_the_engine_ends_every_job(model):
    running = served.engine(served.slowed(model, 0.01), max_batch=1)
    with running as engine:
        asked = [served.Asked(engine, [5], max_new_tokens=200) for _ in range(3)]
        asked[0].next()
    for one in asked:
        with pytest.raises(EndedError, match="shutting down"):
            one.answer()
    with pytest.raises(EndedError, match="shutting down"):
        served.Asked(engine, [5], max_new_tokens=1)


def test_a_row_that_fails_fails_alone(model):
    def fails(ids, logits):
        if ids.shape[1] > 4:
            raise NpllmValueError("no more")
        return logits

    with served.engine(model) as engine:
        good = served.Asked(engine, [5, 6, 7], max_new_tokens=20)
        bad = served.Asked(engine, [5, 6], max_new_tokens=20, logits_processors=[fails])
        with pytest.raises(NpllmValueError, match="no more"):
            bad.answer()
        assert good.ids() == served.alone(model, [5, 6, 7], max_new_tokens=20)


def test_one_thread_alone_touches_the_model(model):
    threads = set()
    other = served.slowed(model, 0)
    for name in ("logits_of_rows", "last_logits", "model", "lm_head"):
        method = getattr(other, name)

        def watched(*args, method=method, **options):
            threads.add(threading.current_thread().name)
            return method(*args, **options)

        setattr(other, name, watched)
    with served.engine(other) as engine:
        asked = [served.Asked(engine, ids, max_new_tokens=3, echo=True) for ids in prompts(4)]
        assert all(one.answer() for one in asked)
    assert threads == {"npllm engine"}


# ------------------------------------------------------------------------------ prefixes


def test_a_prompt_that_begins_as_an_earlier_one_reads_only_the_rest(model):
    begin = tiny.random_ids(1, 80, 1, 272)[0].tolist()
    ends = [tiny.random_ids(1, n, n, 272)[0].tolist() for n in (1, 17, 40)]
    options = {"max_new_tokens": 8, "seed": 2, "top_logprobs": 1, **SAMPLED}
    with served.engine(model) as engine:
        served.Asked(engine, begin, **options).answer()
        for end in ends:
            again = served.Asked(engine, begin + end, **options)
            tokens = again.answer()
            assert again.seen[-1].n_reused == min(80, 80 + len(end) - FEW_ROWS - 1)
            out = model.generate(np.array([begin + end]), return_dict_in_generate=True, **options)
            assert [token.id for token in tokens] == out.answers[0].ids.tolist()
            if exact(model):
                assert tuple(tokens) == out.answers[0].tokens
        assert engine.kept.n_bytes > 0


def test_choices_share_the_prompt_that_is_being_answered(model):
    ids = tiny.random_ids(1, 60, 1, 272)[0]
    with served.engine(served.slowed(model, 0.002)) as engine:
        asked = [served.Asked(engine, ids, max_new_tokens=30) for _ in range(3)]
        assert len({tuple(one.ids()) for one in asked}) == 1
        assert [one.seen[-1].n_reused for one in asked] == [0, 43, 43]


@pytest.mark.parametrize("cache_bytes", [0, 50_000])
def test_kept_caches_stay_within_their_bytes(model, cache_bytes):
    with served.engine(model, cache_bytes=cache_bytes) as engine:
        for seed in range(12):
            ids = tiny.random_ids(1, 50, seed, 272)[0]
            served.Asked(engine, ids, max_new_tokens=1).answer()
            assert engine.kept.n_bytes <= cache_bytes
        assert (engine.kept.n_bytes > 0) == (cache_bytes > 0)


@given(st.integers(1, 3 * PREFILL_CHUNK), st.integers(0, 3 * PREFILL_CHUNK))
def test_a_token_is_read_in_the_kind_of_chunk_in_which_the_whole_prompt_is(n_prompt, n_same):
    """After any reuse: many tokens at a time where `last_logits` reads many, few where few."""
    n_past = n_reusable(min(n_same, n_read_together(n_prompt)), n_prompt)
    assert n_past < n_prompt and n_past <= n_same
    cuts = pieces(n_past, n_prompt)
    assert [start for start, _ in cuts] == [n_past, *(stop for _, stop in cuts)][: len(cuts)]
    assert cuts[-1][1] == n_prompt
    few = [start for start, stop in cuts if stop - start <= FEW_ROWS]
    rest = n_prompt % PREFILL_CHUNK
    assert few == ([n_prompt - rest] if 0 < rest <= FEW_ROWS else [])
    assert all(stop - start <= PREFILL_CHUNK for start, stop in cuts)
