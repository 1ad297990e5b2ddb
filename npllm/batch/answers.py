"""Answers of items, each the one that its row gets alone."""

import math
import queue
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from npllm.analysis.score_batches import score_batches
from npllm.batch.files import Answer
from npllm.batch.tasks import Item, Task
from npllm.continuous_batching.engine import Engine
from npllm.continuous_batching.job import Event, Job
from npllm.decoding.options import Options, resolve_options
from npllm.errors import NpllmError
from npllm.kernels import FEW_ROWS

__all__ = ["answers"]

N_AHEAD = 64  # jobs that wait in the engine
GROUP_TOKENS = 2048  # that an encoder reads together


def answers(task: Task, items: Iterable[Item]) -> Iterator[tuple[str, Answer]]:
    """Answer items, the longest first; yield each key with its answer as it comes.

    An answer {"error": ...} is one that failed by itself.  A number that is not finite, which JSON
    cannot hold, is None.
    """
    ordered = sorted(items, key=lambda item: -len(item.ids))
    run: Callable[..., Iterator[tuple[str, Answer]]] = {
        "score": _scores,
        "embed": _embeddings,
    }.get(task.name, _texts)
    for key, answer in run(task, ordered):
        yield key, {name: _writable(x) for name, x in answer.items()}


def _writable(x: Any) -> Any:
    """A value of an answer; None for a number that JSON cannot hold."""
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _scores(task: Task, items: list[Item]) -> Iterator[tuple[str, Answer]]:
    """Score texts of about one length together."""
    for number, scored in score_batches(task.model, [item.ids for item in items]):
        item = items[number]
        if isinstance(scored, NpllmError):
            yield item.key, {"error": str(scored)}
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
