"""Scoring: how likely a model finds a text, token by token; and its perplexity, by windows that
slide over a text of any length.
"""

import contextlib
import math
import sys
import time
from typing import Any, NamedTuple

import numpy as np

from npllm import ops
from npllm.arguments import host_integers
from npllm.arrays import is_integer, to_numpy
from npllm.decision import FROM_MODEL, check_finite, check_scores
from npllm.errors import NpllmTypeError, NpllmValueError

__all__ = ["Score", "Window", "perplexity", "score", "windows"]

WINDOW = 2048  # tokens of a window, where nothing else is said and the context allows
ROWS = 128  # positions whose logits are held at a time


class Score(NamedTuple):
    """Log-probabilities of the tokens of a text."""

    ids: Any  # int64 [n]
    log_probs: Any  # float64 [n - 1]: natural logarithm, of every token but the first

    @property
    def total(self):
        """The log-probability of the text after its first token: the sum."""
        return float(self.log_probs.sum())

    @property
    def perplexity(self):
        """`perplexity` of these log-probabilities."""
        return perplexity(self.log_probs)


class Window(NamedTuple):
    """A piece of a text that goes through the model at once, and where scoring begins in it."""

    start: int
    stop: int
    first: int  # the first token that this window scores; those before it are context only


def windows(n, max_length, stride):
    """Cut a text into overlapping windows, so that each token but the first is scored once.

        window w = tokens w * stride ... min(w * stride + max_length, n) - 1;  it scores those that no earlier window holds

    Parameters
    ----------
    n : int
        Tokens of the text.
    max_length : int
        Tokens of a window, at least 2.
    stride : int
        By how much the next window is moved on, 1 ... max_length - 1.  Each token but the first
        max_length is scored with at least max_length - stride tokens before it: 1 is the most
        accurate, and the slowest.

    Returns
    -------
    cuts : list of Window

    Raises
    ------
    NpllmValueError
        When a window or the stride is too short, or the windows do not overlap.

    Notes
    -----
    Without an overlap the first token of a window would have nothing before it, and no score.

    Source: "Perplexity of fixed-length models" in the documentation of Transformers, which weighs
    each window by one token too few.
    """
    if max_length < 2 or not 1 <= stride < max_length:
        raise NpllmValueError(
            "max_length must be at least 2 and stride in 1 ... max_length - 1, so that windows overlap, got "
            f"max_length = {max_length} and stride = {stride}"
        )
    cuts, scored = [], 1
    for start in range(0, n, stride):
        stop = min(start + max_length, n)
        if stop > scored:
            cuts.append(Window(start, stop, scored))
            scored = stop
    return cuts


