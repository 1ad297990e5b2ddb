"""The KV cache: the only mutable object of a forward pass, whose it is, and what it holds.

Belongs here: storage of keys and values.  Does not: attention (ops/), the forward pass.
"""

from npllm.cache.kv_cache import KVCache
from npllm.cache.owner import CacheOwner

__all__ = ["CacheOwner", "KVCache"]
