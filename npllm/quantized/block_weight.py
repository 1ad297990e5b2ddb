"""A matrix whose rows are blocks of a GGUF format."""

from dataclasses import dataclass
from typing import Any

from npllm.arrays import array_namespace, asarray, expect_shape
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.quantized.block_formats import FORMATS, BlockFormat
from npllm.quantized.packed import PackedMatrix

__all__ = ["BlockWeight"]

Array = Any


@dataclass(frozen=True, eq=False, repr=False)
class BlockWeight(PackedMatrix):
    """A matrix in blocks, which `linear` and `embed` take in place of a float one.

        weight[o, n * j + i] = widen(blocks[o, n_bytes * j ... n_bytes * (j + 1) - 1])[i]
        n, n_bytes: entries and bytes of a block

    Parameters
    ----------
    blocks : uint8 array [d_out, n_block*n_bytes]
        As stored in a GGUF file; a view of the mapped file is accepted.
    format : str
        A key of `npllm.quantized.block_formats.FORMATS`, such as "Q4_K".

    Raises
    ------
    NpllmTypeError
        When the blocks are not uint8.
    NpllmValueError
        When the format is unknown, or the rows are not whole blocks.

    Notes
    -----
    Immutable.  A row is packed independently of the others, so that slices, stacks and permutations
    of rows are those of the bytes.

    Source: the struct of each format in ggml-common.h.
    """

    blocks: Array
    format: str

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise NpllmValueError(
                f"format must be one of {', '.join(FORMATS)}, got {str(self.format)[:40]!r}"
            )
        xp = array_namespace(self.blocks)
        expect_shape("blocks", self.blocks, d_out=None, n_bytes=None)
        if self.blocks.dtype != xp.uint8:
            raise NpllmTypeError(f"blocks must be uint8, got {self.blocks.dtype}")
        if self.blocks.shape[1] % self.layout.n_bytes:
            raise NpllmValueError(
                f"a row of {self.format} must be whole blocks of {self.layout.n_bytes} bytes, "
                f"got {self.blocks.shape[1]} bytes"
            )

    @property
    def layout(self) -> BlockFormat:
        """Entries and bytes of a block, and its formula."""
        return FORMATS[self.format]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """[d_out, d_in]."""
        d_out, n_bytes = self.blocks.shape
        return d_out, n_bytes // self.layout.n_bytes * self.layout.n_entries

    @property
    def dtype(self) -> Any:
        """The dtype of the blocks, uint8."""
        return self.blocks.dtype

    @property
    def arrays(self) -> tuple[Any, ...]:  # type: ignore[override]
        """The blocks."""
        return (self.blocks,)

    @property
    def facts(self) -> str:
        """What tells two of these apart besides their blocks: the format."""
        return f"BlockWeight {self.format}"

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return self.blocks.shape[0] * self.blocks.shape[1]

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        """Return the library that the blocks belong to."""
        return array_namespace(self.blocks)

    def rows(self, span: slice) -> "BlockWeight":
        """Return the rows of a slice."""
        return BlockWeight(self.blocks[span, :], self.format)

    def take(self, numbers: Array) -> "BlockWeight":
        """Return the rows with the given numbers, a 1-D integer array."""
        xp = array_namespace(self.blocks, numbers)
        return BlockWeight(xp.take(self.blocks, numbers, axis=0), self.format)

    def widened(self) -> Array:
        """Return the float32 values of all rows; slice first to widen a band of rows."""
        xp, layout = array_namespace(self.blocks), self.layout
        d_out, d_in = self.shape
        blocks = xp.reshape(self.blocks, (d_out, d_in // layout.n_entries, layout.n_bytes))
        return xp.reshape(layout.widen(blocks), (d_out, d_in))

    def to(self, xp: Any) -> "BlockWeight":
        """Return the same weight in another array library."""
        return BlockWeight(asarray(self.blocks, xp), self.format)
