"""What a user writes: tests/test_typing.py checks it with mypy, and runs it."""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

import npllm
from npllm import ops, testing


def scaled_norm(x: Any, weight: Any, eps: float) -> Any:
    return ops.rms_norm(x, weight, eps)


def halved(_ids: Any, logits: Any) -> Any:
    return logits * np.float32(0.5)


def main(path: str) -> list[str]:
    model: npllm.Model = npllm.load(path, backend="numpy", dtype="float32")
    ids = np.array([[5, 6, 7, 8]])
    answer = model.generate(ids, max_new_tokens=3, top_k=5, seed=1, logits_processors=[halved])
    text: Iterator[str] = model.stream("hello", max_new_tokens=4, temperature=0.5, seed=2)
    for step in model.stream("hello", max_new_tokens=2, details=True, top_logprobs=1):
        logprob: float = step.token.logprob
        assert logprob <= 0
    cache = model.new_cache(n_batch=1)
    first, second = (model(part, cache=cache, logits_to_keep=1) for part in (ids, ids[:, :1]))
    other = model.with_ops(rms_norm=scaled_norm)
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    weight, visible = np.ones(4, np.float32), ops.mask.causal() & ops.mask.sliding_window(2)
    seen = ops.mask.to_bool(visible, 3, 3)
    inputs = {"x": x, "weight": weight, "eps": 1e-5}
    verdict = testing.verdict("rms_norm", inputs, ops.rms_norm(x, weight, eps=1e-5))
    n_cached: int = cache.n_ctx
    status: str = verdict.status
    shapes = [answer.shape, first.shape, second.shape, other(ids).shape, seen.shape, n_cached]
    return [*map(str, shapes), status, "".join(text)]


if __name__ == "__main__":
    print(*main(sys.argv[1]), sep="\n")
