"""npllm.decoding: which token comes next, when an answer ends, and what of it becomes text."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from close import close
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import (
    CHAT_TEMPLATE,
    CONFIG,
    SETTINGS,
    Counted,
    Scripted,
    byte_level,
    model,
    random_ids,
    sentencepiece,
    write_folder,
    write_json,
)

import npllm
from npllm import ops
from npllm.arguments import check_ids
from npllm.decoding import GenerationConfig, Sampling, choose, resolve_sampling, uniforms
from npllm.errors import NpllmError, NpllmTypeError, NpllmValueError
from npllm.text.stream import TextStream
from npllm.text.tokenizer import Tokenizer

N_VOCAB = CONFIG["vocab_size"]
SAMPLING = {"do_sample": True, "temperature": 1.5}
CHAT = [{"role": "user", "content": "hello"}]


def greedy_loop(m, ids, n_new, mask=None):
    """The definition: the most likely token after the whole text so far, again and again."""
    mask = np.ones(ids.shape, int) if mask is None else mask
    for _ in range(n_new):
        token = m(ids, attention_mask=mask)[:, -1].argmax(axis=-1)
        ids = np.concatenate([ids, token[:, None]], axis=1)
        mask = np.concatenate([mask, np.ones((len(ids), 1), int)], axis=1)
    return ids


def text_model(tmp_path, **changes):
    """A random model with the byte-level tokenizer, from a folder."""
    changes = {"vocab_size": 272, "max_position_embeddings": 200, "eos_token_id": None} | changes
    return npllm.load(write_folder(tmp_path, tokenizer=byte_level(), settings=SETTINGS, **changes))


def without_stop(**changes):
    m = model(**changes)
    m.generation_config = GenerationConfig()
    return m


# ---------------------------------------------------------------------------------------------------------------- which token next


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 4}], ids=["full", "window"])
def test_greedy_is_the_most_likely_token_again_and_again(use_cache, changes):
    m, ids = without_stop(**changes), random_ids(2, 5)
    close(m.generate(ids, max_new_tokens=20, use_cache=use_cache), greedy_loop(m, ids, 20))


def test_a_left_padded_batch_answers_each_row_as_if_alone():
    m, ids = without_stop(), random_ids(3, 7)
    mask = np.array([[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0] * 6 + [1]])
    got = m.generate(ids, attention_mask=mask, max_new_tokens=9)
    close(got, greedy_loop(m, ids, 9, mask))
    for row in range(3):
        close(
            got[row, 7:], m.generate(ids[row : row + 1, mask[row] == 1], max_new_tokens=9)[0, -9:]
        )


def test_what_stands_under_the_padding_does_not_matter():
    m, ids = without_stop(), random_ids(1, 7)
    mask = np.array([[0, 0, 0, 1, 1, 1, 1]])
    a, b = (
        m.generate(x, attention_mask=mask, max_new_tokens=9, repetition_penalty=2.0)[:, 7:]
        for x in (ids, ids * mask)
    )
    close(a, b)


@pytest.mark.parametrize(
    "options",
    [SAMPLING, {"top_k": 5}, {"top_p": 0.8, "temperature": 2.0}, {"min_p": 0.05}],
    ids=str,
)
def test_the_cache_changes_no_token(options):
    m, ids = without_stop(), random_ids(2, 5)
    close(
        *(
            m.generate(ids, max_new_tokens=20, seed=7, use_cache=use_cache, **options)
            for use_cache in (True, False)
        )
    )


def test_a_seed_replays_and_another_does_not():
    m, ids = without_stop(), random_ids(1, 5)
    first, again, other, fresh, fresher = (
        m.generate(ids, max_new_tokens=20, seed=seed, **SAMPLING) for seed in (3, 3, 4, None, None)
    )
    close(first, again)
    assert (first != other).any() and (fresh != fresher).any()


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1, np.int64(5)])
def test_any_seed_of_64_bits_will_do(seed):
    m, ids = without_stop(), random_ids(1, 3)
    answer = m.generate(ids, max_new_tokens=20, seed=seed, **SAMPLING)
    close(m.generate(ids, max_new_tokens=20, seed=int(seed), **SAMPLING), answer)
    assert (
        m.generate(ids, max_new_tokens=20, seed=int(seed) ^ 2**32, **SAMPLING) != answer
    ).any(), "every bit counts"


def test_row_0_of_a_batch_draws_what_it_draws_alone():
    m, ids = without_stop(), random_ids(3, 5)
    batch = m.generate(ids, max_new_tokens=12, seed=3, **SAMPLING)
    close(batch[:1], m.generate(ids[:1], max_new_tokens=12, seed=3, **SAMPLING))
    close(batch[:2], m.generate(ids[:2], max_new_tokens=12, seed=3, **SAMPLING))


def test_equal_rows_draw_different_answers():
    got = without_stop().generate(
        random_ids(1, 5).repeat(2, axis=0), max_new_tokens=12, seed=3, **SAMPLING
    )
    assert (got[0] != got[1]).any()


@given(st.integers(0, 2**64 - 1), st.integers(1, 4), st.integers(0, 1000))
@example(2**64 - 2, 1, 0)
@example(2**63, 1, 0)
def test_uniforms_are_a_function_of_seed_row_and_step(seed, n_batch, step):
    u = uniforms(seed, n_batch, step)
    assert ((u >= 0) & (u < 1)).all() and u.dtype == np.float64
    close(u, uniforms(seed, n_batch + 1, step)[:n_batch], times=0)
    every = [*u, *uniforms(seed, n_batch, step + 1), *uniforms((seed + 1) % 2**64, n_batch, step)]
    assert len(set(every)) == len(every)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = np.log(np.array([[0.5, 0.3, 0.2, 0.0]]) + 1e-30).repeat(4000, axis=0)
    tokens = choose(logits, Sampling(do_sample=True), u=uniforms(1, 4000, 0))
    assert np.abs(np.bincount(tokens, minlength=4) / 4000 - [0.5, 0.3, 0.2, 0]).max() < 0.03


# ------------------------------------------------------------------------------------------------------------- options of the choice


@given(
    st.integers(0, 10**6),
    st.sampled_from([0.3, 1, 2.5]),
    st.sampled_from([None, 0, 3]),
    st.sampled_from([None, 0.7, 1]),
    st.sampled_from([None, 0.2, 0]),
    st.sampled_from([None, 1, 1.7]),
)
def test_filters_act_in_the_order_penalty_temperature_top_k_top_p_min_p(
    seed, t, k, p, min_p, penalty
):
    rng = np.random.default_rng(seed)
    logits, seen, u = 3 * rng.standard_normal((5, 20)), rng.random((5, 20)) < 0.4, rng.random(5)
    want = logits if penalty is None else ops.repetition_penalty(logits, seen, penalty)
    want = ops.temperature(want, t)
    want = ops.top_k(want, k) if k else want
    want = ops.top_p(want, p) if p is not None else want
    want = ops.min_p(want, min_p) if min_p is not None else want
    sampling = Sampling(
        do_sample=True, temperature=t, top_k=k, top_p=p, min_p=min_p, repetition_penalty=penalty
    )
    close(choose(logits, sampling, seen, u), ops.sample(want, u))


def test_top_k_1_is_greedy():
    m, ids = without_stop(), random_ids(2, 5)
    close(
        m.generate(ids, max_new_tokens=12, top_k=1, temperature=3.0),
        m.generate(ids, max_new_tokens=12),
    )


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0.0, "do_sample": True},
        {"temperature": 0, "do_sample": False},
        {"temperature": 0, "top_p": 0.5},
        {"do_sample": False},
        {},
    ],
    ids=str,
)
def test_what_means_greedy(options):
    m, ids = without_stop(), random_ids(2, 5)
    close(m.generate(ids, max_new_tokens=9, seed=1, **options), greedy_loop(m, ids, 9))


@pytest.mark.parametrize(
    "name, value", [("temperature", 1.0), ("top_k", 5), ("top_p", 0.9), ("min_p", 0.1)]
)
def test_a_filter_that_is_given_asks_for_sampling(name, value):
    assert resolve_sampling(Sampling(), **{name: value}) == Sampling(
        do_sample=True, **{name: value}
    )


@pytest.mark.parametrize(
    "name, value", [("temperature", 0.7), ("top_k", 5), ("top_p", 0.9), ("min_p", 0.1)]
)
def test_do_sample_false_contradicts_a_filter(name, value):
    with pytest.raises(
        NpllmValueError, match=f"do_sample=False contradicts {name}={value}: greedy decoding"
    ):
        model().generate(random_ids(1, 3), do_sample=False, **{name: value})


def test_a_penalty_goes_with_greedy_too():
    m, ids = without_stop(), random_ids(1, 5)
    assert resolve_sampling(Sampling(), repetition_penalty=1.3) == Sampling(repetition_penalty=1.3)
    got = m.generate(ids, max_new_tokens=30, repetition_penalty=1e9)
    assert len(set(got[0])) == ids.shape[1] - (ids.shape[1] - len(set(ids[0]))) + 30, (
        "no token comes twice"
    )


def test_defaults_of_the_checkpoint_fill_in_what_is_not_said():
    defaults = Sampling(do_sample=True, temperature=0.6, top_p=0.95, repetition_penalty=1.1)
    assert resolve_sampling(defaults) == defaults
    assert resolve_sampling(defaults, temperature=0.3) == dataclasses.replace(
        defaults, temperature=0.3
    )
    assert resolve_sampling(defaults, do_sample=False) == Sampling(repetition_penalty=1.1)
    assert resolve_sampling(defaults, temperature=0) == Sampling(repetition_penalty=1.1)
    assert resolve_sampling(dataclasses.replace(defaults, do_sample=False)) == Sampling(
        repetition_penalty=1.1
    )


@pytest.mark.parametrize(
    "name, values",
    [
        ("temperature", [-0.1, float("nan"), float("inf"), "1", True]),
        ("top_k", [-1, 1.5, True, "5"]),
        ("top_p", [-0.1, 1.1, float("nan"), "x"]),
        ("min_p", [-0.1, 1.1, True]),
        ("repetition_penalty", [0, -1, 0.0, "x", float("nan")]),
    ],
)
def test_values_out_of_range_are_refused_before_any_work(name, values):
    counted = Counted()
    m = model(ops=counted.ops)
    for value in values:
        with pytest.raises(NpllmValueError, match=f"^{name} must be "):
            m.generate(random_ids(1, 3), **{name: value})
    assert not counted.calls


@pytest.mark.parametrize(
    "name, values",
    [("max_new_tokens", [-1, 1.5, "5", True]), ("seed", [-1, 2**64, 1.5, "x", True])],
)
def test_counts_out_of_range_are_refused(name, values):
    for value in values:
        with pytest.raises(NpllmValueError, match=f"{name} must be an integer in 0 "):
            model().generate(random_ids(1, 3), **{name: value})


def test_an_option_that_does_not_exist_is_refused():
    for call in (model().generate, Scripted("a").stream):
        with pytest.raises(TypeError, match="tempreature"):
            call("x", tempreature=0.5)


# -------------------------------------------------------------------------------------------------------------- ids in, ids out


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.int64])
def test_ids_in_give_int64_out_with_the_prompt(dtype):
    ids = random_ids(2, 5).astype(dtype)
    got = without_stop().generate(ids, max_new_tokens=4)
    assert got.dtype == np.int64 and got.shape == (2, 9)
    close(got[:, :5], ids.astype(np.int64))


def test_no_new_tokens_give_the_prompt():
    ids = random_ids(2, 5)
    close(model().generate(ids, max_new_tokens=0), ids)
    assert (
        Scripted("x").generate("abc", max_new_tokens=0) == ""
        and [*Scripted("x").stream("abc", max_new_tokens=0)] == []
    )


@pytest.mark.parametrize("pad, eos, fill", [(7, (5, 6), 7), (None, (5, 6), 5), (0, (5,), 0)])
def test_rows_that_have_ended_are_filled(pad, eos, fill):
    m = Scripted(
        [10, 5, 11, 11],
        [10, 10, 10, eos[-1], 11],
        [10] * 3 + [11, 12, eos[0]],
        pad_token_id=pad,
        eos_token_id=eos,
    )
    ids = random_ids(3, 2)
    got = m.generate(ids, max_new_tokens=50)[:, 2:].tolist()
    assert got == [
        [10, 5] + [fill] * 4,
        [10, 10, 10, eos[-1], fill, fill],
        [10] * 3 + [11, 12, eos[0]],
    ]


def test_no_step_is_taken_after_the_last_row_has_ended():
    m = Scripted([10, 5], [10, 10, 5], eos_token_id=(5,))
    m.generate(random_ids(2, 2), max_new_tokens=50)
    assert m.n_calls == 3


def test_the_stop_ids_are_those_of_generation_config(tmp_path):
    write_folder(tmp_path, eos_token_id=[3], generation={"eos_token_id": [5, 6], "pad_token_id": 7})
    assert npllm.load(tmp_path).generation_config == GenerationConfig((5, 6), 7)
    write_json(tmp_path / "generation_config.json", {})
    assert npllm.load(tmp_path).generation_config == GenerationConfig((3,), None)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": 9})
    assert npllm.load(tmp_path).generation_config.eos_token_id == (9,)


def test_a_stop_id_ends_the_answer_and_is_no_text():
    m = Scripted("hello", eos_token_id=(5,))
    m.script = [[*m.ids("hello"), 5, *m.ids("world")]]
    assert m.generate("x") == "hello" == "".join(m.stream("x"))


def test_special_tokens_are_no_text():
    m = Scripted([*byte_level().encode("he").ids, 3, *byte_level().encode("llo").ids])
    assert m.generate("x", max_new_tokens=4).startswith("hello")


def test_ids_work_without_a_tokenizer_and_text_says_why_not(tmp_path):
    m = npllm.load(write_folder(tmp_path / "bare"))
    assert m.generate(random_ids(1, 3), max_new_tokens=3).shape[1] >= 4
    for call in (
        lambda: m.generate("text"),
        lambda: m.generate(["a", "b"]),
        lambda: m.generate(CHAT),
        lambda: m.stream("text"),
        lambda: m.generate(random_ids(1, 3), stop="x"),
    ):
        with pytest.raises(
            NpllmValueError,
            match=r"bare: has no tokenizer\.json, so it takes token ids only, not text",
        ):
            call()


def test_the_prompt_is_not_written_to():
    ids = random_ids(2, 5)
    ids.flags.writeable = False
    close(without_stop().generate(ids, max_new_tokens=3)[:, :5], random_ids(2, 5))


# --------------------------------------------------------------------------------------------------------------------- stop strings


def test_the_answer_ends_before_a_stop_string():
    m = Scripted("one two three")
    assert m.generate("x", stop="two") == "one " and m.n_calls < 10


def test_a_stop_string_may_be_spread_over_tokens_and_cut_one():
    assert Scripted("hello wonder").generate("x", stop="o won") == "hell"
    assert Scripted("hello").generate("x", stop="ll") == "he"


def test_the_first_of_several_stop_strings_counts():
    assert Scripted("abcdef").generate("x", stop=["ef", "cd"]) == "ab"
    assert Scripted("aab!").generate("x", stop=["ab", "aab"]) == ""
    assert Scripted("abcabd").generate("x", stop=["abd"]) == "abc"
    assert Scripted("aaab").generate("x", stop=("aab",)) == "a"


def test_text_that_only_began_like_a_stop_string_is_text():
    assert Scripted("one tw").generate("x", stop="two", max_new_tokens=6) == "one tw"
    assert [*Scripted("one tw").stream("x", stop="two", max_new_tokens=6)] == [
        "o",
        "n",
        "e",
        " ",
        "tw",
    ]


def test_a_stop_string_may_stand_beside_a_stop_id():
    m = Scripted("x", eos_token_id=(5,))
    m.script = [[*m.ids("one tw"), 5]]
    assert m.generate("x", stop="two") == "one tw"


def test_no_part_of_a_stop_string_is_ever_streamed():
    assert [*Scripted("one two").stream("x", stop="two")] == ["o", "n", "e", " "]


def test_a_stop_string_may_hold_many_bytes():
    assert Scripted("a🙂b🙃c").generate("x", stop="🙃") == "a🙂b"
    assert Scripted("aé").generate("x", stop="é") == "a"


def test_a_stop_string_in_the_prompt_does_not_count():
    assert Scripted("answer").generate("stop", stop="stop", max_new_tokens=6) == "answer"


def test_stop_strings_end_rows_of_ids_as_well():
    m = Scripted("abc", "xyz", pad_token_id=0)
    got = m.generate(np.array([[70], [71]]), stop="b", max_new_tokens=3)[:, 1:]
    assert got.tolist() == [[*m.ids("ab"), 0], m.ids("xyz")]


def test_each_row_of_a_batch_ends_by_itself():
    assert Scripted("ab|c", "abcd|e").generate(["x", "yy"], stop="|") == ["ab", "abcd"]


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], 5, [5], [None], b"a", {"a": 1}])
def test_stop_strings_that_make_no_sense_are_refused(stop):
    if stop == "":
        stop = ("",)
    with pytest.raises(NpllmTypeError, match="stop must be strings, none of them empty"):
        Scripted("x").generate("x", stop=stop)


@given(
    st.text("ab", max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.integers(1, 3),
)
@settings(max_examples=200)
def test_any_stream_is_cut_before_the_earliest_stop_string(text, stop, n):
    stream, tokenizer, said = TextStream(Tokenizer(byte_level()), (), tuple(stop)), byte_level(), ""
    wanted, ended = text, False
    for end in range(len(text) + 1):  # the answer ends as soon as a stop string is complete
        starts = [text[:end].find(s) for s in stop if s in text[:end]]
        if starts:
            wanted, ended = text[: min(starts)], True
            break
    for token in tokenizer.encode(text).ids:
        if stream.ended:
            break
        said += stream.push(token)
        assert wanted.startswith(said)
    assert stream.ended == ended
    assert said + stream.close() == wanted and n
    assert stream.close() == ""


# ------------------------------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"seed": 5, "temperature": 3.0},
        {"stop": "e"},
        {"seed": 2, "top_p": 0.9, "stop": ["a", "\ufffd"]},
    ],
    ids=str,
)
def test_a_stream_joined_is_what_generate_returns(tmp_path, options):
    m = text_model(tmp_path)
    assert "".join(m.stream("hello", max_new_tokens=40, **options)) == m.generate(
        "hello", max_new_tokens=40, **options
    )


@pytest.mark.parametrize("tokenizer", [byte_level, sentencepiece])
def test_a_stream_never_gives_half_a_character(tokenizer):
    text = "日本 🙂🙃 é hello"
    got = [
        *Scripted(text, tokenizer=tokenizer()).stream(
            "x", max_new_tokens=len(tokenizer().encode(text).ids)
        )
    ]
    assert (
        "".join(got).strip() == text
        and not any("\ufffd" in piece for piece in got)
        and "" not in got
    )


def test_half_a_character_at_the_very_end_is_not_lost():
    m = Scripted("a🙂")
    assert [*m.stream("x", max_new_tokens=3)] == ["a", "\ufffd"]


def test_a_stream_yields_as_it_goes():
    m = Scripted("abc")
    stream = m.stream("x")
    assert (
        m.n_calls == 0
        and next(stream) == "a"
        and m.n_calls == 1
        and next(stream) == "b"
        and m.n_calls == 2
    )


def test_a_stream_refuses_at_once_and_not_at_the_first_piece():
    m = Scripted("abc")
    with pytest.raises(NpllmValueError, match="temperature"):
        m.stream("x", temperature=-1)
    for prompt in (["a", "b"], random_ids(1, 3), 5):
        with pytest.raises(NpllmTypeError, match="stream takes one text or one list of messages"):
            m.stream(prompt)


# ------------------------------------------------------------------------------------------------------------------ kinds of prompts


def test_a_text_gives_a_text_and_a_list_gives_a_list(tmp_path):
    m = text_model(tmp_path)
    texts = ["hello", "hello world, hello", "é"]
    got = m.generate(texts, max_new_tokens=12)
    assert got == [m.generate(text, max_new_tokens=12) for text in texts]
    assert m.generate(texts[:1], max_new_tokens=12) == got[:1] and isinstance(got[0], str)
    assert m.generate(tuple(texts), max_new_tokens=12) == got


def test_a_text_is_its_ids(tmp_path):
    m = text_model(tmp_path)
    ids = np.array([m.tokenizer.encode("hello w")])
    assert m.generate("hello w", max_new_tokens=12) == m.tokenizer.decode(
        m.generate(ids, max_new_tokens=12)[0, ids.shape[1] :]
    )


def test_messages_go_through_the_chat_template(tmp_path):
    m = text_model(tmp_path)
    ids = np.array([[3, *m.tokenizer.encode("hello"), 5, 4]])
    want = m.tokenizer.decode(m.generate(ids, max_new_tokens=12)[0, ids.shape[1] :])
    assert m.generate(CHAT, max_new_tokens=12) == "".join(m.stream(CHAT, max_new_tokens=12)) == want


def test_tools_reach_the_chat_template(tmp_path):
    tools = [{"type": "function", "function": {"name": "hello", "parameters": {}}}]
    template = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + CHAT_TEMPLATE
    settings = SETTINGS | {"chat_template": template}
    changes = {"vocab_size": 272, "max_position_embeddings": 200, "eos_token_id": None}
    m = npllm.load(write_folder(tmp_path, tokenizer=byte_level(), settings=settings, **changes))
    ids = np.array([m.tokenizer.encode_chat(CHAT, tools=tools)])
    assert ids.shape[1] == 1 + len(m.tokenizer.encode_chat(CHAT)), "one token more: the name"
    want = m.tokenizer.decode(m.generate(ids, max_new_tokens=5)[0, ids.shape[1] :])
    assert m.generate(CHAT, tools=tools, max_new_tokens=5) == want
    assert "".join(m.stream(CHAT, tools=tools, max_new_tokens=5)) == want
    assert m.beam_search(CHAT, tools=tools, num_beams=1, max_new_tokens=5)[0]["text"] == want
    for prompt in ("hello", ids):
        with pytest.raises(NpllmTypeError, match="tools go with a list of messages"):
            m.generate(prompt, tools=tools)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}], ids=str)
def test_ids_are_checked_once_at_the_door(monkeypatch, options):
    calls = []

    def counted(*args):
        calls.append(args[0])
        return check_ids(*args)

    for module in (npllm.decoding.prompt, npllm.forward_pass):
        monkeypatch.setattr(module, "check_ids", counted)
    without_stop().generate(random_ids(2, 5), max_new_tokens=6, **options)
    assert calls == ["input_ids"]


def test_nothing_below_the_front_calls_it():
    """A token's way goes down: decoding and the forward pass know no Model, only what they need."""
    folder = Path(npllm.__file__).parent
    below = [folder / "forward_pass.py", *(folder / "decoding").glob("*.py")]
    for file in below:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"npllm\.(model|loading|pipelines)\b", text), file
        assert not re.search(r"model\.(generate|stream|beam_search|embed)\(", text), file


