"""Text of a growing sequence of ids: never half a character, and cut before a stop string."""

import re
from collections.abc import Iterable, Iterator
from operator import index
from typing import Any, SupportsIndex

__all__ = ["Detokenizer", "TextStream"]

BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


class Detokenizer:
    """Text of a growing sequence of ids, piece by piece: joined, the pieces are the decoded whole.

    A piece is what the new ids add to the text; while the end is half a character, it is held back.
    A run of byte tokens (`<0xE2>`) is held back until it ends: its bytes are decoded together, and
    one wrong byte turns all of them into U+FFFD.

    Parameters
    ----------
    tokenizer : Tokenizer

    Notes
    -----
    Decoding token by token would lose spaces, since a decoder strips the first one of every call.
    The difference is taken between two decodes that begin at the last piece, so that the work does
    not grow with the length of the text.

    Source: `DecodeStream` in the tokenizers library, which gives the same pieces for byte-level
    tokenizers.  In a run of byte tokens it emits each byte at once, and a wrong byte after it is
    an error ("Invalid prefix encountered") or contradicts what was emitted; and it cannot be asked
    for what it holds back.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._begin = self._end = 0
        self._in_bytes = False

    def push(self, token: SupportsIndex) -> str:
        """Add an id; return the text that is now certain."""
        token = index(token)
        self._ids.append(token)
        self._in_bytes = self._is_byte(token)
        text = self.pending()
        if self._in_bytes or text.endswith("\ufffd"):
            return ""
        return self._emit(text)

    def pending(self) -> str:
        """Return what is held back, as `flush` would."""
        known = self._tokenizer.decode(self._ids[self._begin : self._end])
        text = self._tokenizer.decode(self._ids[self._begin :])
        return text[len(known) :]

    def flush(self) -> str:
        """Return what was held back."""
        return self._emit(self.pending())

    def _emit(self, text: str) -> str:
        if text:
            self._begin, self._end = self._end, len(self._ids)
        return text

    def _is_byte(self, token: int) -> bool:
        """Whether the sequence ends with a run of byte tokens; a skipped token does not end it."""
        decode = self._tokenizer.decode
        if not decode([token, token]):  # twice: of one space alone nothing would be left
            return self._in_bytes
        name = self._tokenizer.backend.id_to_token(token) or ""
        return BYTE_TOKEN.fullmatch(name) is not None and decode([token]) != name


class TextStream:
    """The text of one answer as its tokens come in, cut before the first stop string.

    Parameters
    ----------
    tokenizer : Tokenizer or None
        None: no text, ids alone.
    stop_ids : iterable of int
        Tokens that end the answer and are no part of its text.
    stop : iterable of str
        Strings that end the answer and are no part of its text.  Special tokens are no part of the
        text either, but stop strings are searched both with and without them, so that
        `stop=["<|im_end|>"]` ends the answer.
    """

    def __init__(
        self, tokenizer: Any, stop_ids: Iterable[SupportsIndex] = (), stop: Iterable[str] = ()
    ) -> None:
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._stop_ids = {index(i) for i in stop_ids}
        self._stop = tuple(stop)
        self._special = _special_texts(tokenizer) if tokenizer is not None and self._stop else {}
        self._marks: list[tuple[int, str]] = []  # special tokens, by their place in pending text
        self._held: list[tuple[str, bool]] = []  # characters, and whether they are shown
        self.ended = False

    def push(self, token: SupportsIndex) -> str:
        """Take a token; return the text that is now certain to belong to the answer, and set
        `ended` at its end.
        """
        token = index(token)
        if token in self._stop_ids:
            return self.close()
        if self._detokenizer is None:
            return ""
        piece = self._detokenizer.push(token)
        if not self._stop:
            return piece
        pending = piece or self._detokenizer.pending()
        if token in self._special:
            self._marks.append((len(pending), self._special[token]))
        if piece or not pending:
            return self._cut(piece)
        pending = self._without_half_a_character(pending)
        ends = _first_stop(self._held + self._marked(pending), self._stop) is not None
        return self._cut(pending) if ends else ""

    def close(self) -> str:
        """End the answer; return what was held back."""
        if self.ended:
            return ""
        text = self._cut(self._detokenizer.flush()) if self._detokenizer else ""
        text += _shown(self._held)
        self._held, self.ended = [], True
        return text

    def _cut(self, text: str) -> str:
        """Add text, and return what cannot become part of a stop string; at one, end the answer."""
        if not self._stop:
            return text
        characters = self._held + self._marked(text)
        end = _first_stop(characters, self._stop)
        self.ended = end is not None
        n_certain = _n_certain(characters, self._stop) if end is None else end
        self._held = [] if self.ended else characters[n_certain:]
        self._marks = []
        return _shown(characters[:n_certain])

    def _without_half_a_character(self, pending: str) -> str:
        """Pending text without what may still become another character."""
        n = len(pending.rstrip("\ufffd"))
        is_followed = any(place > n for place, _ in self._marks)  # by a special token
        return pending if is_followed else pending[:n]

    def _marked(self, text: str) -> list[tuple[str, bool]]:
        """Characters of pending text, and of the special tokens between them."""
        characters = [(character, True) for character in text]
        for place, special in reversed(self._marks):
            characters[place:place] = [(character, False) for character in special]
        return characters


def _special_texts(tokenizer: Any) -> dict[int, str]:
    """Text of every id that decoding leaves out."""
    tokens = tokenizer.backend.get_added_tokens_decoder().items()
    return {i: token.content for i, token in tokens if token.special}


def _shown(characters: list[tuple[str, bool]]) -> str:
    return "".join(character for character, is_shown in characters if is_shown)


def _views(characters: list[tuple[str, bool]]) -> Iterator[tuple[str, list[int]]]:
    """The text with special tokens and the text without, and the place of each character."""
    yield "".join(character for character, _ in characters), list(range(len(characters)))
    yield _shown(characters), [i for i, (_, is_shown) in enumerate(characters) if is_shown]


def _first_stop(characters: list[tuple[str, bool]], stop: tuple[str, ...]) -> int | None:
    """Where the first stop string begins; None where there is none."""
    starts = [
        places[at] for text, places in _views(characters) for at in map(text.find, stop) if at >= 0
    ]
    return min(starts, default=None)


def _n_begun(text: str, end: str) -> int:
    """How many of the last characters of a text are the first ones of a stop string."""
    lengths = range(min(len(text), len(end) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(end[:n])), 0)


def _n_certain(characters: list[tuple[str, bool]], stop: tuple[str, ...]) -> int:
    """How many characters cannot belong to a stop string of which the rest is still to come."""
    n_certain = len(characters)
    for text, places in _views(characters):
        n_held = max((_n_begun(text, end) for end in stop), default=0)
        if n_held:
            n_certain = min(n_certain, places[len(text) - n_held])
    return n_certain
