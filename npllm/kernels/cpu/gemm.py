"""The matrix product of many rows: as BLAS does it, but from stored weights, which are widened tile
by tile where they are used.

The rows of x are packed into panels of 64 columns (16 without AVX-512), [n_panel, d_in, columns].
A task is a band of 96 rows of the weight; for each run of channels it widens its part of the band
into the second-level cache, and passes it over all panels, six rows at a time (`gemm_tiles`).  Of
the last panel only the columns that rows stand in are multiplied, in sixteens where they are few:
the bits are the same.

Source: "Anatomy of High-Performance Matrix Multiplication" (Goto and van de Geijn 2008), section
4.2.
"""

from functools import cache
from typing import Any

import llvmlite.binding
import numpy as np
from numba import prange, types
from numba.extending import overload

from npllm.kernels.cpu.block_gemv import widen_row
from npllm.kernels.cpu.gemm_tiles import NARROW, TILE_ROWS, WIDE, multiply, short_run
from npllm.kernels.cpu.launching import kernel, launch, n_workers
from npllm.kernels.cpu.panels import pack_all, unpack_all
from npllm.kernels.cpu.simd import (
    LANES,
    LINE,
    fma,
    load,
    load_scalar,
    prefetch,
    prefetch_far,
    splat,
    store,
)
from npllm.kernels.cpu.simd_arrays import (
    atomic_fetch_add,
    channels_of_weight,
    is_int8,
    rows_of_weight,
)
from npllm.quantized.int8 import GROUP
from npllm.threads import scratch

__all__ = ["add_unpacked", "packed", "product", "unpacked", "panel_columns"]

Array = Any

BAND = 16 * TILE_ROWS  # rows of a task
DEPTH = 512  # channels of a run
SHALLOW = 288  # of one with 16 columns: a panel's part and a tile's rows stay in the nearest cache
MOST_NARROW = 2 * NARROW  # columns of a wide panel up to which sixteens are faster than all at once
AHEAD = 12  # rows by which the reading of the weight runs ahead


@cache
def panel_columns() -> int:
    """Columns of a panel: what the registers of this processor hold the sums of; 0 for one that is
    left to BLAS.
    """
    features = llvmlite.binding.get_host_cpu_features()
    return WIDE if features.get("avx512f") else NARROW if features.get("fma") else 0


