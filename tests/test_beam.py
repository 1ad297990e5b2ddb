"""Beam search against Transformers' generate, against an exhaustive search, and the cache that is
put in another order.
"""

import itertools
import json
import math
import os

import family
import numpy as np
import pytest
import tiny
from close import close
from hypothesis import given, settings
from hypothesis import strategies as st
from optional import invoke
from seeds import draws

import npllm
from npllm.analysis.score import score
from npllm.cache import KVCache
from npllm.decoding import GenerationConfig
from npllm.decoding.beam import Beams, beam_search, beam_texts

SMALL = tiny.config_dict(vocab_size=6, eos_token_id=2, num_hidden_layers=1)
PENALTIES = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0])


def with_stops(model, *stops, pad=0, penalty=None):
    """The same model with other stop ids."""
    settings = GenerationConfig(stops, pad, npllm.decoding.Sampling(repetition_penalty=penalty))
    return npllm.Model(
        model.config,
        model.params,
        generation_config=settings,
        ops=model.ops,
        tokenizer=model.tokenizer,
    )


def random_model(*stops, content=None, **options):
    return with_stops(
        family.model(tiny.config_dict() if content is None else content), *stops, **options
    )


def padded_prompts(model, seed, n_batch=3, n_prompt=5):
    """Ids and mask of prompts of different lengths, padded on the left."""
    ids = family.ids_of(model.config, (n_batch, n_prompt), seed)
    valid = (
        np.arange(n_prompt)[None, :]
        >= np.random.default_rng(seed).integers(0, n_prompt, n_batch)[:, None]
    )
    return np.where(valid, ids, 0), valid


def exhaustive(model, prompt, stops, n_new, length_penalty):
    """Every answer there is, with its score, the best first."""
    found = []
    for n in range(1, n_new + 1):
        for answer in itertools.product(range(model.config.vocab_size), repeat=n):
            if not set(answer[:-1]) & set(stops) and (n == n_new or answer[-1] in stops):
                total = score(model, [*prompt, *answer]).log_probs[len(prompt) - 1 :].sum()
                found.append((total / n**length_penalty, answer))
    return sorted(found, reverse=True)


@settings(max_examples=draws(3, 6))
@given(seed=st.integers(0, 999), length_penalty=PENALTIES, n_stop=st.integers(0, 2))
def test_a_beam_wide_enough_finds_the_best_of_all_answers(seed, length_penalty, n_stop):
    stops = (2, 4)[:n_stop]
    model = with_stops(family.model(SMALL, seed=seed % 7), *stops)
    prompt = np.random.default_rng(seed).integers(0, 6, 3)
    expected = exhaustive(model, prompt, stops, 3, length_penalty)
    beams = beam_search(
        model,
        prompt[None],
        num_beams=250,
        num_return_sequences=5,
        max_new_tokens=3,
        length_penalty=length_penalty,
        early_stopping="never",
    )
    close(beams.scores[0], np.array([best for best, _ in expected[:5]]), times=100)
    for answer, (_, tokens) in zip(beams.sequences[0, :, 3:], expected, strict=False):
        assert answer.tolist() == [*tokens, *[0] * (3 - len(tokens))][: len(answer)]


@settings(max_examples=15)
@given(
    seed=st.integers(0, 999),
    num_beams=st.integers(1, 5),
    length_penalty=PENALTIES,
    early=st.sampled_from([True, False, "never"]),
)
def test_a_score_is_the_log_probability_over_the_length_to_the_penalty(
    seed, num_beams, length_penalty, early
):
    model = random_model(7, 9, 11, 13, 15)
    ids = family.ids_of(model.config, (1, 4), seed)
    beams = beam_search(
        model,
        ids,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        max_new_tokens=8,
        length_penalty=length_penalty,
        early_stopping=early,
    )
    for sequence, found in zip(beams.sequences[0], beams.scores[0], strict=True):
        ended = np.flatnonzero(np.isin(sequence[4:], (7, 9, 11, 13, 15)))
        n = ended[0] + 1 if len(ended) else 8
        assert found == pytest.approx(
            score(model, sequence[: 4 + n]).log_probs[3:].sum() / n**length_penalty, rel=1e-10
        )
        assert (sequence[4 + n :] == 0).all()
    assert (np.diff(beams.scores[0]) <= 0).all()
    assert len({tuple(row) for row in beams.sequences[0]}) == num_beams


