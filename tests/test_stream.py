"""npllm.text.stream: stop strings that are, begin with, end with or hold special tokens.

Streams of plain text are in test_tokenizer.py and test_generate.py.
"""

import re

import numpy as np
import pytest
import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import byte_level, sentencepiece

import npllm
from npllm import Tokenizer
from npllm.text.stream import TextStream

SPECIAL = ["<|end|>", "<|user|>"]
FORMS = {"byte level": Tokenizer(byte_level()), "byte tokens": Tokenizer(sentencepiece())}
for form in FORMS.values():
    form.backend.add_special_tokens(SPECIAL)
forms = pytest.mark.parametrize("tokenizer", FORMS.values(), ids=list(FORMS))


def ids_of(tokenizer, text):
    """Ids of a text; SentencePiece writes it in byte tokens, which gives no space in front."""
    ids = []
    for piece in re.split(r"(<\|\w+\|>)", text):
        if piece in SPECIAL:
            ids.append(tokenizer.backend.token_to_id(piece))
        elif tokenizer is FORMS["byte tokens"]:
            ids += [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in piece.encode()]
        else:
            ids += tokenizer.encode(piece)
    return ids


def answer(tokenizer, ids, stop, stop_ids=()):
    """The text of an answer, and whether a stop string or id has ended it."""
    stream, said = TextStream(tokenizer, stop_ids, stop), ""
    for i in ids:
        said += stream.push(i)
        if stream.ended:
            return said + stream.close(), True
    return said + stream.close(), False


@forms
@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("hello<|end|> w", ["<|end|>"], "hello"),
        ("hello<|end|> w", ["x", "<|end|>"], "hello"),
        ("hello 🙂<|end|>", ["<|end|>"], "hello 🙂"),  # its bytes are still held back
        ("hello<|end|><|user|> w", ["<|end|><|user|>"], "hello"),
        ("hello<|end|><|end|><|user|> w", ["<|end|><|user|>"], "hello"),
        ("hello<|end|>\n<|user|> w", ["<|end|>\n<|user|>"], "hello"),
        ("hello 🙂<|end|>\n w", ["<|end|>\n"], "hello 🙂"),
        ("hello w<|end|> w", ["w<|end|>"], "hello "),
        ("hello 🙂<|end|> w", ["🙂<|end|>"], "hello "),
        ("hello w<|end|>", ["<|"], "hello w"),  # a part of one
        ("hello w<|end|>", ["|>"], "hello w"),
        ("hello<|user|> w", [" w"], "hello"),
        ("hello<|end|> x", ["<|end|> x", " w"], "hello"),  # begun earlier in one of the texts
        ("hello", ["l", "e"], "h"),
        ("hello", ["e", "l"], "h"),
    ],
)
def test_a_stop_string_with_special_tokens_ends_the_answer(tokenizer, text, stop, wanted):
    assert answer(tokenizer, ids_of(tokenizer, text), stop) == (wanted, True)


@forms
@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("hello<|end|> w", ["<|user|>"], "hello w"),
        ("hello<|end|> w", ["<|end|>x"], "hello w"),
        ("hello<|end|> 🙂", ["<|end|><|user|>"], "hello 🙂"),
        ("hello<|end|>", ["<|end|>\n"], "hello"),
        ("hello<|user|>hello<|end|>", ["o<|end|>h"], "hellohello"),
    ],
)
def test_an_answer_without_the_stop_string_goes_on(tokenizer, text, stop, wanted):
    assert answer(tokenizer, ids_of(tokenizer, text), stop) == (wanted, False)


@forms
def test_a_stop_string_is_found_in_the_shown_text_too(tokenizer):
    """As it reads, special tokens left out."""
    ids = ids_of(tokenizer, "hello <|end|>w w")
    assert answer(tokenizer, ids, [" w"]) == ("hello", True)


def test_a_stop_string_of_byte_tokens_ends_the_answer_at_once():
    """A run of byte tokens is held back until it ends; a stop string in it is not waited for."""
    tokenizer = FORMS["byte tokens"]
    ids = ids_of(tokenizer, "hello\n")
    stream = TextStream(tokenizer, (), ["\n"])
    said = [stream.push(i) for i in ids]
    assert stream.ended
    assert said == [*[""] * 5, "hello"]


