"""The constraints and the caller's functions, applied to the logits of one step."""

from typing import Any

import numpy as np

from npllm import ops
from npllm.decoding.options import Options
from npllm.decoding.sequences import Sequences
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.finite_scores import check_scores

__all__ = ["constrain"]

Array = Any


def constrain(
    logits: Array,
    sequences: Sequences,
    options: Options,
    eos: tuple[int, ...],
    what: str = "logits",
) -> Array:
    """Apply what is switched on, one after another.

        repetition_penalty, no_repeat_ngram_size, bad_words_ids, min_new_tokens,
        forced_eos_token_id, suppress_tokens, begin_suppress_tokens, logits_processors

    Parameters
    ----------
    logits : array [n_batch, n_vocab]
        NumPy; in beam search log-probabilities.
    sequences : Sequences
    options : Options
    eos : tuple of int
        The stop ids.
    what : str
        What the scores are, for messages.

    Returns
    -------
    logits : array [n_batch, n_vocab]

    Raises
    ------
    NpllmTypeError, NpllmValueError
        When a function of the caller returns something else than logits; when no token is left:
        names the option.

    Notes
    -----
    Source: `GenerationMixin._get_logits_processor` in Transformers, whose order this is.
    """
    for name, value, apply in _steps(sequences, options, eos):
        with np.errstate(over="ignore", invalid="ignore"):  # the check says what became of it
            logits = apply(logits)
        check_scores(logits, f"{what} after {name} = {value}", f"give another {name}")
    for process in options.logits_processors:
        logits = _processed(process, sequences.ids, logits)
    return logits


def _steps(sequences: Sequences, options: Options, eos: tuple[int, ...]) -> list[Any]:
    """(name, value, function of the logits) of each constraint that is switched on."""
    ids = np.where(sequences.valid, sequences.ids, -1)
    wanted, penalty = options.constraints, options.sampling.repetition_penalty
    n_new, n_left = sequences.n_new, sequences.n_max - sequences.n_ctx
    functions = {
        "no_repeat_ngram_size": lambda x, v: ops.no_repeat_ngram_size(x, ids, v),
        "bad_words_ids": lambda x, v: ops.bad_words_ids(x, ids, v, eos),
        "min_new_tokens": lambda x, v: ops.min_new_tokens(x, eos, n_new, v),
        "forced_eos_token_id": lambda x, v: ops.forced_eos_token_id(x, v, n_left),
        "suppress_tokens": lambda x, v: ops.suppress_tokens(x, v),
        "begin_suppress_tokens": lambda x, v: ops.begin_suppress_tokens(x, v, n_new),
    }
    found: list[Any] = []
    if penalty not in (None, 1):
        seen = sequences.seen
        found.append(
            ("repetition_penalty", penalty, lambda x: ops.repetition_penalty(x, seen, penalty))
        )
    used = {name: getattr(wanted, name) for name in functions if getattr(wanted, name)}
    for name, value in used.items():
        found.append((name, value, lambda x, f=functions[name], v=value: f(x, v)))
    return found


def _processed(process: Any, ids: Array, logits: Array) -> Array:
    """What a function of the caller makes of the logits; raise unless it is logits."""
    result = process(ids.copy(), logits.copy())
    if not isinstance(result, np.ndarray) or result.dtype != logits.dtype:
        kind = getattr(result, "dtype", type(result).__name__)
        raise NpllmTypeError(
            "a function of logits_processors must return a NumPy array of "
            f"{logits.dtype}, got {kind}"
        )
    if result.shape != logits.shape:
        raise NpllmValueError(
            "a function of logits_processors must return [n_batch, n_vocab] = "
            f"{list(logits.shape)}, got {list(result.shape)}"
        )
    return check_scores(result, "logits after logits_processors", "look at these functions")