@pytest.mark.parametrize("prompt", ["", [""], ["a", ""]])
def test_an_empty_prompt_is_refused(prompt):
    with pytest.raises(NpllmValueError, match="the prompt is empty"):
        Scripted("x").generate(prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        5,
        None,
        [],
        (),
        {"role": "user", "content": "x"},
        b"bytes",
        [5],
        [["a"]],
        ["a", CHAT[0]],
        [CHAT],
    ],
)
def test_what_is_no_prompt_is_refused(prompt):
    with pytest.raises(NpllmError):
        Scripted("x").generate(prompt)


@pytest.mark.parametrize(
    "ids",
    [random_ids(1, 3) * 1.0, random_ids(1, 3)[0], np.zeros((1, 0), int), np.zeros((0, 1), int)],
)
def test_ids_that_are_no_table_of_integers_are_refused(ids):
    with pytest.raises(NpllmTypeError, match=r"input_ids must be integers \[n_batch, n_"):
        model().generate(ids)


@pytest.mark.parametrize("bad", [-1, N_VOCAB, 10**6])
def test_ids_outside_the_vocabulary_are_refused_before_any_work(bad):
    counted = Counted()
    with pytest.raises(NpllmValueError, match="input_ids must lie in 0 "):
        model(ops=counted.ops).generate(np.array([[3, bad]]), repetition_penalty=1.2)
    assert not counted.calls


