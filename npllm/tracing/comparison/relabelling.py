"""Other orders of the same numbers: axes, heads, channels of rotary pairs, rows of fused maps.

A port may keep a value in another order and be right.  An order is accepted where it makes the
value agree with the float64 answer within its budget, so that no wrong value is excused.
"""

from collections.abc import Callable, Iterator
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np

from npllm.models.taps import NAMES
from npllm.tracing.comparison.operations import cut_heads, merged
from npllm.tracing.comparison.row_orders import ROTATED, gathered, pairs, qkv_index

__all__ = ["AS_IS", "Order", "orders"]

Array = Any
Change = Callable[[Array], Array]

HEADS = ("q_proj", "k_proj", "v", "q", "k", "cached_k", "cached_v", "heads")


class Order(NamedTuple):
    """How a value is ordered otherwise.

    Parameters
    ----------
    says : str
        A sentence for the reader; empty where nothing is changed.
    undo : function (array) -> array
        Brings it into our order.
    kind : str
        "" for the layout of what was recorded; else "rope", "heads" or a convention: an order that
        the values that follow must have as well.
    """

    says: str
    undo: Change
    kind: str = ""


AS_IS = Order("", lambda x: x)


def orders(name: str, x: Array, y: Array, config: Any) -> Iterator[Order]:
    """List orders that bring a value into the shape of the answer, the plain ones first.

    Parameters
    ----------
    name : str
        Of the value, without its step.
    x : array
        As recorded.
    y : float64 array
        The answer.
    config : Config
    """
    leaf = name.rsplit(".", 1)[-1]
    for layout in [AS_IS, *_layouts(leaf, name, x, y)]:
        try:
            fits = layout.undo(x)
        except ValueError:
            continue
        if fits.shape != y.shape:
            continue
        yield layout
        for content in _contents(leaf, fits, y, config):
            yield Order(_joined(layout, content), _both(layout.undo, content.undo), content.kind)


def _joined(one: Order, other: Order) -> str:
    return "; ".join(text for text in (one.says, other.says) if text)


def _both(first: Change, second: Change) -> Change:
    return lambda x: second(first(x))


# ------------------------------------------------------------------ layouts


def _layouts(leaf: str, name: str, x: Array, y: Array) -> Iterator[Order]:
    """Other axes."""
    shape = y.shape
    if leaf in ("cos", "sin"):
        yield from _table_layouts(x, shape)
    if x.size != y.size:
        return
    if x.shape != shape and [n for n in x.shape if n > 1] == [n for n in shape if n > 1]:
        yield Order(f"axes {list(x.shape)} for {list(shape)}", lambda x: x.reshape(shape))
    axes = _axes(name)
    if x.ndim == y.ndim <= 4:
        for order in permutations(range(x.ndim)):
            if order != tuple(range(x.ndim)) and tuple(np.array(x.shape)[[*order]]) == shape:
                back = [axes[order.index(n)] for n in range(x.ndim)] if len(axes) == x.ndim else []
                says = f"axes [{', '.join(back)}]" if back else f"axes in the order {order}"
                yield Order(says, _turned(order))
    if leaf in HEADS and len(shape) == 4 and x.ndim in (2, 3):
        flat = (shape[0], shape[2], shape[1] * shape[3])
        yield Order("heads side by side", lambda x: cut_heads(x.reshape(flat), shape[1]))
    if leaf == "attention" and x.ndim == 4:
        yield Order("heads as an axis before n_seq", merged)
        yield Order("heads as an axis", lambda x: x.reshape(shape))
    if x.ndim == 2 and y.ndim == 3:
        yield Order("n_batch and n_seq as one axis", lambda x: x.reshape(shape))


def _turned(order: tuple[int, ...]) -> Change:
    return lambda x: np.transpose(x, order)


