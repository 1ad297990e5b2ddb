"""Orders of the channels of a head, and of the rows of fused projections, as indices."""

from typing import Any

import numpy as np

__all__ = ["ROTATED", "gathered", "interleaved", "pairs", "qkv_index", "rope_rows"]

Array = Any

ROTATED = ("q_proj", "k_proj", "q", "k", "cached_k")
"""Values whose channels are those of rotary pairs."""


def pairs(d_rope: int) -> Array:
    """Where our channels stand among interleaved ones."""
    return np.r_[0:d_rope:2, 1:d_rope:2]


def gathered(x: Array, index: Array) -> Array:
    """Take channels by an index; those behind it stay."""
    return np.concatenate([x[..., index], x[..., len(index) :]], axis=-1)


def interleaved(leaf: str, d_rope: int) -> list[tuple[str, Any]]:
    """Orders of channels that a partial value may have: sentence, and what makes ours theirs."""
    found: list[tuple[str, Any]] = [("", lambda x: x)]
    if leaf in ROTATED:
        says = "channels 2i and 2i + 1 stand for i and i + d_rope/2 (interleaved RoPE pairs)"
        back = np.argsort(pairs(d_rope))
        found.append((says, lambda x: gathered(x, back)))
    return found


def rope_rows(n_row: int, config: Any) -> Array:
    """For each row of a query or key matrix its place among interleaved RoPE pairs."""
    channel = np.r_[pairs(config.d_rope), config.d_rope : config.head_dim]
    return np.arange(n_row).reshape(-1, config.head_dim)[:, channel].ravel()


def qkv_index(config: Any, order: str) -> Array:
    """For each of our rows of `qkv_proj` its place in another order.

    Parameters
    ----------
    config : Config
    order : str
        "rope": the channels of queries and keys are interleaved pairs; "per-head interleave": the
        rows stand by key/value head; "k first" and "v first": blocks in another order.
    """
    n_q, n_kv, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    rows = np.arange((n_q + 2 * n_kv) * d)
    if order == "rope":
        heads = rows.reshape(-1, d)
        channel = np.r_[pairs(config.d_rope), config.d_rope : d]
        heads = np.concatenate([heads[: n_q + n_kv][:, channel], heads[n_q + n_kv :]])
        return heads.ravel()
    if order == "per-head interleave":
        cut = rows.reshape(n_kv, n_q // n_kv + 2, d)
        return np.concatenate([cut[:, :-2].ravel(), cut[:, -2].ravel(), cut[:, -1].ravel()])
    q, k, v = n_q * d, n_kv * d, n_kv * d
    if order == "k and v swapped":
        return np.r_[0:q, q + k : q + k + v, q : q + k]
    return np.r_[k : k + q, 0:k, k + q : k + q + v]