@settings(max_examples=10)
@given(seed=st.integers(0, 999))
def test_one_beam_that_stops_early_is_greedy(seed):
    model = random_model(7, 9, 11)
    ids = family.ids_of(model.config, (1, 4), seed)
    beams = beam_search(model, ids, num_beams=1, max_new_tokens=10, early_stopping=True)
    greedy = model.generate(ids, max_new_tokens=10, do_sample=False)
    assert beams.sequences[0].tolist() == greedy.tolist()


@settings(max_examples=draws(4, 8))
@given(seed=st.integers(0, 999), early=st.sampled_from([True, False, "never"]), data=st.data())
def test_the_answers_of_a_prompt_do_not_depend_on_the_others_of_the_batch(seed, early, data):
    """Under a window and under longrope, whose rows change their frequencies one by one."""
    content = data.draw(
        st.sampled_from(
            [tiny.config_dict(), tiny.config_dict(sliding_window=4), family.longrope(8)]
        )
    )
    model = random_model(
        7, 9, 11, 13, content=content, penalty=data.draw(st.sampled_from([None, 1.5]))
    )
    ids, valid = padded_prompts(model, seed)
    options = {
        "num_beams": 3,
        "num_return_sequences": 2,
        "max_new_tokens": 8,
        "early_stopping": early,
    }
    together = beam_search(model, ids, valid, **options)
    for row in range(len(ids)):
        alone = beam_search(model, ids[row, valid[row]][None], **options)
        n_new = alone.sequences.shape[2] - valid[row].sum()
        assert (
            together.sequences[row, :, 5 : 5 + n_new].tolist()
            == alone.sequences[0, :, valid[row].sum() :].tolist()
        )
        close(together.scores[row], alone.scores[0], times=100)


def to_the_end(model, prompt, num_beams, n_new, length_penalty):
    """The best answers of a beam search that never stops before n_new tokens."""
    running, finished, stops = [(0.0, [])], [], set(model.generation_config.eos_token_id)
    for n in range(1, n_new + 1):
        following = [
            npllm.ops.log_softmax(model(np.array([prompt + answer]))[0, -1].astype(np.float64))
            for _, answer in running
        ]
        ranked = sorted(
            (
                (total + log_probs[token], [*answer, token])
                for (total, answer), log_probs in zip(running, following, strict=True)
                for token in range(len(log_probs))
            ),
            reverse=True,
        )
        finished += [
            (total / n**length_penalty, answer)
            for total, answer in ranked[:num_beams]
            if answer[-1] in stops or n == n_new
        ]
        running = [(total, answer) for total, answer in ranked if answer[-1] not in stops][
            :num_beams
        ]
    return sorted(finished, reverse=True)[:num_beams]


@settings(max_examples=draws(8, 20))
@given(
    seed=st.integers(0, 999),
    length_penalty=st.sampled_from([-2.0, -1.0, -0.3, 1.0, 3.0]),
    num_beams=st.integers(1, 3),
)
def test_never_stops_only_where_going_on_would_change_nothing(seed, length_penalty, num_beams):
    model, options = (
        random_model(*range(5, 61, 3)),
        {"max_new_tokens": 10, "length_penalty": length_penalty, "early_stopping": "never"},
    )
    ids, options = (
        family.ids_of(model.config, (2, 4), seed),
        options | {"num_beams": num_beams, "num_return_sequences": num_beams},
    )
    found = beam_search(model, ids, **options)
    for prompt, sequences, scores in zip(ids, found.sequences, found.scores, strict=True):
        expected = to_the_end(model, prompt.tolist(), num_beams, 10, length_penalty)
        close(scores, np.array([best for best, _ in expected]), times=100)
        for sequence, (_, answer) in zip(sequences[:, 4:].tolist(), expected, strict=True):
            assert sequence == [*answer, *[0] * (10 - len(answer))][: len(sequence)]


class Table(npllm.Model):
    """A model whose next token depends on the last one alone: {last: {next: probability}}."""

    def __init__(self, table, *stops):
        base = tiny.model(num_hidden_layers=1)
        super().__init__(base.config, base.params, generation_config=GenerationConfig(stops, 0))
        self.table = np.full((61, 1, 61), -50.0)
        for last, row in table.items():
            self.table[last, 0, 30:60] = math.log(
                max(1 - sum(row.values()), 1e-20) / 30
            )  # the rest, spread thin
            self.table[last, 0, list(row)] = np.log(list(row.values()))

    def last_logits(self, ids, valid, cache=None, *, n_keep=1):
        super().last_logits(ids, valid, cache, n_keep=n_keep)
        return self.table[ids[:, -n_keep:], 0]


