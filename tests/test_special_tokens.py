"""Special tokens that tokenizer.json does not list: ids, what leaks into an answer, and what a
template sees.
"""

import os
import tempfile
from pathlib import Path

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SPECIAL, byte_level, write_json

from npllm import Tokenizer
from npllm.errors import NpllmValueError
from npllm.text.special_tokens import NAMES

N_VOCAB = byte_level().get_vocab_size()
CONFIG, MAP, OLD, LISTED = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "added_tokens_decoder",
)


def write(folder, *, backend=None, **files):
    """Write tokenizer.json and other files: `settings`, `special_map` and `added` are contents."""
    folder = Path(folder)
    (byte_level() if backend is None else backend).save(str(folder / "tokenizer.json"))
    for name, file in (("settings", CONFIG), ("special_map", MAP), ("added", OLD)):
        if name in files:
            write_json(folder / file, files[name])
    return folder


def token(content, **flags):
    return {
        "__type": "AddedToken",
        "content": content,
        "lstrip": False,
        "rstrip": False,
        "single_word": False,
        "normalized": False,
    } | flags


def new_tokens(tokenizer):
    """Tokens beyond the vocabulary of tokenizer.json, in the order of their ids."""
    known = tokenizer.backend.get_added_tokens_decoder()
    return [known[i].content for i in sorted(known) if i >= N_VOCAB]


# ----------------------------------------------------------------------------------------------------------------- every kind


@pytest.mark.parametrize(
    "files",
    [
        {"settings": {"additional_special_tokens": ["<a>", "<b>"]}},
        {"settings": {"extra_special_tokens": ["<a>", "<b>"]}},
        {"settings": {"extra_special_tokens": [token("<a>", special=True), "<b>"]}},
        {"settings": {"extra_special_tokens": {"image_token": "<a>", "video_token": "<b>"}}},
        {"settings": {"image_token": "<a>", "video_token": token("<b>", special=True)}},
        {"settings": {"sep_token": "<a>", "cls_token": "<b>"}},
        {
            "settings": {
                "sep_token": token("<a>"),
                "mask_token": {"content": "<b>", "lstrip": False},
            }
        },
        {
            "special_map": {
                "sep_token": "<a>",
                "cls_token": {
                    "content": "<b>",
                    "lstrip": False,
                    "rstrip": False,
                    "single_word": False,
                },
            }
        },
        {"special_map": {"additional_special_tokens": ["<a>", "<b>"]}},
        {
            "special_map": {"extra_special_tokens": ["<b>"]},
            "settings": {"extra_special_tokens": ["<a>"]},
        },
        {"special_map": {"extra_special_tokens": {"image_token": "<a>", "video_token": "<b>"}}},
        {
            "special_map": {"image_token": "<a>", "mask_token": "<b>"},
            "added": {"<b>": N_VOCAB + 1, "<a>": N_VOCAB},
            "settings": {"extra_special_tokens": ["<a>", "<b>"]},
        },
        {
            "settings": {
                "added_tokens_decoder": {
                    str(N_VOCAB + 1): {"content": "<b>", "special": True},
                    str(N_VOCAB): {"content": "<a>", "special": True},
                }
            }
        },
        {"settings": {"extra_special_tokens": ["<a>", "<b>", "<a>"], "pad_token": "<a>"}},
    ],
    ids=str,
)
def test_a_special_token_has_an_id_and_does_not_leak(tmp_path, files):
    tokenizer = Tokenizer.from_folder(write(tmp_path, **files))
    assert sorted(new_tokens(tokenizer)) == ["<a>", "<b>"]
    ids = tokenizer.encode("hello<a> w<b>")
    assert {tokenizer.backend.token_to_id(text) for text in ("<a>", "<b>")} <= set(ids)
    assert tokenizer.decode(ids) == "hello w"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "hello<a> w<b>"


def test_new_ids_go_to_listed_tokens_by_id_then_to_names_in_order_then_to_the_others(tmp_path):
    listed = {str(N_VOCAB + 9): {"content": "<9>"}, str(N_VOCAB + 10): {"content": "<10>"}}
    content = {
        "extra_special_tokens": ["<x>", "<y>"],
        "image_token": "<image>",
        "mask_token": "<mask>",
        "sep_token": "<sep>",
        "eos_token": "<eos>",
        "bos_token": "<s>",
    }
    tokenizer = Tokenizer.from_folder(write(tmp_path, settings=content | {LISTED: listed}))
    assert new_tokens(tokenizer) == [
        "<9>",
        "<10>",
        "<eos>",
        "<sep>",
        "<mask>",
        "<image>",
        "<x>",
        "<y>",
    ]


