"""Bytes of the KV cache."""

from typing import Any

from npllm.config.config import Config

__all__ = ["kv_cache_bytes", "kv_table"]


def kv_cache_bytes(
    config: Config,
    n_context: int,
    *,
    n_batch: int = 1,
    n_kv_head: int | None = None,
    window: int | None = None,
    itemsize: int = 4,
) -> int:
    """Count the bytes of keys and values after n_context tokens.

        bytes = 2 * n_layer * n_batch * n_kv_head * d_head * min(n_context, window) * itemsize

    Parameters
    ----------
    config : Config
    n_context, n_batch : int
    n_kv_head : int, optional
        Default: the model's.  n_head is multi-head, 1 multi-query attention.
    window : int, optional
        Keys that a query sees.  None: all.
    itemsize : int
        Bytes of a number: 4 on a CPU, where keys and values are float32.

    Returns
    -------
    n_bytes : int

    Notes
    -----
    Counts the keys that the last of the n_context queries sees.  The arrays of `KVCache` may be
    larger, since they are allocated ahead.

    Source: "Fast Transformer Decoding" (Shazeer 2019), section 2.4; "GQA" (Ainslie et al. 2023),
    section 2.2.
    """
    n_kv_head = config.num_key_value_heads if n_kv_head is None else n_kv_head
    kept = n_context if window is None else min(n_context, window)
    return 2 * config.num_hidden_layers * n_batch * n_kv_head * config.head_dim * kept * itemsize


def kv_table(
    config: Config, n_context: int, *, n_batch: int = 1, itemsize: int = 4
) -> dict[str, dict[str, Any]]:
    """Compare the bytes of KV cache of multi-head, grouped-query and multi-query attention.

    Returns
    -------
    table : dict of str to dict
        "mha" (as many key/value heads as query heads), "gqa" (the model's own) and "mqa" (one) ->
        {"n_kv_head", "full", "window"}; "window" is None where the model has none.
    """
    heads = {"mha": config.num_attention_heads, "gqa": config.num_key_value_heads, "mqa": 1}

    def n_bytes(n_kv_head: int, window: int | None) -> int:
        return kv_cache_bytes(
            config,
            n_context,
            n_batch=n_batch,
            n_kv_head=n_kv_head,
            window=window,
            itemsize=itemsize,
        )

    window = config.sliding_window
    return {
        name: {
            "n_kv_head": n,
            "full": n_bytes(n, None),
            "window": None if window is None else n_bytes(n, window),
        }
        for name, n in heads.items()
    }
