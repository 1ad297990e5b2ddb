"""The tokenizer of a GGUF file: its vocabulary, special tokens, chat template."""

import contextlib
from collections.abc import Iterator
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from npllm.checkpoints.gguf.reader import GGUFFile
from npllm.checkpoints.gguf.sentencepiece import sentencepiece_tokenizer
from npllm.config.strict_json import printable
from npllm.errors import NpllmValueError
from npllm.text import tokenizer as text_tokenizer
from npllm.text.tokenizer_checks import check_added_tokens

__all__ = [
    "PRE_TOKENIZERS",
    "gguf_tokenizer",
    "read_tokenizer",
    "tokenizer_config",
    "word_splitter",
]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token_type
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
CL100K = (
    rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{TAIL}"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTION}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{TAIL}"
)
# GGUF's name -> the pattern that splits a text into words; None: single digits, then GPT-2's.
PRE_TOKENIZERS = {
    "smollm": None,  # SmolLM, SmolLM2
    "llama-bpe": CL100K,  # Llama 3
    "dbrx": CL100K,  # Phi-4
    "gpt-4o": O200K,  # Phi-4-mini
}
WHOLE_WORDS = ("llama-bpe",)  # a word of the vocabulary is a token, whatever the merges say
BEGINS = ("llama-bpe",)  # begin with bos unless the file says otherwise; SentencePiece does too
# Of the architecture phi3: spaces that a special token takes along, which GGUF has no place for.
STRIPS = {
    "llama": {"rstrip": True},
    "gpt-4o": {"rstrip": True},
    "dbrx": {"lstrip": True, "rstrip": True},
}
NEVER_STRIP = {
    "llama": ("<unk>", "<s>", "<|endoftext|>"),
    "gpt-4o": ("<|endoftext|>", "<|endofprompt|>"),
    "dbrx": (),
}

Merge = tuple[str, str]


def gguf_tokenizer(gguf: GGUFFile) -> text_tokenizer.Tokenizer:
    """Return the tokenizer of a GGUF file with its special tokens and chat template.

    Parameters
    ----------
    gguf : GGUFFile

    Returns
    -------
    tokenizer : npllm.Tokenizer

    Raises
    ------
    NpllmValueError
        When the vocabulary is contradictory, or its pre-tokenizer is not implemented; names it.
    """
    settings = tokenizer_config(gguf)
    gguf.require("tokenizer.ggml.add_eos_token", _flag(gguf, "add_eos_token", False), False)
    named = {key: settings[key] for key in settings if key.endswith("_token")}
    return text_tokenizer.Tokenizer(
        read_tokenizer(gguf),
        settings.get("chat_template"),
        {key: text for key, text in named.items() if text is not None},
        add_bos_token=_flag(gguf, "add_bos_token", _kind(gguf) in ("llama", *BEGINS)),
    )


def read_tokenizer(gguf: GGUFFile) -> Tokenizer:
    """Build the tokenizer of a GGUF file: byte-level BPE, or SentencePiece's.

    Parameters
    ----------
    gguf : GGUFFile

    Returns
    -------
    tokenizer : tokenizers.Tokenizer

    Raises
    ------
    NpllmValueError
        When the vocabulary is of another kind, or contradictory.

    Notes
    -----
    GGUF does not store which special tokens take the spaces beside them along.  For the
    architecture phi3 they are those of the published tokenizer.json (of the later revision, where
    there are two); llama.cpp does so for Phi-3 as well.

    Source: `llama_vocab::impl::load` in llama.cpp.
    """
    tokens, types = _read_tokens(gguf)
    kind = _kind(gguf)
    with _library_errors(gguf):
        build = _sentencepiece if kind == "llama" else _byte_level
        tokenizer = build(gguf, tokens, types)
        _add_tokens(gguf, tokenizer, tokens, types, kind)
    return tokenizer


def _kind(gguf: GGUFFile) -> str:
    """Return "llama" for SentencePiece, else the name of the pre-tokenizer."""
    model = gguf.value("tokenizer.ggml.model", str)
    if model == "llama":
        return model
    if model != "gpt2":
        raise NpllmValueError(
            f"{gguf.path}: tokenizer.ggml.model must be 'gpt2' or 'llama', "
            f"got {printable(model[:60])!r}, which is not implemented"
        )
    pre = gguf.value("tokenizer.ggml.pre", str)
    if pre not in PRE_TOKENIZERS:
        raise NpllmValueError(
            f"{gguf.path}: the pre-tokenizer tokenizer.ggml.pre must be one of "
            f"{', '.join(PRE_TOKENIZERS)}, got {printable(pre[:60])!r}, which is not implemented"
        )
    return pre


