"""What can be done with a row: generate, chat, score, embed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from npllm.batch.settings import settings_of
from npllm.config.strict_json import quote
from npllm.decoding.keywords import GenerateArguments
from npllm.decoding.options import resolve_options
from npllm.decoding.prompt import is_chat, read_prompt
from npllm.encoder import Encoder
from npllm.errors import NpllmTypeError, NpllmValueError

__all__ = ["FIELDS", "Item", "TASKS", "Task", "make_task"]

FIELDS = {"generate": "prompt", "chat": "messages", "score": "text", "embed": "text"}
TASKS = tuple(FIELDS)
TAKEN = frozenset(GenerateArguments.__annotations__) - {
    "attention_mask",
    "cache",
    "logits_processors",
    "num_beams",
    "return_dict_in_generate",
    "tools",
    "top_logprobs",
}
"""Options of `generate` that can be asked for of every row."""


class Item(NamedTuple):
    """A row's content, as token ids."""

    key: str
    ids: list[int]


@dataclass(frozen=True)
class Task:
    """What is asked of every row.

    Attributes
    ----------
    name : str
        One of TASKS.
    model : Model or Encoder
    options : dict
        Of `generate`, for "generate" and "chat".
    """

    name: str
    model: Any
    options: dict[str, Any]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that an answer depends on besides the row; computed once, since it reads the weights.

        See `npllm.batch.settings.settings_of`.
        """
        return settings_of(self.name, self.model, self.options)

    def content(self, data: Mapping[str, Any]) -> Any:
        """What a row is answered by.

        Raises
        ------
        NpllmValueError
            When the row lacks it.
        """
        name = FIELDS[self.name]
        if name not in data:
            raise NpllmValueError(f'a row for {self.name} must have "{name}", got {quote(data)}')
        return data[name]

    def ids(self, content: Any) -> list[int]:
        """The token ids of a row's content.

        Raises
        ------
        NpllmError
            For what is no prompt, and where it does not fit.
        """
        if self.name == "embed":
            return self.model.encode(_as_text(content))
        if self.name == "score":
            ids = self.model.require_tokenizer().encode(_as_text(content))
            if len(ids) < 2:
                raise NpllmValueError(f"a text to score must have 2 tokens, got {len(ids)}")
            return ids
        if (self.name == "chat") != is_chat(content) or not isinstance(content, str | list):
            raise NpllmTypeError(f"{FIELDS[self.name]} must be {WANTED[self.name]}")
        return read_prompt(self.model, content).ids[0].tolist()


WANTED = {"generate": "a string", "chat": "a list of messages"}


def _as_text(content: Any) -> str:
    if not isinstance(content, str):
        raise NpllmTypeError(f"text must be a string, got {quote(content)}")
    return content


def make_task(name: str, model: Any, **options: Any) -> Task:
    """Check what is asked for.

    Parameters
    ----------
    name : str
        One of TASKS.
    model : Model or Encoder
    **options
        Those of TAKEN, as in `generate`; seed: default 0, so that an answer that is sampled can be
        repeated.

    Raises
    ------
    NpllmTypeError, NpllmValueError
        For another task, a model of the wrong kind, and wrong options.
    """
    if name not in TASKS:
        raise NpllmValueError(f"task must be one of {', '.join(TASKS)}, got {quote(name)}")
    if isinstance(model, Encoder) != (name == "embed"):
        kind = "an encoder" if name == "embed" else "a causal language model"
        raise NpllmTypeError(f"the task {name} needs {kind}, got {model!r}")
    if name in ("score", "embed"):
        if options:
            raise NpllmTypeError(f"the task {name} takes no option, got {', '.join(options)}")
        return Task(name, model, {})
    _check_names(options)
    given: dict[str, Any] = {"seed": 0}
    for key, value in options.items():
        if value is not None or key == "max_new_tokens":
            given[key] = value
    resolve_options(model.generation_config, **given)
    return Task(name, model, _plain(given))


def _check_names(options: dict[str, Any]) -> None:
    """Raise for options that rows would be answered without."""
    others = sorted(set(options) - TAKEN)
    if others:
        raise NpllmTypeError(
            f"batch has no option {', '.join(others)}; it has {', '.join(sorted(TAKEN))}"
        )


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Options as JSON has them; raise for what cannot be hashed."""
    try:
        return dict(json.loads(json.dumps(options, allow_nan=False)))
    except (TypeError, ValueError):
        raise NpllmTypeError(
            "options of a batch must be numbers, strings and lists of them, so that answers can "
            f"be found again, got {quote(options)}"
        ) from None