@pytest.mark.parametrize(("early_stopping", "second"), [(True, [10, 2]), ("never", [10, 11, 2])])
def test_with_a_penalty_below_zero_the_next_token_is_the_best_chance(early_stopping, second):
    """After 10, 11 the sum is log 1/4, as after 2.  It can still end at once, and beat 10, 2; after
    50 tokens it could not.
    """
    model = Table({5: {10: 0.5, 2: 0.25}, 10: {11: 0.5, 2: 0.4}, 11: {2: 1.0}}, 2)
    beams = model.beam_search(
        np.array([[5]]),
        num_beams=2,
        num_return_sequences=2,
        max_new_tokens=50,
        length_penalty=-0.1,
        early_stopping=early_stopping,
    )
    assert beams.sequences[0, :, 1:].tolist() == [[2, 0, 0][: len(second)], second]
    assert beams.scores[0, 0] == pytest.approx(math.log(0.25))
    assert beams.scores[0, 1] == pytest.approx(
        math.log(0.25) * 3**0.1 if second[1] == 11 else math.log(0.2) * 2**0.1
    )


def test_the_penalty_favours_what_it_says_and_early_stopping_what_ends_first():
    model, ids = random_model(7, 9, 11, 13, 15, 17, 19), tiny.random_ids(8, 4)
    lengths = []
    for length_penalty in (-2.0, 0.0, 3.0):
        sequences = beam_search(
            model,
            ids,
            num_beams=4,
            max_new_tokens=12,
            length_penalty=length_penalty,
            early_stopping="never",
        ).sequences
        lengths.append((sequences[:, 0, 4:] != 0).sum())
    assert lengths[0] <= lengths[1] < lengths[2]
    scores = [
        beam_search(model, ids, num_beams=4, max_new_tokens=12, early_stopping=early).scores
        for early in (True, False, "never")
    ]
    assert (scores[0] <= scores[1] + 1e-12).all() and (scores[1] <= scores[2] + 1e-12).all()
    assert (scores[0] < scores[2]).any()


# ------------------------------------------------------------------------------------------------------- the order of the cache


@settings(max_examples=25)
@given(
    data=st.data(), n_batch=st.integers(1, 4), n_seq=st.integers(1, 20), n_more=st.integers(1, 12)
)
def test_a_cache_in_another_order_continues_as_the_rows_would(data, n_batch, n_seq, n_more):
    content = data.draw(
        st.sampled_from(
            [tiny.config_dict(), tiny.config_dict(sliding_window=5), family.longrope(8)]
        )
    )
    model = family.model(content)
    ids, valid = padded_prompts(model, n_seq, n_batch, n_seq)
    rows = data.draw(st.lists(st.integers(0, n_batch - 1), min_size=1, max_size=6))
    cache = model.new_cache(n_batch)
    model.model(ids, attention_mask=valid, cache=cache)
    positions, choice = cache.positions, cache.rope_variant
    cache.reorder(rows)
    assert (cache.n_batch, cache.n_ctx) == (len(rows), n_seq)
    for now, before in (
        (cache.ids, ids),
        (cache.valid, valid),
        (cache.positions, positions),
        (cache.rope_variant, choice),
    ):
        assert np.array_equal(now, before[rows])
    more = family.ids_of(model.config, (len(rows), n_more), 1)
    whole, mask = (
        np.concatenate([ids[rows], more], axis=1),
        np.concatenate([valid[rows], np.ones(more.shape, bool)], axis=1),
    )
    for start in range(0, n_more, 3):  # a few steps, so that rows grow apart and windows move on
        last = model(more[:, start : start + 3], cache=cache)
    n_last = last.shape[1]
    close(last, model(whole, attention_mask=mask)[:, -n_last:], times=100)


def test_rows_change_places_just_before_one_of_them_changes_its_frequencies():
    """One row has 9 tokens, and long factors; the other has 7, and gets them with its next two."""
    model = family.model(family.longrope(8))
    ids, valid = family.ids_of(model.config, (2, 9)), np.array([[1] * 9, [0] * 2 + [1] * 7], bool)
    cache, more = model.new_cache(2), np.array([[5, 6], [7, 8]])
    model.model(ids, attention_mask=valid, cache=cache)
    assert cache.rope_variant.tolist() == [1, 0]
    cache.reorder([1, 0])
    logits = model(more, cache=cache)[:, -1]
    close(logits[0], family.alone(model, [*ids[1, 2:], 5, 6]), times=10)
    close(logits[1], family.alone(model, [*ids[0], 7, 8]), times=10)


