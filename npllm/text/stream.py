"""The text of one answer as its tokens come in, cut before the first stop string."""

from npllm.text.tokenizer import Detokenizer

__all__ = ["TextStream"]


class TextStream:
    """The text of one answer as its tokens come in, cut before the first stop string.

    Parameters
    ----------
    tokenizer : Tokenizer
    stop_ids : tuple of int
        Tokens that end the answer and are no part of its text.
    stop : tuple of str
        Strings that end the answer and are no part of its text.
    """

    def __init__(self, tokenizer, stop_ids=(), stop=()):
        self._detokenizer, self._stop_ids, self._stop = (
            Detokenizer(tokenizer) if tokenizer else None,
            set(stop_ids),
            stop,
        )
        self._held, self.ended = "", False

    def push(self, token):
        """Take a token; return the text that is now certain to belong to the answer, and set
        `ended` at its end.
        """
        if int(token) in self._stop_ids:
            return self.close()
        if self._detokenizer is None:
            return ""
        return self._cut(self._detokenizer.push(token))

    def close(self):
        """End the answer; return what was held back."""
        if self.ended:
            return ""
        text = self._cut(self._detokenizer.flush()) if self._detokenizer else ""
        text, self._held, self.ended = text + (self._held if not self.ended else ""), "", True
        return text

    def _cut(self, piece):
        text = self._held + piece
        starts = [at for at in map(text.find, self._stop) if at >= 0]
        if starts:
            self._held, self.ended = "", True
            return text[: min(starts)]
        n_held = max(
            (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]