def score(model, text, *, max_length=None, stride=None, progress=False):
    """Compute the log-probability of every token of a text after those before it.

        log_probs[t - 1] = log softmax(logits after tokens s ... t-1)[token t],   t = 1 ... n - 1

    where s is the start of the window that scores t: 0 for a text no longer than max_length.

    Parameters
    ----------
    model : Model
    text : str, or integer array or list of int [n]
        At least two tokens.
    max_length : int, optional
        Tokens of a window; default: 2048, or the context length where that is shorter.
    stride : int, optional
        See `windows`; default: half of max_length.
    progress : bool
        Show a bar on stderr where the tqdm package is installed and somebody looks.

    Returns
    -------
    scored : Score

    Raises
    ------
    NpllmTypeError, NpllmValueError
        When the text has fewer than two tokens, max_length does not fit the context, or a logit is
        NaN or +inf.

    Notes
    -----
    Logits and their log-softmax are in float32 (float64 when the weights are), the sums over tokens
    in float64.  Logits of 128 positions exist at a time.  `npllm.analysis.packing.score_packed`
    scores many short documents at once.

    Source: "A Neural Probabilistic Language Model" (Bengio et al. 2003), section 2;
    `ForCausalLMLoss` in Transformers.
    """
    ids = _ids(model, text)
    max_length = min(WINDOW, model.config.context_length) if max_length is None else max_length
    stride = max(1, max_length // 2) if stride is None else stride
    if max_length > model.config.context_length:
        raise NpllmValueError(
            f"max_length must be at most the context length (max_position_embeddings) = "
            f"{model.config.context_length}, got {max_length}"
        )
    cuts, parts = windows(len(ids), max_length, stride), []
    with _progress_bar(len(ids) - 1, progress) as advance:
        for window in cuts:
            parts += _score_window(model, ids, window)
            advance(window.stop - window.first)
    return Score(ids, np.concatenate(parts))


def perplexity(log_probs):
    """Turn log-probabilities into perplexity: how many equally likely tokens the model wavers
    between, on average.

        perplexity = exp(-mean_t log_probs[t])

    Parameters
    ----------
    log_probs : array [n]
        Natural logarithms, as in `Score.log_probs`.

    Returns
    -------
    perplexity : float
        At least 1; infinite where a token was impossible.

    Raises
    ------
    NpllmValueError
        When there is no token, or a log-probability is NaN or +inf.

    Notes
    -----
    Depends on the tokenizer: models with other vocabularies compare by bits per byte only.

    Source: "Perplexity, a measure of the difficulty of speech recognition tasks" (Jelinek et al.
    1977).
    """
    if len(log_probs) == 0:
        raise NpllmValueError(
            "perplexity needs the log-probability of at least one token, got none"
        )
    if not (np.asarray(log_probs) < np.inf).all():
        check_finite(np.asarray(log_probs), "log_probs")
    mean = -float(np.mean(log_probs))
    return math.exp(mean) if mean < 709 else math.inf


def perplexity_facts(model, text, **options):
    """Score a text and say what it took: what `npllm perplexity` reports.

    Parameters
    ----------
    model : Model
    text : str
    **options
        As in `score`.

    Returns
    -------
    facts : dict
        `bits_per_byte` spreads the log-probability over the bytes of the text in UTF-8;
        tokens_per_second counts scored tokens.
    """
    begin = time.perf_counter()
    scored = score(model, text, **options)
    seconds = time.perf_counter() - begin
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


def _ids(model, text):
    """Token ids [n] of a text or of ids."""
    ids = host_integers(
        "text", model.require_tokenizer().encode(text) if isinstance(text, str) else text
    )
    if ids.ndim != 1 or (ids.size and not is_integer(ids)):
        raise NpllmTypeError(
            f"text must be a str or integers [n], got {ids.dtype} {list(ids.shape)}"
        )
    if len(ids) < 2:
        raise NpllmValueError(
            f"a text must have at least 2 tokens to be scored (the first has nothing before it), got {len(ids)}"
        )
    return ids.astype(np.int64)


def _score_window(model, ids, window):
    """Log-probabilities of the tokens first ... stop - 1, each from the hidden state one place
    before it, in blocks of rows.
    """
    hidden = model.model(ids[None, window.start : window.stop - 1])[
        0, window.first - 1 - window.start :, :
    ]
    targets, parts = ids[window.first : window.stop], []
    for start in range(0, len(targets), ROWS):
        logits = to_numpy(model.lm_head(hidden[start : start + ROWS, :]))
        check_scores(logits, "the model's logits", FROM_MODEL)
        wanted = targets[start : start + ROWS]
        parts.append(ops.log_softmax(logits)[np.arange(len(wanted)), wanted].astype(np.float64))
    return parts


@contextlib.contextmanager
def _progress_bar(total, wanted):
    """Yield a function (n) that moves a bar on stderr; one that does nothing where tqdm is missing
    or nobody looks.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        wanted = False
    if not wanted or not sys.stderr.isatty():
        yield lambda _: None
        return
    with tqdm(total=total, desc="scoring", unit="token", leave=False) as bar:
        yield bar.update