@pytest.mark.parametrize("mask", [[[1, 1]], [[1, 1, 1, 1]], [[1, 2, 1]], [1, 1, 1]])
def test_a_mask_that_does_not_fit_is_refused(mask):
    with pytest.raises(NpllmValueError, match="attention_mask must"):
        model().generate(random_ids(1, 3), attention_mask=np.array(mask))


@pytest.mark.parametrize("mask", [[[1, 1, 0]], [[0, 0, 0]]])
def test_padding_on_the_right_is_refused(mask):
    with pytest.raises(NpllmValueError, match="padded on the left"):
        model().generate(random_ids(1, 3), attention_mask=np.array(mask))


def test_a_mask_does_not_go_with_texts():
    with pytest.raises(NpllmTypeError, match="attention_mask goes with an array of token ids"):
        Scripted("x").generate("x", attention_mask=np.ones((1, 1)))


# -------------------------------------------------------------------------------------------------------------------- the context


@pytest.mark.parametrize("n_prompt", [64, 65, 100])
def test_a_prompt_beyond_the_context_is_refused_before_any_op_runs(n_prompt):
    counted = Counted()
    m = model(ops=counted.ops)
    with pytest.raises(
        NpllmValueError,
        match=rf"the prompt has {n_prompt} tokens, but the context length \(max_position_embeddings\) is 64",
    ):
        m.generate(random_ids(1, n_prompt))
    assert not counted.calls


