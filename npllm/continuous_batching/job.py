"""One sequence that a client waits for, and what it is told of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from npllm.decoding.details import Token
from npllm.decoding.options import Options

__all__ = ["Event", "Job"]


class Event(NamedTuple):
    """What has become of a job since the last event."""

    text: str = ""  # that is certain now
    tokens: tuple[Token, ...] = ()  # generated; log-probabilities where they were asked for
    echoed: tuple[Token, ...] = ()  # of the prompt, from its second token on
    n_reused: int = 0  # tokens of the prompt that were not read again
    finish_reason: str | None = None  # of the last event
    error: Exception | None = None  # in place of all else


@dataclass(eq=False)
class Job:
    """A prompt and how it is to be continued.

    Parameters
    ----------
    ids : list of int
        The prompt.
    options : Options
        With a seed where it samples; max_new_tokens is a number.
    deliver : function (Event)
        Is called from the engine's thread; must not block.
    draw : int
        Which sequence of a batch draws the same numbers: choice k of `n` is row k of `generate`.
    logprobs : bool
        Whether log-probabilities are wanted, with options.top_logprobs of the most likely tokens.
    echo : bool
        Whether those of the prompt are wanted as well.
    deadline : float
        In time.monotonic().
    """

    ids: list[int]
    options: Options
    deliver: Callable[[Event], None]
    draw: int = 0
    logprobs: bool = False
    echo: bool = False
    deadline: float = float("inf")
    is_cancelled: bool = field(default=False, init=False)

    def cancel(self) -> None:
        """Give the job up: the engine frees its slot at the next step."""
        self.is_cancelled = True

    @property
    def is_expired(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() > self.deadline
