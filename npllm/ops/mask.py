"""Mask rules: which key may a query see?

A rule is a function of two *slots*, the places of a query and of a key in the sequence: `rule(i, j)` is True where the query in
slot i sees the key in slot j.  Rules combine with `&`, `|` and `~`.  Attention asks a rule only about the block that it is
working on, so no n x n array exists; and it asks the rule's `bound` first, to skip a block of which nothing is visible and to
drop the mask where everything is.
"""

from collections.abc import Callable
from dataclasses import dataclass

from npllm.arrays import array_namespace, expect_shape
from npllm.errors import NpllmTypeError, NpllmValueError

__all__ = ["ALL", "NONE", "SOME", "Rule", "causal", "padding", "sliding_window"]

NONE, SOME, ALL = 0, 1, 2
"""What a rule may say of a whole block: no pair is visible; some may be; every pair is."""


def _unknown(*_):
    return SOME


@dataclass(frozen=True)
class Rule:
    """Which key slot is visible from which query slot.

    Parameters
    ----------
    visible : function (i, j) -> bool array
        `i` and `j` are integer arrays of slots that broadcast against each other, usually [n_seq, 1] and [1, n_ctx].
        The result may have further axes in front: [n_batch, 1, n_seq, n_ctx] for a rule that differs by sequence.
    bound : function (i_low, i_high, j_low, j_high) -> NONE, SOME or ALL
        What holds for every query slot in i_low ... i_high and key slot in j_low ... j_high, both ends included.
        SOME is always a correct answer, NONE and ALL are promises.
    """

    visible: Callable
    bound: Callable = _unknown

    def __call__(self, i, j):
        """Evaluate the rule on slots."""
        return self.visible(i, j)

    def __and__(self, other):
        return Rule(lambda i, j: self(i, j) & other(i, j), lambda *block: min(self.bound(*block), other.bound(*block)))

    def __or__(self, other):
        return Rule(lambda i, j: self(i, j) | other(i, j), lambda *block: max(self.bound(*block), other.bound(*block)))

    def __invert__(self):
        return Rule(lambda i, j: ~self(i, j), lambda *block: ALL - self.bound(*block))


def causal():
    """Let a query see its own slot and every earlier one.

        visible(i, j) = j <= i

    Returns
    -------
    rule : Rule

    Notes
    -----
    Source: "Attention Is All You Need" (Vaswani et al. 2017), section 3.2.3.
    """

    def bound(i_low, i_high, j_low, j_high):
        return ALL if j_high <= i_low else NONE if j_low > i_high else SOME

    return Rule(lambda i, j: j <= i, bound)


def sliding_window(w):
    """Let a query see the last `w` slots, its own included.

        visible(i, j) = i - w < j <= i

    Parameters
    ----------
    w : int
        Number of visible keys, `sliding_window` in config.json.

    Returns
    -------
    rule : Rule

    Raises
    ------
    NpllmValueError
        When `w` is below 1: not even the own slot would be visible.

    Notes
    -----
    Exactly w keys.  FlashAttention's `window_size=(w, w)` and the engines built on it see w + 1.

    Source: "Longformer" (Beltagy et al. 2020), section 3.1, one-sided; `sliding_window_overlay` in Transformers.
    """
    if w < 1:
        raise NpllmValueError(f"sliding_window must be at least 1 key, got {w}")

    def bound(i_low, i_high, j_low, j_high):
        return ALL if j_low > i_high - w else NONE if j_high <= i_low - w else SOME

    return causal() & Rule(lambda i, j: j > i - w, bound)


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

    Notes
    -----
    Source: `attention_mask` in Transformers.
    """
    xp = array_namespace(valid)
    expect_shape("valid", valid, n_batch=None, n_ctx=None)
    if valid.dtype != xp.bool:
        raise NpllmTypeError(f"valid must be a bool array (True = holds a token), got dtype {valid.dtype}")

    def visible(_, j):
        columns = xp.take(valid, xp.reshape(j, (-1,)), axis=1)
        return xp.reshape(columns, (valid.shape[0], 1, *j.shape))

    return Rule(visible)
