"""Generation that programs can use: ids, log-probabilities, finish reasons, the seed; one list of
keyword arguments.
"""

import inspect
import json

import numpy as np
import pytest
import tiny
from close import close

import npllm
from npllm.decoding.details import Recorder
from npllm.errors import NpllmTypeError, NpllmValueError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return npllm.load(
        tiny.write_folder(
            tmp_path_factory.mktemp("details"),
            tokenizer=tiny.byte_level(),
            settings=tiny.SETTINGS,
            vocab_size=272,
            generation={"eos_token_id": [], "pad_token_id": 0},
        )
    )


def log_softmax(logits):
    """By its definition, in float64."""
    wide = logits.astype(np.float64)
    e = np.exp(wide - wide.max(-1, keepdims=True))
    return np.log(e / e.sum(-1, keepdims=True))


def expected(model, ids, n_prompt):
    """Log-probabilities of every token after the prompt, in one pass over the whole."""
    scores = log_softmax(np.asarray(model(ids[None])))[0]
    return scores[n_prompt - 1 : -1]


def test_log_probabilities_are_those_of_one_pass_over_the_whole(model):
    """Of the model's own logits: constraints and filters do not change them."""
    model = npllm.load(model.folder, dtype="float64")
    out = model.generate(
        "hello",
        max_new_tokens=6,
        temperature=2.0,
        top_k=20,
        seed=3,
        repetition_penalty=1.5,
        return_dict_in_generate=True,
        top_logprobs=4,
    )
    (answer,) = out.answers
    n_prompt = out.sequences.shape[1] - 6
    scores = expected(model, out.sequences[0], n_prompt)
    close(answer.logprobs, scores[np.arange(6), answer.ids])
    assert np.array_equal(answer.ids, out.sequences[0, n_prompt:])
    for token, row in zip(answer.tokens, scores, strict=True):
        assert [i for i, _ in token.top_logprobs] == np.argsort(-row)[:4].tolist()
        close(np.array([p for _, p in token.top_logprobs]), np.sort(row)[::-1][:4])


def test_the_output_holds_what_generate_returns_without_it(model):
    options = {"max_new_tokens": 5, "temperature": 0.8, "seed": 7}
    ids = np.array([[5, 6, 7], [8, 9, 10]])
    for prompt in ("hello", ["hello", "hello w"], ids):
        plain = model.generate(prompt, **options)
        out = model.generate(prompt, **options, return_dict_in_generate=True)
        if prompt is ids:
            assert np.array_equal(out.sequences, plain)
            assert [answer.text for answer in out.answers] == [None, None]
        else:
            assert out.text == plain
        assert out.seed == 7


def test_a_seed_that_was_drawn_replays_the_answer(model):
    first = model.generate("hello", max_new_tokens=8, temperature=1.5, return_dict_in_generate=True)
    again = model.generate("hello", max_new_tokens=8, temperature=1.5, seed=first.seed)
    assert first.text == again and 0 <= first.seed < 2**32
    greedy = model.generate("hello", max_new_tokens=2, seed=5, return_dict_in_generate=True)
    assert greedy.seed is None


def test_a_finish_reason_says_what_ended_each_answer(model):
    texts = ["hello", "hello w"]
    whole = model.generate(texts, max_new_tokens=9, return_dict_in_generate=True)
    assert {answer.finish_reason for answer in whole.answers} == {"length"}
    stop = whole.answers[0].text[3:5]
    out = model.generate(texts, max_new_tokens=9, stop=[stop], return_dict_in_generate=True)
    for answer, full in zip(out.answers, whole.answers, strict=True):
        assert (answer.finish_reason == "stop") == (stop in full.text)
        assert full.text.startswith(answer.text)
        n = len(answer.tokens)
        assert n <= 9 and answer.tokens == full.tokens[:n], "nothing of what follows the stop"
    last = int(whole.answers[0].ids[2])
    eos = npllm.Model(
        model.config,
        model.params,
        generation_config=npllm.decoding.GenerationConfig((last,), 0),
        tokenizer=model.tokenizer,
    )
    (answer,) = eos.generate("hello", max_new_tokens=9, return_dict_in_generate=True).answers
    assert answer.finish_reason == "stop" and answer.ids[-1] == last


