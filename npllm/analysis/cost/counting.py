"""A set of operations that counts operations and bytes while it runs: the check of the formulas."""

from collections.abc import Callable
from typing import Any

import numpy as np

from npllm.analysis.cost.operations import SOFTMAX, Cost
from npllm.ops import Ops, reference
from npllm.ops.attention import evaluate_mask

__all__ = ["COUNTS", "bytes_moved", "counting_ops"]

Array = Any


def counting_ops(ops: Ops = reference) -> tuple[Ops, dict[str, Cost]]:
    """Wrap a set of operations so that it counts operations and bytes while it runs.

    Parameters
    ----------
    ops : Ops

    Returns
    -------
    counted : Ops
        With empty slots, so that every operation is called under its own name.
    costs : dict of str to Cost
        Name of the operation -> what was counted so far; empty at first.

    Notes
    -----
    Independent of the model: operations follow from the shapes of the arguments, visible pairs from
    the mask itself, bytes from the arrays.
    """
    costs: dict[str, Cost] = {}

    def wrap(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            y = op(*args, **options)
            flops = COUNTS[name](*args, **options)
            moved = bytes_moved(name, args, options, y)
            costs[name] = costs.get(name, Cost(0, 0)) + Cost(flops, moved)
            return y

        return counted

    return ops.replace(**{name: wrap(name, getattr(ops, name)) for name in COUNTS}), costs


def _n_rows(x: Array) -> int:
    """Rows of the last axis."""
    return x.size // x.shape[-1]


def _count_embed(_ids: Array, _weight: Array) -> int:
    return 0


def _count_linear(x: Array, weight: Array, bias: Array | None = None) -> int:
    return 2 * x.size * weight.shape[0] + (0 if bias is None else _n_rows(x) * bias.size)


def _count_rms_norm(x: Array, *_: Any) -> int:
    return _n_rows(x) * (4 * x.shape[-1] + 3)


def _count_rope_tables(positions: Array, inv_freq: Array, _scale: float = 1.0) -> int:
    return positions.size * 9 * inv_freq.shape[-1]


def _count_apply_rope(x: Array, cos: Array, _sin: Array) -> int:
    return 3 * _n_rows(x) * cos.shape[-1]


def _count_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Any = None,
    q_slots: Any = None,
    k_slots: Any = None,
    **_: Any,
) -> int:
    n_seq, n_ctx = q.shape[-2], k.shape[-2]
    q_slots = range(n_ctx - n_seq, n_ctx) if q_slots is None else q_slots
    k_slots = range(n_ctx) if k_slots is None else k_slots
    visible = np.True_ if mask is None else evaluate_mask(np, mask, q, q_slots, k_slots)
    n_pair = int(np.broadcast_to(visible, (*q.shape[:-1], n_ctx)).sum())
    return n_pair * (2 * q.shape[-1] + 1 + SOFTMAX + 2 * v.shape[-1])


def _count_swiglu(gate: Array, _up: Array) -> int:
    return 5 * gate.size


COUNTS: dict[str, Callable[..., int]] = {
    "embed": _count_embed,
    "linear": _count_linear,
    "rms_norm": _count_rms_norm,
    "rope_tables": _count_rope_tables,
    "apply_rope": _count_apply_rope,
    "attention": _count_attention,
    "swiglu": _count_swiglu,
}
"""Name of the operation -> function of its arguments that returns the operations of the call."""


def bytes_moved(name: str, args: Any, options: dict[str, Any], y: Any) -> int:
    """Add up the bytes of all arguments and results; of an embedding matrix only the rows that are
    gathered.
    """
    if name == "embed":
        ids, weight = args
        return ids.nbytes + ids.size * (weight.nbytes // weight.shape[0]) + y.nbytes
    results = y if isinstance(y, tuple) else (y,)
    return sum(x.nbytes for x in (*args, *options.values(), *results) if hasattr(x, "nbytes"))
