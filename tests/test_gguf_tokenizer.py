"""The tokenizer of a GGUF file gives the ids of the folder that it was made from."""

import json

import pytest
from gguf_files import metadata, tensors, write
from test_tokenizers_family import CUT_DOWN, WHOLE
from texts import differing, sweep
from tiny import byte_level

from npllm.checkpoints.gguf.reader import GGUFFile
from npllm.checkpoints.gguf.sentencepiece import derive_merges
from npllm.checkpoints.gguf.tokenizer import gguf_tokenizer
from npllm.errors import NpllmValueError
from npllm.text.tokenizer import Tokenizer

pytest.importorskip("gguf")

PRE = {"phi-4": "dbrx", "phi-4-mini": "gpt-4o", "phi-3-mini": None, "phi-3-medium": None}
FOLDERS = {"phi-4": "RECONSTRUCTED-phi-4", "phi-4-mini": "RECONSTRUCTED-phi-4-mini"}


def metadata_of(file, pre):
    """What llama.cpp's converter writes of a tokenizer.json; pre None: SentencePiece."""
    data = json.loads(file.read_text(encoding="utf-8"))
    vocab = dict(data["model"]["vocab"])
    added = {token["id"]: token for token in data["added_tokens"]}
    vocab |= {token["content"]: i for i, token in added.items()}
    names = {i: token for token, i in vocab.items()}
    n = max(names) + 5  # matrices have more rows than there are tokens
    tokens = [names.get(i, f"[PAD{i}]") for i in range(n)]
    content = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [token_type(i, names, added) for i in range(n)],
        "tokenizer.ggml.bos_token_id": vocab.get("<s>", vocab["<|endoftext|>"]),
        "tokenizer.ggml.eos_token_id": vocab["<|endoftext|>"],
        "tokenizer.ggml.unknown_token_id": vocab.get("<unk>", vocab["<|endoftext|>"]),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.scores": None,
    }
    merges = [x if isinstance(x, str) else " ".join(x) for x in data["model"]["merges"]]
    if pre:
        return content | {"tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}
    scores = rank_scores(merges)
    sentencepiece = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [scores.get(token, -1e6) for token in tokens],
        "tokenizer.ggml.merges": None,
    }
    return content | sentencepiece


def rank_scores(merges):
    """The score of a piece: the later its first merge, the lower; characters after all pieces."""
    scores = {}
    for merge in merges:
        scores.setdefault(merge.replace(" ", ""), -float(len(scores)))
    return scores


def token_type(i, names, added):
    if i in added:
        return 3 if added[i]["special"] else 4
    if i not in names:
        return 5
    return 6 if names[i].startswith("<0x") and len(names[i]) == 6 else 1


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Function of metadata: the Tokenizer of a GGUF file that holds them."""

    def load(changes, arch="phi3"):
        path = tmp_path_factory.mktemp("tokenizer") / "x.gguf"
        found = {"output_norm.weight": tensors(arch, "F32")["output_norm.weight"]}
        return gguf_tokenizer(GGUFFile(write(path, metadata(arch, **changes), found, arch)))

    return load


@pytest.mark.parametrize("size", ["cut down", pytest.param("whole", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PRE)
def test_ids_and_texts_are_those_of_the_folder(loaded, name, size):
    folder, texts = CUT_DOWN / name, sweep()[::4]
    if size == "whole":
        if not WHOLE.is_dir():
            pytest.skip("the whole tokenizers are not here; NPLLM_TOKENIZERS names their folder")
        folder, texts = WHOLE / FOLDERS.get(name, name), sweep()
    theirs = Tokenizer.from_folder(folder, add_bos_token=False)
    ours = loaded(metadata_of(folder / "tokenizer.json", PRE[name]))
    assert differing(ours, theirs, texts) == []


@pytest.mark.weights
def test_the_ids_of_the_default_model(loaded, default_folder):
    theirs = Tokenizer.from_folder(default_folder)
    data = json.loads((default_folder / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["id"] for token in data["added_tokens"]}
    tokens = sorted(data["model"]["vocab"], key=data["model"]["vocab"].get)
    content = {
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if i in special else 1 for i in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in data["model"]["merges"]],
    }
    ours = loaded(content, "llama")
    assert differing(ours, theirs, sweep()[::4]) == []


def test_a_word_of_llama_3_is_a_token_whatever_the_merges_say(loaded):
    """Its vocabulary has words that no merges lead to; a text begins with bos."""
    model = json.loads(byte_level().to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "word"]
    changes = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 6 + [1] * (len(tokens) - 6),
    }
    for pre, wanted in (("llama-bpe", ["<s>", "word"]), ("dbrx", [*"word"])):
        ids = loaded(changes | {"tokenizer.ggml.pre": pre}, "llama").encode("word")
        assert [tokens[i] for i in ids] == wanted


def test_the_file_says_whether_a_text_begins_with_bos_and_with_a_space(loaded):
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", "a", "▁a"]
    content = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 3,
        "tokenizer.ggml.scores": [0.0] * 259 + [-2.0, -3.0, -1.0],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    a, with_space, bos = 260, 261, 1
    flags = ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix")
    for chosen, wanted in (
        ({}, [bos, with_space]),
        ({flags[0]: False}, [with_space]),
        ({flags[0]: False, flags[1]: False}, [a]),
        ({flags[0]: True, flags[1]: False}, [bos, a]),
    ):
        ours = loaded(content | chosen, "llama")
        assert ours.encode("a") == wanted
        assert ours.decode(wanted) == "a"
    assert ours.encode("é", add_special_tokens=False) == [3 + 0xC3, 3 + 0xA9]


def test_merges_follow_from_scores():
    scores = {"a": -9.0, "b": -8.0, "ab": -1.0, "aba": -3.0, "ba": -2.0}
    assert derive_merges(scores) == [("a", "b"), ("b", "a"), ("ab", "a"), ("a", "ba")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer.ggml.scores": [0.0]}, "length of tokenizer.ggml.scores must be"),
        ({"tokenizer.ggml.scores": None}, "has no 'tokenizer.ggml.scores'"),
        ({"tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "x" * 300]}, "at most 256 characters"),
        ({"tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "<s>"]}, "number of different tokens"),
        ({"tokenizer.ggml.add_bos_token": 1}, "add_bos_token must be bool, got int"),
    ],
    ids=range(5),
)
def test_a_vocabulary_that_contradicts_itself_is_named(loaded, change, words):
    content = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a"],
        "tokenizer.ggml.token_type": [2, 3, 3, 1],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0],
    }
    with pytest.raises(NpllmValueError, match=words):
        loaded(content | change)
