"""The matrix product of many rows whose activations are rounded: `gemm`'s, on products of bytes or
of bfloat16.

The rows of x, packed into panels as `gemm` packs them, are rounded once.  A task is a band of 96
rows of the weight; for each run of channels its codes are written into the second-level cache, and
passed over all panels, six rows at a time; on matrix units all 96.  Rows of bfloat16 are read where
they lie.  Of the last panel 32 columns are multiplied where no more hold rows.
"""

from functools import partial
from typing import Any

import numpy as np
from numba import prange

from npllm.kernels.cpu import gemm
from npllm.kernels.cpu.dot_products import form_of
from npllm.kernels.cpu.launching import kernel, launch, n_workers
from npllm.kernels.cpu.layout import frozen
from npllm.kernels.cpu.matrix_tiles import HEIGHT, bfloat16_units, integer_units
from npllm.kernels.cpu.operands import kernel_operands
from npllm.kernels.cpu.rounded_panels import (
    bfloat16_function,
    integer_function,
    round_bfloat16,
    round_panels,
)
from npllm.kernels.cpu.rounded_tiles import (
    COLUMNS,
    HALF,
    MOST_FLUSHES,
    NUMBERS,
    TILE_ROWS,
    WORD,
    bfloat16_tile,
    integer_tile,
)
from npllm.kernels.cpu.rounded_weights import (
    FLUSHES,
    MINIMUM,
    SCALE_BYTES,
    codes_function,
    unit_size,
)
from npllm.kernels.cpu.simd import LINE
from npllm.kernels.cpu.simd_addresses import call_address, prefetch_far
from npllm.kernels.cpu.simd_arrays import atomic_fetch_add
from npllm.quantized.activations import N_BYTES
from npllm.quantized.int8 import Int8Weight
from npllm.quantized.stacked import StackedWeight
from npllm.threads import scratch

__all__ = ["COLUMNS", "fits_rounded", "rounded_product"]

Array = Any

BAND = 16 * TILE_ROWS  # rows of a task
RUN = 512  # bytes of a run's codes in a row of the band
ROW = NUMBERS + RUN  # bytes of a row of the band
AHEAD = 12  # rows by which the reading of integers runs ahead
PAIR = 2  # channels of a word of bfloat16
ENTRY = 2  # bytes of a bfloat16 number
MOST_PARTS = 3
PANEL = COLUMNS * WORD
# columns of a table that describes a weight, one integer each; of its last row, the run
FIRST, ROW_BYTES, N_ROWS, SCALES, SCALE_ROW, SCALE, CODES, UNIT_ENTRIES, UNIT_BYTES = range(9)
TILE, LAST_TILE, DEPTH, FLUSH, X_BYTES, D_IN, ROWS = range(7)


def format_of(part: Any) -> str:
    """The name of a part's format, as `rounded_weights` has it."""
    if isinstance(part, Int8Weight):
        return "int8" if part.scales.dtype == np.float16 else "int8_float32"
    return "bfloat16" if type(part) is np.ndarray else part.format


def parts_of(weight: Any) -> tuple:
    """The matrices of which a weight has the rows."""
    return weight.parts if isinstance(weight, StackedWeight) else (weight,)


def address(x: Array) -> int:
    """Where an array begins in memory."""
    return x.__array_interface__["data"][0]