def test_an_answer_ends_with_the_context_and_warns_of_it():
    m = without_stop()
    with pytest.warns(
        UserWarning,
        match=r"is 64: after 60 tokens of prompt there is room for 4 new tokens, not 50",
    ):
        got = m.generate(random_ids(1, 60))
    assert got.shape == (1, 64)


def test_what_just_fits_does_not_warn():
    assert without_stop().generate(random_ids(1, 60), max_new_tokens=4).shape == (1, 64)
    assert without_stop().generate(random_ids(1, 63), max_new_tokens=1, use_cache=False).shape == (
        1,
        64,
    )


# ----------------------------------------------------------------------------------------------------------- generation_config.json


@pytest.mark.parametrize(
    "name, value",
    [
        ("forced_bos_token_id", 3),
        ("guidance_scale", 1.5),
        ("sequence_bias", [[[3], 1.0]]),
        ("penalty_alpha", 0.6),
        ("min_length", 9),
    ],
)
def test_an_entry_that_would_change_the_text_is_refused_when_text_is_asked_for(
    tmp_path, name, value
):
    m = npllm.load(write_folder(tmp_path, generation={name: value}))
    m(random_ids(1, 3))
    m.next_token_distribution(random_ids(1, 3))
    text = rf"generation_config\.json asks for what is not implemented: {name}="
    for call in (m.generate, m.beam_search):
        with pytest.raises(NpllmValueError, match=text):
            call(random_ids(1, 3))


