"""Caches of prompts that were read, for requests that begin with the same tokens."""

from collections import OrderedDict
from typing import Any

import numpy as np

from npllm.cache import KVCache
from npllm.cache.owner import CacheOwner
from npllm.decoding.prefill import n_reusable

__all__ = ["KeptCaches", "common_prefix", "copied_prefix", "n_held"]

Array = Any


class KeptCaches:
    """The caches that were used last, of prompts without their answers, within a number of bytes.

    Parameters
    ----------
    max_bytes : int
        0: none is kept.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self._caches: OrderedDict[int, KVCache] = OrderedDict()

    @property
    def n_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(cache.n_bytes for cache in tuple(self._caches.values()))

    def add(self, cache: KVCache, n_kept: int) -> None:
        """Keep the first n_kept tokens of a cache, which the caller gives up."""
        if n_kept == 0 or n_kept < cache.first_crop or cache.n_bytes > self.max_bytes:
            return
        cache.crop(n_kept)
        for key, other in list(self._caches.items()):
            if not other.owner.has_weights_of(cache.owner):
                continue
            n_same = common_prefix(other.ids[0], cache.ids[0])
            if n_same == n_kept:  # it is held already
                self._caches.move_to_end(key)
                return
            if n_same == other.n_ctx:
                del self._caches[key]
        self._caches[id(cache)] = cache
        while self.n_bytes > self.max_bytes:
            self._caches.popitem(last=False)

    def best(self, ids: Array, owner: CacheOwner) -> tuple[KVCache | None, int]:
        """Return the cache that holds most of a prompt's beginning, and how much can be reused.

        Caches of other weights, or under another adapter, do not count.
        """
        found = [
            (n_held(cache, ids, cache.n_ctx), key)
            for key, cache in self._caches.items()
            if cache.owner.has_weights_of(owner)
        ]
        n, key = max(found, default=(0, 0))
        if n == 0:
            return None, 0
        self._caches.move_to_end(key)
        return self._caches[key], n


def common_prefix(a: Array, b: Array) -> int:
    """Count the equal ids at the beginning of two sequences."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


def n_held(cache: KVCache, ids: Array, n_kept: int) -> int:
    """Count the tokens of a prompt that can be taken from the first n_kept of a cache."""
    n = n_reusable(common_prefix(cache.ids[0, :n_kept], ids), len(ids))
    return n if n >= cache.first_crop else 0


def copied_prefix(cache: KVCache, n: int) -> KVCache:
    """Return a cache of its own that holds the first n tokens of another."""
    copied = cache.copy()
    copied.crop(n)
    return copied
