"""KV caches in safetensors files, bound to weights, mask and tokens by hashes."""

import contextlib
import hashlib
import json
import os
import tempfile
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from npllm.arguments import check_ids, check_path
from npllm.arrays import is_array, to_numpy
from npllm.cache.owner import DECISIVE, CacheOwner
from npllm.cache.state import State, capacity_for, first_visible
from npllm.checkpoints.safetensors import TensorEntry, read_header
from npllm.checkpoints.tensor_files import TensorFiles
from npllm.errors import NpllmError, NpllmOSError, NpllmValueError

__all__ = ["read_note", "read_state", "spelled", "write_state"]

Array = Any
FORMAT = "npllm KV cache 1"
BOOKS = ("ids", "positions", "valid", "rope_variant")  # what is known of the tokens
WHAT = {
    "weights": "other weights, or another adapter",
    "config": "another config.json",
    "mask": "another mask",
}
REMEDY = "a saved cache goes with the model that filled it: compute the prompt again"


def write_state(state: State, window: int | None, path: Any, note: str = "") -> None:
    """Write what a cache holds to a file, which appears when it is complete.

    Parameters
    ----------
    state : State
    window : int or None
    path : str or Path
    note : str
        Any text, for `read_note`.

    Raises
    ------
    NpllmValueError
        For a cache of no model, and under a rule of a function, which has no name that lasts.
    NpllmOSError
        When the file cannot be written.
    """
    file = check_path("path", path)
    if state.owner is None:
        raise NpllmValueError(
            "only a cache of a model can be saved: make it with model.new_cache()"
        )
    tensors = {name: np.asarray(getattr(state, name)).astype(np.int64) for name in BOOKS}
    oldest = first_visible(state.n_ctx, window)
    for number, layer in enumerate(state.layers if state.n_ctx else ()):
        keys, values, first = layer
        kept = slice(oldest - first, state.n_ctx - first)
        for name, x in (("keys", keys), ("values", values)):
            tensors[f"layers.{number}.{name}"] = np.ascontiguousarray(to_numpy(x[:, :, kept, :]))
    facts = _facts(state.owner) | {"format": FORMAT, "note": note, "content": _digest(tensors)}
    _write(file, tensors, facts)


def _write(file: Path, tensors: dict[str, Array], facts: dict[str, str]) -> None:
    partial = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        os.close(handle)
        partial = Path(name)
        save_file(tensors, partial, metadata=facts)
        os.replace(partial, file)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise NpllmOSError(f"{file}: cannot be written ({reason})") from None
    finally:
        if partial is not None:
            with contextlib.suppress(OSError):
                partial.unlink()


def read_note(path: Any) -> str:
    """Return the note of a saved cache.

    Raises
    ------
    NpllmOSError, NpllmValueError
        For what is no such file.
    """
    return _metadata(check_path("path", path)).get("note", "")


def read_state(path: Any, owner: CacheOwner, kinds: tuple[str, ...]) -> State:
    """Read a saved cache of this model, and of no other.

    Parameters
    ----------
    path : str or Path
    owner : CacheOwner
        The model.
    kinds : tuple of str
        Types of keys and values that it takes, as safetensors spells them.

    Returns
    -------
    state : State
        Keys and values are NumPy arrays.

    Raises
    ------
    NpllmOSError
        When the file cannot be read, is no saved cache, or was damaged.
    NpllmValueError
        When the cache belongs to other weights, another config or another mask, or holds what this
        model cannot have written.
    """
    file = check_path("path", path)
    metadata = _metadata(file)
    for name, mine in _facts(owner).items():
        if metadata.get(name) != mine:
            raise NpllmValueError(f"{file}: was filled under {WHAT[name]}; {REMEDY}")
    entries = read_header(file)
    shape, first = _checked_shapes(file, entries, owner, kinds)
    files = TensorFiles(is_mapped=False)
    tensors = {name: np.asarray(files.read(entry)) for name, entry in entries.items()}
    if metadata.get("content") != _digest(tensors):
        raise NpllmOSError(f"{file}: is damaged: its content is not what was written; {REMEDY}")
    books = _checked_books(file, tensors, owner.config)
    layers: list[Any] = [None] * owner.config.num_hidden_layers
    for number in range(len(layers) if shape[2] else 0):
        names = (f"layers.{number}.keys", f"layers.{number}.values")
        room = capacity_for(shape[2], owner.window, owner.config.context_length)
        layers[number] = (*(_grown(file, name, tensors[name], room) for name in names), first)
    ids, positions, valid, variant = books
    return State(owner, ids.shape[1], ids, positions, valid, variant, layers)


def _metadata(file: Path) -> dict[str, str]:
    """The metadata of a saved cache; its header is checked first."""
    read_header(file)
    with safe_open(file, framework="np") as opened:
        metadata = opened.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise NpllmValueError(f"{file}: is no KV cache that npllm saved ({FORMAT})")
    return metadata


