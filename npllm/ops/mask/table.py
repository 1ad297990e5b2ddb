"""A rule written out as a table, for libraries that take no rules."""

from collections.abc import Callable
from typing import Any

import numpy as np

from npllm.arguments import check_mask
from npllm.arrays import array_namespace
from npllm.errors import NpllmTypeError
from npllm.ops.attention import resolve_slots

__all__ = ["to_bool"]

Array = Any


def to_bool(
    rule: Callable, n_seq: int, n_ctx: int, q_slots: Array = None, k_slots: Array = None
) -> Array:
    """Evaluate a rule on all slots: the table that a library without rules takes.

        visible[..., i, j] = rule(q_slots[i], k_slots[j])

    Parameters
    ----------
    rule : Rule
        Or any function of two arrays of slots.
    n_seq : int
        Queries.
    n_ctx : int
        Keys.
    q_slots : integer array [n_seq], optional
        Also a `range`.  Default: the last n_seq slots of the keys.
    k_slots : integer array [n_ctx], optional
        Also a `range`.  Default: 0 ... n_ctx - 1.

    Returns
    -------
    visible : bool array [n_seq, n_ctx]
        True where visible; further axes n_batch, 1 in front for a rule that differs by
        sequence.  In the library of the slots; NumPy without any.

    Raises
    ------
    NpllmTypeError
        When `rule` cannot be called, or slots are no integers.
    NpllmValueError
        When the slots are not as many as the queries or keys.

    Notes
    -----
    Source: the boolean `attn_mask` of `torch.nn.functional.scaled_dot_product_attention`, True =
    takes part.
    """
    if rule is None or not callable(check_mask(rule, "rule")):
        raise NpllmTypeError(
            "rule must be a Rule of npllm.ops.mask or a function of slots, "
            f"got {type(rule).__name__}"
        )
    given = [slots for slots in (q_slots, k_slots) if slots is not None]
    given = [slots for slots in given if not isinstance(slots, range)]
    xp = array_namespace(*given) if given else np
    i = resolve_slots(xp, "q_slots", q_slots, "n_seq", n_seq, n_ctx - n_seq)
    j = resolve_slots(xp, "k_slots", k_slots, "n_ctx", n_ctx, 0)
    i, j = (xp.arange(s.start, s.stop, s.step) if isinstance(s, range) else s for s in (i, j))
    visible = rule(i[:, None], j[None, :])
    return xp.broadcast_to(visible, (*visible.shape[:-2], n_seq, n_ctx))