@pytest.mark.parametrize("name", ["typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"])
def test_a_filter_that_is_not_implemented_is_refused_when_tokens_are_drawn(tmp_path, name):
    m = npllm.load(write_folder(tmp_path, generation={name: 0.5}))
    greedy_and_beams(m)
    with pytest.raises(NpllmValueError, match=rf"not implemented: {name}=0\.5"):
        m.generate(random_ids(1, 3), do_sample=True)


def greedy_and_beams(m):
    """Everything that draws no token: none of it is hindered."""
    ids = random_ids(1, 3)
    m.generate(ids, max_new_tokens=2, do_sample=False, num_beams=1, stop=())
    m.beam_search(ids, max_new_tokens=2, num_beams=2, stop=())
    assert m.next_token_distribution(ids).shape == (1, N_VOCAB)


@pytest.mark.parametrize(
    "generation",
    [
        {"temperature": -1},
        {"temperature": "hot"},
        {"top_k": "many"},
        {"top_k": -1},
        {"top_k": 50.0},
        {"top_p": 2},
        {"min_p": [0.5]},
    ],
    ids=str,
)
def test_a_filter_out_of_range_is_refused_with_the_path_when_tokens_are_drawn(tmp_path, generation):
    ((name, _),) = generation.items()
    m = npllm.load(write_folder(tmp_path, generation={"do_sample": True} | generation))
    greedy_and_beams(m)
    with pytest.raises(NpllmValueError, match=rf"generation_config\.json: {name} must be "):
        m.generate(random_ids(1, 3))
    good = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1}[name]
    m.generate(random_ids(1, 3), max_new_tokens=2, **{name: good})  # the caller's value is used


