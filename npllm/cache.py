"""The KV cache: keys and values of the tokens seen so far.  The only mutable object of a forward pass."""

import numpy as np

from npllm.arrays import array_namespace, asarray, is_integer
from npllm.errors import NpllmValueError

__all__ = ["KVCache"]

SMALLEST_CAPACITY = 64  # slots of the first allocation
STALE = -1  # a row whose keys and values must be computed anew, whatever its frequencies


class KVCache:
    """Keys and values of every layer, for n_batch sequences that grow together.

    Room grows geometrically: a full array is replaced by one of twice the size, up to the context length, so that appending n
    tokens one by one copies O(n) keys in all.  With a sliding window only the keys that a coming query can still see are kept,
    and the arrays stop growing.

    Parameters
    ----------
    n_batch, n_layer : int
    max_slots : int
        The context length; going beyond raises.
    window : int, optional
        Number of keys a query sees, its own included.

    Attributes
    ----------
    n_ctx : int
        Slots used so far: tokens of the sequence, padding included.
    ids, positions : integer array [n_batch, n_ctx]
        NumPy; what stands in each slot.  A row is computed anew from them when its RoPE frequencies change.
    valid : bool array [n_batch, n_ctx]
        NumPy; False where a slot holds padding.
    choice : integer array [n_batch]
        NumPy; which RoPE frequencies the keys of each row were rotated with (`npllm.models.rope.frequency_choice`).

    Notes
    -----
    A forward pass appends layer by layer and then calls `advance`; one that fails before that leaves the cache as it was.
    Keys are stored after RoPE.

    Source: `DynamicCache` and `DynamicSlidingWindowLayer` in Transformers.
    """

    def __init__(self, n_batch, n_layer, max_slots, window=None):
        if n_batch < 1:
            raise NpllmValueError(f"n_batch must be at least 1, got {n_batch}")
        self.n_batch, self.max_slots = n_batch, max_slots
        self.window = window if window is not None and window < max_slots else None
        self.n_ctx = 0
        self.ids = self.positions = np.zeros((n_batch, 0), dtype=np.int64)
        self.valid = np.ones((n_batch, 0), dtype=bool)
        self.choice = np.full(n_batch, STALE)
        self._layers = [None] * n_layer  # each (keys, values, first slot), [n_batch, n_kv_head, capacity, d_head]

    @property
    def n_bytes(self):
        """Bytes allocated for keys and values."""
        return sum(x.nbytes for layer in self._layers if layer for x in layer[:2])

    def append(self, layer, k, v):
        """Add keys and values of new tokens to one layer.

        Parameters
        ----------
        layer : int
        k : array [n_batch, n_kv_head, n_seq, d_head]
        v : array [n_batch, n_kv_head, n_seq, d_value]

        Returns
        -------
        k, v : array [n_batch, n_kv_head, n_kept + n_seq, d_head]
            Views of the keys and values that the new tokens can see, their own included; valid until the next call.
        slots : range
            Where they stand in the sequence.
        """
        keys, values, slots = self.extend(layer, k, v)
        n_seq = k.shape[-2]
        for x, new in ((keys, k), (values, v)):
            x[:, :, x.shape[-2] - n_seq :, :] = new
        return keys, values, slots

    def extend(self, layer, k, v):
        """Make room for new tokens in one layer, for a kernel that writes their keys and values itself.

        Parameters
        ----------
        layer : int
        k : array [n_batch, n_kv_head, n_seq, d_head]
            Only its shape, dtype and library count, and so for `v`.
        v : array [n_batch, n_kv_head, n_seq, d_value]

        Returns
        -------
        keys, values, slots
            As `append` returns them, the last n_seq columns of both still to be filled.

        Raises
        ------
        NpllmValueError
            When the cache is full, or was filled with another number of sequences or shape of heads.
        """
        n_seq = k.shape[-2]
        self.check_room(k.shape[0], n_seq)
        oldest, stop = self._oldest(), self.n_ctx + n_seq
        keys, values, first = self._layers[layer] or (*(_empty(x, self._capacity(n_seq)) for x in (k, v)), 0)
        for name, held, new in (("keys", keys, k), ("values", values, v)):
            sizes, got = ([x.shape[1], x.shape[3]] for x in (held, new))
            if sizes != got:
                raise NpllmValueError(f"layer {layer} of the cache holds {name} [n_kv_head, d_head] = {sizes}, got {got}; a cache "
                                      "goes with the model that made it")
        if stop - first > keys.shape[-2]:
            keys, values = (_moved(x, oldest - first, self.n_ctx - first, self._capacity(stop - oldest)) for x in (keys, values))
            first = oldest
        self._layers[layer] = keys, values, first
        return *(x[:, :, oldest - first : stop - first, :] for x in (keys, values)), range(oldest, stop)

    def kept(self, layer):
        """Return what a coming query can see of one layer.

        Parameters
        ----------
        layer : int

        Returns
        -------
        k, v : array [n_batch, n_kv_head, n_kept, d_head]
            Views, valid until the next call.
        slots : range
            Where they stand in the sequence; empty, and both arrays None, where the layer was never filled.
        """
        if self._layers[layer] is None:
            return None, None, range(0)
        keys, values, first = self._layers[layer]
        oldest, stop = self._oldest(), self.n_ctx
        return *(x[:, :, oldest - first : stop - first, :] for x in (keys, values)), range(oldest, stop)

    def advance(self, ids, positions, valid, choice):
        """Count the tokens that every layer has appended as seen.

        Parameters
        ----------
        ids, positions : integer array [n_batch, n_seq]
        valid : bool array [n_batch, n_ctx + n_seq]
            Which slots hold tokens, the new ones included.
        choice : integer array [n_batch]
        """
        self.ids = np.concatenate([self.ids, ids], axis=1)
        self.positions = np.concatenate([self.positions, np.broadcast_to(positions, ids.shape)], axis=1)
        self.n_ctx, self.valid, self.choice = self.n_ctx + ids.shape[1], valid, choice

    def replace_rows(self, rows, other):
        """Take over keys and values of some rows from a cache that holds them, computed anew.

        Parameters
        ----------
        rows : list of int
        other : KVCache
            Of len(rows) sequences, with the same n_ctx and window.
        """
        oldest = self._oldest()
        for mine, theirs in zip(self._layers, other._layers, strict=True):
            for x, new in zip(mine[:2], theirs[:2], strict=True):
                for i, row in enumerate(rows):
                    kept = new[i, :, oldest - theirs[2] : self.n_ctx - theirs[2], :]
                    x[row, :, oldest - mine[2] : self.n_ctx - mine[2], :] = kept

    def reorder(self, rows):
        """Let row r of the cache hold what row rows[r] holds now, keys and values and all that is known of them.

        Parameters
        ----------
        rows : list of int
            A row may be named several times, or not at all: the cache then grows or shrinks to len(rows) sequences.

        Raises
        ------
        NpllmValueError
            When no row is named, or one that does not exist.

        Notes
        -----
        Source: `DynamicCache.reorder_cache` and `batch_repeat_interleave` in Transformers.
        """
        rows = np.asarray(rows)
        if rows.ndim != 1 or not is_integer(rows) or rows.size == 0 or rows.min() < 0 or rows.max() >= self.n_batch:
            raise NpllmValueError(f"rows must be integers in 0 ... n_batch - 1 = {self.n_batch - 1}, at least one, got "
                                  f"{rows.tolist()}")
        self.ids, self.positions, self.valid, self.choice = (x[rows] for x in (self.ids, self.positions, self.valid, self.choice))
        self.n_batch = len(rows)
        self._layers = [layer and (*(_rows(x, rows, self.n_ctx - layer[2]) for x in layer[:2]), layer[2]) for layer in self._layers]

    def state(self):
        """What `restore` needs to go back to here."""
        return self.n_ctx, self.ids, self.positions, self.valid

    def restore(self, state):
        """Go back to an earlier state after a call that failed midway; keys dropped since then are computed anew when needed."""
        if state[0] != self.n_ctx:
            self.n_ctx, self.ids, self.positions, self.valid = state
            self.choice = np.full(self.n_batch, STALE)
            self._layers = [None if layer is None or self.n_ctx == 0 else (*layer[:2], min(layer[2], self._oldest()))
                            for layer in self._layers]

    def check_room(self, n_batch, n_seq):
        """Raise unless n_seq more tokens of n_batch sequences fit."""
        if n_batch != self.n_batch:
            raise NpllmValueError(f"the cache was made for n_batch = {self.n_batch} sequences, got {n_batch}; make one with "
                                  f"model.new_cache(n_batch={n_batch})")
        if self.n_ctx + n_seq > self.max_slots:
            raise NpllmValueError(f"{self.n_ctx} cached + {n_seq} new tokens are {self.n_ctx + n_seq}, but the context length "
                                  f"(max_position_embeddings) is {self.max_slots}")

    def _oldest(self):
        """The first slot that a query in slot n_ctx can see."""
        return 0 if self.window is None else max(0, self.n_ctx - self.window + 1)

    def _capacity(self, needed):
        """A power of two times SMALLEST_CAPACITY, at most the context length; with a window, room to spare before the next move."""
        if self.window is not None and needed >= self.window:
            needed += self.window // 2
        capacity = SMALLEST_CAPACITY
        while capacity < needed:
            capacity *= 2
        return min(capacity, self.max_slots)


def _empty(x, capacity):
    n_batch, n_kv_head, _, d_head = x.shape
    return array_namespace(x).empty((n_batch, n_kv_head, capacity, d_head), dtype=x.dtype)


def _rows(x, rows, used):
    """A new array of some rows of `x`, of the same capacity, filled as far as it is used."""
    xp = array_namespace(x)
    new = xp.empty((len(rows), *x.shape[1:]), dtype=x.dtype)
    new[:, :, :used, :] = xp.take(x[:, :, :used, :], asarray(rows, xp), axis=0)
    return new


def _moved(x, start, stop, capacity):
    """An array of the given capacity that begins with columns start ... stop - 1 of `x`."""
    new = _empty(x, capacity)
    new[:, :, : stop - start, :] = x[:, :, start:stop, :]
    return new
