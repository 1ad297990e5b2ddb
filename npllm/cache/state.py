"""What a KV cache holds, and how its arrays are made: every function returns new arrays."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from npllm.arrays import DTYPES, array_namespace, asarray, compute_dtype, dtype_named
from npllm.cache.owner import CacheOwner
from npllm.errors import NpllmValueError

__all__ = [
    "CACHE_DTYPES",
    "SMALLEST_CAPACITY",
    "State",
    "cache_dtype",
    "capacity_for",
    "check_held",
    "crop",
    "empty",
    "first_visible",
    "reallocated",
    "replace_rows",
    "rounded",
    "select_rows",
]

Array = Any
SMALLEST_CAPACITY = 64  # slots of the first allocation
CACHE_DTYPES = ("bfloat16", "float16", "float32")  # what keys and values can be kept in by choice


class State(NamedTuple):
    """What a cache holds.  It is replaced as a whole, so that a call happens wholly or not at all.

    Arrays of keys and values are shared by old and new states: a slot below `n_ctx` is not written
    again unless the cache is cropped, and slots beyond it are overwritten by the next call.
    """

    owner: CacheOwner | None
    n_ctx: int
    ids: Array  # integers [n_batch, n_ctx]
    positions: Array  # integers [n_batch, n_ctx]
    valid: Array  # bool [n_batch, n_ctx]
    rope_variant: Array  # integers [n_batch]
    layers: list[Any]  # each None or (keys, values, first slot), [n_batch, n_kv_head, capacity, d]


def cache_dtype(name: str | None, computed: Any = DTYPES["float32"]) -> Any:
    """Look up the dtype that keys and values are kept in.

    Parameters
    ----------
    name : str, optional
        One of CACHE_DTYPES.  None: that of new keys and values, which are not rounded.
    computed : dtype
        Of new keys and values.

    Returns
    -------
    dtype : NumPy dtype, or None

    Raises
    ------
    NpllmValueError
        For another name, and where keys and values are float64.
    """
    if name is None:
        return None
    if name not in CACHE_DTYPES:
        raise NpllmValueError(
            f"cache_dtype must be one of {', '.join(CACHE_DTYPES)}, got {str(name)[:40]!r}"
        )
    if computed == DTYPES["float64"]:
        raise NpllmValueError(
            f"the model computes in float64, and cache_dtype {name!r} would round its keys and "
            "values: leave cache_dtype out"
        )
    return dtype_named(name)


def first_visible(n_ctx: int, window: int | None) -> int:
    """Return the first slot that a query in slot n_ctx can see."""
    return 0 if window is None else max(0, n_ctx - window + 1)


def capacity_for(needed: int, window: int | None, max_slots: int) -> int:
    """Return how many slots to allocate for `needed` ones.

    A power of two times SMALLEST_CAPACITY, at most the context length.  With a window half of it
    more, so that many tokens are appended before the next reallocation.
    """
    if window is not None and needed >= window:
        needed += window // 2
    capacity = SMALLEST_CAPACITY
    while capacity < needed:
        capacity *= 2
    return min(capacity, max_slots)


def check_held(layer: int, name: str, held: Array, new: Array) -> None:
    """Raise where an array of the cache cannot take new keys or values as they are."""
    if held.shape[1] != new.shape[1] or held.shape[3] != new.shape[3]:
        sizes, got = ([x.shape[1], x.shape[3]] for x in (held, new))
        raise NpllmValueError(
            f"layer {layer} of the cache holds {name} [n_kv_head, d_head] = {sizes}, got {got}; "
            "a cache goes with the model that made it"
        )
    if held.dtype != new.dtype and compute_dtype(held, new) != compute_dtype(held):
        raise NpllmValueError(
            f"layer {layer} of the cache holds {name} in {held.dtype}, which would round "
            f"the {new.dtype} of the new ones; a cache goes with the model that made it"
        )


def empty(x: Array, capacity: int, dtype: Any = None) -> Array:
    """Make an array for `capacity` slots, of the library and heads of `x`; of its dtype too, unless
    another is given.
    """
    n_batch, n_kv_head, _, d_head = x.shape
    shape = n_batch, n_kv_head, capacity, d_head
    return array_namespace(x).empty(shape, dtype=x.dtype if dtype is None else dtype)


def rounded(x: Array, dtype: Any) -> Array:
    """Round new keys or values to the dtype that they are kept in: to nearest, ties to even.

    y = float32(dtype(x)),   infinity beyond the largest number of float16
    """
    if x.dtype == dtype:
        return x
    with np.errstate(over="ignore"):
        return array_namespace(x).astype(x, dtype)


def take_rows(x: Array, rows: Sequence[int] | range | Array, used: int) -> Array:
    """Make a new array of some rows of `x`, of the same capacity, filled as far as it is used."""
    xp = array_namespace(x)
    new = xp.empty((len(rows), *x.shape[1:]), dtype=x.dtype)
    new[:, :, :used, :] = xp.take(x[:, :, :used, :], asarray(np.asarray(rows), xp), axis=0)
    return new


def reallocated(x: Array, start: int, stop: int, capacity: int) -> Array:
    """Make an array of the given capacity that begins with columns start ... stop - 1 of `x`."""
    new = empty(x, capacity)
    new[:, :, : stop - start, :] = x[:, :, start:stop, :]
    return new


def select_rows(state: State, rows: Array) -> State:
    """Return the state whose row r is row rows[r] of `state`, in new arrays."""
    layers = [
        layer and (*(take_rows(x, rows, state.n_ctx - layer[2]) for x in layer[:2]), layer[2])
        for layer in state.layers
    ]
    return state._replace(
        layers=layers,
        ids=state.ids[rows],
        positions=state.positions[rows],
        valid=state.valid[rows],
        rope_variant=state.rope_variant[rows],
    )


def crop(state: State, n_ctx: int) -> State:
    """Return the state without slot n_ctx and those beyond; the arrays stay, unless nothing is
    kept.
    """
    return state._replace(
        layers=list(state.layers) if n_ctx else [None] * len(state.layers),
        n_ctx=n_ctx,
        ids=state.ids[:, :n_ctx],
        positions=state.positions[:, :n_ctx],
        valid=state.valid[:, :n_ctx],
    )


def replace_rows(state: State, rows: Sequence[int], other: State, oldest: int) -> State:
    """Return the state with some rows' keys and values, from slot `oldest` on, those of `other`.

    Parameters
    ----------
    state : State
    rows : list of int
    other : State
        Of len(rows) sequences, with the same n_ctx.
    oldest : int
    """
    layers, n_ctx, n_batch = [], state.n_ctx, len(state.ids)
    for (*mine, first), (*theirs, start) in zip(state.layers, other.layers, strict=True):
        new = [take_rows(x, range(n_batch), n_ctx - first) for x in mine]
        for x, fresh in zip(new, theirs, strict=True):
            for i, row in enumerate(rows):
                recomputed = fresh[i, :, oldest - start : n_ctx - start, :]
                x[row, :, oldest - first : n_ctx - first, :] = recomputed
        layers.append((*new, first))
    rope_variant = state.rope_variant.copy()
    rope_variant[rows] = other.rope_variant
    return state._replace(layers=layers, rope_variant=rope_variant)
