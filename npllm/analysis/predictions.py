"""What a model predicts, as plain data: the next tokens, the score of every token of a text."""

import math
from typing import Any

import numpy as np

from npllm.analysis.score import score
from npllm.decoding.loop import last_logits
from npllm.decoding.prompt import read_prompt, require_tokenizer
from npllm.decoding.sampler_chain import next_token_distribution
from npllm.decoding.sequences import seen_tokens
from npllm.kernels.compilation import working_seconds
from npllm.model import Model

__all__ = ["next_tokens", "perplexity_facts", "score_facts"]


def next_tokens(
    model: Model, prompt: Any, n: int, *, order: str = "transformers", **filters: Any
) -> list[dict[str, Any]]:
    """List the n most likely next tokens after a prompt.

    Parameters
    ----------
    model : Model
    prompt : str or list of messages
    n : int
    order : str
        See `npllm.next_token_distribution`.
    **filters
        temperature, top_k, top_p, min_p, repetition_penalty; None: off.

    Returns
    -------
    rows : list of dict
        Each {"id", "text", "logit", "probability"}, the most likely first; the logit is the model's
        own, the probability that after the filters.  Tokens that a filter excludes are left out.
    """
    ids, valid, *_ = read_prompt(model, prompt)
    logits = last_logits(model, ids, attention_mask=valid)
    seen = seen_tokens(ids, valid, model.config.vocab_size)
    probabilities = next_token_distribution(logits, order=order, seen=seen, **filters)[0]
    best = [i for i in np.lexsort((-logits[0], -probabilities))[:n] if probabilities[i] > 0]
    return [
        {
            "id": int(i),
            "text": require_tokenizer(model).token_text(i),
            "logit": float(logits[0, i]),
            "probability": float(probabilities[i]),
        }
        for i in best
    ]


def score_facts(model: Model, text: str, **options: Any) -> dict[str, Any]:
    """List every token of a text with its log-probability: what `npllm score` reports.

    Parameters
    ----------
    model : Model
    text : str
    **options
        As in `npllm.analysis.score.score`.

    Returns
    -------
    facts : dict
        "tokens": a list of {"id", "text", "log_probability"}, None for the first; "log_probability"
        and "perplexity" of the whole.
    """
    scored = score(model, text, **options)
    log_probs = [None, *map(float, scored.log_probs)]
    return {
        "tokens": [
            {"id": int(i), "text": require_tokenizer(model).token_text(i), "log_probability": value}
            for i, value in zip(scored.ids, log_probs, strict=True)
        ],
        "log_probability": scored.total,
        "perplexity": scored.perplexity,
    }


def perplexity_facts(model: Model, text: str, **options: Any) -> dict[str, Any]:
    """Score a text and time it: what `npllm perplexity` reports.

    Parameters
    ----------
    model : Model
    text : str
    **options
        As in `npllm.analysis.score.score`.

    Returns
    -------
    facts : dict
        `bits_per_byte` is the negative log-probability in bits over the bytes of the text in UTF-8;
        `tokens_per_second` counts scored tokens.
    """
    begin = working_seconds()
    scored = score(model, text, **options)
    seconds = working_seconds() - begin
    n = len(scored.log_probs)
    return {
        "perplexity": scored.perplexity,
        "tokens": n + 1,
        "scored_tokens": n,
        "log_probability": scored.total,
        "bits_per_byte": -scored.total / math.log(2) / len(text.encode()),
        "seconds": seconds,
        "tokens_per_second": n / seconds,
    }
