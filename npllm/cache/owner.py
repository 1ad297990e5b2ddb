"""Whose cache it is: what cached keys and values depend on besides the tokens."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from npllm.arrays import is_array, is_packed, to_numpy
from npllm.errors import NpllmValueError

__all__ = ["CacheOwner", "content_hash", "fingerprint"]

Array = Any
N_SAMPLE = 64  # entries of each weight that the fingerprint looks at
BAND_BYTES = 2**24  # of an array that are hashed at a time

# Entries of config.json that change keys and values; the others name tokens, heads and files.
DECISIVE = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
)
REMEDY = "a cache goes with the model that made it: make one with model.new_cache(n_batch)"


@dataclass(frozen=True, eq=False, repr=False)
class CacheOwner:
    """The model that a cache belongs to.

    Parameters
    ----------
    params : Params or str
        The weights, compared by identity: two arrays of equal numbers are not looked at.  After
        pickling, their `fingerprint`, since another process holds other arrays.
    config : Config
    mask : tuple of Rule or None
        One rule for each layer, compared by `==`; None: the checkpoint's own.

    Notes
    -----
    The set of operations is no part of it: the same weights under the same mask give the same keys
    but for rounding, so that a model and its copy with other ops may continue one cache.
    """

    params: Any
    config: Any
    mask: tuple[Any, ...] | None = None

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the weights."""
        return self.params if isinstance(self.params, str) else fingerprint(self.params)

    def __getstate__(self) -> dict[str, Any]:
        return {"params": self.fingerprint, "config": self.config, "mask": self.mask}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def has_weights_of(self, other: "CacheOwner") -> bool:
        """Tell whether another owner has the same weights, under the same adapter."""
        if isinstance(self.params, str) or isinstance(other.params, str):
            return self.fingerprint == other.fingerprint
        return self.params is other.params

    @property
    def window(self) -> int | None:
        """How many keys a query sees; None where the rules may look further back."""
        return self.config.sliding_window if self.mask is None else None

    def require(self, cache: Any) -> None:
        """Raise unless a cache belongs to this model, or to none yet and is of its sizes.

        Raises
        ------
        NpllmValueError
            Naming what differs.
        """
        if cache.owner is None:
            self._require_sizes(cache)
        else:
            self._require_same(cache.owner)

    def _require_sizes(self, cache: Any) -> None:
        """Raise where a cache that was made by hand is of other sizes than this model's."""
        n_layer, n_ctx = self.config.num_hidden_layers, self.config.context_length
        if cache.n_layer != n_layer:
            raise NpllmValueError(
                f"the cache has n_layer = {cache.n_layer}, the model {n_layer}; {REMEDY}"
            )
        if cache.max_slots > n_ctx:
            raise NpllmValueError(
                f"the cache has room for {cache.max_slots} tokens, but the context "
                f"length (max_position_embeddings) of the model is {n_ctx}; {REMEDY}"
            )
        if cache.window not in (None, self.window):
            raise NpllmValueError(
                f"the cache keeps a window of {cache.window} keys, the model sees "
                f"{self.window or 'all'}; {REMEDY}"
            )

    def _require_same(self, other: "CacheOwner") -> None:
        """Raise where a cache belongs to another model than this one."""
        if other.config is not self.config:
            for name in DECISIVE:
                theirs, mine = getattr(other.config, name), getattr(self.config, name)
                if theirs != mine:
                    raise NpllmValueError(
                        f"the cache belongs to a model with {name} = {theirs}, this "
                        f"model has {mine}; {REMEDY}"
                    )
        if not self.has_weights_of(other):
            raise NpllmValueError(
                "the cache belongs to a model with other weights (of the same shapes) or under "
                f"another adapter, whose keys are not those of this model; {REMEDY}"
            )
        if other.mask != self.mask:
            raise NpllmValueError(
                f"the cache was filled under another mask, {_named(other.mask)}, this "
                f"model has {_named(self.mask)}; {REMEDY}"
            )


def _named(mask: tuple[Any, ...] | None) -> str:
    """Say what a mask is, in few words."""
    return (
        "the checkpoint's own"
        if mask is None
        else ", ".join(map(str, dict.fromkeys(map(str, mask))))[:200]
    )


def fingerprint(weights: Any) -> str:
    """Hash what tells one set of weights from another.

        sha256 of the shape, the dtype and 64 evenly spaced entries of every array, and of the
        scales of an adapter

    Parameters
    ----------
    weights : tuple of arrays
        Or of such tuples: `Params`.

    Returns
    -------
    digest : str
        Hexadecimal.

    Notes
    -----
    Reads a few pages of each mapped file instead of all of it.  Weights that differ in a few
    entries only, between those that are looked at, have the same fingerprint.
    """
    digest = hashlib.sha256()
    for x in _arrays_of(weights):
        if is_packed(x):
            digest.update(x.facts.encode())
            continue
        flat = x.reshape(-1)
        places = np.linspace(0, max(flat.shape[0] - 1, 0), min(N_SAMPLE, flat.shape[0]))
        sample = to_numpy(flat[places.astype(np.int64)])
        digest.update(f"{x.shape} {x.dtype}".encode() + sample.tobytes())
    return digest.hexdigest()


def content_hash(tree: Any) -> str:
    """Hash everything that a tree holds: of arrays all bytes.

        sha256 of the structure, and of the dtype, the shape and the bytes of every array

    Parameters
    ----------
    tree : tuple
        Of arrays, packed matrices, names, numbers, None, and such tuples: `Params`.

    Returns
    -------
    digest : str
        Hexadecimal.

    Notes
    -----
    Reads all weights, in bands of 16 MiB: about 1 s a GB, beside the time to read mapped files.
    `fingerprint` reads 64 entries of each weight.
    """
    digest = hashlib.sha256()
    for piece in _pieces_of(tree):
        digest.update(piece)
    return digest.hexdigest()


def _pieces_of(tree: Any) -> Iterator[Any]:
    """The bytes of a tree, piece by piece."""
    if isinstance(tree, tuple):
        yield f"{type(tree).__name__} of {len(tree)};".encode()
        for branch in tree:
            yield from _pieces_of(branch)
    elif is_packed(tree):
        yield f"{tree.facts};".encode()
        yield from _pieces_of(tuple(tree.arrays))
    elif is_array(tree):
        yield f"{tree.dtype} {list(tree.shape)};".encode()
        yield from _bands_of(tree.reshape(-1) if tree.ndim == 0 else tree)
    else:
        yield f"{tree!r};".encode()


def _bands_of(x: Array) -> Iterator[Any]:
    """The bytes of an array, some rows at a time."""
    n_rows = x.shape[0]
    row_bytes = math.prod(x.shape[1:]) * x.dtype.itemsize
    step = max(1, BAND_BYTES // max(1, row_bytes))
    for start in range(0, n_rows if row_bytes else 0, step):
        band = np.ascontiguousarray(to_numpy(x[start : start + step]))
        yield band.view(np.uint8).data


def _arrays_of(tree: Any) -> Iterator[Array]:
    """Every array in tuples of tuples; a packed matrix, then the arrays that it stores."""
    if isinstance(tree, tuple):
        for branch in tree:
            yield from _arrays_of(branch)
    elif is_packed(tree):
        yield tree
        yield from _arrays_of(tree.arrays)
    elif is_array(tree):
        yield tree