def test_steps_of_a_stream_are_the_tokens_of_the_answer(model):
    options = {"max_new_tokens": 7, "temperature": 1.1, "seed": 11, "top_logprobs": 2}
    steps = list(model.stream("hello", details=True, **options))
    (answer,) = model.generate("hello", return_dict_in_generate=True, **options).answers
    assert tuple(step.token for step in steps) == answer.tokens
    assert "".join(step.text for step in steps) == answer.text
    assert [step.finish_reason for step in steps] == [None] * 6 + ["length"]
    assert {step.seed for step in steps} == {11}
    assert list(model.stream("hello", details=True, max_new_tokens=0)) == []


def test_prompt_lookup_notes_the_same_tokens(model):
    options = {"max_new_tokens": 12, "return_dict_in_generate": True}
    plain = model.generate("hello hello hello", **options).answers[0]
    found = model.generate("hello hello hello", prompt_lookup_num_tokens=4, **options).answers[0]
    assert np.array_equal(plain.ids, found.ids)
    close(found.logprobs, plain.logprobs, times=1000)


def test_details_that_cannot_be_given_are_refused(model):
    with pytest.raises(NpllmValueError, match="top_logprobs = 3 goes with return_dict_in_generate"):
        model.generate("hello", top_logprobs=3)
    with pytest.raises(NpllmValueError, match="top_logprobs = 3 goes with details=True"):
        model.stream("hello", top_logprobs=3)
    with pytest.raises(NpllmValueError, match="takes one beam, got num_beams = 2"):
        model.generate("hello", num_beams=2, return_dict_in_generate=True)
    with pytest.raises(NpllmValueError, match="num_beams = 2 always uses the cache"):
        model.generate("hello", num_beams=2, use_cache=False)
    with pytest.raises(NpllmTypeError, match="tools go with a list of messages"):
        model.beam_search(np.array([[5, 6]]), tools=[{}])


def test_a_misspelt_argument_is_named(model):
    for call in (model.generate, model.stream, model.beam_search):
        with pytest.raises(NpllmTypeError, match=r"has no argument 'max_new_token'; did you mean"):
            call("hello", max_new_token=3)
    with pytest.raises(NpllmTypeError, match="did you mean top_k"):
        model.generate("hello", topk=3)
    with pytest.raises(NpllmTypeError, match=r"beam_search has no argument 'seed'$"):
        model.beam_search("hello", seed=3)


def test_the_signatures_have_the_defaults_that_apply(model):
    """What `inspect` shows, given explicitly, changes nothing."""
    for call in (model.generate, model.stream, model.beam_search):
        parameters = inspect.signature(call).parameters
        shown = {
            name: p.default for name, p in parameters.items() if name not in ("prompt", "self")
        }
        shown["max_new_tokens"] = 3
        plain, explicit = call("hello", max_new_tokens=3), call("hello", **shown)
        if call == model.stream:
            plain, explicit = "".join(plain), "".join(explicit)
        assert plain == explicit
        assert parameters["max_new_tokens"].default == 50


def test_the_recorder_holds_no_more_tokens_than_the_vocabulary_has():
    recorder = Recorder(1, 10)
    recorder.note(np.zeros((1, 3), np.float32), np.array([1]))
    ((token,),) = recorder.tokens
    assert len(token.top_logprobs) == 3 and token.logprob == pytest.approx(-np.log(3))


def test_generate_json_carries_all_of_it(model):
    testing = pytest.importorskip("click.testing")
    commands = pytest.importorskip("npllm.cli.commands")
    words = ["generate", "hello", "-n", "4", "--temp", "0.9", "--json", "-m", str(model.folder)]
    result = testing.CliRunner().invoke(commands.main, [*words, "--top-logprobs", "2"])
    facts = json.loads(result.stdout)
    (answer,) = model.generate(
        "hello",
        max_new_tokens=4,
        temperature=0.9,
        seed=facts["seed"],
        top_logprobs=2,
        return_dict_in_generate=True,
    ).answers
    assert (facts["text"], facts["finish_reason"]) == (answer.text, "length")
    assert [token["id"] for token in facts["tokens"]] == answer.ids.tolist()
    assert [token["logprob"] for token in facts["tokens"]] == answer.logprobs.tolist()
    assert [len(token["top_logprobs"]) for token in facts["tokens"]] == [2] * 4
    assert {"id", "text", "logprob"} == set(facts["tokens"][0]["top_logprobs"][0])
    plain = testing.CliRunner().invoke(commands.main, ["generate", "hello", "--top-logprobs", "2"])
    assert plain.exit_code == 2 and "--top-logprobs would be ignored" in plain.stderr
