"""A SentencePiece vocabulary of a GGUF file as a BPE model of the tokenizers library."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers

from npllm.errors import NpllmValueError

__all__ = ["MOST_MERGES", "derive_merges", "sentencepiece_tokenizer"]

SPACE = "▁"  # SentencePiece's letter for a space
LONGEST_PIECE = 256  # characters; published ones have 16 (Llama) to 48
MOST_MERGES = 2**22  # Llama 2's vocabulary of 32,000 pieces has 61,249


def derive_merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Derive the merges of a vocabulary, in order of rank.

        (a, b) is a merge where a, b and a + b are pieces
        rank: the score of a + b, highest first; then the scores of a and of b

    Parameters
    ----------
    scores : dict of str to float
        Piece -> its score; the higher, the earlier it is merged.

    Returns
    -------
    merges : list of tuple of str

    Raises
    ------
    NpllmValueError
        When a piece is too long, or there are too many merges.

    Notes
    -----
    SentencePiece merges the neighbours whose union has the highest score.  The tokenizers library
    ranks pairs, so that pairs with the same union must follow each other.

    Source: "SentencePiece" (Kudo and Richardson 2018), section 3.1; `bpe_model.cc` there.
    """
    longest = max(map(len, scores), default=0)
    if longest > LONGEST_PIECE:
        raise NpllmValueError(
            f"pieces must have at most {LONGEST_PIECE} characters, got one of {longest}"
        )
    found = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                found.append((-score, -scores[left], -scores[right], left, right))
        if len(found) > MOST_MERGES:
            raise NpllmValueError(f"the vocabulary makes more than {MOST_MERGES} merges")
    return [(left, right) for *_, left, right in sorted(found)]


def sentencepiece_tokenizer(
    vocab: dict[str, int], scores: dict[str, float], unknown: str | None, has_prefix: bool
) -> Tokenizer:
    """Build the tokenizer: spaces become `▁`, unknown characters become byte tokens.

    Parameters
    ----------
    vocab : dict of str to int
        All pieces, byte tokens included.
    scores : dict of str to float
        Of the pieces that take part in merges.
    unknown : str or None
        The piece for what has no byte token either.
    has_prefix : bool
        Begin a text with a space.

    Returns
    -------
    tokenizer : tokenizers.Tokenizer

    Notes
    -----
    Source: the tokenizer.json of Phi-3-mini and Llama 2.
    """
    options: dict[str, Any] = {"byte_fallback": True, "fuse_unk": True, "unk_token": unknown}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=derive_merges(scores), **options))
    prefix = [normalizers.Prepend(SPACE)] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    tokenizer.decoder = decoders.Sequence([*steps, *strip])
    return tokenizer