def _read_tokens(gguf: GGUFFile) -> tuple[list[str], list[int]]:
    """Read the tokens and their types; no two tokens are the same."""
    tokens = gguf.values("tokenizer.ggml.tokens", str)
    types = gguf.values("tokenizer.ggml.token_type", int)
    gguf.require("number of different tokens", len(set(tokens)), len(tokens))
    gguf.require("length of tokenizer.ggml.token_type", len(types), len(tokens))
    return tokens, types


def _byte_level(gguf: GGUFFile, tokens: list[str], types: list[int]) -> Tokenizer:
    """Build a byte-level BPE tokenizer."""
    pre = _kind(gguf)
    vocab = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    merges = [_read_merge(gguf, x, vocab) for x in gguf.values("tokenizer.ggml.merges", str)]
    options: dict[str, Any] = {"ignore_merges": True} if pre in WHOLE_WORDS else {}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    tokenizer.pre_tokenizer = word_splitter(pre)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def word_splitter(pre: str) -> pre_tokenizers.PreTokenizer:
    """Build the pre-tokenizer of a name of `PRE_TOKENIZERS`."""
    pattern = PRE_TOKENIZERS[pre]
    first: Any = pre_tokenizers.Digits(individual_digits=True)
    if pattern is not None:
        first = pre_tokenizers.Split(Regex(pattern), "isolated")
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    return pre_tokenizers.Sequence([first, words])


def _sentencepiece(gguf: GGUFFile, tokens: list[str], types: list[int]) -> Tokenizer:
    """Build SentencePiece's tokenizer, whose merges follow from the scores."""
    scores = gguf.values("tokenizer.ggml.scores", float)
    gguf.require("length of tokenizer.ggml.scores", len(scores), len(tokens))
    vocab = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    pieces = {token: scores[i] for token, i in vocab.items() if types[i] == NORMAL}
    unknown = tokens[gguf.token_id("unknown")] if gguf.has_token_id("unknown") else None
    try:
        return sentencepiece_tokenizer(
            vocab, pieces, unknown, _flag(gguf, "add_space_prefix", True)
        )
    except NpllmValueError as error:
        raise NpllmValueError(f"{gguf.path}: {error}") from None


def _add_tokens(
    gguf: GGUFFile, tokenizer: Tokenizer, tokens: list[str], types: list[int], kind: str
) -> None:
    """Add the tokens that text is searched for: control tokens, and those of the user."""
    is_phi3 = gguf.architecture == "phi3"
    strips = STRIPS.get(kind, {}) if is_phi3 else {}
    never = NEVER_STRIP.get(kind, ())
    added = [
        AddedToken(
            token,
            special=kind_of_token != USER_DEFINED,
            normalized=False,
            **({} if token in never else strips),
        )
        for token, kind_of_token in zip(tokens, types, strict=True)
        if kind_of_token in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    check_added_tokens([token.content for token in added], gguf.path)
    tokenizer.add_tokens(added)


def _read_merge(gguf: GGUFFile, merge: str, vocab: dict[str, int]) -> Merge:
    """Split a merge into the two tokens that it joins."""
    left, _, right = merge.partition(" ")
    if not (left in vocab and right in vocab and left + right in vocab):
        raise NpllmValueError(
            f"{gguf.path}: a merge must join two tokens into a third, got {merge[:100]!r}"
        )
    return left, right


def _flag(gguf: GGUFFile, name: str, default: bool) -> bool:
    """Return a flag of the tokenizer."""
    return gguf.value_or(f"tokenizer.ggml.{name}", bool, default)


@contextlib.contextmanager
def _library_errors(gguf: GGUFFile) -> Iterator[None]:
    """Raise an error of npllm for what the tokenizers library raises, panics included."""
    try:
        yield
    except NpllmValueError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise NpllmValueError(
            f"{gguf.path}: its vocabulary makes no tokenizer ({printable(str(error)[:300])})"
        ) from None


def tokenizer_config(gguf: GGUFFile) -> dict[str, Any]:
    """Return the tokenizer_config.json: special tokens by name, and the chat template if any."""
    tokens = gguf.values("tokenizer.ggml.tokens", str)
    ids = gguf.special_ids()
    unknown = tokens[gguf.token_id("unknown")] if gguf.has_token_id("unknown") else None
    template = gguf.value_or("tokenizer.chat_template", str, None)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[ids["bos_token_id"]],
        "eos_token": tokens[gguf.token_id("eos")],
        "pad_token": tokens[ids["pad_token_id"]],
        "unk_token": unknown,
        "model_max_length": gguf.value(gguf.own("context_length"), int),
        "clean_up_tokenization_spaces": False,
        **({} if template is None else {"chat_template": template}),
    }
