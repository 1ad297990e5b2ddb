"""Rules that close over one label for each slot: padding, and documents packed into one row."""

import numpy as np

from npllm.arrays import array_namespace, expect_shape, host_range, is_integer
from npllm.errors import NpllmTypeError
from npllm.ops.mask.dense import check_slots
from npllm.ops.mask.rule import ALL, FAR, NONE, SOME, Rule

__all__ = ["documents", "left_padding", "padding"]


def padding(valid):
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

    def bound(_, __, j_low, j_high):
        block = _on_host(valid, j_low, j_high)
        return SOME if block is None else ALL if block.all() else SOME if block.any() else NONE

    return Rule(lambda _, j: _labels_at(xp, valid, j), bound)


def left_padding(start):
    """Hide the keys before each row's first token: padding that stands on the left.

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
    xp = array_namespace(start)
    expect_shape("start", start, n_batch=None)
    if not is_integer(start):
        raise NpllmTypeError(f"start must be integers, got dtype {start.dtype}")

    def visible(i, j):
        return (xp.reshape(start, (-1, 1, *(1 for _ in j.shape))) <= j) & (i == i)

    def bound(_, __, j_low, j_high):
        first_last = host_range(start)
        if first_last is None:
            return SOME
        return ALL if j_low >= first_last[1] else NONE if j_high < first_last[0] else SOME

    return Rule(visible, bound, left_band=(-FAR, FAR, start))


def documents(labels):
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
    xp = array_namespace(labels)
    expect_shape("labels", labels, n_batch=None, n_ctx=None)
    if not is_integer(labels):
        raise NpllmTypeError(f"labels must be integers, got dtype {labels.dtype}")

    def bound(i_low, i_high, j_low, j_high):
        queries, keys = _on_host(labels, i_low, i_high), _on_host(labels, j_low, j_high)
        if queries is None or keys is None:
            return SOME
        if not any(np.intersect1d(*row).size for row in zip(queries, keys, strict=True)):
            return NONE
        both = np.concatenate([queries, keys], axis=1)
        return ALL if (both == both[:, :1]).all() else SOME

    return Rule(lambda i, j: _labels_at(xp, labels, i) == _labels_at(xp, labels, j), bound)


def _labels_at(xp, labels, slots):
    """Labels of slots of any shape: [n_batch, 1, *slots.shape]."""
    check_slots(slots, labels.shape[1])
    columns = xp.take(labels, xp.reshape(slots, (-1,)), axis=1)
    return xp.reshape(columns, (labels.shape[0], 1, *slots.shape))


def _on_host(labels, low, high):
    """Labels of a run of slots where they can be looked at for free; None on a device, and for
    slots that have no label.
    """
    return (
        labels[:, low : high + 1]
        if isinstance(labels, np.ndarray) and 0 <= low <= high < labels.shape[1]
        else None
    )
