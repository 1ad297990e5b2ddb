"""Beam search: keep the few likeliest unfinished answers at every step, instead of the likeliest
token alone.
"""

from typing import Any, NamedTuple

import numpy as np

from npllm import ops
from npllm.decision import check_scores
from npllm.decoding.loop import fill_id, last_logits, prepare, room_for, seen_tokens
from npllm.errors import NpllmValueError

__all__ = ["Beams", "beam_search", "beam_texts"]


class Beams(NamedTuple):
    """The best answers to each prompt, the best first."""

    sequences: Any  # int64 [n_batch, n_return, n_prompt + n_new], prompt included, shorter answers filled with the pad id
    scores: Any  # float64 [n_batch, n_return]: sum of log-probabilities / n_token ** length_penalty


def beam_search(
    model,
    prompt,
    attention_mask=None,
    *,
    num_beams=4,
    num_return_sequences=1,
    max_new_tokens=50,
    length_penalty=1.0,
    early_stopping=False,
    repetition_penalty=None,
):
    """Search for the answers of the highest score.

        score(y) = sum_(t = 1 ... n) log p(y_t | prompt, y_1 ... y_(t-1)) / n ** length_penalty

    At each step every running answer is continued with every token.  Of the num_beams best
    continuations those that end (with a stop id, or because max_new_tokens is reached) compete for
    the num_beams places among the finished answers; the num_beams best that do not end run on.

    Parameters
    ----------
    model : Model
    prompt : str, list of str, list of messages, or integer array [n_batch, n_prompt]
    attention_mask : array [n_batch, n_prompt], optional
        Only with an array of ids: 0 for padding on the left.
    num_beams : int
        Answers that run side by side.
    num_return_sequences : int
        Answers to return for each prompt, at most num_beams.
    max_new_tokens : int
    length_penalty : float
        0 compares sums, which favours short answers; 1 compares means; more favours long ones.
    early_stopping : bool or "never"
        When a prompt is done: True, as soon as num_beams answers are finished.  False: when besides
        the best running answer, at its present length, scores no higher than the worst finished
        one.  "never": when it could not do so at its best possible length either, which for a
        positive length penalty is max_new_tokens.
    repetition_penalty : float, optional
        None: as generation_config.json says.  Applies to log-probabilities, as in Transformers.

    Returns
    -------
    beams : Beams

    Raises
    ------
    NpllmTypeError, NpllmValueError
        For values out of range and for a prompt that does not fit, before any work is done.

    Notes
    -----
    Adds in float64.  The prompt is computed once, not once for each beam; each prompt ends by
    itself, and its answers do not depend on the others of the batch.  n counts the stop id.
    Stopping looks at running answers only as they are, so that `early_stopping=False` with a length
    penalty above 0 may miss a longer answer of a higher score.  Where the vocabulary has fewer than
    num_beams tokens fewer answers run at first.  Transformers fills with the first stop id where
    the pad id is 0.

    Source: "Speech understanding systems" (Lowerre 1976, the Harpy system); length penalty:
    "Google's Neural Machine Translation System" (Wu et al. 2016), equation 14, in the simpler form
    of `GenerationMixin._beam_search` in Transformers 5.23.
    """
    ids, valid, _, options = prepare(
        model,
        prompt,
        attention_mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        repetition_penalty=repetition_penalty,
    )
    _check(num_beams, num_return_sequences, max_new_tokens, length_penalty, early_stopping)
    n_new = room_for(model.config, ids.shape[1], max_new_tokens)
    searches = [
        _Search(
            seen,
            num_beams,
            n_new,
            length_penalty,
            early_stopping,
            model.generation_config.eos_token_id,
            options["sampling"].repetition_penalty,
        )
        for seen in seen_tokens(ids, valid, model.config.vocab_size)
    ]
    _run(model, ids, valid, searches)
    return _collect(ids, searches, num_return_sequences, fill_id(model.generation_config))


def beam_texts(model, prompt, **options):
    """Search for the best answers to text, as text.

    Parameters
    ----------
    model : Model
    prompt : str, list of str or list of messages
    **options
        As in `beam_search`.

    Returns
    -------
    answers : list of dict
        Each {"text", "score"}, the best first; for a list of prompts one such list for each.  The
        stop id is no part of the text.
    """
    tokenizer = model.require_tokenizer()
    ids, _, _, _ = prepare(model, prompt)
    sequences, scores = beam_search(model, prompt, **options)
    stop = model.generation_config.eos_token_id

    def text(tokens):
        ended = np.flatnonzero(np.isin(tokens, stop))
        return tokenizer.decode(tokens[: ended[0] if len(ended) else None].tolist())

    answers = [
        [
            {"text": text(tokens[ids.shape[1] :]), "score": float(score)}
            for tokens, score in zip(*row, strict=True)
        ]
        for row in zip(sequences, scores, strict=True)
    ]
    return (
        answers if isinstance(prompt, list | tuple) and isinstance(prompt[0], str) else answers[0]
    )


