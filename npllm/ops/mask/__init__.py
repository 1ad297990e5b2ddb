"""Mask rules: which key may a query see?

A rule is a function of two *slots*, the places of a query and of a key in the sequence: `rule(i,
j)` is True where the query in slot i sees the key in slot j.  Rules combine with `&`, `|` and `~`.
Attention asks a rule only about the block that it is working on, so no n x n array exists; and it
asks the rule's `bound` first, to skip a block of which nothing is visible and to drop the mask
where everything is.
"""

from npllm.ops.mask.blocks import block_local, fixed, global_tokens, random_blocks
from npllm.ops.mask.causal_and_window import (
    bidirectional,
    causal,
    lookback,
    prefix_lm,
    sliding_window,
)
from npllm.ops.mask.labels import documents, left_padding, padding
from npllm.ops.mask.rule import ALL, NONE, SOME, Rule
from npllm.ops.mask.sparse import band, dilated_window, longformer_window, strided
from npllm.ops.mask.table import to_bool

__all__ = [
    "ALL",
    "NONE",
    "SOME",
    "Rule",
    "band",
    "bidirectional",
    "block_local",
    "causal",
    "dilated_window",
    "documents",
    "fixed",
    "global_tokens",
    "left_padding",
    "lookback",
    "longformer_window",
    "padding",
    "prefix_lm",
    "random_blocks",
    "sliding_window",
    "strided",
    "to_bool",
]
