"""The KV cache: keys and values of the tokens seen so far.  The only mutable object of a forward pass."""

import numpy as np

from npllm.arrays import array_namespace
from npllm.errors import NpllmValueError

__all__ = ["KVCache"]

SMALLEST_CAPACITY = 64  # slots of the first allocation


class KVCache:
    """Keys and values of every layer, for n_batch sequences that grow together.

    Room grows geometrically: a full array is replaced by one of twice the size, up to the context length, so that appending n
    tokens one by one copies O(n) keys in all.

    Parameters
    ----------
    n_batch, n_layer : int
    max_slots : int
        The context length; going beyond raises.

    Attributes
    ----------
    n_ctx : int
        Slots in use: tokens of the sequence so far, padding included.
    valid : bool array [n_batch, n_ctx]
        NumPy; False where a slot holds padding.

    Notes
    -----
    A forward pass appends layer by layer and then calls `advance`; one that fails before that leaves the cache as it was.
    Keys are stored after RoPE.

    Source: `DynamicCache` in Transformers.
    """

    def __init__(self, n_batch, n_layer, max_slots):
        if n_batch < 1:
            raise NpllmValueError(f"n_batch must be at least 1, got {n_batch}")
        self.n_batch, self.max_slots, self.n_ctx = n_batch, max_slots, 0
        self.valid = np.ones((n_batch, 0), dtype=bool)
        self._layers = [None] * n_layer  # each (keys, values), [n_batch, n_kv_head, capacity, d_head]

    @property
    def n_bytes(self):
        """Bytes allocated for keys and values."""
        return sum(x.nbytes for pair in self._layers if pair for x in pair)

    def append(self, layer, k, v):
        """Add keys and values of new tokens to one layer.

        Parameters
        ----------
        layer : int
        k : array [n_batch, n_kv_head, n_seq, d_head]
        v : array [n_batch, n_kv_head, n_seq, d_value]

        Returns
        -------
        k, v : array [n_batch, n_kv_head, n_ctx + n_seq, d_head]
            Views of everything stored, the new tokens included; valid until the next call.
        """
        start, stop = self.n_ctx, self.n_ctx + k.shape[-2]
        self.check_room(k.shape[0], k.shape[-2])
        stored = self._layers[layer] or tuple(_empty(x, self._capacity(stop)) for x in (k, v))
        if stored[0].shape[-2] < stop:
            stored = tuple(_grown(x, self._capacity(stop), start) for x in stored)
        self._layers[layer] = stored
        for x, new in zip(stored, (k, v), strict=True):
            x[:, :, start:stop, :] = new
        return tuple(x[:, :, :stop, :] for x in stored)

    def advance(self, valid):
        """Count the tokens that every layer has appended as seen.

        Parameters
        ----------
        valid : bool array [n_batch, n_ctx + n_seq]
            NumPy; which slots hold tokens, the new ones included.
        """
        self.n_ctx, self.valid = valid.shape[-1], valid

    def check_room(self, n_batch, n_seq):
        """Raise unless n_seq more tokens of n_batch sequences fit."""
        if n_batch != self.n_batch:
            raise NpllmValueError(f"the cache was made for n_batch = {self.n_batch} sequences, got {n_batch}; make one with "
                                  f"model.new_cache(n_batch={n_batch})")
        if self.n_ctx + n_seq > self.max_slots:
            raise NpllmValueError(f"{self.n_ctx} cached + {n_seq} new tokens are {self.n_ctx + n_seq}, but the context length "
                                  f"(max_position_embeddings) is {self.max_slots}")

    def _capacity(self, needed):
        """The smallest power of two times SMALLEST_CAPACITY that is enough, at most the context length."""
        capacity = SMALLEST_CAPACITY
        while capacity < needed:
            capacity *= 2
        return min(capacity, self.max_slots)


def _empty(x, capacity):
    n_batch, n_kv_head, _, d_head = x.shape
    return array_namespace(x).empty((n_batch, n_kv_head, capacity, d_head), dtype=x.dtype)


def _grown(x, capacity, used):
    new = _empty(x, capacity)
    new[:, :, :used, :] = x[:, :, :used, :]
    return new