def test_a_template_sees_every_name(tmp_path):
    template = "{{ bos_token }}{{ sep_token }}{{ image_token }}{{ cls_token }}{{ x_token }}{{ messages[0].content }}{{ tools }}"
    content = {
        "chat_template": template,
        "sep_token": "<sep>",
        "image_token": "<image>",
        "extra_special_tokens": {"x_token": "<x>", "messages": "<m>", "tools": "<t>"},
    }
    tokenizer = Tokenizer.from_folder(
        write(
            tmp_path,
            settings=content,
            special_map={"bos_token": "<s>", "cls_token": token("<cls>")},
        )
    )
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
        == "<s><sep><image><cls><x>HiNone"
    )


def test_a_file_that_lists_its_tokens_leaves_the_old_files_unread(tmp_path):
    folder = write(
        tmp_path, settings={LISTED: {}}, special_map={"bos_token": "<a>"}, added={"<b>": N_VOCAB}
    )
    tokenizer = Tokenizer.from_folder(folder)
    assert new_tokens(tokenizer) == []
    assert tokenizer.special_tokens == {}


def test_the_old_map_has_the_last_word(tmp_path):
    folder = write(
        tmp_path,
        settings={"bos_token": "<s>", "eos_token": "<a>", "unk_token": "<unk>"},
        special_map={"eos_token": "</s>", "unk_token": None},
    )
    assert Tokenizer.from_folder(folder).special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_old_added_tokens_that_nobody_calls_special_are_text(tmp_path):
    folder = write(
        tmp_path, settings={"eos_token": "<b>"}, added={"<b>": N_VOCAB + 1, "<a>": N_VOCAB}
    )
    tokenizer = Tokenizer.from_folder(folder)
    assert new_tokens(tokenizer) == ["<a>", "<b>"]
    assert tokenizer.decode(tokenizer.encode("hello<a> w<b>")) == "hello<a> w"


def test_old_added_tokens_do_not_change_those_of_tokenizer_json(tmp_path):
    folder = write(tmp_path, added={text: i for i, text in enumerate(SPECIAL)})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.decode(tokenizer.encode("hello<|end|>")) == "hello"
    assert new_tokens(tokenizer) == []


def test_the_padding_of_tokenizer_json_names_the_pad_token(tmp_path):
    backend = byte_level()
    backend.enable_padding(pad_token="</s>", pad_id=1)
    assert Tokenizer.from_folder(write(tmp_path, backend=backend)).special_tokens == {
        "pad_token": "</s>"
    }
    write_json(tmp_path / CONFIG, {"pad_token": "<unk>"})
    assert Tokenizer.from_folder(tmp_path).special_tokens == {"pad_token": "<unk>"}


def test_flags_of_a_named_token_count(tmp_path):
    tokenizer = Tokenizer.from_folder(
        write(tmp_path, settings={"mask_token": token("<mask>", lstrip=True)})
    )
    assert tokenizer.decode(tokenizer.encode("hello  <mask>w")) == "hellow"


@pytest.mark.parametrize("name", ["add_bos_token", "legacy_token", "n_token"])
def test_flags_that_end_in_token_are_no_tokens(tmp_path, name):
    assert Tokenizer.from_folder(write(tmp_path, settings={name: True})).special_tokens == {}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"settings": {"sep_token": 5}},
            "tokenizer_config.json: sep_token must be an object, got 5",
        ),
        (
            {"settings": {"cls_token": {}}},
            "cls_token must be a text or {content, lstrip, ...}, got {}",
        ),
        (
            {"settings": {"extra_special_tokens": 5}},
            "extra_special_tokens must be a list of tokens, or an object of named ones, got 5",
        ),
        (
            {"settings": {"extra_special_tokens": [5]}},
            "extra_special_tokens must be an object, got 5",
        ),
        (
            {"settings": {"extra_special_tokens": {"x_token": 5}}},
            "x_token must be an object, got 5",
        ),
        (
            {"settings": {"extra_special_tokens": [token("<a>", lstrip="no")]}},
            "must hold a text and flags of true or false",
        ),
        ({"settings": {"image_token": "\ud800"}}, "image_token must hold a text"),
        ({"special_map": {"bos_token": [1]}}, "bos_token must be an object, got [1]"),
        ({"added": {"<a>": "7"}}, "added_tokens.json: must be {text: id}, got {'<a>': '7'}"),
        ({"added": {"<a>": -1}}, "added_tokens.json: must be {text: id}"),
        (
            {"settings": {LISTED: {"x": {"content": "<a>"}}}},
            "added_tokens_decoder must be {id: {content, ...}}",
        ),
        ({"settings": {LISTED: [1]}}, "added_tokens_decoder must be an object, got [1]"),
    ],
)
def test_entries_that_are_no_tokens_are_refused_by_name(tmp_path, files, words):
    with pytest.raises(NpllmValueError) as caught:
        Tokenizer.from_folder(write(tmp_path, **files))
    assert words in str(caught.value)


