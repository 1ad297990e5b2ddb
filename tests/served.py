"""A tiny model behind the engine and behind HTTP, and what the tests of both ask of it."""

import contextlib
import queue
import time

import numpy as np
import tiny

import npllm
from npllm.continuous_batching.engine import Engine
from npllm.continuous_batching.job import Job
from npllm.decoding.options import resolve_options

CONTEXT = 256


def load(folder, **changes):
    """A tiny model with text, a chat template, no stop id and 256 tokens of context."""
    settings = {
        "tokenizer": tiny.byte_level(),
        "settings": tiny.SETTINGS,
        "vocab_size": 272,
        "generation": {"eos_token_id": [], "pad_token_id": 0},
        "max_position_embeddings": CONTEXT,
        "original_max_position_embeddings": CONTEXT,
    }
    return npllm.load(tiny.write_folder(folder, **settings | changes))


@contextlib.contextmanager
def engine(model, **options):
    """An engine that runs while the body does."""
    running = Engine(model, **options).start()
    try:
        yield running
    finally:
        running.stop()


class Asked:
    """A job of an engine, and the events that came."""

    def __init__(self, engine, ids, *, draw=0, echo=False, deadline=float("inf"), **options):
        resolved = resolve_options(engine.model.generation_config, num_beams=1, **options)
        self._events, self.seen = queue.Queue(), []
        self.job = Job(
            list(map(int, ids)),
            resolved,
            self._events.put,
            draw=draw,
            logprobs=True,
            echo=echo,
            deadline=deadline,
        )
        engine.submit([self.job])

    def next(self):
        """Wait for an event."""
        event = self._events.get(timeout=300)
        if event.error is not None:
            raise event.error
        self.seen.append(event)
        return event

    def answer(self):
        """Wait for the end; return the tokens."""
        while not self.seen or self.seen[-1].finish_reason is None:
            self.next()
        return [token for event in self.seen for token in event.tokens]

    def ids(self):
        """Wait for the end; return the ids."""
        return [token.id for token in self.answer()]


def alone(model, ids, **options):
    """The ids that `generate` gives for a prompt by itself."""
    return model.generate(np.array([ids]), **options)[0, len(ids) :].tolist()


def slowed(model, seconds):
    """The same model, with steps of at least so many seconds."""
    other = model.with_tokenizer(model.tokenizer)
    step = other.logits_of_rows

    def logits_of_rows(*args):
        time.sleep(seconds)
        return step(*args)

    other.logits_of_rows = logits_of_rows
    return other


def wait_until(holds, seconds=120):
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
