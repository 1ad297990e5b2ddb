"""The matrix product of many rows: as BLAS does it, but from stored weights, which are widened tile
by tile where they are used.

The rows of x are packed into panels of 64 columns (16 without AVX-512), [n_panel, d_in, columns].
A task is a band of 96 rows of the weight; for each run of channels it widens its part of the band
into the second-level cache, and passes it over all panels, six rows at a time: 6 x 64 sums stay in
24 registers, 6 x 16 in 12.  Of the last panel only the columns that rows stand in are multiplied,
in sixteens where they are few: the bits are the same.

An entry is summed on three levels, since the error of a chain of sums grows with its length: short
runs in registers, their sums in a tile in the nearest cache, the sums of those in y.

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
Vector = Any  # sixteen float32

WIDE, NARROW = 4 * LANES, LANES  # columns of a panel, and of a tile
TILE_ROWS = 6  # rows of a tile
BAND = 16 * TILE_ROWS  # rows of a task
DEPTH = 512  # channels of a run
SHALLOW = 288  # of one with 16 columns: a panel's part and a tile's rows stay in the nearest cache
SHORT = 40  # most channels that are summed in registers; 64 are up to 2 % faster, and less exact
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
    columns] in a buffer; of as many as the panels have columns for n = 0.
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
def short_run(depth: int) -> int:
    """Channels of a short run of a product: as few runs as SHORT allows, and all of nearly the same
    length.  Attention, whose number of keys depends on where a prompt is cut, sums in one run.
    """
    n = max((depth + SHORT - 1) // SHORT, 1)
    return (depth + n - 1) // n


@kernel(nogil=True)
def store_vectors(
    y: Array, at: int, a: Vector, b: Vector, c: Vector, d: Vector, accumulate: bool
) -> None:
    """Store four vectors, or add them to the stored ones."""
    if accumulate:
        one = splat(np.float32(1))
        a, b = fma(one, load(y, at), a), fma(one, load(y, at + LANES), b)
        c, d = fma(one, load(y, at + 2 * LANES), c), fma(one, load(y, at + 3 * LANES), d)
    store(y, at, a)
    store(y, at + LANES, b)
    store(y, at + 2 * LANES, c)
    store(y, at + 3 * LANES, d)


@kernel(nogil=True)
def multiply_tile(
    m: Array,
    w: int,
    row: int,
    step: int,
    panels: Array,
    x: int,
    depth: int,
    y: Array,
    at: int,
    accumulate: bool,
) -> None:
    """Y [6, 64] at `at`, set to or (more) increased by a matrix [6, depth] times panel [depth, 64]
    at x.

    The matrix begins at w of m, with `row` entries from one row to the next and `step` from one
    channel to the next.
    """
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = c0 = c1 = c2 = c3 = splat(np.float32(0))
    d0 = d1 = d2 = d3 = e0 = e1 = e2 = e3 = f0 = f1 = f2 = f3 = splat(np.float32(0))
    for k in range(depth):
        i, j = x + k * WIDE, w + k * step
        x0, x1, x2, x3 = (
            load(panels, i),
            load(panels, i + LANES),
            load(panels, i + 2 * LANES),
            load(panels, i + 3 * LANES),
        )
        g = splat(load_scalar(m, j))
        a0, a1, a2, a3 = fma(g, x0, a0), fma(g, x1, a1), fma(g, x2, a2), fma(g, x3, a3)
        g = splat(load_scalar(m, j + row))
        b0, b1, b2, b3 = fma(g, x0, b0), fma(g, x1, b1), fma(g, x2, b2), fma(g, x3, b3)
        g = splat(load_scalar(m, j + 2 * row))
        c0, c1, c2, c3 = fma(g, x0, c0), fma(g, x1, c1), fma(g, x2, c2), fma(g, x3, c3)
        g = splat(load_scalar(m, j + 3 * row))
        d0, d1, d2, d3 = fma(g, x0, d0), fma(g, x1, d1), fma(g, x2, d2), fma(g, x3, d3)
        g = splat(load_scalar(m, j + 4 * row))
        e0, e1, e2, e3 = fma(g, x0, e0), fma(g, x1, e1), fma(g, x2, e2), fma(g, x3, e3)
        g = splat(load_scalar(m, j + 5 * row))
        f0, f1, f2, f3 = fma(g, x0, f0), fma(g, x1, f1), fma(g, x2, f2), fma(g, x3, f3)
    store_vectors(y, at, a0, a1, a2, a3, accumulate)
    store_vectors(y, at + WIDE, b0, b1, b2, b3, accumulate)
    store_vectors(y, at + 2 * WIDE, c0, c1, c2, c3, accumulate)
    store_vectors(y, at + 3 * WIDE, d0, d1, d2, d3, accumulate)
    store_vectors(y, at + 4 * WIDE, e0, e1, e2, e3, accumulate)
    store_vectors(y, at + 5 * WIDE, f0, f1, f2, f3, accumulate)


@kernel(nogil=True)
def multiply_narrow(
    m: Array,
    w: int,
    row: int,
    step: int,
    panels: Array,
    x: int,
    columns: int,
    depth: int,
    y: Array,
    at: int,
    accumulate: bool,
) -> None:
    """As `multiply_tile` with 16 of some columns: twelve of sixteen registers hold sums."""
    a = b = c = d = e = f = splat(np.float32(0))
    for k in range(depth):
        v, j = load(panels, x + k * columns), w + k * step
        a, b = fma(splat(load_scalar(m, j)), v, a), fma(splat(load_scalar(m, j + row)), v, b)
        c, d = (
            fma(splat(load_scalar(m, j + 2 * row)), v, c),
            fma(splat(load_scalar(m, j + 3 * row)), v, d),
        )
        e, f = (
            fma(splat(load_scalar(m, j + 4 * row)), v, e),
            fma(splat(load_scalar(m, j + 5 * row)), v, f),
        )
    store_vectors(y, at, a, b, c, d, accumulate)
    one = splat(np.float32(1))
    if accumulate:
        e, f = fma(one, load(y, at + 4 * NARROW), e), fma(one, load(y, at + 5 * NARROW), f)
    store(y, at + 4 * NARROW, e)
    store(y, at + 5 * NARROW, f)


@kernel(nogil=True)
def add_tile(tile: Array, first: int, y: Array, at: int, size: int, accumulate: bool) -> None:
    """Set entries of y from `at` on to those of a tile from `first` on, or add them."""
    one = splat(np.float32(1))
    for i in range(0, size, LANES):
        a = load(tile, first + i)
        store(y, at + i, fma(one, load(y, at + i), a) if accumulate else a)


@kernel(nogil=True)
def multiply_runs(
    m: Array,
    w: int,
    row: int,
    step: int,
    panel: Array,
    x: int,
    depth: int,
    y: Array,
    at: int,
    accumulate: bool,
    tile: Array,
    width: int,
    short: int,
) -> None:
    """As `multiply_tile`, or `multiply_narrow` on the first `width` columns, over runs of `short`
    channels whose sums are added up in a tile.
    """
    columns = y.shape[y.ndim - 1]
    if width == WIDE:
        for k in range(0, depth, short):
            n, v, p = min(short, depth - k), w + k * step, x + k * WIDE
            multiply_tile(m, v, row, step, panel, p, n, tile, 0, k > 0)
        add_tile(tile, 0, y, at, TILE_ROWS * WIDE, accumulate)
        return
    for c in range(0, width, NARROW):
        for k in range(0, depth, short):
            n, v, p = min(short, depth - k), w + k * step, x + k * columns + c
            multiply_narrow(m, v, row, step, panel, p, columns, n, tile, 0, k > 0)
        for r in range(TILE_ROWS):
            add_tile(tile, r * NARROW, y, at + r * columns + c, NARROW, accumulate)


@kernel(nogil=True)
def multiply(
    m: Array,
    w: int,
    row: int,
    step: int,
    n_row: int,
    panel: Array,
    x: int,
    depth: int,
    y: Array,
    at: int,
    accumulate: bool,
    next_panel: int,
    tile: Array,
    width: int,
    short: int,
) -> None:
    """Y [n_row, columns] at `at`, set to or (more) increased by a matrix [n_row, depth], as in
    `multiply_tile`, times the first `width` columns of a panel.

    The part of a panel at `next_panel`, which the next call reads, is fetched meanwhile; `tile` is
    a buffer of 6 x columns entries.  Runs of `short` channels are summed in registers.
    """
    columns = y.shape[y.ndim - 1]
    whole = n_row // TILE_ROWS * TILE_ROWS
    share = depth * TILE_ROWS // max(whole, 1) + 1  # channels to fetch during each tile
    for r in range(0, whole, TILE_ROWS):
        if columns == NARROW:
            for k in range(r // TILE_ROWS * share, (r // TILE_ROWS + 1) * share):
                prefetch(panel, next_panel + k * NARROW)
        to = at + r * columns
        p = w + r * row
        multiply_runs(m, p, row, step, panel, x, depth, y, to, accumulate, tile, width, short)
    for r in range(whole, n_row):
        for c in range(0, width, LANES):
            to = at + r * columns + c
            a = dot_columns(m, w + r * row, step, panel, x + c, columns, depth, short)
            store(y, to, fma(splat(np.float32(1)), load(y, to), a) if accumulate else a)


@kernel(nogil=True)
def dot_columns(
    m: Array, w: int, step: int, panel: Array, x: int, columns: int, depth: int, short: int
) -> Vector:
    """One row of a matrix times sixteen columns of a panel, summed over short runs."""
    total, one = splat(np.float32(0)), splat(np.float32(1))
    for start in range(0, depth, short):
        a = splat(np.float32(0))
        for k in range(start, min(start + short, depth)):
            a = fma(splat(load_scalar(m, w + k * step)), load(panel, x + k * columns), a)
        total = fma(one, a, total)
    return total


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
    """Rows first ... stop - 1 of the product, for all panels, of the last one `last` columns.

    Meanwhile the next run of the weight, or the first one of rows `ahead` ..., is fetched, a share
    of its rows beside each tile.
    """
    d_in, columns, n_panel = channels_of_weight(weight), panels.shape[2], len(panels)
    n_row = (stop - first + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    run = run_length(d_in, DEPTH if columns == WIDE else SHALLOW)
    part = TILE_ROWS if columns == WIDE else n_row  # rows that are multiplied at once
    for start in range(0, d_in, run):
        depth = min(run, d_in - start)
        for r in range(n_row):
            write_run(weight, scales, first + r, start, depth, wide, r, first + r < stop)
        next_row, next_start = (first, start + run) if start + run < d_in else (ahead, 0)
        next_depth = min(run, d_in - next_start)
        for p in range(n_panel):
            x, at = (p * d_in + start) * columns, (p * y.shape[1] + first) * columns
            next_panel = ((p + 1) % n_panel * d_in + start) * columns
            for r in range(0, n_row, part):
                done, n = p * n_row + r, n_panel * n_row
                low, high = next_row + done * BAND // n, next_row + (done + part) * BAND // n
                high = min(high, rows_of_weight(weight))
                prefetch_run(weight, low, high, next_start, next_depth)
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
