"""Tiles of the float32 product of many rows: six rows of a matrix times 64 or 16 rows of x.

6 x 64 sums stay in 24 registers, 6 x 16 in 12.  Short runs of channels are summed in registers,
their sums in a tile in the nearest cache, the sums of those in y: the error of a chain of sums
grows with its length.
"""

from typing import Any

import numpy as np

from npllm.kernels.cpu.launching import kernel
from npllm.kernels.cpu.simd import LANES, fma, load, load_scalar, prefetch, splat, store

__all__ = ["NARROW", "TILE_ROWS", "WIDE", "multiply", "short_run"]

Array = Any
Vector = Any  # sixteen float32

WIDE, NARROW = 4 * LANES, LANES  # columns of a panel, and of a tile
TILE_ROWS = 6  # rows of a tile
SHORT = 40  # most channels that are summed in registers; 64 are up to 2 % faster, and less exact


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
