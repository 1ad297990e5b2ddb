"""The tokenizer of a GGUF file, as tokenizer.json and tokenizer_config.json hold it."""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from npllm.checkpoints.gguf import GGUFFile
from npllm.errors import NpllmValueError

__all__ = ["read_tokenizer", "tokenizer_config"]

CONTROL_TOKEN = 3  # of tokenizer.ggml.token_type: text never produces it

Merge = tuple[str, str]


def read_tokenizer(gguf: GGUFFile) -> Tokenizer:
    """Build the byte-level BPE tokenizer of a GGUF file.

    The pre-tokenizer that GGUF calls `smollm` splits off every digit, then follows GPT-2's pattern.

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
    """
    gguf.require("tokenizer.ggml.model", gguf.value("tokenizer.ggml.model", str), "gpt2")
    gguf.require("tokenizer.ggml.pre", gguf.value("tokenizer.ggml.pre", str), "smollm")
    vocab, merges, control = _read_vocabulary(gguf)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in control]
    tokenizer.add_special_tokens(special)
    return tokenizer


def _read_vocabulary(gguf: GGUFFile) -> tuple[dict[str, int], list[Merge], list[str]]:
    """Read the ids of the tokens, the merges in order of rank, and the control tokens."""
    tokens = gguf.values("tokenizer.ggml.tokens", str)
    types = gguf.values("tokenizer.ggml.token_type", int)
    vocab = {token: i for i, token in enumerate(tokens)}
    gguf.require("number of different tokens", len(vocab), len(tokens))
    gguf.require("length of tokenizer.ggml.token_type", len(types), len(tokens))
    pairs = gguf.values("tokenizer.ggml.merges", str)
    merges = [_read_merge(gguf, pair, vocab) for pair in pairs]
    return vocab, merges, [token for token, i in vocab.items() if types[i] == CONTROL_TOKEN]


def _read_merge(gguf: GGUFFile, merge: str, vocab: dict[str, int]) -> Merge:
    """Split a merge into the two tokens that it joins."""
    left, _, right = merge.partition(" ")
    if not (left in vocab and right in vocab and left + right in vocab):
        raise NpllmValueError(
            f"{gguf.path}: a merge must join two tokens into a third, got {merge[:100]!r}"
        )
    return left, right


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
        "model_max_length": gguf.value("llama.context_length", int),
        "clean_up_tokenization_spaces": False,
        **({} if template is None else {"chat_template": template}),
    }
