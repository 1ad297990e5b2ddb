"""Beam search: keep the few likeliest unfinished answers at every step, instead of the likeliest
token alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from npllm import ops
from npllm.arguments import check_integer
from npllm.decoding.constraints import constrain
from npllm.decoding.loop import count_new_tokens, last_logits
from npllm.decoding.options import MAX_NEW_TOKENS, Options, resolve_options
from npllm.decoding.prompt import Prompt, read_prompt, require_tokenizer
from npllm.decoding.sequences import Sequences
from npllm.errors import NpllmValueError
from npllm.text.stream import TextStream

__all__ = ["Beams", "beam_search", "beam_texts", "best_answers", "best_texts", "search"]

Array = Any


class Beams(NamedTuple):
    """The best answers to each prompt, the best first."""

    sequences: Array  # int64 [n_batch, n_return, n_prompt + n_new], prompt included, then fill ids
    scores: Array  # float64 [n_batch, n_return]: sum of log-probabilities / n_token**length_penalty


def beam_search(
    model: Any,
    prompt: Any,
    attention_mask: Any = None,
    *,
    num_beams: int = 4,
    num_return_sequences: int = 1,
    max_new_tokens: int | None = MAX_NEW_TOKENS,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    stop: str | Sequence[str] | None = None,
    repetition_penalty: float | None = None,
    tools: Any = None,
    **constraints: Any,
) -> Beams:
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
    stop : str or list of str, optional
        An answer ends with the first of these; None: stop_strings of generation_config.json.
    repetition_penalty : float, optional
    tools : list, optional
        Only with messages.
    **constraints
        no_repeat_ngram_size, bad_words_ids, min_new_tokens, forced_eos_token_id, suppress_tokens,
        begin_suppress_tokens, logits_processors: see `npllm.Model.generate`.  These and the penalty
        apply to log-probabilities, as in Transformers; None: as generation_config.json says.

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
    options = _options(
        model,
        num_beams=num_beams,
        num_return_sequences=num_return_sequences,
        max_new_tokens=max_new_tokens,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        stop=stop,
        repetition_penalty=repetition_penalty,
        **constraints,
    )
    return search(model, read_prompt(model, prompt, attention_mask, tools), options)


def beam_texts(
    model: Any, prompt: Any, attention_mask: Any = None, *, tools: Any = None, **options: Any
) -> list[Any]:
    """Search for the best answers to text, as text.

    Parameters
    ----------
    model : Model
    prompt : str, list of str or list of messages
    tools : list, optional
        With messages: see `npllm.Model.generate`.
    **options
        As in `beam_search`.

    Returns
    -------
    answers : list of dict
        Each {"text", "score"}, the best first; for a list of prompts one such list for each.  The
        stop id and the stop string are no part of the text.
    """
    tokenizer = require_tokenizer(model)
    resolved = _options(model, **({"num_beams": 4, "length_penalty": 1.0} | options))
    found = read_prompt(model, prompt, attention_mask, tools)
    sequences, scores = search(model, found, resolved)
    texts = best_texts(model, tokenizer, sequences[:, :, found.ids.shape[1] :], resolved.stop)
    answers = [
        [{"text": text, "score": float(score)} for text, score in zip(*row, strict=True)]
        for row in zip(texts, scores, strict=True)
    ]
    return answers[0] if found.is_single else answers


def _options(model: Any, *, early_stopping: Any = False, **options: Any) -> Options:
    """Check the options of a beam search, which takes at least one token."""
    n_new = options.get("max_new_tokens", MAX_NEW_TOKENS)
    if n_new is not None:
        check_integer("max_new_tokens", n_new, 1, 2**31, " or None (until a stop)")
    return resolve_options(
        model.generation_config, do_sample=False, early_stopping=early_stopping, **options
    )


def best_answers(model: Any, prompt: Prompt, options: Options) -> Any:
    """Search for the best answer to each prompt.

    Parameters
    ----------
    model : Model
    prompt : Prompt
    options : Options

    Returns
    -------
    answers : list of str
        One for each text; for ids int64 [n_batch, n_prompt + n_new], the prompt included.

    Raises
    ------
    NpllmValueError
        When the options ask for sampling: beams are not sampled.
    """
    if options.sampling.do_sample:
        raise NpllmValueError(
            f"num_beams = {options.num_beams} with sampling is not implemented; "
            "give num_beams=1 or do_sample=False"
        )
    sequences = search(model, prompt, options).sequences
    if not prompt.is_text:
        return sequences[:, 0, :]
    new = sequences[:, :, prompt.ids.shape[1] :]
    return [row[0] for row in best_texts(model, require_tokenizer(model), new, options.stop)]


def best_texts(model: Any, tokenizer: Any, tokens: Array, stop: Sequence[str]) -> list[list[str]]:
    """Decode answers, each up to the first stop id or stop string.

    Parameters
    ----------
    model : Model
    tokenizer : Tokenizer
    tokens : int64 array [n_batch, n_return, n_new]
    stop : sequence of str

    Returns
    -------
    texts : list of list of str
        [n_batch][n_return].
    """
    eos = model.generation_config.eos_token_id

    def text(answer: Array) -> str:
        stream = TextStream(tokenizer, eos, stop)
        pieces = [stream.push(token) for token in answer if not stream.ended]
        return "".join(pieces) + stream.close()

    return [[text(answer) for answer in row] for row in tokens]


def search(
    model: Any, prompt: Prompt, options: Options, watch: Callable[..., object] | None = None
) -> Beams:
    """Run a beam search for each prompt, side by side; see `beam_search`.

    Parameters
    ----------
    model : Model
    prompt : Prompt
    options : Options
    watch : function (answers, scores), optional
        Is told, after each step of each search, of the answers that run on: new ids [n_answer,
        n_new], and their sums of log-probabilities [n_answer].

    Returns
    -------
    beams : Beams
    """
    tokenizer = require_tokenizer(model) if options.stop else None
    n_new = count_new_tokens(model.config, prompt, options.max_new_tokens)
    searches = [
        _Search(ids[valid], n_new, options, model, tokenizer)
        for ids, valid in zip(prompt.ids, prompt.valid, strict=True)
    ]
    _run(model, prompt, searches, watch)
    fill = model.generation_config.fill_id
    return _collect(prompt.ids, searches, options.num_return_sequences, fill)


class _Search:
    """The search for the answers to one prompt: what runs, and what is finished."""

    def __init__(self, ids: Array, n_new: int, options: Options, model: Any, tokenizer: Any):
        self.options, self.n_new, self.tokenizer = options, n_new, tokenizer
        self.eos = model.generation_config.eos_token_id
        prompt = ids[None, :]
        valid = np.ones(prompt.shape, dtype=bool)
        # the running answers, the best first
        self.sequences = Sequences(prompt, valid, model.config.vocab_size, n_new)
        self.scores = np.zeros(1)
        self.finished: list[tuple[float, Array]] = []  # (score, tokens), the best first
        self.done = False

    def step(self, log_probs: Array) -> tuple[Array, Array]:
        """Continue every running answer; return for each that runs on which one it continues, and
        its new token.
        """
        name = "log-probabilities"
        log_probs = constrain(log_probs, self.sequences, self.options, self.eos, name)
        scores, parents, tokens = self._candidates(log_probs)
        answers = np.concatenate([self.sequences.new_ids[parents], tokens[:, None]], axis=1)
        ends = self._ends(answers)
        self._finish(scores, answers, ends)
        on = np.flatnonzero(~ends)[: self.options.num_beams]
        self.sequences.select(parents[on])
        self.sequences.append(tokens[on])
        self.scores = scores[on]
        self.done = len(on) == 0 or self._no_better()
        return parents[on], tokens[on]

    def _ends(self, answers: Array) -> Array:
        """Which answers end: with a stop id or a stop string, or because they are long enough."""
        ends = np.isin(answers[:, -1], self.eos) | (answers.shape[1] == self.n_new)
        if self.options.stop:
            ends |= np.array([self._has_stopped(answer) for answer in answers], dtype=bool)
        return ends

    def _has_stopped(self, answer: Array) -> bool:
        """Whether the text of an answer holds a stop string."""
        stream = TextStream(self.tokenizer, (), self.options.stop)
        for token in answer:
            stream.push(token)
        return stream.ended

    def _finish(self, scores: Array, answers: Array, ends: Array) -> None:
        """Let those of the num_beams best candidates that end compete with the finished answers."""
        n_token, n_beam = answers.shape[1], self.options.num_beams
        new = [
            (scores[rank] / n_token**self.options.length_penalty, answers[rank])
            for rank in range(min(n_beam, len(scores)))
            if ends[rank]
        ]
        ranked = sorted([*self.finished, *new], key=lambda answer: -answer[0])
        self.finished = ranked[:n_beam]

    def _candidates(self, log_probs: Array) -> tuple[Array, Array, Array]:
        """The best continuations: enough that num_beams remain even where the best tokens of each
        beam are all stop ids.
        """
        totals = (self.scores[:, None] + log_probs).ravel()
        n = min(max(2, 1 + len(self.eos)) * self.options.num_beams, totals.size)
        best = np.argpartition(-totals, n - 1)[:n]
        best = best[np.lexsort((best, -totals[best]))]
        parents, tokens = np.divmod(best, log_probs.shape[1])
        return totals[best], parents, tokens

    def _no_better(self) -> bool:
        """Whether no running answer is expected to displace a finished one."""
        options = self.options
        if len(self.finished) < options.num_beams:
            return False
        longest = options.early_stopping == "never" and options.length_penalty > 0
        n_token = self.n_new if longest else self.sequences.n_new
        reachable = self.scores[0] / n_token**options.length_penalty
        return options.early_stopping is True or reachable <= self.finished[-1][0]


def _run(
    model: Any,
    prompt: Prompt,
    searches: list[_Search],
    watch: Callable[..., object] | None = None,
) -> None:
    """Send prompts, and then the last tokens of all running answers, through the model until every
    search is done.
    """
    ids, valid = prompt.ids, prompt.valid
    cache = model.new_cache(len(ids))
    owners = list(range(len(ids)))  # which search each row of the cache belongs to
    while owners:
        logits = last_logits(model, ids, attention_mask=valid, cache=cache)
        log_probs = ops.log_softmax(logits.astype(np.float64))
        rows: list[int] = []
        tokens: list[int] = []
        next_owners: list[int] = []
        for owner in dict.fromkeys(owners):
            mine = np.flatnonzero(np.equal(owners, owner))
            parents, new = searches[owner].step(log_probs[mine])
            if watch is not None:
                watch(searches[owner].sequences.new_ids, searches[owner].scores)
            if not searches[owner].done:
                rows += mine[parents].tolist()
                tokens += new.tolist()
                next_owners += [owner] * len(new)
        owners, ids = next_owners, np.array(tokens, dtype=np.int64)[:, None]
        if owners:
            cache.reorder(rows)
            valid = np.concatenate([cache.valid, np.ones(ids.shape, dtype=bool)], axis=1)


def _collect(ids: Array, searches: list[_Search], n_return: int, fill: int) -> Beams:
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
