"""OpenAI's own changes of logits, as functions that `generate` takes as logits_processors."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from npllm.serve.errors import Refusal

__all__ = ["frequency_penalty", "logit_bias", "penalties", "presence_penalty"]

Array = Any
Processor = Callable[[Array, Array], Array]


def logit_bias(bias: Mapping[int, float]) -> Processor:
    """Return a function that adds to the logits of some tokens.

    y[..., i] = x[..., i] + bias[i]
    """
    ids = np.array(list(bias), np.int64)
    values = np.array(list(bias.values()))

    def process(_: Array, logits: Array) -> Array:
        logits[:, ids] += values.astype(logits.dtype)
        return logits

    return process


def frequency_penalty(penalty: float, n_prompt: int) -> Processor:
    """Return a function that subtracts a penalty for every time a token was generated.

        y[..., i] = x[..., i] - penalty * n_i,   n_i: how often i stands in the answer so far

    Parameters
    ----------
    penalty : float
    n_prompt : int
        Tokens of the prompt, which do not count.
    """

    def process(ids: Array, logits: Array) -> Array:
        for row, answer in zip(logits, ids[:, n_prompt:], strict=True):
            found, counts = np.unique(answer, return_counts=True)
            row[found] -= (penalty * counts).astype(row.dtype)
        return logits

    return process


def presence_penalty(penalty: float, n_prompt: int) -> Processor:
    """Return a function that subtracts a penalty once from every token that was generated.

    y[..., i] = x[..., i] - penalty * (n_i > 0)
    """

    def process(ids: Array, logits: Array) -> Array:
        for row, answer in zip(logits, ids[:, n_prompt:], strict=True):
            row[np.unique(answer)] -= row.dtype.type(penalty)
        return logits

    return process


def penalties(fields: Mapping[str, Any], n_prompt: int, n_vocab: int) -> tuple[Processor, ...]:
    """Return the functions that a request asks for.

    Raises
    ------
    Refusal
        When logit_bias names a token that the vocabulary lacks.
    """
    bias = {int(key): value for key, value in (fields.get("logit_bias") or {}).items()}
    if bias and max(bias) >= n_vocab:
        raise Refusal(
            f"logit_bias must name ids below vocab_size = {n_vocab}, got {max(bias)}",
            "logit_bias",
            "invalid_value",
        )
    found = [logit_bias(bias)] if bias else []
    if fields.get("frequency_penalty"):
        found.append(frequency_penalty(fields["frequency_penalty"], n_prompt))
    if fields.get("presence_penalty"):
        found.append(presence_penalty(fields["presence_penalty"], n_prompt))
    return tuple(found)
