"""What a generation tells besides the text: ids, log-probabilities, why it ended, the seed."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from npllm import ops
from npllm.arrays import largest

__all__ = ["Answer", "GenerateOutput", "Recorder", "StreamStep", "Token"]

Array = Any


class Token(NamedTuple):
    """One generated token.

        logprob = log softmax(logits)[id]

    of the model's own logits, in float64: before constraints, logits_processors and filters.
    """

    id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]  # (id, logprob), the most likely first


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    Attributes
    ----------
    text : str or None
        Without the stop id or the stop string; None where the prompt was an array of ids.
    tokens : tuple of Token
        All that were generated, the stop id included.
    finish_reason : str
        "stop": a stop id or a stop string ended it.  "length": max_new_tokens or the context did.
    """

    text: str | None
    tokens: tuple[Token, ...]
    finish_reason: str

    @property
    def ids(self) -> Array:
        """Ids of the tokens: int64 [n_new]."""
        return np.array([token.id for token in self.tokens], dtype=np.int64)

    @property
    def logprobs(self) -> Array:
        """Log-probabilities of the tokens: float64 [n_new]."""
        return np.array([token.logprob for token in self.tokens], dtype=np.float64)


@dataclass(frozen=True)
class GenerateOutput:
    """What `generate` returns with return_dict_in_generate=True.

    Attributes
    ----------
    sequences : int64 array [n_batch, n_prompt + n_new]
        Prompts and answers; rows that ended early are filled with the pad id (else the first stop
        id).
    answers : tuple of Answer
        One for each prompt.
    seed : int or None
        Replays the draw; None where decoding was greedy.
    text : str, list of str or None
        What `generate` returns without the option, for text and messages.
    """

    sequences: Array
    answers: tuple[Answer, ...]
    seed: int | None
    text: Any


class StreamStep(NamedTuple):
    """What `stream` yields for each token with details=True."""

    text: str  # that is certain after this token: "" while a character or stop string is incomplete
    token: Token
    finish_reason: str | None  # of the last step
    seed: int | None


class Recorder:
    """Notes the tokens of a generation, with log-probabilities.

    Parameters
    ----------
    n_batch : int
    n_top : int
        How many of the most likely tokens to note at each step.
    """

    def __init__(self, n_batch: int, n_top: int):
        self.n_top = n_top
        self.tokens: list[list[Token]] = [[] for _ in range(n_batch)]

    def note(self, logits: Array, tokens: Array) -> None:
        """Take note of one step.

        Parameters
        ----------
        logits : array [n_batch, n_vocab]
            NumPy; of the model.
        tokens : integer array [n_batch]
        """
        log_probs = ops.log_softmax(logits.astype(np.float64))
        n_top = min(self.n_top, logits.shape[-1])
        best = largest(log_probs, n_top, np) if n_top else np.zeros((len(tokens), 0), np.int64)
        for row, token in enumerate(tokens):
            top = tuple((int(i), float(log_probs[row, i])) for i in best[row])
            self.tokens[row].append(Token(int(token), float(log_probs[row, token]), top))
