"""Log-probabilities of many continuations of many contexts: common prefixes are computed once."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from npllm.analysis.score import log_probs_of
from npllm.arguments import check_ids
from npllm.arrays import to_numpy
from npllm.errors import NpllmValueError
from npllm.evaluation.prefix_tree import PrefixTree, Tree, trees
from npllm.models import rope
from npllm.progress import progress_bar

__all__ = ["Continuation", "score_continuations"]

Array = Any
ROWS = 128  # positions whose logits are in memory at a time
LEAST_CAPACITY = 1024  # tokens of a pass, where the context allows


class Continuation(NamedTuple):
    """What a model says of a continuation."""

    log_probs: Array  # float64 [n]: natural logarithm, of each of its tokens
    is_greedy: bool  # whether each of its tokens is the most likely one

    @property
    def total(self) -> float:
        """The log-probability of the continuation: the sum."""
        return float(self.log_probs.sum())


def score_continuations(
    model: Any,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    capacity: int | None = None,
    progress: bool = False,
) -> list[Continuation]:
    """Compute the log-probability of each token of continuations, each after its context.

        log_probs[t] = log softmax(logits after context, continuation[:t])[continuation[t]]

    Parameters
    ----------
    model : Model
    pairs : list of (list of int, list of int)
        Context and continuation, as token ids; at least one of each.  Together at most one token
        more than the context length: the last one is scored, not read.
    capacity : int, optional
        Tokens of a pass; default: four times the longest input, at least 1,024, as far as the
        context length allows.
    progress : bool
        Show a bar on stderr where it is a terminal and tqdm is installed.

    Returns
    -------
    scores : list of Continuation
        In the order of the pairs.

    Raises
    ------
    NpllmValueError
        When a context or a continuation is empty, both do not fit the context, or a logit is NaN
        or +inf.

    Notes
    -----
    The inputs are the paths of trees (`npllm.evaluation.prefix_tree`), and a tree is one row: the
    answers of a question share its tokens, and questions share their examples.  Each token has the
    position that it has in its own sequence, and sees those of its path only, so that its scores
    equal those it has alone.  Under a mask of the caller's each sequence is computed by itself.

    The sums over tokens are in float64.

    Source: the sharing is that of tree attention, "SpecInfer" (Miao et al. 2023), section 4.2.
    """
    for context, continuation in pairs:
        _check_pair(model, context, continuation)
    inputs = [[*context, *continuation][:-1] for context, continuation in pairs]
    longest = model.config.context_length
    if capacity is None:
        capacity = min(longest, max([LEAST_CAPACITY, *(4 * len(x) for x in inputs)]))
    capacity = 1 if model.mask is not None else min(capacity, longest)
    scores: list[Any] = [None] * len(pairs)
    with progress_bar(len(pairs), "scoring", unit="request", wanted=progress) as advance:
        for numbers in _by_variant(model, inputs):
            for tree in trees([inputs[number] for number in numbers], capacity):
                own = {numbers[k]: path for k, path in tree.paths.items()}
                targets = {number: pairs[number][1] for number in own}
                for number, score in _score_tree(model, tree._replace(paths=own), targets):
                    scores[number] = score
                advance(len(own))
    return scores


def _check_pair(model: Any, context: Sequence[int], continuation: Sequence[int]) -> None:
    n, most = len(context) + len(continuation), model.config.context_length + 1
    if not len(context) or not len(continuation):
        raise NpllmValueError(
            "context and continuation must have at least one token each, got "
            f"{len(context)} and {len(continuation)}"
        )
    check_ids("continuation", [list(continuation)], model.config.vocab_size, "vocab_size")
    if n > most:
        raise NpllmValueError(
            f"context and continuation must have at most {most} tokens, one more than the context "
            f"length, got {len(context)} + {len(continuation)} = {n}"
        )


def _by_variant(model: Any, inputs: list[list[int]]) -> list[list[int]]:
    """Numbers of the inputs, those of the same RoPE frequencies together: a row has one set."""
    variants = [rope.frequency_choice(model.config, len(x)) for x in inputs]
    return [
        [number for number, other in enumerate(variants) if other == variant]
        for variant in sorted(set(variants))
    ]


def _score_tree(
    model: Any, tree: Tree, targets: dict[int, Sequence[int]]
) -> list[tuple[int, Continuation]]:
    """Run a tree through the model; the score of each of its sequences, by number."""
    hidden = _hidden(model, tree)[0]
    slots = np.concatenate([tree.paths[n][-len(x) :] for n, x in targets.items()])
    wanted = np.concatenate([np.asarray(x, np.int64) for x in targets.values()])
    log_probs, is_best = _scores(model, hidden, slots, wanted)
    found, start = [], 0
    for number, tokens in targets.items():
        part = slice(start, start + len(tokens))
        found.append((number, Continuation(log_probs[part], bool(is_best[part].all()))))
        start += len(tokens)
    return found


def _hidden(model: Any, tree: Tree) -> Array:
    """Hidden states of all nodes, [1, n_seq, d_model]."""
    if tree.is_chain:
        return model.model(tree.ids[None])
    stop, positions = model.to_backend(tree.stop), model.to_backend(tree.positions)
    rule = PrefixTree(stop, positions, model.config.sliding_window)
    return model.with_mask(rule).model(tree.ids[None], position_ids=tree.positions)


def _scores(model: Any, hidden: Array, slots: Array, wanted: Array) -> tuple[Array, Array]:
    """Log-probability of wanted[k] after slot slots[k], and whether none is likelier."""
    log_probs, is_best = np.empty(len(slots)), np.empty(len(slots), bool)
    nodes, which = np.unique(slots, return_inverse=True)
    for start in range(0, len(nodes), ROWS):
        rows = nodes[start : start + ROWS]
        logits = to_numpy(model.lm_head(hidden[model.to_backend(rows), :]))
        here = np.flatnonzero((which >= start) & (which < start + len(rows)))
        row, token = which[here] - start, wanted[here]
        log_probs[here] = log_probs_of(logits.astype(np.float64), token, row)
        is_best[here] = logits.argmax(axis=-1)[row] == token
    return log_probs, is_best
