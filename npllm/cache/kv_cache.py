"""The KV cache: keys and values of the tokens seen so far.  The only mutable object of a forward
pass.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter
from threading import Lock
from typing import Any

import numpy as np

from npllm.arguments import check_integer, host_integers
from npllm.arrays import is_integer
from npllm.cache.files import write_state
from npllm.cache.owner import CacheOwner
from npllm.cache.state import (
    State,
    capacity_for,
    check_held,
    crop,
    empty,
    first_visible,
    reallocated,
    replace_rows,
    rounded,
    select_rows,
)
from npllm.errors import NpllmRuntimeError, NpllmValueError

__all__ = ["KVCache"]

Array = Any


class KVCache:
    """Keys and values of every layer, for n_batch sequences that grow together.

    Capacity grows geometrically: a full array is replaced by one of twice the size, up to the
    context length, so that appending n tokens one by one copies O(n) keys in all.  With a sliding
    window only the keys that a coming query can still see are kept, and the arrays stop growing.

    Parameters
    ----------
    n_batch, n_layer : int
    max_slots : int
        The context length; going beyond raises.
    window : int, optional
        Number of keys a query sees, its own included.
    owner : CacheOwner, optional
        The model that it belongs to; default: that of the first call.
    dtype : NumPy dtype, optional
        What keys and values are kept in: bfloat16 or float16, to which they are rounded once, when
        they are appended, or float32.  Every query reads them rounded, those of the same call
        too.  Default: that of the first keys.

    Attributes
    ----------
    n_ctx : int
        Slots used so far: tokens of the sequence, padding included.
    ids, positions : integer array [n_batch, n_ctx]
        NumPy; what stands in each slot.  A row is computed anew from them when its RoPE frequencies
        change.
    valid : bool array [n_batch, n_ctx]
        NumPy; False where a slot holds padding.
    rope_variant : integer array [n_batch]
        NumPy; which RoPE frequencies the keys of each row were rotated with
        (`npllm.models.rope.frequency_choice`).
    state : State
        All of it, as one value that does not change.

    Notes
    -----
    A forward pass works on a draft (`transact`): it appends layer by layer and then calls
    `advance`.  One that fails, wherever it does, leaves the cache as it was.  Keys are stored after
    RoPE.  A cache keeps the weights of its owner alive.  `copy.copy` and `copy.deepcopy` are
    `copy`.  A pickled cache holds no weights, only their fingerprint: in another process it goes on
    under a model of the same weights and mask, and no other.

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
        dtype: Any = None,
    ):
        n_batch = check_integer("n_batch", n_batch, 1, 2**31)
        self.max_slots, self.dtype = max_slots, dtype
        self.window = window if window is not None and window < max_slots else None
        none = np.zeros((n_batch, 0), dtype=np.int64)
        self._state = State(
            owner, 0, none, none, none.astype(bool), np.zeros(n_batch, np.int64), [None] * n_layer
        )
        self._expected = 0  # slots that the current pass will use
        self._draft: KVCache | None = None  # kept between calls: kernels remember tables by it
        self._lock = Lock()

    watch: Callable[[int], object] | None = None
    """Is told of each layer to which a forward pass appends, for a progress bar."""

    # read about 30 times a token: an attrgetter takes no Python call, a function would
    state = property(attrgetter("_state"))
    owner = property(attrgetter("_state.owner"))
    n_ctx: int = property(attrgetter("_state.n_ctx"))  # type: ignore[assignment]
    ids = property(attrgetter("_state.ids"))
    positions = property(attrgetter("_state.positions"))
    valid = property(attrgetter("_state.valid"))
    rope_variant = property(attrgetter("_state.rope_variant"))
    n_batch = property(lambda self: len(self._state.ids))
    n_layer = property(lambda self: len(self._state.layers))

    @property
    def n_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(x.nbytes for layer in self._state.layers if layer for x in layer[:2])

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
            self._draft = self._like_this()
        state, self._draft.watch, self._draft._expected = self._state, self.watch, 0
        self._draft._state = state._replace(owner=state.owner or owner, layers=list(state.layers))
        return self._draft

    def expect(self, n_seq: int) -> None:
        """Say how many new tokens this pass will append, before it appends the first.

        The arrays are then allocated once for all of them.  Otherwise they would be copied each
        time their size doubles, when the tokens come in chunks.

        Parameters
        ----------
        n_seq : int
        """
        self._expected = self.n_ctx + n_seq

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
        keys, values, slots = self.reserve_slots(layer, k, v)
        n_seq = k.shape[-2]
        for x, new in ((keys, k), (values, v)):
            x[:, :, x.shape[-2] - n_seq :, :] = rounded(new, x.dtype)
        return keys, values, slots

    def reserve_slots(self, layer: int, k: Array, v: Array) -> tuple[Array, Array, range]:
        """Reserve slots for new tokens in one layer, for a kernel that writes their keys and values
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
        layers, n_ctx, n_seq = self._state.layers, self._state.n_ctx, k.shape[-2]
        self.check_fits(k.shape[0], n_seq)
        if self.watch is not None:
            self.watch(layer)
        if not 0 <= layer < len(layers):
            raise NpllmValueError(
                f"layer must lie in 0 ... n_layer - 1 = {len(layers) - 1}, got {layer}; "
                "a cache goes with the model that made it"
            )
        oldest, stop = first_visible(n_ctx, self.window), n_ctx + n_seq
        needed = max(stop - oldest, self._expected if self.window is None else 0)
        keys, values, first = layers[layer] or self._allocated(k, v, needed)
        check_held(layer, "keys", keys, k)
        check_held(layer, "values", values, v)
        if stop - first > keys.shape[-2]:
            capacity = capacity_for(needed, self.window, self.max_slots)
            span = oldest - first, n_ctx - first
            keys, values = (reallocated(x, *span, capacity) for x in (keys, values))
            first = oldest
        layers[layer] = keys, values, first
        held = slice(oldest - first, stop - first)
        return keys[:, :, held, :], values[:, :, held, :], range(oldest, stop)

    def reserve_in_layers(
        self, k: Array, v: Array, numbers: range
    ) -> list[tuple[Array, Array, int]]:
        """Reserve slots for new tokens in some layers, for a kernel that finds the columns itself.

        Parameters
        ----------
        k, v : array [n_batch, n_kv_head, n_seq, d_head]
            As in `reserve_slots`.
        numbers : range
            Of layers.

        Returns
        -------
        layers : list of (keys, values, first)
            Whole arrays [n_batch, n_kv_head, capacity, d_head], and the slot of their first column.
            The same tuples as last time where nothing was reallocated.

        Raises
        ------
        NpllmValueError
            As `reserve_slots`.
        """
        layers, stop = self._state.layers, self._state.n_ctx + k.shape[-2]
        for number in numbers:
            layer = layers[number] if number < len(layers) else None
            if layer is None or stop - layer[2] > layer[0].shape[-2]:
                self.reserve_slots(number, k, v)
            elif self.watch is not None:
                self.watch(number)
        self.check_fits(k.shape[0], k.shape[-2])
        return layers[numbers.start : numbers.stop]

    def _allocated(self, k: Array, v: Array, needed: int) -> tuple[Array, Array, int]:
        """Make the first arrays of a layer, for the shapes of its keys and values."""
        capacity = capacity_for(needed, self.window, self.max_slots)
        return empty(k, capacity, self.dtype), empty(v, capacity, self.dtype), 0

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
        if self._state.layers[layer] is None:
            return None, None, range(0)
        keys, values, first = self._state.layers[layer]
        oldest, stop = self._oldest(), self.n_ctx
        return *(x[:, :, oldest - first : stop - first, :] for x in (keys, values)), range(
            oldest, stop
        )

    def advance(self, ids: Array, positions: Array, valid: Array, rope_variant: Array) -> None:
        """Count the tokens that every layer has appended as seen.

        Parameters
        ----------
        ids, positions : integer array [n_batch, n_seq]
        valid : bool array [n_batch, n_ctx + n_seq]
            Which slots hold tokens, the new ones included.
        rope_variant : integer array [n_batch]
        """
        state = self._state
        if positions.shape != ids.shape:
            positions = np.broadcast_to(positions, ids.shape)
        self._state = state._replace(
            n_ctx=state.n_ctx + ids.shape[1],
            valid=valid,
            rope_variant=rope_variant,
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
        self._state = replace_rows(self._state, rows, other.state, self._oldest())

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
                f"rows must be integers in 0 ... n_batch - 1 = {n - 1}, at least one, "
                f"got {chosen.tolist()}"
            )
        self.transact(lambda draft: draft._select(chosen))

    def save(self, path: Any, *, note: str = "") -> None:
        """Write what the cache holds to a safetensors file, for `model.load_cache`.

        Parameters
        ----------
        path : str or Path
            Replaced where it exists.
        note : str
            Any text; `npllm.cache.files.read_note` returns it.

        Raises
        ------
        NpllmValueError
            For a cache of no model, and under a mask rule of a function.
        NpllmOSError
            When the file cannot be written.

        Notes
        -----
        The file names weights, config and mask by hashes (`npllm.cache.owner.fingerprint`), and has
        a hash of its own content, tokens included.
        """
        write_state(self._state, self.window, path, note)

    def load_state(self, state: State) -> "KVCache":
        """Take over a state that was read from a file; return the cache itself."""
        self._state = state
        return self

    def crop(self, n_ctx: int) -> None:
        """Forget the tokens from slot n_ctx on.

        Parameters
        ----------
        n_ctx : int

        Raises
        ------
        NpllmValueError
            When the cache holds fewer tokens, or no longer holds what a query in slot n_ctx sees: a
            sliding window gives up old keys.
        NpllmRuntimeError
            When another call is using the cache.

        Notes
        -----
        Source: `DynamicCache.crop` in Transformers.
        """
        n = check_integer("n_ctx", n_ctx, 0, self.n_ctx, " (cached tokens)")
        first = max((layer[2] for layer in self._state.layers if layer), default=0)
        if 0 < n < self.first_crop:
            raise NpllmValueError(
                f"the cache cannot go back to n_ctx = {n}: a query there sees slots from "
                f"{first_visible(n, self.window)} on, and only those from {first} on are kept "
                f"(sliding_window {self.window})"
            )
        self.transact(lambda draft: draft._crop(n))

    @property
    def first_crop(self) -> int:
        """The least n_ctx above 0 that `crop` takes: a sliding window gives up old keys."""
        first = max((layer[2] for layer in self._state.layers if layer), default=0)
        return 0 if self.window is None or first == 0 else first + self.window - 1

    def _crop(self, n_ctx: int) -> None:
        self._state = crop(self._state, n_ctx)

    def _select(self, rows: Array) -> None:
        self._state = select_rows(self._state, rows)

    def copy(self) -> "KVCache":
        """Return a cache that holds the same, belongs to the same model and shares no array."""
        other = self._like_this()
        other._state = select_rows(self._state, np.arange(self.n_batch))
        return other

    def _like_this(self) -> "KVCache":
        """An empty cache of the same size."""
        size = self.n_batch, self.n_layer, self.max_slots, self.window
        return KVCache(*size, dtype=self.dtype)

    __copy__ = copy

    def __deepcopy__(self, _: Any) -> "KVCache":
        return self.copy()

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in ("max_slots", "window", "dtype", "_state")}
        return kept | {"_draft": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _expected=0, _lock=Lock())

    def __repr__(self) -> str:
        window = "" if self.window is None else f", window {self.window}"
        return (
            f"<npllm.KVCache n_batch {self.n_batch}, {self.n_layer} layers, {self.n_ctx} of "
            f"{self.max_slots} slots{window}, {self.n_bytes:,} bytes>"
        )

    def check_fits(self, n_batch: int, n_seq: int) -> None:
        """Raise unless n_seq more tokens of n_batch sequences fit."""
        n_mine = len(self._state.ids)
        if n_batch != n_mine:
            raise NpllmValueError(
                f"the cache was made for n_batch = {n_mine} sequences, got {n_batch}; "
                f"make one with model.new_cache(n_batch={n_batch})"
            )
        if self.n_ctx + n_seq > self.max_slots:
            raise NpllmValueError(
                f"{self.n_ctx} cached + {n_seq} new tokens are {self.n_ctx + n_seq}, but the "
                f"context length (max_position_embeddings) is {self.max_slots}"
            )

    def _oldest(self) -> int:
        """The first slot that a query in slot n_ctx can see."""
        return first_visible(self.n_ctx, self.window)
