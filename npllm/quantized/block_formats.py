"""The table of block formats: entries and bytes of a block, and the formula that widens it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from npllm.quantized.blocks_of_32 import (
    widen_q4_0,
    widen_q4_1,
    widen_q5_0,
    widen_q5_1,
    widen_q8_0,
)
from npllm.quantized.k_blocks import widen_q4_k, widen_q5_k, widen_q6_k

__all__ = ["FORMATS", "BlockFormat"]

Array = Any


class BlockFormat(NamedTuple):
    """How a block of adjacent entries of a row is stored."""

    name: str  # of GGML's type
    n_entries: int  # of a block
    n_bytes: int
    widen: Callable[[Array], Array]  # uint8 [..., n_bytes] -> float32 [..., n_entries]

    @property
    def bits(self) -> float:
        """Bits an entry, scales included."""
        return 8 * self.n_bytes / self.n_entries


FORMATS = {
    layout.name: layout
    for layout in (
        BlockFormat("Q4_0", 32, 18, widen_q4_0),
        BlockFormat("Q4_1", 32, 20, widen_q4_1),
        BlockFormat("Q5_0", 32, 22, widen_q5_0),
        BlockFormat("Q5_1", 32, 24, widen_q5_1),
        BlockFormat("Q8_0", 32, 34, widen_q8_0),
        BlockFormat("Q4_K", 256, 144, widen_q4_k),
        BlockFormat("Q5_K", 256, 176, widen_q5_k),
        BlockFormat("Q6_K", 256, 210, widen_q6_k),
    )
}
"""Name of a format, as GGML writes it, to the format."""