def test_rows_named_twice_do_not_share_memory():
    model = family.model(tiny.config_dict())
    cache, ids = model.new_cache(1), tiny.random_ids(1, 5)
    model.model(ids, cache=cache)
    cache.reorder([0, 0])
    model.model(np.array([[4], [9]]), cache=cache)
    logits = model(np.array([[8], [8]]), cache=cache)[:, -1]
    for row, token in enumerate((4, 9)):
        close(logits[row], family.alone(model, [*ids[0], token, 8]), times=10)


def test_an_empty_cache_can_be_put_in_order_too():
    cache = KVCache(2, 3, 10)
    cache.reorder([1, 0, 1])
    assert (cache.n_batch, cache.ids.shape, cache.n_bytes) == (3, (3, 0), 0)


@pytest.mark.parametrize("rows", [[], [2], [-1], [0.0], [[0]]])
def test_rows_that_do_not_exist_raise(rows):
    with pytest.raises(
        npllm.NpllmError,
        match=r"rows must be integers in 0 ... n_batch - 1 = 1, at least one, got \[",
    ):
        KVCache(2, 1, 10).reorder(rows)


# ------------------------------------------------------------------------------------------------------------ fronts and errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams must be an integer in 1 ... 65536, got 0"),
        ({"num_beams": True}, "got True"),
        ({"num_beams": 2.0}, "got 2.0"),
        (
            {"num_return_sequences": 5},
            r"num_return_sequences must be an integer in 1 ... 4 \(num_beams\), got 5",
        ),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer in 1"),
        ({"length_penalty": "long"}, "length_penalty must be a number .* got 'long'"),
        ({"length_penalty": math.nan}, "got nan"),
        ({"early_stopping": "soon"}, "early_stopping must be True, False or \"never\", got 'soon'"),
        ({"early_stopping": 1}, "got 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a number above 0"),
    ],
)
def test_options_out_of_range_raise_before_any_work(options, message):
    model = random_model(7)
    model.model = None
    with pytest.raises(npllm.NpllmError, match=message):
        model.beam_search(np.array([[5, 6]]), **options)


def test_the_end_of_the_context_ends_the_answers():
    model = random_model()
    with pytest.warns(UserWarning, match="room for 3 new tokens, not 9"):
        beams = beam_search(model, tiny.random_ids(1, 61), num_beams=2, max_new_tokens=9)
    assert beams.sequences.shape == (1, 1, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    stops = {"eos_token_id": [2, 70, 80, 90, 100, 110, 120, 130], "pad_token_id": 0}
    return tiny.write_text_folder(tmp_path_factory.mktemp("beam") / "tiny", generation=stops)


def test_text_in_text_out(folder):
    model, options = (
        npllm.load(folder),
        {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6},
    )
    prompts = ["hello", "hello world, and more"]
    answers = model.beam_search(prompts, **options)
    assert answers == beam_texts(model, prompts, **options)
    for prompt, rows in zip(prompts, answers, strict=True):
        assert [row["score"] for row in rows] == pytest.approx(
            [row["score"] for row in model.beam_search(prompt, **options)], rel=1e-4
        )
        ids = np.array([model.tokenizer.encode(prompt)])
        beams = model.beam_search(ids, **options)
        assert isinstance(beams, Beams)
        for row, sequence in zip(rows, beams.sequences[0], strict=True):
            new = list(
                itertools.takewhile(
                    lambda t: t not in model.generation_config.eos_token_id,
                    sequence[ids.shape[1] :].tolist(),
                )
            )
            new = new if len(new) < 6 else new[:6]
            assert row["text"] == model.tokenizer.decode([t for t in new if t != 0])
    assert len(model.beam_search([{"role": "user", "content": "hello"}], **options)) == 2


def test_the_command_prints_answers_the_best_first(folder):
    command = [
        "beam",
        "-m",
        str(folder),
        "hello",
        "--num-beams",
        "3",
        "--num-return-sequences",
        "2",
        "-n",
        "5",
        "--early-stopping",
        "never",
    ]
    answers = json.loads(invoke([*command, "--json"]).stdout)
    expected = npllm.load(folder).beam_search(
        "hello", num_beams=3, num_return_sequences=2, max_new_tokens=5, early_stopping="never"
    )
    assert [a["text"] for a in answers] == [a["text"] for a in expected]
    lines = invoke(command).stdout.splitlines()
    assert len(lines) == 2 and all(
        f"{a['score']:.4f}" in line and repr(a["text"]) in line
        for a, line in zip(answers, lines, strict=True)
    )
    result = invoke([*command, "--num-return-sequences", "4"])
    assert result.exit_code == 1 and "(num_beams), got 4" in result.stderr


# -------------------------------------------------------------------------------------------------------------- Transformers


def torch_and_transformers():
    if os.environ.get("NPLLM_REQUIRE_LIVE") != "1":
        pytest.importorskip(
            "torch", reason="compares with Transformers, and torch is not installed"
        )
        pytest.importorskip(
            "transformers", reason="compares with Transformers, which is not installed"
        )
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    return torch, transformers


def check_against(hf, model, ids, valid, stops, options, tolerance):
    """Compare all answers and scores; Transformers adds in float32, so the tolerance is relative
    where scores are large.
    """
    torch, _ = torch_and_transformers()
    n_return = options["num_return_sequences"]
    with torch.no_grad():
        theirs = hf.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(valid.astype(int)),
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            eos_token_id=list(stops) or None,
            **options,
        )
    ours = beam_search(model, ids, valid, **options)
    assert ours.sequences.reshape(len(ids) * n_return, -1).tolist() == theirs.sequences.tolist()
    expected = theirs.sequences_scores.double().numpy().reshape(-1, n_return)
    error = np.abs(ours.scores - expected) / np.maximum(1, np.abs(expected))
    assert error.max() < tolerance
    return error.max()


