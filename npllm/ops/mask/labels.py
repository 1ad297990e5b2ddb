"""Rules that close over one label for each slot: padding, and documents packed into one row."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from npllm.arrays import array_namespace, expect_shape, host_range, is_integer
from npllm.errors import NpllmTypeError
from npllm.ops.mask.causal_and_window import check_slots
from npllm.ops.mask.rule import ALL, FAR, NONE, SOME, LeftBand, Rule

__all__ = ["documents", "left_padding", "padding"]

Array = Any


def padding(valid: Array) -> Rule:
    """Hide the keys that are padding.

        visible(i, j) = valid[batch, j]

    Parameters
    ----------
    valid : bool array [n_batch, n_ctx]
        True where the slot holds a token.

    Returns
    -------
    rule : Rule
        Its array has the axes [n_batch, 1, ...]: the same for every head.

    Raises
    ------
    NpllmTypeError
        When `valid` is not bool: the inverse `~` of numbers would be no truth.
    NpllmValueError
        When the rule is asked about a key slot on the host that has no entry.

    Notes
    -----
    Source: `attention_mask` in Transformers.
    """
    xp = array_namespace(valid)
    expect_shape("valid", valid, n_batch=None, n_ctx=None)
    if valid.dtype != xp.bool:
        raise NpllmTypeError(
            f"valid must be a bool array (True = holds a token), got dtype {valid.dtype}"
        )
    return Padding(valid)


@dataclass(frozen=True, eq=False, repr=False)
class Padding(Rule):
    """The rule of `padding`."""

    valid: Array  # bool [n_batch, n_ctx]

    def visible(self, _: Array, j: Array) -> Array:
        """Evaluate the rule on slots."""
        return _labels_at(self.valid, j)

    def bound(self, _: int, __: int, j_low: int, j_high: int) -> int:
        """Say what holds for a whole block."""
        block = _on_host(self.valid, j_low, j_high)
        if block is None:
            return SOME
        return ALL if block.all() else SOME if block.any() else NONE


def left_padding(start: Array) -> Rule:
    """Hide the keys before each row's first token: padding on the left.

        visible(i, j) = j >= start[batch]

    Parameters
    ----------
    start : integer array [n_batch]
        The slot of the first token of each row.

    Returns
    -------
    rule : Rule
        Its array has the axes [n_batch, 1, ...]: the same for every head.  Equals `padding` of what
        is padded on the left, and is a form that a kernel can evaluate (`Rule.left_band`).

    Raises
    ------
    NpllmTypeError
        When `start` holds no integers.

    Notes
    -----
    Source: `attention_mask` in Transformers with `padding_side="left"`, as generation needs it.
    """
    array_namespace(start)
    expect_shape("start", start, n_batch=None)
    if not is_integer(start):
        raise NpllmTypeError(f"start must be integers, got dtype {start.dtype}")
    return LeftPadding(start)


@dataclass(frozen=True, eq=False, repr=False)
class LeftPadding(Rule):
    """The rule of `left_padding`."""

    start: Array  # integers [n_batch]

    @property
    def left_band(self) -> LeftBand:
        """What a kernel may evaluate instead."""
        return (-FAR, FAR, self.start)

    def visible(self, i: Array, j: Array) -> Array:
        """Evaluate the rule on slots."""
        xp = array_namespace(self.start)
        # [n_batch] -> [n_batch, 1, 1, ...]
        start = xp.reshape(self.start, (-1, 1, *(1 for _ in j.shape)))
        return (start <= j) & (i == i)

    def bound(self, _: int, __: int, j_low: int, j_high: int) -> int:
        """Say what holds for a whole block."""
        first_last = host_range(self.start)
        if first_last is None:
            return SOME
        return ALL if j_low >= first_last[1] else NONE if j_high < first_last[0] else SOME


def documents(labels: Array) -> Rule:
    """Let a query see the keys of its own document only.

        visible(i, j) = labels[batch, i] == labels[batch, j]

    Parameters
    ----------
    labels : integer array [n_batch, n_ctx]
        A number for each document of a row.

    Returns
    -------
    rule : Rule
        Its array has the axes [n_batch, 1, ...]: the same for every head.  To be combined:
        `causal() & documents(labels)`.

    Raises
    ------
    NpllmTypeError
        When the labels are not integers.
    NpllmValueError
        When the rule is asked about a slot on the host that has no label.

    Notes
    -----
    To restart the positions for each document does not keep documents apart: a query still sees the
    keys of the others.  This rule is what separates them.

    Source: "Exploring the Limits of Transfer Learning" (Raffel et al. 2019, T5), section 3.1.1
    names the packing; `packed_sequence_mask_function` in Transformers.
    """
    array_namespace(labels)
    expect_shape("labels", labels, n_batch=None, n_ctx=None)
    if not is_integer(labels):
        raise NpllmTypeError(f"labels must be integers, got dtype {labels.dtype}")
    return Documents(labels)


@dataclass(frozen=True, eq=False, repr=False)
class Documents(Rule):
    """The rule of `documents`."""

    labels: Array  # integers [n_batch, n_ctx]

    def visible(self, i: Array, j: Array) -> Array:
        """Evaluate the rule on slots."""
        return _labels_at(self.labels, i) == _labels_at(self.labels, j)

    def bound(self, i_low: int, i_high: int, j_low: int, j_high: int) -> int:
        """Say what holds for a whole block."""
        queries = _on_host(self.labels, i_low, i_high)
        keys = _on_host(self.labels, j_low, j_high)
        if queries is None or keys is None:
            return SOME
        if not any(np.intersect1d(*row).size for row in zip(queries, keys, strict=True)):
            return NONE
        both = np.concatenate([queries, keys], axis=1)
        return ALL if (both == both[:, :1]).all() else SOME


def _labels_at(labels: Array, slots: Array) -> Array:
    """Labels of slots of any shape: [n_batch, 1, *slots.shape]."""
    xp = array_namespace(labels)
    check_slots(slots, labels.shape[1])
    columns = xp.take(labels, xp.reshape(slots, (-1,)), axis=1)
    return xp.reshape(columns, (labels.shape[0], 1, *slots.shape))


def _on_host(labels: Array, low: int, high: int) -> Array | None:
    """Labels of a run of slots where they can be looked at for free; None on a device, and for
    slots that have no label.
    """
    return (
        labels[:, low : high + 1]
        if isinstance(labels, np.ndarray) and 0 <= low <= high < labels.shape[1]
        else None
    )
