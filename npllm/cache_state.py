"""What a KV cache holds, and how its arrays are made: every function returns new arrays."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from npllm.arrays import array_namespace, asarray, compute_dtype
from npllm.cache_owner import CacheOwner
from npllm.errors import NpllmValueError

__all__ = ["State", "check_held", "empty", "moved", "take_rows"]

Array = Any


class State(NamedTuple):
    """What a cache holds.  It is replaced as a whole, so that a call happens wholly or not at all.

    Arrays of keys and values are shared by old and new states: a slot below `n_ctx` is never
    written again, and what a call that failed has written beyond it is overwritten by the next.
    """

    owner: CacheOwner | None
    n_ctx: int
    ids: Array  # integers [n_batch, n_ctx]
    positions: Array  # integers [n_batch, n_ctx]
    valid: Array  # bool [n_batch, n_ctx]
    choice: Array  # integers [n_batch]
    layers: list[Any]  # each None or (keys, values, first slot), [n_batch, n_kv_head, capacity, d]


def check_held(layer: int, name: str, held: Array, new: Array) -> None:
    """Raise where an array of the cache cannot take new keys or values as they are."""
    sizes, got = ([x.shape[1], x.shape[3]] for x in (held, new))
    if sizes != got:
        raise NpllmValueError(
            f"layer {layer} of the cache holds {name} [n_kv_head, d_head] = {sizes}, got {got}; a cache "
            "goes with the model that made it"
        )
    if held.dtype != new.dtype and compute_dtype(held, new) != compute_dtype(held):
        raise NpllmValueError(
            f"layer {layer} of the cache holds {name} in {held.dtype}, which would round "
            f"the {new.dtype} of the new ones; a cache goes with the model that made it"
        )


def empty(x: Array, capacity: int) -> Array:
    """Make an array for `capacity` slots, of the library, dtype and heads of `x`."""
    n_batch, n_kv_head, _, d_head = x.shape
    return array_namespace(x).empty((n_batch, n_kv_head, capacity, d_head), dtype=x.dtype)


def take_rows(x: Array, rows: Sequence[int], used: int) -> Array:
    """Make a new array of some rows of `x`, of the same capacity, filled as far as it is used."""
    xp = array_namespace(x)
    new = xp.empty((len(rows), *x.shape[1:]), dtype=x.dtype)
    new[:, :, :used, :] = xp.take(x[:, :, :used, :], asarray(np.asarray(rows), xp), axis=0)
    return new


def moved(x: Array, start: int, stop: int, capacity: int) -> Array:
    """Make an array of the given capacity that begins with columns start ... stop - 1 of `x`."""
    new = empty(x, capacity)
    new[:, :, : stop - start, :] = x[:, :, start:stop, :]
    return new
