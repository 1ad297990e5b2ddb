"""A tokenizer as GGUF metadata: tokens, types, scores or merges, special ids, chat template."""

import json
from typing import Any

from npllm.checkpoints.gguf.reader import END_TEXTS
from npllm.checkpoints.gguf.sentencepiece import SPACE
from npllm.checkpoints.gguf.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    UNUSED,
    USER_DEFINED,
    WHOLE_WORDS,
    word_splitter,
)
from npllm.errors import NpllmValueError
from npllm.text.tokenizer import Tokenizer

__all__ = ["PROBE", "piece_scores", "vocabulary_metadata"]

SCORES = {BYTE: 0.0, UNUSED: -10000.0}  # as the converter writes them; no merge makes these
ADDED_SCORE = -1000.0  # of tokens that text is searched for
PROBE = (
    "I've been there 3 times, 33 times, 3333 times; we'LL see!!! HTTPServer camelCase\n\n\n  x = 1;"
    "\t\ty /= 2\r\n   \n naïve café ça e\u0301 Straße ἄλφα Привет мир 你好世界 こんにちは "
    "ภาษาไทย हिन्दी 🚀🚀 \u00a0\u3000 ½ ² Ⅷ ... '''don't''' a_b-c/d//e  "
)
"""Text that the pre-tokenizers split at different places."""


def vocabulary_metadata(tokenizer: Tokenizer, n_vocab: int, stop_ids: list[int]) -> dict[str, Any]:
    """Return the metadata of a tokenizer, as llama.cpp's converter writes them.

    Parameters
    ----------
    tokenizer : npllm.Tokenizer
        Byte-level BPE with one of the pre-tokenizers of `PRE_TOKENIZERS`, or SentencePiece's BPE.
    n_vocab : int
        Rows of the embedding matrix; ids without a token are unused ones.
    stop_ids : list of int
        The ids that end an answer.  The first is eos where the tokenizer names no eos_token.

    Returns
    -------
    metadata : dict

    Raises
    ------
    NpllmValueError
        When GGUF has no place for the tokenizer.

    Notes
    -----
    Source: `TextModel.get_vocab_base`, `_create_vocab_sentencepiece` and `Phi3MiniModel.set_vocab`
    in llama.cpp's converter; `SpecialVocab` of the package gguf.
    """
    content = json.loads(tokenizer.backend.to_str())
    model = content["model"]
    if model.get("type") != "BPE":
        raise NpllmValueError(f"GGUF files are written for BPE tokenizers, got {model.get('type')}")
    tokens, types = _tokens(content, n_vocab)
    merges = [x if isinstance(x, str) else " ".join(x) for x in model["merges"]]
    if model.get("byte_fallback"):
        own = _sentencepiece(content, tokens, types, merges)
    else:
        pre = _pre_tokenizer(tokenizer, model)
        own = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": merges}
    named = {f"tokenizer.ggml.{key}": value for key, value in own.items()}
    named |= _special_ids(tokenizer, stop_ids)
    named["tokenizer.ggml.add_bos_token"] = _begins_with_bos(tokenizer)
    template = {"tokenizer.chat_template": tokenizer.chat_template}
    return named | (template if tokenizer.chat_template else {})


