"""Tokens per second: of a whole run, of prefill and decoding, of one set of operations beside
another.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from npllm import kernels, ops
from npllm.analysis.machine import peak_memory
from npllm.analysis.profiling import seconds
from npllm.arrays import array_namespace, backend_name, to_numpy
from npllm.decoding.details import Token
from npllm.decoding.loop import Generation
from npllm.decoding.loop import start as start_generation
from npllm.kernels.compilation import compile_seconds, working_seconds
from npllm.model import Model
from npllm.progress import progress_bar, stderr_is_terminal, working

__all__ = ["compare_sets", "generate_timed", "speed", "warm_up"]

Array = Any
LONG_PROMPT = 512  # new tokens from which on a bar is drawn


def generate_timed(
    model: Model,
    prompt: Any,
    write: Callable[[str], object],
    *,
    echo: bool = False,
    details: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Generate, hand every piece of text to `write` as it comes, and time it.

    Parameters
    ----------
    model : Model
    prompt : str or list of messages
    write : function (str)
    echo : bool
        Write a text prompt before the first piece.
    details : bool
        Also return "tokens" (id, text, logprob, top_logprobs), "finish_reason" and "seed".
    **options
        As in `Model.generate`.

    Returns
    -------
    stats : dict
        Seconds and tokens/s of the prompt (up to the first new token) and of the generation after
        it, in which the compilation of kernels is not counted; its seconds; peak memory in bytes.
        A rate is None where it cannot be measured: of the prompt without a new token, of the
        generation with fewer than two.
    """
    run = start_generation(model, prompt, **options)
    recorder = run.record() if details else None
    pending = prompt if echo and isinstance(prompt, str) else ""  # lines on stderr come before it
    compiled_before = compile_seconds()
    start, ticks, text = working_seconds(), [], []
    try:
        for (piece,) in _announced(run):
            ticks.append(working_seconds())
            text.append(piece)
            write(pending + piece)
            pending = ""
    finally:
        (reason,) = run.finish_reasons()
        text.extend(run.close())
        write(pending + text[-1])
    return {
        "text": "".join(text),
        **_rates(run.sequences.n_prompt, start, ticks),
        "compile_seconds": compile_seconds() - compiled_before,
        "finish_reason": reason,
        "seed": run.seed,
        **({} if recorder is None else {"tokens": _token_facts(model, recorder.tokens[0])}),
    }