def packed(rows: Array, gain: Array, eps: float, columns: int = 0) -> Array:
    """Rows [n, d], normalised where there is a gain, as panels [n_panel, d, columns] in a buffer,
    the last filled up with zeros; 0 columns: those of `product`.
    """
    n, d = rows.shape
    columns = columns or (NARROW if n <= NARROW else panel_columns())
    panels = scratch("x panels", (-(-n // columns), d, columns), np.float32)
    launch(pack_all, rows, gain, np.float32(eps), panels)
    return panels


def product(panels: Array, weight: Array, scales: Array, n: int = 0) -> Array:
    """The product of a weight and n packed rows, [n_panel, d_out (and up to five rows more),
    columns] in a buffer; of as many as the panels have columns for n = 0.  Columns without a row
    may hold anything.
    """
    d_out = rows_of_weight(weight)
    y = scratch(
        "y panels", (len(panels), -(-d_out // TILE_ROWS) * TILE_ROWS, panels.shape[2]), np.float32
    )
    wide = scratch("band", (n_workers(), BAND + 1, DEPTH), np.float32)  # the last row: a tile
    columns = panels.shape[2]
    last = (n - 1) % columns // NARROW * NARROW + NARROW  # columns of the last panel
    last = last if last <= MOST_NARROW else columns
    launch(multiply_all, weight, scales, panels, last, wide, y, np.zeros(1, np.int64))
    return y


def unpacked(panels: Array, y: Array) -> Array:
    """Write panels [n_panel, at least d, columns] as rows into y [n, d]."""
    launch(unpack_all, panels, y, False)
    return y


def add_unpacked(panels: Array, y: Array) -> Array:
    """Add panels [n_panel, at least d, columns] to the rows y [n, d]."""
    launch(unpack_all, panels, y, True)
    return y


@kernel(nogil=True)
def widen_run(
    weight: Array,
    scales: Array,
    row: int,
    start: int,
    depth: int,
    wide: Array,
    r: int,
    exists: bool,
) -> None:
    """Write channels start ... start + depth - 1 of a row of the weight into row r of the buffer;
    zeros where there is no row.
    """
    if not exists:
        wide[r, :depth] = 0
        return
    p, whole, ahead = row * weight.shape[1] + start, depth // LANES * LANES, AHEAD * weight.shape[1]
    for i in range(0, whole, LANES):
        prefetch(weight, p + i + ahead)
        x = load(weight, p + i)
        if is_int8(weight):
            x = fma(x, splat(load_scalar(scales, (p + i) // GROUP)), splat(np.float32(0)))
        store(wide, r * DEPTH + i, x)
    for i in range(whole, depth):
        wide[r, i] = load_scalar(weight, p + i)


def write_run(
    weight: Array,
    scales: Array,
    row: int,
    start: int,
    depth: int,
    wide: Array,
    r: int,
    exists: bool,
) -> None:
    """As `widen_run`, of any weight."""


@overload(write_run, strict=False)
def choose_widening(weight: Any, *_: Any) -> Any:
    """Choose by the weight's type: an array of entries, or the table of a weight in blocks."""

    def of_blocks(
        weight: Array,
        scales: Array,  # noqa: ARG001
        row: int,
        start: int,
        depth: int,
        wide: Array,
        r: int,
        exists: bool,
    ) -> None:
        if exists:
            widen_row(weight, row, start, depth, wide[r].ctypes.data, AHEAD)
        else:
            for i in range(depth):
                wide[r, i] = 0

    return of_blocks if weight.dtype == types.int64 else widen_run.py_func


@kernel(nogil=True)
def fetch_run(weight: Array, first: int, stop: int, start: int, depth: int) -> None:
    """Ask for what `widen_run` reads of rows first ... stop - 1, into the second-level cache."""
    for row in range(first, stop):
        p = row * weight.shape[1] + start
        for i in range(p, p + depth - 1, LINE // weight.itemsize):
            prefetch_far(weight, i)
        prefetch_far(weight, p + depth - 1)


def prefetch_run(weight: Array, first: int, stop: int, start: int, depth: int) -> None:
    """As `fetch_run`, of any weight; one in blocks is read as it is decoded."""


@overload(prefetch_run, strict=False)
def choose_prefetch(weight: Any, *_: Any) -> Any:
    """Choose by the weight's type, as `choose_widening`."""
    return prefetch_run if weight.dtype == types.int64 else fetch_run.py_func


@kernel(nogil=True)
def run_length(d_in: int, most: int) -> int:
    """Channels of a run: at most so many, a multiple of LANES, and no short run at the end that is
    not worth its sums.
    """
    n_run = (d_in + most - 1) // most
    return ((d_in + n_run - 1) // n_run + LANES - 1) // LANES * LANES


@kernel(nogil=True)
def multiply_panels(
    weight: Array,
    panels: Array,
    last: int,
    wide: Array,
    y: Array,
    rows: tuple[int, int],
    run: tuple[int, int],
    following: tuple[int, int, int],
) -> None:
    """Add (the first run: write) the product of a run of channels [start, depth] of rows [first,
    n_row], which lies in the band, and of all panels.

    Meanwhile what follows, [row, start, depth], is fetched, a share of BAND rows beside each tile.
    """
    (first, n_row), (start, depth), n_panel = rows, run, len(panels)
    d_in, columns = panels.shape[1:]
    part = TILE_ROWS if columns == WIDE else n_row  # rows that are multiplied at once
    for p in range(n_panel):
        x, at = (p * d_in + start) * columns, (p * y.shape[1] + first) * columns
        next_panel = ((p + 1) % n_panel * d_in + start) * columns
        for r in range(0, n_row, part):
            low, high = share_of_band(p * n_row + r, part, n_panel * n_row)
            low, high = following[0] + low, min(following[0] + high, rows_of_weight(weight))
            prefetch_run(weight, low, high, following[1], following[2])
            multiply(
                wide,
                r * DEPTH,
                DEPTH,
                1,
                part,
                panels,
                x,
                depth,
                y,
                at + r * columns,
                start > 0,
                next_panel,
                wide[BAND],
                columns if p < n_panel - 1 else last,
                short_run(depth),
            )


@kernel(nogil=True)
def share_of_band(done: int, part: int, n: int) -> tuple[int, int]:
    """The rows of the next band to fetch during a part of n rows of tiles, after some are done."""
    return done * BAND // n, (done + part) * BAND // n


@kernel(nogil=True)
def multiply_band(
    weight: Array,
    scales: Array,
    panels: Array,
    last: int,
    wide: Array,
    y: Array,
    first: int,
    stop: int,
    ahead: int,
) -> None:
    """Rows first ... stop - 1 of the product, for all panels, of the last one `last` columns; rows
    from `ahead` on are those that this thread is likely to multiply next.
    """
    d_in = channels_of_weight(weight)
    n_row = (stop - first + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    run = run_length(d_in, DEPTH if panels.shape[2] == WIDE else SHALLOW)
    for start in range(0, d_in, run):
        depth = min(run, d_in - start)
        for r in range(n_row):
            write_run(weight, scales, first + r, start, depth, wide, r, first + r < stop)
        row, at = (first, start + run) if start + run < d_in else (ahead, 0)
        following = row, at, min(run, d_in - at)
        multiply_panels(weight, panels, last, wide, y, (first, n_row), (start, depth), following)


@kernel(parallel=True)
def multiply_all(
    weight: Array, scales: Array, panels: Array, last: int, wide: Array, y: Array, counter: Array
) -> None:
    """All bands of the product, of the last panel `last` columns: whichever thread is free takes
    the next one, so that a core that is busy otherwise gets fewer.
    """
    d_out = rows_of_weight(weight)
    for thread in prange(len(wide)):
        first = atomic_fetch_add(counter) * BAND
        while first < d_out:
            stop, ahead = min(first + BAND, d_out), counter[0] * BAND
            multiply_band(weight, scales, panels, last, wide[thread], y, first, stop, ahead)
            first = atomic_fetch_add(counter) * BAND
