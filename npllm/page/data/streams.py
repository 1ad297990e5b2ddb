"""Streams side by side: what an edited token changes; and the KV cache, measured."""

import time
from functools import partial
from typing import Any

import numpy as np

from npllm import ops
from npllm.analysis.cost import kv_cache_bytes
from npllm.analysis.limits import seconds
from npllm.arrays import to_numpy
from npllm.page.data.rounding import significant
from npllm.page.run import Run
from npllm.tracing.record import trace

__all__ = ["cache", "other_heads", "streams"]

Array = Any
Data = dict[str, Any]

N_TIMED = 24  # tokens that are decoded with the cache and without
MOST_SECONDS = 6  # that they may take


def streams(run: Run) -> Data:
    """Give both runs, with the prompt and with its last token edited, and where they differ."""
    edited = _edited(run)
    outputs = ["model.embed_tokens", *_outputs(run)]
    names = [f"{name}@0" for name in (*outputs, "lm_head")]
    # one token more, so that both runs fill a cache and take the same kernels
    other = trace(run.model, np.array([edited]), names=names, max_new_tokens=1)
    change = [
        np.abs(run.value(name) - np.asarray(other[name][0], np.float64)).max(axis=-1)
        for name in outputs
    ]
    both = (run.trace["lm_head"][0], other["lm_head"][0])
    best = [[run.token(i) for i in x.argmax(axis=-1)] for x in both]
    return {
        "tokens": [run.token(i) for i in run.ids],
        "edited": run.token(edited[-1]),
        "change": significant(np.array(change), 3),
        "rounding": [significant(_rounding(run.value(name)), 3) for name in outputs],
        "best": best[0],
        "edited_best": best[1],
        "context_length": run.model.config.context_length,
    }


def _rounding(x: Array) -> float:
    """A change that float32 sums in another order may make, for streams [..., n_seq, d_model]."""
    return float(1e-5 * np.median(np.abs(x).max(axis=-1)))


def _outputs(run: Run) -> list[str]:
    return [f"model.layers.{n}" for n in range(run.model.config.num_hidden_layers)]


def _edited(run: Run) -> list[int]:
    """The prompt with another last token: what the model itself finds likeliest there."""
    if len(run.ids) == 1:
        return [(run.ids[0] + 1) % run.model.config.vocab_size]
    best = np.argsort(-run.trace["lm_head"][0, -2], kind="stable")[:2]
    return [*run.ids[:-1], int(best[0] if best[0] != run.ids[-1] else best[1])]


def cache(run: Run) -> Data:
    """Give the bytes of the cache by length, and the seconds of each token with and without it."""
    config = run.model.config
    n_new = min(N_TIMED, config.context_length - len(run.ids))
    per_token = kv_cache_bytes(config, 1)
    _times(run.model, run.ids, min(2, n_new))  # the first call may compile kernels
    timed = _times(run.model, run.ids, n_new)
    return {
        "tokens": [run.token(i) for i in run.ids],
        "bytes_per_token": per_token,
        "window": config.sliding_window,
        "n_layer": config.num_hidden_layers,
        "n_kv_head": config.num_key_value_heads,
        "d_head": config.head_dim,
        "context_length": config.context_length,
        "ops": run.model.ops.name,
        **{name: significant(np.cumsum(times)) for name, times in timed.items()},
    }


def _times(model: Any, ids: list[int], n_new: int) -> dict[str, list[float]]:
    """Time greedy steps with the cache and without, in turn, until the time that a page may take
    is used up.
    """
    kept, text, new = model.new_cache(), np.array([ids]), np.array([ids])
    times: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(n_new):
        times["without"].append(seconds(partial(_best, model, text)))
        start = time.perf_counter()
        new = _best(model, new, kept)
        times["with"].append(time.perf_counter() - start)
        text = np.concatenate([text, new], axis=1)
        if sum(map(sum, times.values())) > MOST_SECONDS:
            break
    return times


def _best(model: Any, ids: Array, cache: Any = None) -> Array:
    """The likeliest token behind a sequence: [1, 1]."""
    return ops.greedy(to_numpy(model(ids, cache=cache, logits_to_keep=1))[:, -1])[:, None]


def other_heads(run: Run) -> Data:
    """Give which streams an edited last token changes under a causal and a bidirectional mask."""
    pair = np.array([run.ids, _edited(run)])
    changes = {}
    for name, rule in (("causal", ops.mask.causal()), ("bidirectional", ops.mask.bidirectional())):
        hidden = to_numpy(run.model.with_mask(rule).model(pair))
        changes[name] = significant(np.abs(hidden[0] - hidden[1]).max(axis=-1), 3)
        rounding = significant(_rounding(hidden), 3)
    config = run.model.config
    return {
        "tokens": [run.token(i) for i in run.ids],
        "change": changes,
        "rounding": rounding,
        "d_model": config.hidden_size,
        "n_vocab": config.vocab_size,
        "n_seq": len(run.ids),
    }
