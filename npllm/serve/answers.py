"""From events to answers in OpenAI's form."""

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from npllm.continuous_batching.job import Event
from npllm.decoding.details import Token
from npllm.serve.parsing import Ask

__all__ = ["Answers", "Choice"]

MOST_BYTES = 4  # of a character in UTF-8


class Places:
    """Where each token begins in the text; the tokens of one character share its place.

    Parameters
    ----------
    tokenizer : Tokenizer or None
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer, self._at = tokenizer, 0
        self._before: list[int] = []  # a token beside which the next one keeps its space
        self._pending: list[int] = []

    def next(self, token: int) -> int:
        """Return the place of the next token."""
        if self._tokenizer is None:
            return 0
        place, self._pending = self._at, [*self._pending, token]
        text = self._decoded([*self._before, *self._pending])
        if not text.endswith("\ufffd") or len(self._pending) >= MOST_BYTES:
            self._at += len(text) - len(self._decoded(self._before))
            self._before, self._pending = [token], []
        return place

    def _decoded(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


@dataclass
class Choice:
    """One answer so far."""

    index: int
    prompt: list[int]
    is_first: bool  # of the choices of its prompt
    places: Places  # of its tokens in the text
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    echoed: list[Token] = field(default_factory=list)
    n_reused: int = 0
    finish_reason: str | None = None

    def add(self, event: Event) -> None:
        """Take note of an event."""
        self.text += event.text
        self.tokens += event.tokens
        self.echoed += event.echoed
        self.n_reused, self.finish_reason = event.n_reused, event.finish_reason


class Answers:
    """The answers to one request: all choices of all prompts.

    Parameters
    ----------
    model : Model
    name : str
        Of the model, for clients.
    ask : Ask
    """

    def __init__(self, model: Any, name: str, ask: Ask):
        self.ask, self._tokenizer = ask, model.tokenizer
        prefix, self._object = "cmpl", "text_completion"
        if ask.is_chat:
            prefix, self._object = "chatcmpl", "chat.completion"
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": name,
        }
        self.choices = [
            Choice(i * ask.n + k, ids, k == 0, Places(model.tokenizer))
            for i, ids in enumerate(ask.prompts)
            for k in range(ask.n)
        ]

    @property
    def is_done(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.finish_reason for choice in self.choices)

    def usage(self) -> dict[str, Any]:
        """Count tokens: of each prompt once, and of every choice."""
        n_prompt = sum(map(len, self.ask.prompts))
        n_new = sum(len(choice.tokens) for choice in self.choices)
        reused = sum(choice.n_reused for choice in self.choices if choice.is_first)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_new,
            "total_tokens": n_prompt + n_new,
            "prompt_tokens_details": {"cached_tokens": reused},
        }

    def whole(self) -> dict[str, Any]:
        """Write the complete answer."""
        form = self._chat_choice if self.ask.is_chat else self._text_choice
        choices = [form(choice) for choice in self.choices]
        return self._with_head(self._object, choices) | {"usage": self.usage()}

    def opening(self) -> list[dict[str, Any]]:
        """Write what a stream begins with: the role, of each choice of a chat."""
        if not self.ask.is_chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(choice.index, {"delta": delta}) for choice in self.choices]

    def piece(self, choice: Choice, event: Event) -> dict[str, Any] | None:
        """Write an event for a stream, and take note of it; None where it tells nothing."""
        is_opening = not choice.tokens and not choice.echoed
        choice.add(event)
        part = Choice(choice.index, choice.prompt, choice.is_first, choice.places)
        part.add(event)
        if not (event.text or self.ask.logprobs or event.finish_reason or self._echoes(is_opening)):
            return None
        if not self.ask.is_chat:
            return self._with_head(self._object, [self._text_choice(part, is_opening)])
        delta = {"content": event.text} if event.text or not event.finish_reason else {}
        rest = {"delta": delta, "finish_reason": event.finish_reason}
        return self._chunk(choice.index, rest | {"logprobs": self._chat_logprobs(part)})

    def closing(self) -> list[dict[str, Any]]:
        """Write what a stream ends with: the counts, where they were asked for."""
        if not self.ask.include_usage:
            return []
        kind = self._object + (".chunk" if self.ask.is_chat else "")
        return [self._with_head(kind, []) | {"usage": self.usage()}]

    def _echoes(self, is_opening: bool) -> bool:
        return self.ask.echo and is_opening

    def _with_head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"object": kind, "choices": choices}

    def _chunk(self, index: int, rest: dict[str, Any]) -> dict[str, Any]:
        """A chunk of a streamed chat."""
        choice = {"index": index, "finish_reason": None, "logprobs": None} | rest
        return self._with_head("chat.completion.chunk", [choice])

    def _chat_choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text},
            "logprobs": self._chat_logprobs(choice),
            "finish_reason": choice.finish_reason,
        }

    def _chat_logprobs(self, choice: Choice) -> dict[str, Any] | None:
        """The log-probabilities of a chat's tokens."""
        if not self.ask.logprobs:
            return None
        content = [
            self._named(token.id, token.logprob)
            | {"top_logprobs": [self._named(*pair) for pair in token.top_logprobs]}
            for token in choice.tokens
        ]
        return {"content": content, "refusal": None}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}

    def _text_choice(self, choice: Choice, is_opening: bool = True) -> dict[str, Any]:
        """A choice of /v1/completions, or a part of it."""
        echoes = self._echoes(is_opening)
        prompt = self._prompt_text(choice.prompt) if echoes else ""
        return {
            "index": choice.index,
            "text": prompt + choice.text,
            "logprobs": self._text_logprobs(choice, echoes),
            "finish_reason": choice.finish_reason,
        }

    def _prompt_text(self, ids: list[int]) -> str:
        """The text of a prompt, special tokens included."""
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _text_logprobs(self, choice: Choice, echoes: bool) -> dict[str, Any] | None:
        """The log-probabilities of tokens; that of the first token of a prompt is null."""
        if not self.ask.logprobs:
            return None
        tokens = [*choice.echoed, *choice.tokens]
        names = [self._token_text(token.id) for token in tokens]
        values: list[Any] = [_finite(token.logprob) for token in tokens]
        tops: list[Any] = [self._tops(token) for token in tokens]
        ids = [token.id for token in tokens]
        if echoes:
            ids = [choice.prompt[0], *ids]
            names = [self._token_text(choice.prompt[0]), *names]
            values, tops = [None, *values], [None, *tops]
        return {
            "tokens": names,
            "token_logprobs": values,
            "top_logprobs": tops if any(tops) else None,
            "text_offset": [choice.places.next(i) for i in ids],
        }

    def _tops(self, token: Token) -> dict[str, float]:
        """The most likely tokens by their texts, and the token itself; of those with one text the
        most likely.
        """
        found: dict[str, float] = {}
        for other, logprob in token.top_logprobs:
            found.setdefault(self._token_text(other), _finite(logprob))
        if found:
            found.setdefault(self._token_text(token.id), _finite(token.logprob))
        return found

    def _token_text(self, token: int) -> str:
        """A token in words: its text; where that is no whole character, its name."""
        if self._tokenizer is None:
            return f"<{token}>"
        text = self._tokenizer.token_text(token)
        name = self._tokenizer.backend.id_to_token(token)
        return name if "\ufffd" in text and name else text


def _finite(logprob: float) -> float:
    """A number that JSON can hold, in the place of -infinity."""
    return max(logprob, -9999.0)