def _checked_shapes(
    file: Path, entries: dict[str, TensorEntry], owner: CacheOwner, kinds: tuple[str, ...]
) -> tuple[tuple[int, ...], int]:
    """Raise unless the tensors are those of a cache of this model; shape and first slot of keys."""
    config = owner.config
    wrong = [name for name in BOOKS if name not in entries or entries[name].dtype != "I64"]
    if wrong or len(entries["ids"].shape) != 2:
        raise NpllmValueError(f"{file}: must hold {', '.join(BOOKS)} as I64")
    n_batch, n_ctx = entries["ids"].shape
    oldest = first_visible(n_ctx, owner.window)
    shape = (n_batch, config.num_key_value_heads, n_ctx - oldest, config.head_dim)
    wanted: dict[str, tuple[int, ...]] = {name: (n_batch, n_ctx) for name in BOOKS[:3]}
    wanted["rope_variant"] = (n_batch,)
    for number in range(config.num_hidden_layers if n_ctx else 0):
        wanted |= {f"layers.{number}.{name}": shape for name in ("keys", "values")}
    found = {name: entry.shape for name, entry in entries.items()}
    is_long = n_ctx > config.context_length
    types = {entry.dtype for name, entry in entries.items() if name not in BOOKS}
    if n_batch < 1 or is_long or found != wanted or len(types) > 1 or not types <= set(kinds):
        raise NpllmValueError(
            f"{file}: must hold keys and values [n_batch, n_kv_head, n_kept, d_head] = "
            f"{list(shape)} of {config.num_hidden_layers} layers in {' or '.join(kinds)}, at most "
            f"{config.context_length} tokens, and nothing else; it holds {len(found)} tensors of "
            f"{n_ctx} tokens in {', '.join(sorted(types)) or 'no type'}"
        )
    return shape, oldest


def _checked_books(file: Path, tensors: dict[str, Array], config: Any) -> list[Array]:
    """Ids, positions, valid and rope_variant, in their ranges."""
    ids, positions, valid, variant = (tensors[name] for name in BOOKS)
    try:
        if ids.size:
            check_ids("ids", ids, config.vocab_size, "vocab_size")
    except NpllmError as error:
        raise NpllmValueError(f"{file}: {error}") from None
    in_range = (0 <= positions) & (positions < config.context_length)
    flags = np.isin(valid, (0, 1)).all() and (variant >= 0).all()
    if not in_range.all() or not flags:
        raise NpllmValueError(f"{file}: positions, valid or rope_variant are out of range")
    return [ids, positions, valid.astype(bool), variant]


def _grown(file: Path, name: str, x: Array, capacity: int) -> Array:
    """A tensor in an array with room for more tokens; raise unless it is finite."""
    if not np.isfinite(x.astype(np.float32) if x.dtype.itemsize == 2 else x).all():
        raise NpllmValueError(f"{file}: {name} holds NaN or infinity")
    grown = np.empty((*x.shape[:2], max(capacity, x.shape[2]), x.shape[3]), x.dtype)
    grown[:, :, : x.shape[2], :] = x
    return grown


def _facts(owner: CacheOwner) -> dict[str, str]:
    """What a saved cache is bound to: hashes of weights, config and mask."""
    config = json.dumps({name: repr(getattr(owner.config, name)) for name in DECISIVE})
    return {
        "weights": owner.fingerprint,
        "config": hashlib.sha256(config.encode()).hexdigest(),
        "mask": hashlib.sha256(spelled(owner.mask).encode()).hexdigest(),
    }


def spelled(x: Any) -> str:
    """A mask in words that are the same in every process: rules by type and parameters."""
    if isinstance(x, tuple | list):
        return f"({', '.join(map(spelled, x))})"
    if is_array(x):
        content = to_numpy(x)
        digest = hashlib.sha256(np.ascontiguousarray(content).tobytes()).hexdigest()
        return f"{content.dtype}{content.shape}{digest}"
    is_rule = is_dataclass(x) and not isinstance(x, type)
    if is_rule and type(x).__module__.startswith("npllm."):
        inside = (f"{f.name}={spelled(getattr(x, f.name))}" for f in fields(x) if f.compare)
        return f"{type(x).__qualname__}({', '.join(inside)})"
    if x is None or isinstance(x, bool | int | float | str):
        return repr(x)
    raise NpllmValueError(
        f"a cache under the mask of {str(x)[:80]} cannot be saved: a rule of a function has no "
        "name that lasts; use the rules of npllm.ops.mask"
    )


def _digest(tensors: dict[str, Array]) -> str:
    """Hash the names and bytes of all tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f"{name} {x.dtype} {x.shape} ".encode())
        digest.update(np.ascontiguousarray(x).view(np.uint8).data if x.size else b"")
    return digest.hexdigest()