def _tokens(content: dict[str, Any], n_vocab: int) -> tuple[list[str], list[int]]:
    """List all tokens and their types, by id."""
    names = {i: token for token, i in content["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in content["added_tokens"]}
    names |= {i: entry["content"] for i, entry in added.items()}
    largest = max(names, default=0)
    if largest >= n_vocab:
        raise NpllmValueError(
            f"token ids must be below vocab_size = {n_vocab}, got {names[largest]!r} = {largest}"
        )
    is_byte = content["model"].get("byte_fallback", False)

    def type_of(i: int) -> int:
        if i in added:
            return CONTROL if added[i]["special"] else USER_DEFINED
        if i not in names:
            return UNUSED
        is_code = is_byte and len(names[i]) == 6 and names[i].startswith("<0x")
        return BYTE if is_code else NORMAL

    ids = range(n_vocab)
    return [names.get(i, f"[PAD{i}]") for i in ids], [type_of(i) for i in ids]


def _sentencepiece(
    content: dict[str, Any], tokens: list[str], types: list[int], merges: list[str]
) -> dict[str, Any]:
    """Return tokens with scores, from which the merges follow."""
    pieces = [token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL]
    scores = piece_scores(pieces, merges)
    steps = (content.get("normalizer") or {}).get("normalizers", [])
    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": [
            scores[token] if kind == NORMAL else SCORES.get(kind, ADDED_SCORE)
            for token, kind in zip(tokens, types, strict=True)
        ],
        "token_type": types,
        "add_space_prefix": {"type": "Prepend", "prepend": SPACE} in steps,
    }


def piece_scores(pieces: list[str], merges: list[str]) -> dict[str, float]:
    """Return scores from which the merges follow: the later a piece is made, the lower its score.

        score = -(number of other pieces that earlier merges make)

    Parameters
    ----------
    pieces : list of str
    merges : list of str
        "left right", in order of rank.

    Returns
    -------
    scores : dict of str to float
        Pieces that no merge makes, such as single characters, come last, in their own order.

    Notes
    -----
    A tokenizer.json does not have the scores of the published tokenizer.model; these have the same
    order, on which alone the merges depend.
    """
    scores: dict[str, float] = {}
    for merge in merges:
        scores.setdefault(merge.replace(" ", ""), -float(len(scores)))
    for piece in pieces:
        scores.setdefault(piece, -float(len(scores)))
    return scores


def _pre_tokenizer(tokenizer: Tokenizer, model: dict[str, Any]) -> str:
    """Return GGUF's name of the pre-tokenizer that splits as this one does."""
    own = tokenizer.backend.pre_tokenizer
    has_whole_words = bool(model.get("ignore_merges"))
    words = None if own is None else own.pre_tokenize_str(PROBE)
    for name in PRE_TOKENIZERS:
        is_alike = has_whole_words == (name in WHOLE_WORDS)
        if is_alike and words == word_splitter(name).pre_tokenize_str(PROBE):
            return name
    raise NpllmValueError(
        "the pre-tokenizer of tokenizer.json must split text as one of "
        f"{', '.join(PRE_TOKENIZERS)}; it is another one, for which npllm knows no name in GGUF"
    )


def _special_ids(tokenizer: Tokenizer, stop_ids: list[int]) -> dict[str, int]:
    """Return the ids of special tokens; further stop ids are end of turn and end of message."""
    find, text = tokenizer.backend.token_to_id, tokenizer.backend.id_to_token
    names = {"bos": "bos_token", "unknown": "unk_token", "padding": "pad_token"}
    found = {key: find(tokenizer.special_tokens.get(name, "")) for key, name in names.items()}
    named_eos = find(tokenizer.special_tokens.get("eos_token", ""))
    ends = [*dict.fromkeys(stop_ids if named_eos is None else [named_eos, *stop_ids])]
    if not ends:
        raise NpllmValueError("a GGUF file must name the token that ends a text, and there is none")
    others = sorted(ends[1:], key=lambda i: text(i) not in END_TEXTS)
    found |= dict(zip(("eos", "eot", "eom"), [ends[0], *others], strict=False))
    return {f"tokenizer.ggml.{key}_token_id": i for key, i in found.items() if i is not None}


def _begins_with_bos(tokenizer: Tokenizer) -> bool:
    """Tell whether a text begins with bos; raise where more than that is added."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    ids = tokenizer.encode("a")
    bos = tokenizer.backend.token_to_id(tokenizer.special_tokens.get("bos_token", ""))
    if ids not in (plain, [bos, *plain]):
        raise NpllmValueError(
            f"a tokenizer may add bos_token = {bos} before a text; this one makes {ids} of {plain}"
        )
    return ids != plain
