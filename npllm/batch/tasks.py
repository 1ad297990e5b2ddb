"""What can be done with a row: generate, chat, score, embed.

Each answer is the one that the row gets alone.
"""

import json
import queue
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from npllm import __version__
from npllm.analysis.score import score
from npllm.batching.engine import Engine
from npllm.batching.job import Event, Job
from npllm.cache.owner import fingerprint
from npllm.config.strict_json import quote
from npllm.decoding.options import Options, resolve_options
from npllm.decoding.prefill import FEW_ROWS
from npllm.decoding.prompt import is_chat, read_prompt
from npllm.encoder import Encoder
from npllm.errors import NpllmError, NpllmTypeError, NpllmValueError

__all__ = ["FIELDS", "Item", "TASKS", "Task", "answers", "make_task"]

FIELDS = {"generate": "prompt", "chat": "messages", "score": "text", "embed": "text"}
TASKS = tuple(FIELDS)
N_AHEAD = 64  # jobs that wait in the engine
GROUP_TOKENS = 2048  # that an encoder reads together

Answer = dict[str, Any]


class Item(NamedTuple):
    """A row's content, as token ids."""

    key: str
    ids: list[int]


class Task(NamedTuple):
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

    @property
    def settings(self) -> dict[str, Any]:
        """All that an answer depends on besides the row."""
        model = self.model
        texts = [] if model.tokenizer is None else [model.tokenizer.backend.to_str()]
        template = getattr(model.tokenizer, "chat_template", None)
        decoding = () if self.name in ("score", "embed") else (repr(model.generation_config),)
        return {
            "task": self.name,
            "npllm": __version__,
            "weights": fingerprint(model.params),
            "config": repr(model.config),
            "ops": [model.ops.name, model.ops.activations],
            "tokenizer": [*texts, template if self.name == "chat" else None],
            "options": json.loads(json.dumps(self.options)),
            "defaults": decoding,
        }

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
        As in `generate`; seed: default 0, so that an answer that is sampled can be repeated.

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
    given: dict[str, Any] = {"seed": 0}
    for key, value in options.items():
        if value is not None or key == "max_new_tokens":
            given[key] = value
    resolve_options(model.generation_config, **given)
    return Task(name, model, given)


def answers(task: Task, items: Iterable[Item]) -> Iterator[tuple[str, Answer]]:
    """Answer items, the longest first; yield each key with its answer as it comes.

    An answer {"error": ...} is one that failed by itself.
    """
    ordered = sorted(items, key=lambda item: -len(item.ids))
    run: Callable[..., Iterator[tuple[str, Answer]]] = {
        "score": _scores,
        "embed": _embeddings,
    }.get(task.name, _texts)
    yield from run(task, ordered)


def _scores(task: Task, items: list[Item]) -> Iterator[tuple[str, Answer]]:
    """Score one text after another."""
    for item in items:
        try:
            scored = score(task.model, item.ids)
        except NpllmError as error:
            yield item.key, {"error": str(error)}
            continue
        yield (
            item.key,
            {
                "log_probability": scored.total,
                "perplexity": scored.perplexity,
                "n_tokens": len(item.ids),
            },
        )


def _embeddings(task: Task, items: list[Item]) -> Iterator[tuple[str, Answer]]:
    """Embed texts of one length together."""
    for group in _groups(items):
        try:
            vectors = task.model.embed_ids([item.ids for item in group])
        except NpllmError as error:
            yield from ((item.key, {"error": str(error)}) for item in group)
            continue
        for item, vector in zip(group, vectors, strict=True):
            yield item.key, {"embedding": vector.tolist(), "n_tokens": len(item.ids)}


def _groups(items: list[Item]) -> Iterator[list[Item]]:
    """Items of one length: without padding, and in the kind of product that takes each alone."""
    group: list[Item] = []
    for item in items:
        n = len(item.ids)
        most = FEW_ROWS if n <= FEW_ROWS else GROUP_TOKENS
        if group and (len(group[0].ids) != n or n * (len(group) + 1) > most):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _texts(task: Task, items: list[Item]) -> Iterator[tuple[str, Answer]]:
    """Generate by continuous batching; each answer comes when it is complete."""
    done: queue.SimpleQueue[tuple[Item, Event]] = queue.SimpleQueue()
    engine = Engine(task.model, max_queue=N_AHEAD).start()
    parts: dict[str, list[Event]] = {}
    waiting = iter(items)
    try:
        n_left = _submit(task, engine, waiting, N_AHEAD, done)
        while n_left:
            item, event = done.get()
            parts.setdefault(item.key, []).append(event)
            if event.error is None and event.finish_reason is None:
                continue
            n_left += _submit(task, engine, waiting, 1, done) - 1
            yield item.key, _answer(item, parts.pop(item.key))
    finally:
        engine.stop()


def _submit(task: Task, engine: Engine, items: Iterator[Item], n: int, done: Any) -> int:
    """Give the engine up to n more items; return how many there were."""
    jobs = []
    for item in items:
        options = _options(task, len(item.ids))
        jobs.append(Job(item.ids, options, partial(_put, done, item)))
        if len(jobs) == n:
            break
    engine.submit(jobs)
    return len(jobs)


def _options(task: Task, n_prompt: int) -> Options:
    """The options of one row: as many new tokens as fit."""
    model, given = task.model, dict(task.options)
    n_left = model.config.context_length - n_prompt
    wanted = given.pop("max_new_tokens", 50)
    n_new = n_left if wanted is None else min(wanted, n_left)
    return resolve_options(model.generation_config, max_new_tokens=n_new, **given)


def _put(done: Any, item: Item, event: Event) -> None:
    done.put((item, event))


def _answer(item: Item, events: list[Event]) -> Answer:
    """What is written of a complete answer."""
    last = events[-1]
    if last.error is not None:
        if not isinstance(last.error, NpllmError):
            raise last.error
        return {"error": str(last.error)}
    return {
        "text": "".join(event.text for event in events),
        "finish_reason": last.finish_reason,
        "n_prompt_tokens": len(item.ids),
        "n_tokens": sum(len(event.tokens) for event in events),
    }
