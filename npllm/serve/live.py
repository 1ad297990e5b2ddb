"""A request in progress: its jobs, and their events as the event loop receives them."""

import asyncio
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from npllm.continuous_batching.engine import Engine
from npllm.continuous_batching.job import Event, Job
from npllm.serve.answers import Answers, Choice
from npllm.serve.parsing import Ask

__all__ = ["Live"]


class Live:
    """The jobs of one request; `abort` frees their rows.

    Parameters
    ----------
    engine : Engine
    answers : Answers

    Raises
    ------
    QueueFullError
        When the queue is full.
    """

    def __init__(self, engine: Engine, answers: Answers):
        self.answers = answers
        self._events: asyncio.Queue[tuple[Choice, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        deadline = time.monotonic() + engine.timeout
        self._jobs = [self._job(answers.ask, choice, deadline) for choice in answers.choices]
        engine.submit(self._jobs)

    def _job(self, ask: Ask, choice: Choice, deadline: float) -> Job:
        return Job(
            choice.prompt,
            ask.options[choice.index // ask.n],
            partial(self._deliver, choice),
            draw=choice.index % ask.n,
            logprobs=ask.logprobs,
            echo=ask.echo and ask.logprobs,
            deadline=deadline,
        )

    def _deliver(self, choice: Choice, event: Event) -> None:
        """Hand an event from the engine's thread to the event loop."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (choice, event))
        except RuntimeError:  # the loop has ended, and with it the connection
            self.abort()

    def abort(self) -> None:
        """Give up what is not done."""
        for job in self._jobs:
            job.cancel()

    async def events(self) -> AsyncIterator[tuple[Choice, Event]]:
        """Yield events until every choice has ended; raise the error of one that failed."""
        n_left = len(self._jobs)
        try:
            while n_left:
                choice, event = await self._events.get()
                if event.error is not None:
                    raise event.error
                n_left -= event.finish_reason is not None
                yield choice, event
        finally:
            self.abort()

    async def whole(self) -> dict[str, Any]:
        """Wait for all answers."""
        async for choice, event in self.events():
            choice.add(event)
        return self.answers.whole()