@pytest.mark.parametrize(
    "generation, error",
    [
        ({"num_beams": 0}, NpllmValueError),
        ({"num_beams": 2.5}, NpllmValueError),
        ({"no_repeat_ngram_size": -1}, NpllmValueError),
        ({"min_new_tokens": "few"}, NpllmValueError),
        ({"bad_words_ids": [3]}, NpllmValueError),
        ({"bad_words_ids": [[]]}, NpllmValueError),
        ({"suppress_tokens": [-1.5]}, NpllmValueError),
        ({"begin_suppress_tokens": "x"}, NpllmValueError),
        ({"forced_eos_token_id": True}, NpllmValueError),
        ({"stop_strings": [""]}, NpllmTypeError),
        ({"do_sample": "yes"}, NpllmValueError),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused_with_the_path_when_it_is_used(tmp_path, generation, error):
    ((name, _),) = generation.items()
    m = npllm.load(write_folder(tmp_path, generation=generation))
    assert m(random_ids(1, 3)).shape == (1, 3, N_VOCAB)
    m.next_token_distribution(random_ids(1, 3))
    with pytest.raises(error, match=rf"generation_config\.json: {name} must be "):
        m.generate(random_ids(1, 3))


@pytest.mark.parametrize(
    "generation", [{"suppress_tokens": []}, {"bad_words_ids": []}, {"stop_strings": []}]
)
def test_an_empty_list_is_none(tmp_path, generation):
    m = npllm.load(write_folder(tmp_path, generation=generation, eos_token_id=None))
    ids = random_ids(1, 3)
    close(m.generate(ids, max_new_tokens=9), greedy_loop(m, ids, 9))


def test_temperature_0_in_the_file_is_greedy(tmp_path):
    generation = {"do_sample": True, "temperature": 0, "top_p": 0.9}
    m = npllm.load(write_folder(tmp_path, generation=generation, eos_token_id=None))
    ids = random_ids(2, 5)
    close(m.generate(ids, max_new_tokens=9), greedy_loop(m, ids, 9))
    drawn = {m.generate(ids, max_new_tokens=9, temperature=3.0, seed=n).tobytes() for n in range(3)}
    assert len(drawn) == 3, "the caller's temperature is used"


def test_pad_token_id_minus_1_is_none(tmp_path):
    m = npllm.load(write_folder(tmp_path, generation={"pad_token_id": -1, "eos_token_id": 7}))
    assert m.generation_config.pad_token_id is None and m.generation_config.fill_id == 7


def test_entries_that_change_nothing_are_accepted(tmp_path):
    generation = {
        "num_beams": 1,
        "typical_p": 1.0,
        "guidance_scale": None,
        "max_length": 20,
        "transformers_version": "5",
        "num_beam_groups": None,
    }
    with_entries, without = (
        npllm.load(write_folder(tmp_path / name, generation=entries))
        for name, entries in (("with", generation), ("without", {}))
    )
    close(
        with_entries.generate(random_ids(1, 3), max_new_tokens=9),
        without.generate(random_ids(1, 3), max_new_tokens=9),
    )


def test_sampling_options_of_the_checkpoint_are_used(tmp_path):
    generation = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
    }
    m = npllm.load(write_folder(tmp_path, generation=generation))
    assert m.generation_config.sampling == Sampling(**generation)
    ids = random_ids(1, 5)
    close(
        m.generate(ids, seed=1, max_new_tokens=9),
        m.generate(ids, seed=1, max_new_tokens=9, **generation),
    )


@pytest.mark.parametrize(
    "generation",
    [
        {"eos_token_id": "x"},
        {"eos_token_id": [1, None]},
        {"eos_token_id": True},
        {"pad_token_id": -2},
        {"pad_token_id": [1]},
        {"pad_token_id": N_VOCAB},
    ],
    ids=str,
)
def test_stop_and_pad_ids_of_the_wrong_kind_are_refused_with_the_path(tmp_path, generation):
    ((name, _),) = generation.items()
    with pytest.raises(NpllmValueError, match=rf"generation_config\.json: {name} must be"):
        npllm.load(write_folder(tmp_path, generation=generation))


def test_null_means_absent(tmp_path):
    m = npllm.load(
        write_folder(
            tmp_path,
            generation=dict.fromkeys(
                ["temperature", "top_k", "eos_token_id", "pad_token_id", "do_sample"]
            ),
        )
    )
    assert m.generation_config.sampling == Sampling() and m.generation_config.eos_token_id == ()


# ------------------------------------------------------------------------------------------------------------------------ pipelines


def test_a_pipeline_returns_dicts_like_transformers():
    pipe = npllm.pipeline("text-generation", model=Scripted("hello"))
    assert pipe("say ", max_new_tokens=1) == [{"generated_text": "say hello"}]
    pipe = npllm.pipeline("text-generation", model=Scripted("hello"))
    assert pipe("say ", max_new_tokens=1, return_full_text=False, do_sample=False) == [
        {"generated_text": "hello"}
    ]


def test_a_pipeline_takes_lists():
    answers = [[{"generated_text": "a: hello"}], [{"generated_text": "b: he"}]]
    pipe = npllm.pipeline("text-generation", model=Scripted("hello", "he"))
    assert pipe(["a: ", "b: "], max_new_tokens=1) == answers
    pipe = npllm.pipeline("text-generation", model=Scripted("hello", "he"))
    assert pipe(["a: ", "b: "], max_new_tokens=1, return_full_text=False) == [
        [{"generated_text": "hello"}],
        [{"generated_text": "he"}],
    ]


def test_a_pipeline_appends_to_a_conversation_and_leaves_the_given_one():
    chat, answer = [dict(CHAT[0])], {"role": "assistant", "content": "hello"}
    pipe = npllm.pipeline("text-generation", model=Scripted("hello"))
    assert pipe(chat, max_new_tokens=1) == [{"generated_text": [*CHAT, answer]}] and chat == CHAT
    pipe = npllm.pipeline("text-generation", model=Scripted("hello"))
    assert pipe(chat, max_new_tokens=1, return_full_text=False) == [{"generated_text": "hello"}]


def test_a_pipeline_loads_a_folder(tmp_path):
    m = text_model(tmp_path)
    pipe = npllm.pipeline("text-generation", model=tmp_path)
    assert pipe("hello", max_new_tokens=5, return_full_text=False) == [
        {"generated_text": m.generate("hello", max_new_tokens=5)}
    ]


def test_another_task_is_refused():
    with pytest.raises(
        NpllmValueError, match="task must be \"text-generation\", got 'summarization'"
    ):
        npllm.pipeline("summarization", model=Scripted("x"))


def test_a_classifier_does_not_generate(tmp_path):
    m = npllm.load(write_folder(tmp_path, architectures=["Phi3ForSequenceClassification"]))
    with pytest.raises(
        NpllmValueError, match="Phi3ForSequenceClassification scores classes and cannot generate"
    ):
        m.generate(random_ids(1, 3))


# -------------------------------------------------------------------------------------------------------------- the default checkpoint


def test_the_default_checkpoint_knows_the_capital_of_france(default_model):
    assert (
        default_model.generate("The capital of France is", max_new_tokens=8)
        == " Paris.\n\nThe answer is:"
    )


def test_the_default_checkpoint_chats_and_stops(default_model):
    answer = default_model.generate(
        [{"role": "user", "content": "What is 2 + 2? Answer with one number."}], max_new_tokens=60
    )
    assert "4" in answer and "<|im_end|>" not in answer