@pytest.mark.live
@pytest.mark.filterwarnings("ignore")
def test_tiny_models_give_transformers_answers_and_scores(tmp_path):
    torch, transformers = torch_and_transformers()
    folder = family.write(tmp_path / "tiny", tiny.config_dict(pad_token_id=1))
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    base, rng = npllm.load(folder, dtype="float64"), np.random.default_rng(0)
    for trial in range(75):
        stops = tuple(map(int, rng.choice(np.arange(3, 61), rng.integers(1, 50), replace=False)))
        num_beams = int(rng.integers(2, 6))
        options = {
            "num_beams": num_beams,
            "num_return_sequences": int(rng.integers(1, num_beams + 1)),
            "max_new_tokens": int(rng.integers(1, 12)),
            "length_penalty": float(rng.choice([-1.0, 0.0, 0.7, 1.0, 2.0])),
            "early_stopping": (True, False, "never")[trial % 3],
            "repetition_penalty": float(rng.choice([1.0, 1.3])),
        }
        model = with_stops(base, *stops, pad=1)
        ids = family.ids_of(model.config, (3, 5), trial)
        valid = np.arange(5)[None, :] >= rng.integers(0, 5, 3)[:, None]
        ids = np.where(valid, ids, 1)
        check_against(hf, model, ids, valid, stops, options, 3e-5)


@pytest.mark.live
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "num_beams", "stops"),
    [
        (False, 1.0, 4, (2,)),
        (True, 1.0, 3, (28, 30, 2, 198)),
        ("never", 2.0, 4, (28, 30, 2, 198)),
        (False, 0.0, 5, (28, 30, 2, 198)),
    ],
)
def test_the_default_checkpoint_gives_transformers_answers_and_scores(
    default_model, hf_default, early_stopping, length_penalty, num_beams, stops
):
    model = with_stops(default_model, *stops, pad=2)
    texts = [
        "The capital of France is",
        "Once upon a time, there was a",
        "Answer yes or no: is water wet?\nAnswer:",
    ]
    ids, valid = family.padded([model.tokenizer.encode(text) for text in texts], 2)
    options = {
        "num_beams": num_beams,
        "num_return_sequences": num_beams,
        "max_new_tokens": 12,
        "length_penalty": length_penalty,
        "early_stopping": early_stopping,
    }
    error = check_against(hf_default, model, ids, valid, stops, options, 1e-4)
    print(
        f"\nbeam search, {early_stopping} {length_penalty}: largest difference of scores {error:.2e}"
    )


@pytest.fixture(scope="module")
def hf_default(default_folder):
    torch, transformers = torch_and_transformers()
    return transformers.AutoModelForCausalLM.from_pretrained(
        default_folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
