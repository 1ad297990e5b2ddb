"""Scoring: the log-probability of each token of a text, and the perplexity of a text of any length
by a sliding window.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from npllm import ops
from npllm.arguments import check_ids, host_integers
from npllm.arrays import is_integer, to_numpy
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.finite_scores import FROM_MODEL, check_finite, check_scores
from npllm.model import Model
from npllm.progress import progress_bar

__all__ = [
    "Score",
    "Window",
    "log_probs_of",
    "perplexity",
    "score",
    "token_log_probs",
    "windows",
]

Array = Any

WINDOW = 2048  # default tokens of a window, where the context allows
ROWS = 128  # positions whose logits are in memory at a time


class Score(NamedTuple):
    """Log-probabilities of the tokens of a text."""

    ids: Array  # int64 [n]
    log_probs: Array  # float64 [n - 1]: natural logarithm, of every token but the first

    @property
    def total(self) -> float:
        """The log-probability of the text after its first token: the sum."""
        return float(self.log_probs.sum())

    @property
    def perplexity(self) -> float:
        """`perplexity` of these log-probabilities."""
        return perplexity(self.log_probs)


class Window(NamedTuple):
    """Tokens start ... stop - 1 of a text, of one pass through the model."""

    start: int
    stop: int
    first: int  # the first token that this window scores; earlier ones are context only


def windows(n: int, max_length: int, stride: int) -> list[Window]:
    """Cut a text into overlapping windows, so that each token but the first is scored once.

        window w = tokens w * stride ... min(w * stride + max_length, n) - 1

    Each window scores the tokens that no earlier window contains.

    Parameters
    ----------
    n : int
        Tokens of the text.
    max_length : int
        Tokens of a window, at least 2.
    stride : int
        Tokens from the start of a window to the start of the next, 1 ... max_length - 1.  Each
        token after the first max_length is scored with at least max_length - stride tokens before
        it: 1 is the most accurate and the slowest.

    Returns
    -------
    cuts : list of Window

    Raises
    ------
    NpllmValueError
        When max_length or stride is out of range.

    Notes
    -----
    Windows must overlap: the first token of a window has no token before it, and so no score.

    Source: "Perplexity of fixed-length models" in the documentation of Transformers, which weights
    each window by one token too few.
    """
    if max_length < 2 or not 1 <= stride < max_length:
        raise NpllmValueError(
            "max_length must be at least 2 and stride in 1 ... max_length - 1, so that windows "
            f"overlap, got max_length = {max_length} and stride = {stride}"
        )
    cuts, scored = [], 1
    for start in range(0, n, stride):
        stop = min(start + max_length, n)
        if stop > scored:
            cuts.append(Window(start, stop, scored))
            scored = stop
    return cuts


def score(
    model: Model,
    text: Any,
    *,
    max_length: int | None = None,
    stride: int | None = None,
    progress: bool = False,
) -> Score:
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
        Show a bar on stderr where it is a terminal and tqdm is installed.

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
    in float64.  Logits of 128 positions exist at a time.  `npllm.analysis.score_batches`
    scores many texts at once.

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
    with progress_bar(len(ids) - 1, "scoring", unit="token", wanted=progress) as advance:
        for window in cuts:
            parts += _score_window(model, ids, window)
            advance(window.stop - window.first)
    return Score(ids, np.concatenate(parts))


def perplexity(log_probs: Array) -> float:
    """Compute the perplexity of scored tokens.

        perplexity = exp(-mean_t log_probs[t])

    A uniform distribution over n tokens has perplexity n.

    Parameters
    ----------
    log_probs : array [n]
        Natural logarithms, as in `Score.log_probs`.

    Returns
    -------
    perplexity : float
        At least 1; infinite where a token has probability 0.

    Raises
    ------
    NpllmValueError
        When there is no token, or a log-probability is NaN or +inf.

    Notes
    -----
    Depends on the tokenizer: compare models of different vocabularies by bits per byte.

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


def _ids(model: Model, text: Any) -> Array:
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
            "a text must have at least 2 tokens to be scored (no token precedes the first), "
            f"got {len(ids)}"
        )
    return ids.astype(np.int64)


def _score_window(model: Model, ids: Array, window: Window) -> list[Array]:
    """Log-probabilities of the tokens first ... stop - 1, in blocks of rows.

    The hidden state at position t - 1 gives the logits of token t.
    """
    hidden = model.model(ids[None, window.start : window.stop - 1])
    states = hidden[:, window.first - 1 - window.start :, :]
    return token_log_probs(model, states, ids[window.first : window.stop])


def token_log_probs(model: Any, hidden: Array, targets: Array) -> list[Array]:
    """Compute the log-probabilities of tokens from the hidden states in front of them.

        log_probs[t] = log softmax(lm_head(hidden[t]))[targets[t]]

    Parameters
    ----------
    model : Model
    hidden : array [1, n, d_model]
    targets : integer array [n]

    Returns
    -------
    parts : list of array
        float64, of 128 tokens each.

    Raises
    ------
    NpllmValueError
        When a token is none of the vocabulary, or a logit is NaN or +inf.
    """
    parts = []
    check_ids("text", targets[None], model.config.vocab_size, "vocab_size")
    for start in range(0, len(targets), ROWS):
        logits = to_numpy(model.lm_head(hidden[:, start : start + ROWS, :]))[0]
        parts.append(log_probs_of(logits, targets[start : start + ROWS]))
    return parts


def log_probs_of(logits: Array, targets: Array, rows: Array | None = None) -> Array:
    """Compute the log-probability of tokens under the logits of a model.

        log_probs[t] = log softmax(logits[rows[t]])[targets[t]]

    Parameters
    ----------
    logits : array [n_row, n_vocab]
        NumPy.  The softmax is in this dtype: `score` gives the model's own, float32 for most;
        `npllm.analysis.packing` and `npllm.evaluation.continuations` widen to float64 first.
    targets : integer array [n]
    rows : integer array [n], optional
        The row of each token.  Default: token t has row t.

    Returns
    -------
    log_probs : float64 array [n]

    Raises
    ------
    NpllmValueError
        When a logit is NaN or +inf.
    """
    check_scores(logits, "the model's logits", FROM_MODEL)
    rows = np.arange(len(targets)) if rows is None else rows
    return ops.log_softmax(logits)[rows, targets].astype(np.float64)