@forms
def test_half_a_character_before_a_stop_string_belongs_to_the_answer(tokenizer):
    *half, _ = ids_of(tokenizer, "a🙂")
    ids = [*half, *ids_of(tokenizer, "<|end|>")]
    text, ended = answer(tokenizer, ids, ["<|end|>"])
    assert (text, ended) == (tokenizer.decode(half), True)
    assert text.endswith("\ufffd")


@forms
def test_half_a_character_is_no_stop_string(tokenizer):
    assert answer(tokenizer, ids_of(tokenizer, "x🙂"), ["\ufffd"]) == ("x🙂", False)


@forms
def test_stop_ids_and_stop_strings_may_be_the_same_token(tokenizer):
    ids = ids_of(tokenizer, "hello 🙂<|end|> w")
    end = np.int64(tokenizer.backend.token_to_id("<|end|>"))
    assert answer(tokenizer, ids, ["<|end|>"], [end]) == ("hello 🙂", True)
    assert answer(tokenizer, np.array(ids), [], np.array([end])) == ("hello 🙂", True)


TOKENS = ["<|end|>", "<|user|>", "a", "b", "🙂", " "]


@forms
@settings(max_examples=150, deadline=None)
@given(
    said=st.lists(st.sampled_from(TOKENS), max_size=8),
    stop=st.lists(
        st.lists(st.sampled_from(TOKENS), min_size=1, max_size=3).map("".join), max_size=2
    ),
)
@example(said=["🙂", "<|end|>", "<|user|>"], stop=["<|user|>"])
@example(said=["a", "<|end|>", "🙂", "<|end|>"], stop=["🙂<|end|>", "<|end|>b"])
def test_the_answer_is_what_stands_before_the_first_stop_string(tokenizer, said, stop):
    """Law: of the text with special tokens, or without, whichever holds one first."""
    said = ["x", *said]  # a decoder strips a space in front
    shown = [piece for piece in said if not piece.startswith("<|")]
    ids = [i for piece in said for i in ids_of(tokenizer, piece)]
    text, ended = answer(tokenizer, ids, stop)
    assert ended == any(s in "".join(said) or s in "".join(shown) for s in stop)
    assert "".join(shown).startswith(text)
    if not ended:
        assert text == "".join(shown)
    else:
        assert text in cuts("".join(shown), "".join(said), stop)


def cuts(shown, full, stop):
    """Answers that end before a stop string of either text."""
    found = {shown[: shown.find(s)] for s in stop if s in shown}
    for s in stop:
        if s in full:
            before = full[: full.find(s)]
            for special in SPECIAL:
                before = before.replace(special, "")
            found.add(before)
    return found


def test_an_added_token_that_is_not_special_is_text():
    tokenizer = Tokenizer(byte_level())
    tokenizer.backend.add_tokens(["<|tool|>"])
    ids = tokenizer.encode("a<|tool|>b")
    assert answer(tokenizer, ids, ["|><|"]) == ("a<|tool|>b", False)
    assert answer(tokenizer, ids, ["<|tool|>"]) == ("a", True)


def test_special_tokens_cost_nothing_without_stop_strings(monkeypatch):
    class Backend:
        def __getattr__(self, name):
            assert name != "get_added_tokens_decoder", "a list of every special token"
            return getattr(backend, name)

    tokenizer = FORMS["byte level"]
    backend = tokenizer.backend
    monkeypatch.setattr(tokenizer, "backend", Backend())
    TextStream(tokenizer)
    with pytest.raises(AssertionError, match="every special token"):
        TextStream(tokenizer, stop=["x"])
    assert TextStream(None, [np.int64(3)]).push(np.int64(3)) == ""


def test_generation_ends_at_a_special_token(tmp_path):
    """Whatever the model says: the token that comes first, as a stop string."""
    tokenizer = byte_level()
    tiny.write_folder(tmp_path, tokenizer=tokenizer, vocab_size=tokenizer.get_vocab_size())
    model = npllm.load(tmp_path)
    ids = model.generate(np.array([[9, 8, 7]]), max_new_tokens=1)[0, 3:]
    special = model.tokenizer.backend.id_to_token(int(ids[0]))
    model.tokenizer.backend.add_special_tokens([special])
    text = model.tokenizer.decode([9, 8, 7])
    assert model.generate(text, max_new_tokens=4, stop=[special]) == ""