class _Search:
    """The search for the answers to one prompt: what runs, and what is finished."""

    def __init__(self, seen, num_beams, n_new, length_penalty, early_stopping, stop, penalty):
        self.seen, self.num_beams, self.n_new, self.stop, self.penalty = (
            seen,
            num_beams,
            n_new,
            stop,
            penalty,
        )
        self.length_penalty, self.early_stopping = length_penalty, early_stopping
        self.tokens, self.scores = (
            np.zeros((1, 0), dtype=np.int64),
            np.zeros(1),
        )  # of the running answers, the best first
        self.finished = []  # (score, tokens), the best first
        self.done = False

    def step(self, log_probs):
        """Continue every running answer; return for each that runs on which one it continues, and
        its new token.
        """
        scores, parents, tokens = self._candidates(self._penalised(log_probs))
        n_token = self.tokens.shape[1] + 1
        ends = np.isin(tokens, self.stop) | (n_token == self.n_new)
        best = [rank for rank in range(min(self.num_beams, len(tokens))) if ends[rank]]
        new = [
            (
                scores[i] / n_token**self.length_penalty,
                np.append(self.tokens[parents[i]], tokens[i]),
            )
            for i in best
        ]
        self.finished = sorted([*self.finished, *new], key=lambda answer: -answer[0])[
            : self.num_beams
        ]
        on = np.flatnonzero(~ends)[: self.num_beams]
        self.tokens, self.scores = (
            np.concatenate([self.tokens[parents[on]], tokens[on, None]], axis=1),
            scores[on],
        )
        self.done = len(on) == 0 or self._no_better()
        return parents[on], tokens[on]

    def _penalised(self, log_probs):
        """Log-probabilities after the repetition penalty, for each answer by its own tokens."""
        if self.penalty in (None, 1):
            return log_probs
        seen = np.repeat(self.seen[None, :], len(self.tokens), axis=0)
        seen[np.arange(len(seen))[:, None], self.tokens] = True
        name = f"log-probabilities after repetition_penalty = {self.penalty}"
        return check_scores(ops.repetition_penalty(log_probs, seen, self.penalty), name)

    def _candidates(self, log_probs):
        """The best continuations: so many that num_beams are left even where each beam's best
        tokens are all stop ids.
        """
        totals = (self.scores[:, None] + log_probs).ravel()
        n = min(max(2, 1 + len(self.stop)) * self.num_beams, totals.size)
        best = np.argpartition(-totals, n - 1)[:n]
        best = best[np.lexsort((best, -totals[best]))]
        parents, tokens = np.divmod(best, log_probs.shape[1])
        return totals[best], parents, tokens

    def _no_better(self):
        """Tell whether no running answer is expected to displace a finished one."""
        if len(self.finished) < self.num_beams:
            return False
        longest = self.early_stopping == "never" and self.length_penalty > 0
        n_token = self.n_new if longest else self.tokens.shape[1]
        return (
            self.early_stopping is True
            or self.scores[0] / n_token**self.length_penalty <= self.finished[-1][0]
        )


def _run(model, ids, valid, searches):
    """Send prompts, and then the last tokens of all running answers, through the model until every
    search is done.
    """
    cache = model.new_cache(len(ids))
    owners = list(range(len(ids)))  # which search each row of the cache belongs to
    options = {"attention_mask": valid}
    while owners:
        logits = last_logits(model, ids, cache=cache, **options)
        log_probs = ops.log_softmax(logits.astype(np.float64))
        rows, tokens, next_owners = [], [], []
        for owner in dict.fromkeys(owners):
            mine = np.flatnonzero(np.equal(owners, owner))
            parents, new = searches[owner].step(log_probs[mine])
            if not searches[owner].done:
                rows, tokens = [*rows, *mine[parents]], [*tokens, *new]
                next_owners += [owner] * len(new)
        owners, options, ids = next_owners, {}, np.array(tokens, dtype=np.int64)[:, None]
        if owners:
            cache.reorder(rows)


def _collect(ids, searches, n_return, fill):
    """Put the best answers into one array; where fewer are finished than asked for, the last is
    repeated with a score of -inf.
    """
    best = [
        [*search.finished, *[(-np.inf, search.finished[-1][1])] * n_return][:n_return]
        for search in searches
    ]
    n_new = max(len(tokens) for row in best for _, tokens in row)
    sequences = np.full((len(ids), n_return, ids.shape[1] + n_new), fill, dtype=np.int64)
    sequences[:, :, : ids.shape[1]] = ids[:, None, :]
    for r, row in enumerate(best):
        for n, (_, tokens) in enumerate(row):
            sequences[r, n, ids.shape[1] : ids.shape[1] + len(tokens)] = tokens
    return Beams(sequences, np.array([[score for score, _ in row] for row in best]))


def _check(num_beams, num_return_sequences, max_new_tokens, length_penalty, early_stopping):
    """Raise for options out of range."""
    for name, value, most in (
        ("num_beams", num_beams, 2**16),
        ("num_return_sequences", num_return_sequences, num_beams),
        ("max_new_tokens", max_new_tokens, 2**31),
    ):
        if (
            not isinstance(value, int | np.integer)
            or isinstance(value, bool)
            or not 1 <= value <= most
        ):
            limit = " (num_beams)" if name == "num_return_sequences" else ""
            raise NpllmValueError(
                f"{name} must be an integer in 1 ... {most}{limit}, got {value!r}"
            )
    if (
        isinstance(length_penalty, bool)
        or not isinstance(length_penalty, int | float)
        or not abs(length_penalty) < 100
    ):
        raise NpllmValueError(
            f"length_penalty must be a number in -100 ... 100, got {length_penalty!r}"
        )
    if not isinstance(early_stopping, bool) and early_stopping != "never":
        raise NpllmValueError(
            f'early_stopping must be True, False or "never", got {early_stopping!r}'
        )
