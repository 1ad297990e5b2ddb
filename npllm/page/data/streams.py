"""Streams side by side: what an edited token changes; and the KV cache, measured."""

import time
from typing import Any

import numpy as np

from npllm import ops
from npllm.analysis.cost import kv_cache_bytes
from npllm.arrays import to_numpy
from npllm.page.data.rounding import significant
from npllm.page.run import Run
from npllm.tracing.record import trace

__all__ = ["cache", "other_heads", "streams"]

Array = Any
Data = dict[str, Any]

N_TIMED = 12  # tokens that are decoded with the cache and without


def streams(run: Run) -> Data:
    """Give both runs, with the prompt and with its last token edited, and where they differ."""
    edited = _edited(run)
    outputs = ["model.embed_tokens", *_outputs(run)]
    other = trace(run.model, np.array([edited]), names=[*outputs, "lm_head"])
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
        "best": best[0],
        "edited_best": best[1],
        "context_length": run.model.config.context_length,
    }


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
    for use_cache in (True, False):  # the first call may compile kernels
        _seconds(run.model, run.ids, min(2, n_new), use_cache=use_cache)
    timed = {
        name: significant(np.cumsum(_seconds(run.model, run.ids, n_new, use_cache=name == "with")))
        for name in ("with", "without")
    }
    return {
        "tokens": [run.token(i) for i in run.ids],
        "bytes_per_token": per_token,
        "window": config.sliding_window,
        "n_layer": config.num_hidden_layers,
        "n_kv_head": config.num_key_value_heads,
        "d_head": config.head_dim,
        "context_length": config.context_length,
        "ops": run.model.ops.name,
        **timed,
    }


def _seconds(model: Any, ids: list[int], n_new: int, *, use_cache: bool) -> list[float]:
    """Time n_new greedy steps, one by one."""
    kept = model.new_cache() if use_cache else None
    text = new = np.array([ids])
    times = []
    for _ in range(n_new):
        start = time.perf_counter()
        best = ops.greedy(to_numpy(model(new, cache=kept, logits_to_keep=1))[:, -1])[:, None]
        text = np.concatenate([text, best], axis=1)
        new = best if use_cache else text
        times.append(time.perf_counter() - start)
    return times


def other_heads(run: Run) -> Data:
    """Give which streams an edited last token changes under a causal and a bidirectional mask."""
    pair = np.array([run.ids, _edited(run)])
    changes = {}
    for name, rule in (("causal", ops.mask.causal()), ("bidirectional", ops.mask.bidirectional())):
        hidden = to_numpy(run.model.with_mask(rule).model(pair))
        changes[name] = significant(np.abs(hidden[0] - hidden[1]).max(axis=-1), 3)
    config = run.model.config
    return {
        "tokens": [run.token(i) for i in run.ids],
        "change": changes,
        "d_model": config.hidden_size,
        "n_vocab": config.vocab_size,
        "n_seq": len(run.ids),
    }
