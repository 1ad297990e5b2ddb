"""The KV cache: keys and values of the tokens seen so far.  The only mutable object of a forward
pass.
"""

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import numpy as np

from npllm.arguments import host_integers
from npllm.arrays import is_integer
from npllm.cache_owner import CacheOwner
from npllm.cache_state import State, check_held, empty, moved, take_rows
from npllm.errors import NpllmRuntimeError, NpllmValueError

__all__ = ["KVCache"]

Array = Any
SMALLEST_CAPACITY = 64  # slots of the first allocation


class KVCache:
    """Keys and values of every layer, for n_batch sequences that grow together.

    Room grows geometrically: a full array is replaced by one of twice the size, up to the context
    length, so that appending n tokens one by one copies O(n) keys in all.  With a sliding window
    only the keys that a coming query can still see are kept, and the arrays stop growing.

    Parameters
    ----------
    n_batch, n_layer : int
    max_slots : int
        The context length; going beyond raises.
    window : int, optional
        Number of keys a query sees, its own included.
    owner : CacheOwner, optional
        The model that it belongs to; default: that of the first call.

    Attributes
    ----------
    n_ctx : int
        Slots used so far: tokens of the sequence, padding included.
    ids, positions : integer array [n_batch, n_ctx]
        NumPy; what stands in each slot.  A row is computed anew from them when its RoPE frequencies
        change.
    valid : bool array [n_batch, n_ctx]
        NumPy; False where a slot holds padding.
    choice : integer array [n_batch]
        NumPy; which RoPE frequencies the keys of each row were rotated with
        (`npllm.models.rope.frequency_choice`).

    Notes
    -----
    A forward pass works on a draft (`transact`): it appends layer by layer and then calls
    `advance`.  One that fails, wherever it does, leaves the cache as it was.  Keys are stored after
    RoPE.  A cache keeps the weights of its owner alive.  `copy.copy` and `copy.deepcopy` are
    `copy`; a cache that was pickled belongs to the model of its next call.

    Source: `DynamicCache` and `DynamicSlidingWindowLayer` in Transformers.
    """

    def __init__(
        self,
        n_batch: int,
        n_layer: int,
        max_slots: int,
        window: int | None = None,
        *,
        owner: CacheOwner | None = None,
    ):
        if n_batch < 1:
            raise NpllmValueError(f"n_batch must be at least 1, got {n_batch}")
        self.max_slots = max_slots
        self.window = window if window is not None and window < max_slots else None
        none = np.zeros((n_batch, 0), dtype=np.int64)
        self._state = State(
            owner, 0, none, none, none.astype(bool), np.zeros(n_batch, np.int64), [None] * n_layer
        )
        self._draft: KVCache | None = None  # kept between calls: kernels remember tables by it
        self._lock = Lock()

    owner = property(lambda self: self._state.owner)
    n_ctx = property(lambda self: self._state.n_ctx)
    ids = property(lambda self: self._state.ids)
    positions = property(lambda self: self._state.positions)
    valid = property(lambda self: self._state.valid)
    choice = property(lambda self: self._state.choice)
    n_batch = property(lambda self: len(self._state.ids))
    n_layer = property(lambda self: len(self._state.layers))
    _layers = property(lambda self: self._state.layers)

    @property
    def n_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(x.nbytes for layer in self._layers if layer for x in layer[:2])

    def transact(self, call: Callable[["KVCache"], Any], owner: CacheOwner | None = None) -> Any:
        """Run a call on a draft of this cache, and take over all that it did when it returns.

        Parameters
        ----------
        call : function (draft) -> result
            The draft is a KVCache; the cache itself does not change meanwhile.
        owner : CacheOwner, optional
            The model that calls.

        Returns
        -------
        result
            What the call returned.  Where it raised, for whatever reason, the cache is as it was.

        Raises
        ------
        NpllmRuntimeError
            When another call is using the cache, in another thread or this one.
        NpllmValueError
            When the cache belongs to another model.

        Notes
        -----
        The whole change is one assignment.  The lock is taken by the interpreter in one step, so
        that an interrupt cannot leave it locked; of two threads that come at the same moment the
        second may wait for the first.
        """
        if self._lock.locked():
            raise NpllmRuntimeError(
                "the cache is in use by another call, and takes one at a time; give "
                "each thread a cache of its own, or wait for the other call"
            )
        with self._lock:
            return self._run_on_draft(call, owner)

    def _run_on_draft(self, call: Callable[["KVCache"], Any], owner: CacheOwner | None) -> Any:
        draft = self._new_draft(owner)
        try:
            result = call(draft)
            self._state = draft._state
        finally:
            draft._state = self._state  # arrays of a call that failed are given up
        return result

    def _new_draft(self, owner: CacheOwner | None) -> "KVCache":
        """Return a cache that holds the same and shares the arrays."""
        if owner is not None:
            owner.require(self)
        if self._draft is None:
            self._draft = KVCache(self.n_batch, self.n_layer, self.max_slots, self.window)
        state = self._state
        self._draft._state = state._replace(owner=state.owner or owner, layers=list(state.layers))
        return self._draft

    def append(self, layer: int, k: Array, v: Array) -> tuple[Array, Array, range]:
        """Add keys and values of new tokens to one layer.

        Parameters
        ----------
        layer : int
        k : array [n_batch, n_kv_head, n_seq, d_head]
        v : array [n_batch, n_kv_head, n_seq, d_value]

        Returns
        -------
        k, v : array [n_batch, n_kv_head, n_kept + n_seq, d_head]
            Views of the keys and values that the new tokens can see, their own included; valid
            until the next call.
        slots : range
            Where they stand in the sequence.
        """
        keys, values, slots = self.extend(layer, k, v)
        n_seq = k.shape[-2]
        for x, new in ((keys, k), (values, v)):
            x[:, :, x.shape[-2] - n_seq :, :] = new
        return keys, values, slots

    def extend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array, range]:
        """Make room for new tokens in one layer, for a kernel that writes their keys and values
        itself.

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
            When the cache is full, has no such layer, or was filled with another number of
            sequences or shape of heads, or in float32 where these are float64.
        """
        n_seq, n_ctx, layers = k.shape[-2], self.n_ctx, self._layers
        self.check_room(k.shape[0], n_seq)
        if not 0 <= layer < len(layers):
            raise NpllmValueError(
                f"layer must lie in 0 ... n_layer - 1 = {len(layers) - 1}, got {layer}; "
                "a cache goes with the model that made it"
            )
        oldest, stop = self._oldest(), n_ctx + n_seq
        keys, values, first = layers[layer] or (
            *(empty(x, self._capacity(n_seq)) for x in (k, v)),
            0,
        )
        check_held(layer, "keys", keys, k)
        check_held(layer, "values", values, v)
        if stop - first > keys.shape[-2]:
            keys, values = (
                moved(x, oldest - first, n_ctx - first, self._capacity(stop - oldest))
                for x in (keys, values)
            )
            first = oldest
        layers[layer] = keys, values, first
        return *(x[:, :, oldest - first : stop - first, :] for x in (keys, values)), range(
            oldest, stop
        )

    def kept(self, layer: int) -> tuple[Array, Array, range]:
        """Return what a coming query can see of one layer.

        Parameters
        ----------
        layer : int

        Returns
        -------
        k, v : array [n_batch, n_kv_head, n_kept, d_head]
            Views, valid until the next call.
        slots : range
            Where they stand in the sequence; empty, and both arrays None, where the layer was never
            filled.
        """
        if self._layers[layer] is None:
            return None, None, range(0)
        keys, values, first = self._layers[layer]
        oldest, stop = self._oldest(), self.n_ctx
        return *(x[:, :, oldest - first : stop - first, :] for x in (keys, values)), range(
            oldest, stop
        )

    def advance(self, ids: Array, positions: Array, valid: Array, choice: Array) -> None:
        """Count the tokens that every layer has appended as seen.

        Parameters
        ----------
        ids, positions : integer array [n_batch, n_seq]
        valid : bool array [n_batch, n_ctx + n_seq]
            Which slots hold tokens, the new ones included.
        choice : integer array [n_batch]
        """
        state = self._state
        positions = np.broadcast_to(positions, ids.shape)
        self._state = state._replace(
            n_ctx=state.n_ctx + ids.shape[1],
            valid=valid,
            choice=choice,
            ids=np.concatenate([state.ids, ids], axis=1),
            positions=np.concatenate([state.positions, positions], axis=1),
        )

    def replace_rows(self, rows: Sequence[int], other: "KVCache") -> None:
        """Take over keys and values of some rows from a cache that holds them, computed anew.

        Parameters
        ----------
        rows : list of int
        other : KVCache
            Of len(rows) sequences, with the same n_ctx and window.
        """
        oldest, n_ctx, layers = self._oldest(), self.n_ctx, []
        for (*mine, first), (*theirs, start) in zip(self._layers, other._layers, strict=True):
            new = [take_rows(x, range(self.n_batch), n_ctx - first) for x in mine]
            for x, fresh in zip(new, theirs, strict=True):
                for i, row in enumerate(rows):
                    x[row, :, oldest - first : n_ctx - first, :] = fresh[
                        i, :, oldest - start : n_ctx - start, :
                    ]
            layers.append((*new, first))
        choice = self.choice.copy()
        choice[rows] = other.choice
        self._state = self._state._replace(layers=layers, choice=choice)

    def reorder(self, rows: Sequence[int]) -> None:
        """Let row r of the cache hold what row rows[r] holds now, keys and values and all that is
        known of them.

        Parameters
        ----------
        rows : list of int
            A row may be named several times, or not at all: the cache then grows or shrinks to
            len(rows) sequences.

        Raises
        ------
        NpllmValueError
            When no row is named, or one that does not exist.
        NpllmRuntimeError
            When another call is using the cache.

        Notes
        -----
        Source: `DynamicCache.reorder_cache` and `batch_repeat_interleave` in Transformers.
        """
        chosen, n = host_integers("rows", rows), self.n_batch
        if (
            chosen.ndim != 1
            or not is_integer(chosen)
            or chosen.size == 0
            or chosen.min() < 0
            or chosen.max() >= n
        ):
            raise NpllmValueError(
                f"rows must be integers in 0 ... n_batch - 1 = {n - 1}, at least one, got {chosen.tolist()}"
            )
        self.transact(lambda draft: draft._take(chosen))

    def _take(self, rows: Array) -> None:
        state = self._state
        layers = [
            layer and (*(take_rows(x, rows, state.n_ctx - layer[2]) for x in layer[:2]), layer[2])
            for layer in state.layers
        ]
        self._state = state._replace(
            layers=layers,
            ids=state.ids[rows],
            positions=state.positions[rows],
            valid=state.valid[rows],
            choice=state.choice[rows],
        )

    def copy(self) -> "KVCache":
        """Return a cache that holds the same, belongs to the same model and shares no array."""
        other = KVCache(self.n_batch, self.n_layer, self.max_slots, self.window)
        other._state = self._state
        other._take(np.arange(self.n_batch))
        return other

    __copy__ = copy

    def __deepcopy__(self, _: Any) -> "KVCache":
        return self.copy()

    def __getstate__(self) -> dict[str, Any]:
        state = self._state._replace(owner=None)  # another process has other weights
        return {"max_slots": self.max_slots, "window": self.window, "_state": state, "_draft": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())

    def check_room(self, n_batch: int, n_seq: int) -> None:
        """Raise unless n_seq more tokens of n_batch sequences fit."""
        if n_batch != self.n_batch:
            raise NpllmValueError(
                f"the cache was made for n_batch = {self.n_batch} sequences, got {n_batch}; make one with "
                f"model.new_cache(n_batch={n_batch})"
            )
        if self.n_ctx + n_seq > self.max_slots:
            raise NpllmValueError(
                f"{self.n_ctx} cached + {n_seq} new tokens are {self.n_ctx + n_seq}, but the context length "
                f"(max_position_embeddings) is {self.max_slots}"
            )

    def _oldest(self) -> int:
        """The first slot that a query in slot n_ctx can see."""
        return 0 if self.window is None else max(0, self.n_ctx - self.window + 1)

    def _capacity(self, needed: int) -> int:
        """A power of two times SMALLEST_CAPACITY, at most the context length; with a window, room
        to spare before the next move.
        """
        if self.window is not None and needed >= self.window:
            needed += self.window // 2
        capacity = SMALLEST_CAPACITY
        while capacity < needed:
            capacity *= 2
        return min(capacity, self.max_slots)