# --------------------------------------------------------------------------------------------------------- as in Transformers

TEXTS = ["<s>", "</s>", "<unk>", "<|end|>", "<a>", "<b>", "<c>", "hello", " w"]
texts, flags = (
    st.sampled_from(TEXTS),
    st.fixed_dictionaries(
        {"lstrip": st.booleans(), "rstrip": st.booleans(), "normalized": st.booleans()}
    ),
)
objects = st.builds(
    lambda text, flags, special: token(text, **flags, special=special), texts, flags, st.booleans()
)
plain = st.builds(lambda text, flags: token(text, **flags), texts, flags).map(
    lambda entry: {k: v for k, v in entry.items() if k != "__type"}
)
names = st.sampled_from([*NAMES, "image_token", "other_token"])
named = st.dictionaries(names, texts | objects, max_size=4)
lists = st.lists(texts | objects, max_size=3)
dictionaries = st.dictionaries(st.sampled_from(["image_token", "video_token"]), texts, max_size=2)
ids = st.sampled_from([*range(len(SPECIAL)), *range(N_VOCAB - 1, N_VOCAB + 4)])


@st.composite
def folders(draw):
    """What files beside tokenizer.json say; only what Transformers can read."""
    config = draw(named)
    for key, values in (
        ("extra_special_tokens", lists | dictionaries),
        ("additional_special_tokens", lists),
    ):
        if draw(st.booleans()):
            config[key] = draw(values)
    files = {"settings": config}
    if draw(st.booleans()):
        entries = draw(st.dictionaries(ids, objects, max_size=3)).items()
        once = {
            entry["content"]: i for i, entry in entries
        }  # a text with two ids contradicts itself
        config[LISTED] = {
            str(i): {k: v for k, v in entry.items() if k != "__type"}
            for i, entry in entries
            if once[entry["content"]] == i
        }
    if draw(st.booleans()):
        files["special_map"] = draw(st.dictionaries(names, texts | plain | st.none(), max_size=3))
        if draw(st.booleans()):
            files["special_map"]["extra_special_tokens"] = draw(st.lists(texts | plain, max_size=2))
        if draw(st.booleans()):
            files["special_map"]["additional_special_tokens"] = draw(st.lists(texts, max_size=2))
    if draw(st.booleans()):
        numbered = draw(st.dictionaries(st.integers(N_VOCAB, N_VOCAB + 4), texts, max_size=3))
        files["added"] = {text: byte_level().token_to_id(text) or i for i, text in numbered.items()}
    return files


@pytest.mark.live
@settings(max_examples=150)
@given(
    folders(), st.booleans(), st.lists(texts | st.sampled_from([" ", "x"]), max_size=6).map("".join)
)
def test_ids_and_names_are_those_of_transformers(files, padded, text):
    if os.environ.get("NPLLM_REQUIRE_LIVE") != "1":
        pytest.importorskip(
            "transformers", reason="compares with Transformers, which is not installed"
        )
    from transformers import PreTrainedTokenizerFast

    backend = byte_level()
    if padded:
        backend.enable_padding(pad_token="</s>", pad_id=1)
    with tempfile.TemporaryDirectory() as folder:
        write(folder, backend=backend, **files)
        theirs = PreTrainedTokenizerFast.from_pretrained(folder)
        ours = Tokenizer.from_folder(folder)
    assert ours.special_tokens == theirs.special_tokens_map
    there, here = theirs.added_tokens_decoder, ours.backend.get_added_tokens_decoder()
    assert {i: repr(entry) for i, entry in here.items()} == {
        i: repr(entry) for i, entry in there.items()
    }
    theirs.backend_tokenizer.no_padding()
    encoded = theirs.backend_tokenizer.encode(text).ids
    assert ours.encode(text) == encoded
    for skip in (False, True):
        assert ours.decode(encoded, skip_special_tokens=skip) == theirs.decode(
            encoded, skip_special_tokens=skip
        )


def test_a_model_folder_with_unlisted_tokens_answers_without_them(tmp_path):
    """A stop token that only tokenizer_config.json names is no text of an answer."""
    tiny.write_folder(
        tmp_path,
        tokenizer=byte_level(),
        settings={"extra_special_tokens": ["<|stop|>"]},
        vocab_size=N_VOCAB + 1,
    )
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("<|stop|>") == [N_VOCAB]
    assert tokenizer.decode([*tokenizer.encode("hello"), N_VOCAB]) == "hello"