@contextmanager
def _reading(run: Generation) -> Iterator[None]:
    """Show how far the reading of a long prompt is: by layers where the cache is the caller's."""
    n_prompt, cache = run.sequences.n_prompt, run.options.cache
    n_new = n_prompt - (0 if cache is None else cache.n_ctx)
    if cache is None or n_new < LONG_PROMPT or not stderr_is_terminal():
        with working(f"reading a prompt of {n_prompt} tokens"):
            yield
        return
    total = run.model.config.num_hidden_layers * -(-n_new // run.model.prefill_chunk)
    with progress_bar(total, f"reading {n_prompt} tokens", unit="layer") as advance:
        cache.watch = lambda _: advance(1)
        try:
            yield
        finally:
            cache.watch = None


def _token_facts(model: Model, tokens: Iterable[Token]) -> list[dict[str, Any]]:
    """Tokens as plain data, with their text."""
    text = model.require_tokenizer().token_text
    return [
        {
            "id": token.id,
            "text": text(token.id),
            "logprob": token.logprob,
            "top_logprobs": [
                {"id": i, "text": text(i), "logprob": value} for i, value in token.top_logprobs
            ],
        }
        for token in tokens
    ]


def _announced(run: Generation) -> Iterator[list[str]]:
    """The steps of a run; while a long prompt is read, lines on stderr say so."""
    steps = iter(run)
    with _reading(run):
        first = next(steps, None)
    if first is not None:
        yield first
    yield from steps


def _rates(n_prompt: int, start: float, ticks: list[float]) -> dict[str, Any]:
    """Seconds and tokens/s, from the start of a run and the time of each new token."""
    first = ticks[0] - start if ticks else 0.0
    rest = ticks[-1] - ticks[0] if ticks else 0.0
    return {
        "prompt_tokens": n_prompt,
        "prompt_seconds": first,
        "prompt_tokens_per_second": n_prompt / first if first else None,
        "new_tokens": len(ticks),
        "new_seconds": rest,
        "new_tokens_per_second": (len(ticks) - 1) / rest if rest else None,
        "peak_bytes": peak_memory(),
    }


def warm_up(model: Model) -> float:
    """Run a prompt and a token through a model, so that what they need is compiled.

    Parameters
    ----------
    model : Model

    Returns
    -------
    seconds : float
        Of compilation; 0 where everything was compiled before.
    """
    before, ids = compile_seconds(), np.zeros((1, 32), np.int64)
    cache = model.new_cache()
    for new in (ids, ids[:, :1]):
        model(new, cache=cache, logits_to_keep=1)
    return compile_seconds() - before


def speed(
    model: Model, *, n_prompt: int = 51, n_new: int = 32, repeat: int = 3, seed: int = 0
) -> dict[str, Any]:
    """Measure prefill, and decoding with and without the cache, on random token ids.

    Parameters
    ----------
    model : Model
    n_prompt, n_new, repeat, seed : int

    Returns
    -------
    facts : dict
        Medians over `repeat` runs after a warm-up, in tokens per second.  A run ends when its
        logits are on the host.
    """
    ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, (1, n_prompt))
    to_numpy(model(ids[:, :2]))  # warm up: the first touch reads the mapped weights
    runs = {
        "prefill": (n_prompt, lambda: to_numpy(model(ids, logits_to_keep=1))),
        "decode_cached": (n_new, lambda: _decode(model, ids, n_new, use_cache=True)),
        "decode_uncached": (n_new, lambda: _decode(model, ids, n_new, use_cache=False)),
    }
    rates = {
        name: count / statistics.median(seconds(run) for _ in range(repeat))
        for name, (count, run) in runs.items()
    }
    return {
        "n_prompt": n_prompt,
        "n_new": n_new,
        "repeat": repeat,
        "ops": model.ops.name,
        "tokens_per_second": rates,
        "cache_speedup": rates["decode_cached"] / rates["decode_uncached"],
        "peak_bytes": peak_memory(),
    }


def _decode(model: Model, ids: Array, n_new: int, use_cache: bool) -> None:
    """Run n_new greedy steps without stop ids: the same number of tokens in every run."""
    cache = model.new_cache() if use_cache else None
    new = ids
    for _ in range(n_new):
        logits = to_numpy(model(new, cache=cache, logits_to_keep=1))
        token = ops.greedy(logits[:, -1])[:, None]
        new = token if use_cache else np.concatenate([new, token], axis=1)


def compare_sets(model: Model, others: Iterable[str], **sizes: Any) -> dict[str, Any]:
    """Measure a model on its own set of operations and on others, one after another.

    Parameters
    ----------
    model : Model
    others : iterable of str
        Names of sets, see `npllm.kernels.choose_ops`.
    **sizes
        As in `speed`.

    Returns
    -------
    facts : dict
        "sets": what `speed` found, in the order measured, the model's own set first; "speedup": the
        tokens per second of the model's own set over those of each other, by the name of that set
        and of what was measured.
    """
    backend = backend_name(array_namespace(model.params.embed_tokens))
    models = [model, *(model.on(kernels.choose_ops(name, backend)) for name in others)]
    sets = [speed(one, **sizes) for one in models]
    own = sets[0]["tokens_per_second"]
    speedup = {
        facts["ops"]: {
            name: own[name] / value for name, value in facts["tokens_per_second"].items()
        }
        for facts in sets[1:]
    }
    return {"sets": sets, "speedup": speedup}
