"""tokenizer.json: claims that would exhaust memory or time are refused before the tokenizers library
sees them; what is published passes.
"""

import base64
import json

import pytest
import tiny
from family import SHARED

from npllm.errors import NpllmValueError
from npllm.text.tokenizer import Tokenizer
from npllm.text.tokenizer_checks import read_tokenizer_json

REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
PIECE = {"Sequence": {"id": "A", "type_id": 0}}
SPECIAL = {"SpecialToken": {"id": "<s>", "type_id": 0}}


def written(folder, **changes):
    """A folder whose tokenizer.json has other entries."""
    data = json.loads(tiny.byte_level().to_str()) | changes
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


def precompiled(trie, replacements=b"", n_trie=None):
    size = len(trie) if n_trie is None else n_trie
    table = size.to_bytes(4, "little") + trie + replacements
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


def sequence(components, kind="normalizers"):
    return {"type": "Sequence", kind: components}


def template(single, ids=(1,)):
    token = {"id": "<s>", "ids": list(ids), "tokens": ["<s>"] * len(ids)}
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [PIECE],
        "special_tokens": {"<s>": token},
    }


def added(*contents):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return [{"id": 500 + i, "content": text, **flags} for i, text in enumerate(contents)]


HOSTILE = {
    "a trie of 4 GiB": ({"normalizer": precompiled(b"", n_trie=2**32 - 4)}, "of the trie"),
    "a trie one word too long": ({"normalizer": precompiled(bytes(8), n_trie=12)}, "of the trie"),
    "inside a sequence": (
        {"normalizer": sequence([sequence([precompiled(b"", n_trie=2**31)])])},
        "of the trie",
    ),
    "an endless replacement": (
        {"normalizer": precompiled(bytes(8), b"x" * 5000)},
        "normalizer lengthens a text must be at most 1024, got 5000",
    ),
    "twenty doublings": (
        {"normalizer": sequence([REPLACE] * 20)},
        "normalizer lengthens a text must be at most 1024, got 2048",
    ),
    "an empty pattern": (
        {"normalizer": REPLACE | {"pattern": {"String": ""}, "content": "x" * 5000}},
        "lengthens a text",
    ),
    "an empty match": (
        {"normalizer": REPLACE | {"pattern": {"Regex": "x*"}, "content": "x" * 5000}},
        "lengthens a text",
    ),
    "the decoder": (
        {"decoder": sequence([REPLACE] * 20, "decoders")},
        "decoder lengthens a text",
    ),
    "a template that repeats": (
        {"post_processor": template([PIECE] * 5000)},
        "post_processor lengthens a text must be at most 1024, got 5000",
    ),
    "a template of long tokens": (
        {"post_processor": template([SPECIAL] * 1000, [1] * 1000)},
        "got 15625",
    ),
    "templates one after another": (
        {"post_processor": sequence([template([PIECE] * 100)] * 2, "processors")},
        "got 10000",
    ),
    "a long added token": ({"added_tokens": added("x" * 1025)}, "an added token must be at most"),
    "many long ones": (
        {"added_tokens": added(*(f"{i:01000}" for i in range(2200)))},
        "all added tokens must be at most 2097152, got 2200000",
    ),
    "a long pattern": (
        {"normalizer": REPLACE | {"pattern": {"Regex": "x" * 20_000}}},
        "characters of 'Regex' must be at most",
    ),
    "a long prefix": (
        {"model": {"type": "WordPiece", "continuing_subword_prefix": "x" * 20_000}},
        "characters of 'continuing_subword_prefix' must be at most 16384, got 20000",
    ),
    "words of any length": (
        {"model": {"type": "WordPiece", "max_input_chars_per_word": 10**9}},
        "max_input_chars_per_word must be at most 4096, got 1000000000",
    ),
    "a number of 400 digits": (
        {"model": {"type": "WordPiece", "max_input_chars_per_word": 10**400}},
        "max_input_chars_per_word must be at most 4096, got 1000",
    ),
    "no base64": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "é"}},
        "is no base64 text",
    ),
}


@pytest.mark.parametrize(("changes", "words"), HOSTILE.values(), ids=list(HOSTILE))
def test_what_a_file_claims_is_bounded(tmp_path, changes, words):
    with pytest.raises(NpllmValueError, match=words) as caught:
        Tokenizer.from_folder(written(tmp_path, **changes))
    assert "tokenizer.json" in str(caught.value)


def test_added_tokens_of_other_files_are_bounded_as_well(tmp_path):
    written(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"image_token": "x" * 1025}))
    with pytest.raises(NpllmValueError, match="bytes of an added token must be at most 1024"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000, '{"a": 1, "a": 2}', "\0"])
def test_a_file_that_is_not_json(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(NpllmValueError, match="is not a tokenizer that the tokenizers library"):
        Tokenizer.from_folder(tmp_path)


def test_components_inside_components(tmp_path):
    nested = REPLACE
    for _ in range(100):
        nested = sequence([nested])
    with pytest.raises(NpllmValueError, match="nested in more than 64 levels"):
        Tokenizer.from_folder(written(tmp_path, normalizer=nested))


def test_a_regex_that_backtracks_without_end_is_given_up(tmp_path):
    split = {
        "type": "Split",
        "pattern": {"Regex": r"(\w+\s?)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    tokenizer = Tokenizer.from_folder(written(tmp_path, pre_tokenizer=split))
    with pytest.raises(NpllmValueError, match="retry-limit-in-match over"):
        tokenizer.encode("hello my world this is a text without an end " * 3 + "!")


ORDINARY = {
    "XLM-R": sequence(
        [
            precompiled(bytes(1024), b"\0".join([b"ab", b"x" * 33, b""])),
            REPLACE | {"pattern": {"Regex": " {2,}"}, "content": "▁"},
        ]
    ),
    "ALBERT": sequence(
        [REPLACE | {"pattern": {"String": x}, "content": '"'} for x in ("``", "''")]
        + [{"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Lowercase"}]
    ),
    "Llama": sequence(
        [
            {"type": "Prepend", "prepend": "▁"},
            REPLACE | {"pattern": {"String": " "}, "content": "▁"},
        ]
    ),
}


@pytest.mark.parametrize("normalizer", ORDINARY.values(), ids=list(ORDINARY))
def test_ordinary_normalizers_pass(tmp_path, normalizer):
    assert read_tokenizer_json(written(tmp_path, normalizer=normalizer) / "tokenizer.json")


@pytest.mark.slow
def test_published_tokenizers_pass():
    files = sorted((SHARED / "tokenizers").glob("*/tokenizer.json"))
    if not files:
        pytest.skip("no published tokenizers are beside the repository")
    for file in files:
        read_tokenizer_json(file)
        Tokenizer.from_folder(file.parent)
