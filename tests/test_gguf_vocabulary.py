"""A tokenizer as GGUF metadata gives the same ids when it is read back."""

import json
from functools import cache

import pytest
from gguf_files import metadata, tensors, write
from test_tokenizers_family import CUT_DOWN, WHOLE
from texts import differing, sweep
from tokenizers import Tokenizer as Backend
from tokenizers import models, processors

from npllm.checkpoints.gguf.reader import GGUFFile
from npllm.checkpoints.gguf.sentencepiece import derive_merges
from npllm.checkpoints.gguf.tokenizer import gguf_tokenizer
from npllm.checkpoints.gguf.vocabulary import piece_scores, vocabulary_metadata
from npllm.errors import NpllmValueError
from npllm.text.tokenizer import Tokenizer

pytest.importorskip("gguf")

WANTED = {
    "phi-3-mini": ("llama", "default"),
    "phi-3-medium": ("llama", "default"),
    "phi-4": ("gpt2", "dbrx"),
    "phi-4-mini": ("gpt2", "gpt-4o"),
}
FOLDERS = {"phi-4": "RECONSTRUCTED-phi-4", "phi-4-mini": "RECONSTRUCTED-phi-4-mini"}


@cache
def found_in(folder):
    """(Tokenizer of a folder, its metadata)."""
    named = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>"}
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    named = {key: text for key, text in named.items() if backend.token_to_id(text) is not None}
    tokenizer = Tokenizer(backend, "{{ messages }}", named)
    return tokenizer, vocabulary_metadata(tokenizer, max(backend.get_vocab().values()) + 6, [])


@pytest.fixture(params=["cut down", pytest.param("whole", marks=pytest.mark.slow)])
def folder(request):
    """Function name -> folder of a tokenizer."""

    def find(name):
        if request.param == "cut down":
            return CUT_DOWN / name
        if not WHOLE.is_dir():
            pytest.skip("the whole tokenizers are not here; NPLLM_TOKENIZERS names their folder")
        return WHOLE / FOLDERS.get(name, name)

    return find


@pytest.fixture
def texts(request):
    """What is compared: a fourth of all texts by default."""
    return sweep() if request.node.callspec.params["folder"] == "whole" else sweep()[::4]


def read_back(path, own, arch="phi3"):
    """Write the metadata of a tokenizer into a file; return the Tokenizer of the file."""
    found = {"output_norm.weight": tensors(arch, "F32")["output_norm.weight"]}
    base = {key: x for key, x in metadata(arch).items() if not key.startswith("tokenizer.")}
    return gguf_tokenizer(GGUFFile(write(path, base | own, found, arch)))


@pytest.mark.parametrize("name", WANTED)
def test_ids_and_texts_are_kept(folder, texts, name, tmp_path):
    theirs, own = found_in(folder(name))
    assert (own["tokenizer.ggml.model"], own["tokenizer.ggml.pre"]) == WANTED[name]
    ours = read_back(tmp_path / "x.gguf", own)
    assert differing(ours, theirs, texts) == []
    assert ours.chat_template == theirs.chat_template


def test_ids_and_texts_of_llama_3_are_kept(folder, texts, tmp_path):
    """Its form with the vocabulary of Phi-4: bos first, no token strips, and words are tokens
    that no merges lead to.
    """
    content = json.loads((folder("phi-4") / "tokenizer.json").read_text(encoding="utf-8"))
    merges = content["model"]["merges"]
    content["model"] |= {"ignore_merges": True, "merges": merges[::2]}
    for token in content["added_tokens"]:
        token |= {"lstrip": False, "rstrip": False}
    backend, bos = Backend.from_str(json.dumps(content)), "<|endoftext|>"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    theirs = Tokenizer(backend, None, {"bos_token": bos, "eos_token": bos})
    own = vocabulary_metadata(theirs, max(backend.get_vocab().values()) + 6, [])
    assert (own["tokenizer.ggml.pre"], own["tokenizer.ggml.add_bos_token"]) == ("llama-bpe", True)
    ours = read_back(tmp_path / "x.gguf", own, "llama")
    assert ours.encode("x") != ours.encode("x", add_special_tokens=False)
    assert differing(ours, theirs, texts) == []


@pytest.mark.parametrize("name", ["phi-3-mini", "phi-3-medium"])
def test_merges_follow_from_the_scores(folder, name):
    data = json.loads((folder(name) / "tokenizer.json").read_text(encoding="utf-8"))
    merges = [
        tuple(x.split(" ")) if isinstance(x, str) else tuple(x) for x in data["model"]["merges"]
    ]
    _, own = found_in(folder(name))
    scores = dict(zip(own["tokenizer.ggml.tokens"], own["tokenizer.ggml.scores"], strict=True))
    kinds = dict(zip(own["tokenizer.ggml.tokens"], own["tokenizer.ggml.token_type"], strict=True))
    derived = derive_merges({x: y for x, y in scores.items() if kinds[x] == 1})
    assert [a + b for a, b in derived] == [a + b for a, b in merges]
    assert set(derived) == set(merges)


def test_a_piece_that_is_made_later_has_a_lower_score():
    scores = piece_scores(["a", "b", "ab", "ba", "aba"], ["a b", "b a", "ab a", "a ba"])
    assert scores == {"ab": 0, "ba": -1, "aba": -2, "a": -3, "b": -4}


def tiny(**changes):
    """A tokenizer of a few bytes."""
    backend = Backend(models.BPE(vocab={"a": 0, "b": 1, "</s>": 2}, merges=[]))
    for name, value in changes.items():
        setattr(backend, name, value)
    return Tokenizer(backend, None, {"eos_token": "</s>"})


def test_what_gguf_cannot_hold_is_named():
    with pytest.raises(NpllmValueError, match="written for BPE tokenizers, got WordLevel"):
        words = models.WordLevel({"a": 0}, unk_token="a")
        vocabulary_metadata(Tokenizer(Backend(words)), 4, [0])
    with pytest.raises(NpllmValueError, match=r"ids must be below vocab_size = 2, got '</s>' = 2"):
        vocabulary_metadata(tiny(), 2, [])
    with pytest.raises(NpllmValueError, match="must split text as one of smollm"):
        vocabulary_metadata(tiny(), 4, [])


def test_tokens_behind_a_text_have_no_place():
    backend = Backend.from_file(str(CUT_DOWN / "phi-4-mini" / "tokenizer.json"))
    end = "<|endoftext|>"
    pair = (end, backend.token_to_id(end))
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[pair]
    )
    with pytest.raises(NpllmValueError, match="may add bos_token = None before a text; this one"):
        vocabulary_metadata(Tokenizer(backend, None, {"eos_token": end}), 300_000, [])


def test_a_model_without_an_end_is_refused():
    backend = Backend.from_file(str(CUT_DOWN / "phi-4-mini" / "tokenizer.json"))
    with pytest.raises(NpllmValueError, match="must name the token that ends a text"):
        vocabulary_metadata(Tokenizer(backend), 300_000, [])
