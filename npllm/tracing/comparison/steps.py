"""The steps of a trace: token ids, positions, and which keys each query sees."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from npllm.config.strict_json import quote
from npllm.errors import NpllmValueError

__all__ = ["Step", "key_of", "steps_of", "visible"]

Array = Any

MOST_TOKENS = 2**22  # of one step


class Step(NamedTuple):
    """One call of the model.

    Parameters
    ----------
    ids : int64 array [n_batch, n_seq]
    positions : int64 array [n_batch, n_seq]
    valid : bool array [n_batch, n_past + n_seq]
        Which slots hold tokens.
    n_past : int
        Slots that a cache held before.
    cached : bool
        Whether the call appended to a cache.
    documents : int64 array [n_batch, n_past + n_seq], optional
        Labels of documents that are packed into one row.
    """

    ids: Array
    positions: Array
    valid: Array
    n_past: int
    cached: bool
    documents: Array = None

    @property
    def real(self) -> Array:
        """Which tokens of this call are no padding, bool [n_batch, n_seq]."""
        return self.valid[:, self.n_past :]


def key_of(name: str, t: int) -> str:
    """Name a value of step t: the plain name in step 0, else with "@t"."""
    return f"{name}@{t}" if t else name


def steps_of(index: Mapping[str, Any], where: str) -> list[Step]:
    """Read the steps of an index.

    Raises
    ------
    NpllmValueError
        For what is no list of steps, or steps whose sizes contradict each other.
    """
    found = index.get("steps")
    if not isinstance(found, list) or not found:
        raise NpllmValueError(f"{where}: steps must be a list of at least one, got {quote(found)}")
    steps = [_step(content, f"{where}: step {t}") for t, content in enumerate(found)]
    for t, (one, other) in enumerate(pairwise(steps)):
        if len(one.ids) != len(other.ids):
            raise NpllmValueError(
                f"{where}: steps {t} and {t + 1} have {len(one.ids)} and {len(other.ids)} sequences"
            )
    return steps


def _step(content: Any, where: str) -> Step:
    if not isinstance(content, Mapping):
        raise NpllmValueError(f"{where} must be an object, got {quote(content)}")
    ids = _integers(content.get("input_ids"), "input_ids", where)
    n_batch, n_seq = ids.shape
    n_past = content.get("n_past", 0)
    if not isinstance(n_past, int) or not 0 <= n_past <= MOST_TOKENS:
        raise NpllmValueError(f"{where}: n_past must be an integer from 0, got {quote(n_past)}")
    mask = content.get("attention_mask")
    labels = np.ones((n_batch, n_past + n_seq), dtype=np.int64)
    if mask is not None:
        labels = _integers(mask, "attention_mask", where)
    positions = content.get("position_ids")
    if positions is None:
        counted = np.maximum(np.cumsum(labels > 0, axis=1) - 1, 0)
        positions = counted[:, n_past:]
    else:
        positions = _integers(positions, "position_ids", where)
    positions = _fitted(positions, (n_batch, n_seq), "position_ids", where)
    labels = _fitted(labels, (n_batch, n_past + n_seq), "attention_mask", where)
    documents = content.get("documents")
    if documents is not None:
        documents = _integers(documents, "documents", where)
        documents = _fitted(documents, labels.shape, "documents", where)
    elif labels.max(initial=0) > 1:
        documents = labels
    return Step(ids, positions, labels > 0, n_past, bool(content.get("cached")), documents)


def _fitted(x: Array, shape: tuple[int, int], name: str, where: str) -> Array:
    """Give one row to every sequence; raise for another shape."""
    if x.shape not in (shape, (1, shape[1])):
        raise NpllmValueError(f"{where}: {name} must be {list(shape)}, got {list(x.shape)}")
    return np.broadcast_to(x, shape)


def _integers(value: Any, name: str, where: str) -> Array:
    """Convert nested lists of integers to an array of two axes."""
    try:
        x = np.asarray(value)
    except (ValueError, TypeError):
        x = np.asarray(None)
    if x.ndim == 1 and x.dtype.kind in "iu":
        x = x[None, :]
    if x.ndim != 2 or x.dtype.kind not in "iub" or not 0 < x.size <= MOST_TOKENS:
        raise NpllmValueError(
            f"{where}: {name} must be integers [n_batch, n_seq], got {quote(value)}"
        )
    return x.astype(np.int64)


def visible(step: Step, n_ctx: int, window: int | None, documents: Array = None) -> Array:
    """Tell which keys each query sees, bool [n_batch, 1, n_seq, n_ctx].

    Parameters
    ----------
    step : Step
    n_ctx : int
        Keys at hand: the last so many slots; a cache with a window forgets the others.
    window : int, optional
        A query sees so many keys, its own included.
    documents : integer array [n_batch, n_past + n_seq], optional
    """
    n_slots, n_seq = step.valid.shape[1], step.ids.shape[1]
    i = np.arange(n_slots - n_seq, n_slots)[:, None]
    j = np.arange(n_slots - n_ctx, n_slots)[None, :]
    seen = j <= i
    if window is not None:
        seen = seen & (j > i - window)
    seen = seen[None] & step.valid[:, None, n_slots - n_ctx :]
    if documents is not None:
        same = documents[:, n_slots - n_seq :, None] == documents[:, None, n_slots - n_ctx :]
        seen = seen & same
    return seen[:, None]