def weight_table(weight: Any, kind: str, last: int) -> tuple[Array, int]:
    """Describe a weight to `multiply_all`, and say how many channels are scaled together; of
    bfloat16 2, a word.  Of the last panel so many columns are multiplied.

    The caller keeps the weight alive.
    """
    parts = parts_of(weight)
    names = [format_of(part) for part in parts]
    flush = min(FLUSHES.get(name, 32) for name in names)
    form = form_of(kind, flush)
    uses = form != "plain"
    table = np.zeros((MOST_PARTS + 1, UNIT_BYTES + 1), np.int64)
    for row, part, name in zip(table, parts, names, strict=False):
        row[:] = (
            *_places(part, name),
            SCALE_BYTES.get(name, 0),
            codes_function(name, flush, uses).address,
            *unit_size(name),
        )
    tiles = tile_addresses(kind, flush, not MINIMUM.isdisjoint(names), last)
    n_bytes = N_BYTES.get(kind, 2)  # of an entry of x, and of a channel in the band
    depth, x_bytes = min(RUN // n_bytes, flush * MOST_FLUSHES), PANEL // WORD * n_bytes
    flush = PAIR if kind == "bfloat16" else flush
    rows = HEIGHT if form == "tiles" else TILE_ROWS
    table[MOST_PARTS, :7] = *tiles, depth, flush, x_bytes, weight.shape[1], rows
    return frozen(table), flush


def tile_addresses(kind: str, flush: int, has_minimum: bool, last: int) -> tuple[int, int]:
    """The functions that multiply tiles of a whole panel, and of one with `last` rows."""
    form = form_of(kind, flush)
    if kind == "bfloat16":
        make = bfloat16_units if form == "tiles" else partial(bfloat16_tile, form != "plain")
    else:
        variant = N_BYTES[kind], flush, has_minimum
        units, tile = partial(integer_units, *variant), partial(integer_tile, *variant)
        make = units if form == "tiles" else partial(tile, form != "plain")
    return make(COLUMNS).address, make(HALF if last <= HALF else COLUMNS).address


def _places(part: Any, name: str) -> tuple[int, int, int, int, int]:
    """Where rows begin, bytes of one, how many; where their scales begin, and bytes of a row's."""
    if isinstance(part, Int8Weight):
        values, scales = part.values, part.scales
        return address(values), *values.shape[::-1], address(scales), scales.strides[0]
    rows = part if name == "bfloat16" else part.blocks
    return address(rows), rows.strides[0], len(rows), 0, 0


def rounded_product(panels: Array, weight: Any, kind: str, n: int) -> Array:
    """The product of a weight and n packed rows, rounded as `kind` says.

    Parameters
    ----------
    panels : float32 array [n_panel, d_in, 64]
    weight : Int8Weight, BlockWeight, StackedWeight or bfloat16 array [d_out, d_in]
        For which `fits_rounded` holds.
    kind : str
        "int16", "int8" or "bfloat16".
    n : int
        Columns of panels that hold rows.

    Returns
    -------
    y : float32 array [n_panel, d_out (and up to 95 rows more), 64]
        In a buffer; columns without a row may hold anything.

    Notes
    -----
    `panels` is a buffer: its entries may be rounded in place.
    """
    if form_of(kind) == "float32":
        launch(round_bfloat16, panels.view(np.uint32))
        return gemm.product(panels, *kernel_operands(weight), n)
    table, flush = weight_table(weight, kind, (n - 1) % COLUMNS + 1)
    words, scales = rounded_panels(panels, weight, kind, flush)
    d_out, height = weight.shape[0], int(table[MOST_PARTS, ROWS])
    n_row = -(-d_out // height) * height
    y = scratch("y panels", (len(panels), n_row, COLUMNS), np.float32)
    band = scratch("rounded band", (n_workers(), BAND, ROW), np.uint8)
    launch(multiply_all, table, words, scales, band, y, d_out, np.zeros(1, np.int64))
    return y


def rounded_panels(panels: Array, weight: Any, kind: str, flush: int) -> tuple[Array, Array]:
    """Round packed rows: their words, and scales and sums for each flush, in buffers."""
    n_panel, d_in, _ = panels.shape
    n_bytes = N_BYTES.get(kind, 2)
    words = scratch("rounded x", (n_panel, d_in * n_bytes // WORD, COLUMNS), np.uint32)
    n_flush = 1 if kind == "bfloat16" else d_in // flush
    scales = scratch("rounded scales", (n_panel, n_flush, 2, COLUMNS), np.float32)
    if kind == "bfloat16":
        function = bfloat16_function()
    else:
        function = integer_function(n_bytes, weight.activation_group, flush)
    launch(round_panels, function.address, panels, words, scales)
    return words, scales


@kernel(nogil=True)
def place_of_run(table: Array, row: int, start: int) -> tuple[int, int, int]:
    """Find a run of a row: the part of the weight, where its codes begin, where its scales do."""
    p = 0
    while row >= table[p, N_ROWS]:
        row, p = row - table[p, N_ROWS], p + 1
    unit = start // table[p, UNIT_ENTRIES]
    w = table[p, FIRST] + row * table[p, ROW_BYTES] + unit * table[p, UNIT_BYTES]
    return p, w, table[p, SCALES] + row * table[p, SCALE_ROW] + unit * table[p, SCALE]


@kernel(nogil=True)
def write_row(table: Array, row: int, start: int, depth: int, target: int) -> None:
    """Write channels start ... start + depth - 1 of a row of the weight into the band."""
    p, w, scales = place_of_run(table, row, start)
    n_units, ahead = depth // table[p, UNIT_ENTRIES], AHEAD * table[p, ROW_BYTES]
    call_address(table[p, CODES], (w, scales, n_units, target, ahead))


@kernel(nogil=True)
def place_in_bfloat16(table: Array, row: int, start: int) -> int:
    """Where a run of a row begins, of a weight in bfloat16, which has one part: without the
    divisions of `place_of_run`, since this is asked beside each tile.
    """
    return table[0, FIRST] + row * table[0, ROW_BYTES] + ENTRY * start


@kernel(nogil=True)
def prefetch_rows(table: Array, first: int, stop: int, start: int, depth: int) -> None:
    """Ask for channels start ... start + depth - 1 of rows first ... stop - 1 of a weight in
    bfloat16, into the second-level cache, but for a line that begins before.
    """
    at = place_in_bfloat16(table, first, start) + LINE - 1
    for line in range(at, at + ENTRY * depth, LINE):
        for r in range(stop - first):
            prefetch_far(line + r * table[0, ROW_BYTES])


@kernel(nogil=True)
def rows_in_place(table: Array, n_row: int) -> int:
    """Rows of a band that tiles read where they lie: whole tiles of a weight in bfloat16.  Matrix
    units read the band: rows a large power of two apart would share a few lines of their cache.
    """
    run = table[MOST_PARTS]
    lie_so = run[FLUSH] == PAIR and run[ROWS] == TILE_ROWS
    return n_row // TILE_ROWS * TILE_ROWS if lie_so else 0


@kernel(nogil=True)
def write_band(
    table: Array, first: int, r: int, n_row: int, stop: int, start: int, depth: int, band: Array
) -> None:
    """Write a run of rows first + r ... first + n_row - 1 into rows r ... of the band; zeros from
    row `stop` of the weight on.
    """
    for i in range(r, n_row):
        if first + i < stop:
            write_row(table, first + i, start, depth, band[i].ctypes.data)
        else:
            band[i, :] = 0


@kernel(nogil=True)
def multiply_panels(
    table: Array,
    words: Array,
    scales: Array,
    band: Array,
    y: Array,
    rows: tuple[int, int, int],
    run: tuple[int, int],
    following: tuple[int, int, int],
) -> None:
    """Add (the first run: write) the product of a run of channels [start, depth] of rows [first,
    n_row, rows in place] and of all panels.

    Meanwhile what follows of a weight in bfloat16, [row, start, depth], is fetched, a share of BAND
    rows beside each tile.  Beside tiles of integers, which take half the time, that was slower than
    a prefetch as the rows are decoded.
    """
    (first, n_row, in_place), (start, depth), n_panel = rows, run, len(words)
    settings, n = table[MOST_PARTS], len(words) * n_row
    height, is_bfloat16 = settings[ROWS], settings[FLUSH] == PAIR
    for p in range(n_panel):
        x = words[p].ctypes.data + start * settings[X_BYTES]
        x_scales = scales[p].ctypes.data + start // settings[FLUSH] * 2 * PANEL
        function = settings[TILE] if p < n_panel - 1 else settings[LAST_TILE]
        for r in range(0, n_row, height):
            if is_bfloat16:
                low, high = gemm.share_of_band(p * n_row + r, height, n)
                low, high = following[0] + low, min(following[0] + high, table[0, N_ROWS])
                prefetch_rows(table, low, high, following[1], following[2])
            tile = y[p, first + r : first + r + height]
            if start == 0:
                tile[:, :] = 0
            codes, row_bytes = np.int64(band[r].ctypes.data), np.int64(ROW)
            if r < in_place:  # as if it had numbers before it
                codes = place_in_bfloat16(table, first + r, start) - NUMBERS
                row_bytes = table[0, ROW_BYTES]
            count, to = depth // settings[FLUSH], tile.ctypes.data
            call_address(function, (codes, row_bytes, count, x, x_scales, to))


@kernel(nogil=True)
def multiply_band(
    table: Array,
    words: Array,
    scales: Array,
    band: Array,
    y: Array,
    first: int,
    stop: int,
    ahead: int,
) -> None:
    """Rows first ... stop - 1 of the product, for all panels; rows from `ahead` on are those that
    this thread is likely to multiply next.
    """
    d_in, run, height = table[MOST_PARTS, D_IN], table[MOST_PARTS, DEPTH], table[MOST_PARTS, ROWS]
    n_row = (stop - first + height - 1) // height * height
    in_place = rows_in_place(table, stop - first)
    for start in range(0, d_in, run):
        depth = min(run, d_in - start)
        write_band(table, first, in_place, n_row, stop, start, depth, band)
        row, at = (first, start + run) if start + run < d_in else (ahead, 0)
        following = row, at, min(run, d_in - at)
        rows = first, n_row, in_place
        multiply_panels(table, words, scales, band, y, rows, (start, depth), following)


@kernel(parallel=True)
def multiply_all(
    table: Array, words: Array, scales: Array, band: Array, y: Array, d_out: int, counter: Array
) -> None:
    """All bands of the product: whichever thread is free takes the next one."""
    for thread in prange(len(band)):
        first = atomic_fetch_add(counter) * BAND
        while first < d_out:
            stop, ahead = min(first + BAND, d_out), counter[0] * BAND
            multiply_band(table, words, scales, band[thread], y, first, stop, ahead)
            first = atomic_fetch_add(counter) * BAND


def fits_rounded(weight: Any) -> bool:
    """Tell whether a weight that the kernels of `operands` take is one of these kernels', too."""
    return all(weight.shape[1] % unit_size(format_of(part))[0] == 0 for part in parts_of(weight))
