"""Packing: documents in one row, and what leaks without the document mask."""

from typing import Any

import numpy as np

from npllm import ops
from npllm.analysis.packing import layout, pack, score_packed, utilisation
from npllm.arrays import to_numpy
from npllm.page.data.rounding import significant
from npllm.page.run import Run

__all__ = ["packing"]

Array = Any
Data = dict[str, Any]

TEXTS = (
    "One, two, three, four.",
    "The dog chased the squirrel because it",
    "The Shawshank Redemption is a film.",
    "Dear Sarah,",
)


def packing(run: Run) -> Data:
    """Give documents in rows, and their log-probabilities alone, packed, and without the mask."""
    n_most = run.model.config.context_length
    documents = [ids for ids in _documents(run) if len(ids) <= n_most]
    lengths = [len(ids) for ids in documents]
    capacity = min(max(lengths) + 8, n_most)
    rows = pack(lengths, capacity)
    together = _that_fit([n for row in rows for n in row], lengths, n_most)
    chosen = [documents[n] for n in together]
    total = sum(map(len, chosen))
    alone = [score_packed(run.model, [ids])[0] for ids in chosen]
    masked = score_packed(run.model, chosen, capacity=total)
    leaky = _without_mask(run.model, chosen)
    return {
        "documents": [[run.token(i) for i in ids] for ids in documents],
        "capacity": capacity,
        "rows": rows,
        "used": significant(utilisation(rows, lengths)),
        "unpacked": significant(sum(lengths) / (len(lengths) * max(lengths))),
        "together": together,
        "alone": [significant(x, 7) for x in alone],
        "masked": [significant(x, 7) for x in masked],
        "leaky": [significant(x, 7) for x in leaky],
        "leak": _largest(alone, leaky),
        "leak_masked": _largest(alone, masked),
    }


def _that_fit(order: list[int], lengths: list[int], n_most: int, n_documents: int = 3) -> list[int]:
    """The first few documents that fit one row of n_most tokens."""
    chosen: list[int] = []
    for n in order:
        used = sum(lengths[number] for number in chosen)
        if len(chosen) < n_documents and used + lengths[n] <= n_most:
            chosen.append(n)
    return chosen


def _documents(run: Run) -> list[list[int]]:
    """The prompt and three other short texts; of a model without tokenizer, parts of the prompt."""
    if run.model.tokenizer is None:
        return [run.ids, run.ids[:2] or run.ids, run.ids[-3:]]
    others = [run.model.tokenizer.encode(text) for text in TEXTS]
    return [run.ids, *(ids for ids in others if ids and ids != run.ids)][:4]


def _without_mask(model: Any, documents: list[list[int]]) -> list[Array]:
    """Log-probabilities in one row where each document sees those before it.

    The positions restart with each document, which does not keep them apart.
    """
    order = list(range(len(documents)))
    tokens, positions, _ = layout([order], documents)
    log_p = ops.log_softmax(
        np.asarray(to_numpy(model(tokens, position_ids=positions))[0], np.float64)
    )
    scores, start = [], 0
    for ids in documents:
        places = start + np.arange(len(ids) - 1)
        scores.append(log_p[places, ids[1:]])
        start += len(ids)
    return scores


def _largest(one: list[Array], other: list[Array]) -> float:
    pairs = [np.abs(a - b).max() for a, b in zip(one, other, strict=True) if len(a)]
    return significant(max(pairs, default=0.0), 3)