def _table_layouts(x: Array, shape: tuple) -> Iterator[Order]:
    """Tables with half the columns."""
    if x.shape[-1] * 2 == shape[-1]:
        yield Order(
            "a table with one column a pair",
            lambda x: np.broadcast_to(np.concatenate([x, x], -1), shape),
        )
    if x.ndim == 2:
        yield Order("", lambda x: np.broadcast_to(x, shape))
    if x.ndim == 4 and 1 in x.shape[1:3]:
        axis = x.shape[1:3].index(1) + 1
        yield Order(
            "a table with an axis of heads",
            lambda x: np.broadcast_to(np.squeeze(x, axis), shape),
        )
    if x.ndim == 3 and x.shape[0] == 1:
        yield Order("", lambda x: np.broadcast_to(x, shape))


def _axes(name: str) -> list[str]:
    """Names of a value's axes."""
    general = ".".join("N" if part.isdigit() else part for part in name.split("."))
    return NAMES[general][0].strip("[]").split(", ") if general in NAMES else []


# ------------------------------------------------------------------ contents


def _contents(leaf: str, x: Array, y: Array, config: Any) -> Iterator[Order]:
    """Other orders of heads, channels and rows."""
    d_rope = config.d_rope
    if leaf in (*ROTATED, "cos", "sin"):
        says = "channels 2i and 2i + 1 stand for i and i + d_rope/2 (interleaved RoPE pairs)"
        yield Order(says, lambda x: gathered(x, pairs(d_rope)), "rope")
        yield Order(
            "channels i and i + d_rope/2 stand for 2i and 2i + 1 (RoPE pairs)",
            lambda x: gathered(x, np.argsort(pairs(d_rope))),
            "rope",
        )
    if leaf == "qkv_proj":
        yield from _qkv_rows(config)
    if leaf == "gate_up_proj":
        half = x.shape[-1] // 2
        swapped = np.r_[half : 2 * half, 0:half]
        yield Order("C7 up first: rows of up, then of gate", _by(swapped), "C7 up first")
        mixed = np.r_[0 : 2 * half : 2, 1 : 2 * half : 2]
        yield Order("C7 interleaved: rows of gate and up alternate", _by(mixed), "C7 interleaved")
    found = _head_order(leaf, x, y, config)
    if found is not None:
        yield found


def _by(index: Array) -> Change:
    return lambda x: x[..., index]


def _qkv_rows(config: Any) -> Iterator[Order]:
    says = {
        "rope": ("rope", "rows of queries and keys are interleaved RoPE pairs"),
        "per-head interleave": (
            "C6 per-head interleave",
            "C6 per-head interleave: rows stand by key/value head",
        ),
        "k and v swapped": ("C22 k and v swapped", "C22 rows of values before those of keys"),
        "q and k swapped": ("C22 q and k swapped", "C22 rows of keys before those of queries"),
    }
    for order, (kind, text) in says.items():
        yield Order(text, _by(qkv_index(config, order)), kind)


def _head_order(leaf: str, x: Array, y: Array, config: Any) -> Order | None:
    """The order of heads, where each of ours has one of theirs that is nearest."""
    if leaf == "attention":
        n = config.num_attention_heads
        found = _matching(cut_heads(x, n), cut_heads(y, n))
        if found is None:
            return None
        return Order(
            f"heads in the order {found.tolist()}",
            lambda x: merged(cut_heads(x, n)[:, found]),
            "heads",
        )
    if leaf not in HEADS:
        return None
    found = _matching(x, y)
    if found is None:
        return None
    return Order(f"heads in the order {found.tolist()}", lambda x: x[:, found], "heads")


def _matching(x: Array, y: Array) -> Array:
    """Which of their heads each of ours is; None where that is no other order."""
    wide = np.nan_to_num(x.astype(np.float64))
    distance = ((wide[:, None] - y[:, :, None]) ** 2).sum(axis=(0, 3, 4))
    nearest = np.argmin(distance, axis=1)
    is_order = len(set(nearest.tolist())) == len(nearest)
    return nearest if is_order and (nearest != np.arange(len(nearest))).any() else None
