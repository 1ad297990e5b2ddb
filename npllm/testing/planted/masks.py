"""Attention under another mask than the one it is given."""

from collections.abc import Callable
from typing import Any

import numpy as np

from npllm import ops
from npllm.testing.planted.bug import Array, plant

__all__ = ["visible", "without_slots"]

C = "attention"


def visible(mask: Any, q: Array, k: Array, shift: int = 0) -> Array:
    """Evaluate a mask as bool [..., n_seq, n_ctx], each query `shift` slots further on."""
    n_seq, n_ctx = q.shape[-2], k.shape[-2]
    if mask is None:
        return np.ones((n_seq, n_ctx), dtype=bool)
    if callable(mask):
        i = np.clip(np.arange(n_ctx - n_seq, n_ctx) + shift, 0, n_ctx - 1)
        return np.asarray(mask(i[:, None], np.arange(n_ctx)[None, :]))
    rows = np.clip(np.arange(mask.shape[-2]) + shift, 0, mask.shape[-2] - 1)
    return mask[..., rows, :]


def masked(name: str, convention: str, says: str) -> Callable:
    """List the definition under another mask: a function (mask, q, k) -> bool array."""

    def listed(make: Callable) -> Callable:
        def fn(q: Array, k: Array, v: Array, *, mask: Any = None, **options: Any) -> Array:
            return ops.attention(q, k, v, mask=make(mask, q, k), **without_slots(options))

        fn.__doc__ = says
        plant(C, name, convention)(fn)
        return make

    return listed


def without_slots(options: dict[str, Any]) -> dict[str, Any]:
    """Options without the slots, which an evaluated mask has no use for."""
    return {name: value for name, value in options.items() if name not in ("q_slots", "k_slots")}


# ------------------------------------------------------------------ masks


@masked("top-left", "C9", "The first query is aligned with the first key.")
def _top_left(mask: Any, q: Array, k: Array) -> Array:
    return visible(mask, q, k, q.shape[-2] - k.shape[-2])


@masked("one key late", "C9", "Each query sees one key of the future.")
def _late(mask: Any, q: Array, k: Array) -> Array:
    now, later = visible(mask, q, k), visible(mask, q, k, 1)
    j, i = np.arange(k.shape[-2]), np.arange(k.shape[-2] - q.shape[-2], k.shape[-2])[:, None]
    return now | (later & (j == i + 1))


@masked("one key early", "C9", "No query sees its own key.")
def _early(mask: Any, q: Array, k: Array) -> Array:
    j, i = np.arange(k.shape[-2]), np.arange(k.shape[-2] - q.shape[-2], k.shape[-2])[:, None]
    return visible(mask, q, k) & (j != i)


@masked("not causal", "C9", "Every query sees the future.")
def _future(mask: Any, q: Array, k: Array) -> Array:
    j, i = np.arange(k.shape[-2]), np.arange(k.shape[-2] - q.shape[-2], k.shape[-2])[:, None]
    return visible(mask, q, k) | (visible(mask, q, k, k.shape[-2]) & (j > i))


@masked("w + 1 keys", "C10", "A window of w is w + 1 keys.")
def _wider(mask: Any, q: Array, k: Array) -> Array:
    return visible(mask, q, k) | visible(mask, q, k, -1)


@masked("symmetric", "C10", "The window looks as far ahead as back.")
def _both_sides(mask: Any, q: Array, k: Array) -> Array:
    n_seq, n_ctx = q.shape[-2], k.shape[-2]
    if not callable(mask):
        return visible(mask, q, k)
    slot = np.arange(n_ctx)
    back = np.asarray(mask(slot[None, :], slot[:, None]))[..., n_ctx - n_seq :, :]
    keys = visible(mask, q, k).any(axis=-2, keepdims=True)
    return visible(mask, q, k) | (back & keys)


@masked("ignored", "C10", "There is no window.")
def _no_window(mask: Any, q: Array, k: Array) -> Array:
    n_ctx = k.shape[-2]
    if not callable(mask):
        return visible(mask, q, k)
    slot = np.arange(n_ctx)
    table = np.asarray(mask(slot[:, None], slot[None, :]))
    return np.logical_or.accumulate(table, axis=-2)[..., n_ctx - q.shape[-2] :, :]


@masked("no document mask", "C19", "A query sees the documents that are packed before its own.")
def _no_documents(mask: Any, q: Array, k: Array) -> Array:
    return _no_window(mask, q, k)


@masked("padding enters", "C23", "Keys that are padding are seen.")
def _padding(mask: Any, q: Array, k: Array) -> Array:
    seen = visible(mask, q, k)
    j, i = np.arange(k.shape[-2]), np.arange(k.shape[-2] - q.shape[-2], k.shape[-2])[:, None]
    hidden = ~seen.any(axis=-2, keepdims=True) & (j <= i)
    return seen | hidden
