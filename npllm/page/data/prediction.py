"""What the model predicts: the logits, and a beam search as a tree."""

from typing import Any

import numpy as np

from npllm import ops
from npllm.decoding.beam import search
from npllm.decoding.options import resolve_options
from npllm.decoding.prompt import read_prompt
from npllm.page.data.rounding import significant
from npllm.page.run import Run

__all__ = ["decoding", "logits"]

Array = Any
Data = dict[str, Any]

N_NAMED = 200  # tokens whose text is in the page
N_BEAMS, N_STEPS = 3, 4


def logits(run: Run) -> Data:
    """Give the logits behind the last token: the best with their texts, the others as numbers.

    All of them are there, so that the page computes the exact softmax and its filters.
    """
    x = np.asarray(run.logits(), np.float64)
    order = np.argsort(-x, kind="stable")
    p = ops.softmax(x)
    named = [
        run.token(i) | {"logit": significant(x[i], 7), "p": significant(p[i])}
        for i in order[:N_NAMED]
    ]
    return {
        "named": named,
        "others": np.round(x[order[N_NAMED:]], 3).tolist(),
        "last": run.token(run.ids[-1]),
        "n_vocab": len(x),
    }


def decoding(run: Run) -> Data:
    """Give a beam search as a tree: every beginning that was kept for a step, and its score."""
    n_beam = min(N_BEAMS, run.model.config.vocab_size)
    n_new = min(N_STEPS, run.model.config.context_length - len(run.ids))
    kept: dict[tuple[int, ...], float] = {}

    def watch(answers: Array, scores: Array) -> None:
        kept.update(zip(map(tuple, answers.tolist()), scores.tolist(), strict=True))

    found = _search(run, n_beam, n_new, watch)
    sequences = found.sequences[0, :, len(run.ids) :].tolist()
    answers = [
        {"tokens": new, "score": score}
        for new, score in zip(sequences, found.scores[0].tolist(), strict=True)
        if np.isfinite(score)
    ]
    eos = set(run.model.generation_config.eos_token_id)
    for answer in answers:
        answer["tokens"] = _until(answer["tokens"], eos)
        kept[tuple(answer["tokens"])] = float(answer["score"])
    return {
        "n_beam": n_beam,
        "nodes": _nodes(run, kept),
        "answers": [
            {"text": _joined(run, a["tokens"]), "score": significant(a["score"], 7)}
            for a in answers
        ],
    }


def _search(run: Run, n_beam: int, n_new: int, watch: Any) -> Any:
    """Search without a length penalty, so that a score is a sum of log-probabilities."""
    options = resolve_options(
        run.model.generation_config,
        do_sample=False,
        num_beams=n_beam,
        num_return_sequences=n_beam,
        max_new_tokens=n_new,
        length_penalty=0.0,
        early_stopping=False,
    )
    return search(run.model, read_prompt(run.model, np.array([run.ids])), options, watch)


def _until(tokens: list[int], eos: set[int]) -> list[int]:
    """The tokens up to the first stop id, which is kept; what follows it fills the row."""
    ends = [n for n, token in enumerate(tokens) if token in eos]
    return tokens[: ends[0] + 1] if ends else tokens


def _nodes(run: Run, kept: dict[tuple[int, ...], float]) -> list[Data]:
    """The beginnings as nodes: parents before children, siblings by score."""
    order = sorted(kept, key=lambda answer: (len(answer), -kept[answer]))
    number = {answer: n for n, answer in enumerate(order)}
    return [
        run.token(answer[-1])
        | {
            "parent": number.get(answer[:-1], -1),
            "depth": len(answer),
            "score": significant(kept[answer], 7),
        }
        for answer in order
    ]


def _joined(run: Run, tokens: list[int]) -> str:
    return "".join(map(run.text, tokens)) if run.model.tokenizer else " ".join(map(str, tokens))
