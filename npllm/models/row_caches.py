"""Rows of one call that each have a KV cache of their own: all but attention runs on them together.

Rows of unequal length need no padding, and a row joins or leaves without a copy of any key.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from npllm.arrays import array_namespace
from npllm.cache import KVCache
from npllm.models import phi3
from npllm.ops.opset import Ops, Step

__all__ = ["RowCaches", "rowwise_attention", "transact_all"]

Array = Any


class RowCaches(NamedTuple):
    """Stands where a KVCache does: row b of the call appends to drafts[b].

    `known`: what a kernel found of a mask in one layer, for the others.
    """

    drafts: list[KVCache]
    known: dict[int, Any]


@lru_cache(8)
def rowwise_attention(ops: Ops) -> Ops:
    """Return a set in which each row attends to its own cache, under a `RowCaches`.

        y[b] = rope_attention(qkv[b], cache b)

    Parameters
    ----------
    ops : Ops
        Computes each row's attention, and all the rest for all rows together.

    Returns
    -------
    rowwise : Ops
    """

    def rope_attention(qkv: Array, step: Step) -> Array:
        """Compute `npllm.models.phi3.rope_attention` of each row [1, n_seq, ...] by itself."""
        if getattr(ops.rope_attention, "takes_rows", False):
            y = ops.rope_attention(qkv, step)  # type: ignore[misc]
            if y is not NotImplemented:
                return y
        rows = [
            phi3.rope_attention(qkv[b : b + 1], _of_row(step, b, draft), ops)
            for b, draft in enumerate(step.cache.drafts)
        ]
        return array_namespace(qkv).concat(rows, axis=0)

    return ops.replace(rope_attention=rope_attention)


def _of_row(step: Step, b: int, draft: KVCache) -> Step:
    """What a row's attention needs: its tables [n_seq, d_rope] and its cache."""
    return step._replace(cos=step.cos[b], sin=step.sin[b], cache=draft)


def transact_all(
    caches: Sequence[KVCache], call: Callable[[list[KVCache]], Any], owner: Any = None
) -> Any:
    """Run a call on drafts of several caches, which take over all that it did when it returns.

    Parameters
    ----------
    caches : sequence of KVCache
    call : function (drafts) -> result
    owner : CacheOwner, optional
        The model that calls.

    Returns
    -------
    result
        What the call returned.  Where it raised, every cache is as it was.

    Raises
    ------
    NpllmRuntimeError, NpllmValueError
        As `KVCache.transact`; and where a cache is named twice.
    """

    def open_next(drafts: list[KVCache]) -> Any:
        if len(drafts) == len(caches):
            return call(drafts)
        return caches[len(drafts)].transact(lambda draft: open_next([*drafts, draft]), owner)

    return open_next([])
