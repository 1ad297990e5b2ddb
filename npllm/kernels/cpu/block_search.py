"""`npllm.quantized.block_search`, compiled: every candidate of a group is tried while the group is
in the cache.

Groups lie beside each other, one in a lane; sums run over the entries of a group, in order.
"""

from typing import Any

import numpy as np

from npllm.kernels.cpu.launching import kernel
from npllm.quantized.block_search import (
    LARGEST_MULTIPLE,
    NEIGHBOURS,
    SHRINKS,
    as_columns,
    first_multiples,
    first_scale,
    first_steps,
)

__all__ = ["search_affine", "search_multiples", "search_scale"]

Array = Any
LANES = 256  # groups at a time
ZERO, ONE, INFINITY = np.float32(0), np.float32(1), np.float32(np.inf)
MOST = np.float32(LARGEST_MULTIPLE)


def search_scale(x: Array, low: int, high: int) -> Array:
    """Compute `npllm.quantized.block_search.search_scale`."""
    columns = as_columns(x)
    base = first_scale(columns, low)
    best = base.copy()
    _search_scale(columns, base, SHRINKS, np.float32(low), np.float32(high), best)
    return best.reshape(x.shape[:-1])


def search_affine(x: Array, high: int, *, below: bool) -> tuple[Array, Array]:
    """Compute `npllm.quantized.block_search.search_affine`."""
    columns = as_columns(x)
    base, smallest = first_steps(columns, high, below=below)
    scale, offset = base.copy(), np.zeros_like(base)
    largest = -smallest if below else np.full_like(base, np.inf)
    _search_affine(columns - smallest, base, SHRINKS, np.float32(high), largest, scale, offset)
    shape = x.shape[:-1]
    return scale.reshape(shape), (offset + smallest).reshape(shape)


def search_multiples(
    x: Array, line: tuple[Array, Array], steps: tuple[Array, Array], high: int
) -> tuple[Array, Array]:
    """Compute `npllm.quantized.block_search.search_multiples`."""
    columns, first = as_columns(x), np.stack(first_multiples(line, steps))
    widths = np.stack([part.reshape(-1) for part in steps])
    best = first.copy()
    _search_multiples(columns, first, widths, NEIGHBOURS, np.float32(high), best)
    sc, m = best.astype(np.int32).reshape(2, *x.shape[:-1])
    return sc, m


@kernel(nogil=True)
def _search_scale(
    columns: Array, base: Array, shrinks: Array, low: Any, high: Any, best: Array
) -> None:
    """Write the best scale of each column."""
    n, n_group = columns.shape
    sum_qq, sum_qx = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    step, most = np.empty(LANES, np.float32), np.empty(LANES, np.float64)
    for start in range(0, n_group, LANES):
        here = slice(start, min(start + LANES, n_group))
        most[:] = -1.0
        for shrink in shrinks:
            _divisors(base[here], shrink, step)
            sum_qq[:] = ZERO
            sum_qx[:] = ZERO
            for i in range(n):
                _add_products(columns[i, here], step, low, high, sum_qq, sum_qx)
            _keep_scale(sum_qq, sum_qx, most, best[here])


@kernel(nogil=True)
def _divisors(base: Array, shrink: Any, step: Array) -> None:
    """Write base * shrink; 1 where that is 0, and all numbers of the group with it."""
    for lane in range(len(base)):
        d = base[lane] * shrink
        step[lane] = ONE if d == ZERO else d


@kernel(nogil=True)
def _add_products(x: Array, step: Array, low: Any, high: Any, sum_qq: Array, sum_qx: Array) -> None:
    """Round one entry of each group; add q * q and q * x."""
    for lane in range(len(x)):
        q = np.rint(x[lane] / step[lane])
        q = low if q < low else q
        q = high if q > high else q
        sum_qq[lane] += q * q
        sum_qx[lane] += q * x[lane]


@kernel(nogil=True)
def _keep_scale(sum_qq: Array, sum_qx: Array, most: Array, best: Array) -> None:
    """Keep the scale that explains more of sum x**2 than those before."""
    for lane in range(len(best)):
        d = sum_qx[lane] / sum_qq[lane] if sum_qq[lane] > ZERO else ZERO
        explained = np.float64(d) * np.float64(sum_qx[lane])
        if explained > most[lane]:
            most[lane], best[lane] = explained, d


@kernel(nogil=True)
def _search_affine(
    distance: Array,
    base: Array,
    shrinks: Array,
    high: Any,
    largest: Array,
    scale: Array,
    offset: Array,
) -> None:
    """Write the best scale and offset of each column of distances from the smallest number."""
    n, n_group = distance.shape
    sums = np.empty((4, LANES), np.float32)  # of q, x, q * q, q * x
    step, least = np.empty(LANES, np.float32), np.empty(LANES, np.float64)
    for start in range(0, n_group, LANES):
        here = slice(start, min(start + LANES, n_group))
        least[:] = np.inf
        for shrink in shrinks:
            _divisors(base[here], shrink, step)
            sums[:] = ZERO
            for i in range(n):
                _add_sums(distance[i, here], step, high, sums)
            _keep_line(sums, n, largest[here], least, scale[here], offset[here])


@kernel(nogil=True)
def _add_sums(x: Array, step: Array, high: Any, sums: Array) -> None:
    """Round one entry of each group; add q, x, q * q and q * x."""
    for lane in range(len(x)):
        q = np.rint(x[lane] / step[lane])
        q = high if q > high else q
        sums[0, lane] += q
        sums[1, lane] += x[lane]
        sums[2, lane] += q * q
        sums[3, lane] += q * x[lane]


@kernel(nogil=True)
def _keep_line(
    sums: Array, n: int, largest: Array, least: Array, scale: Array, offset: Array
) -> None:
    """Fit x = d * q + m by least squares, m at most `largest`; keep what has the least error."""
    for lane in range(len(scale)):
        sum_q, sum_x = np.float64(sums[0, lane]), np.float64(sums[1, lane])
        sum_qq, sum_qx = np.float64(sums[2, lane]), np.float64(sums[3, lane])
        determinant = n * sum_qq - sum_q * sum_q
        d = (n * sum_qx - sum_q * sum_x) / determinant if determinant > 0 else 0.0
        m = (sum_x - d * sum_q) / n
        if m > largest[lane]:
            m = np.float64(largest[lane])
            d = (sum_qx - m * sum_q) / sum_qq if sum_qq > 0 else 0.0
        error = d * d * sum_qq + 2 * d * m * sum_q + n * m * m - 2 * (d * sum_qx + m * sum_x)
        if error < least[lane]:
            least[lane], scale[lane], offset[lane] = error, np.float32(d), np.float32(m)


@kernel(nogil=True)
def _search_multiples(
    columns: Array, first: Array, widths: Array, neighbours: Array, high: Any, best: Array
) -> None:
    """Write the best two multiples [2, n_group] of each column."""
    n, n_group = columns.shape
    tried, line = np.empty((2, LANES), np.float32), np.empty((3, LANES), np.float32)
    error, least = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for start in range(0, n_group, LANES):
        here = slice(start, min(start + LANES, n_group))
        least[:] = INFINITY
        for neighbour in neighbours:
            _set_line(first[:, here], widths[:, here], neighbour, tried, line)
            error[:] = ZERO
            for i in range(n):
                _add_errors(columns[i, here], line, high, error)
            _keep_multiples(tried, error, least, best[:, here])


@kernel(nogil=True)
def _set_line(first: Array, widths: Array, neighbour: Array, tried: Array, line: Array) -> None:
    """Write two multiples, and of these the scale, what is below 0, and the divisor."""
    for lane in range(first.shape[1]):
        for part in range(2):
            multiple = first[part, lane] + neighbour[part]
            multiple = ZERO if multiple < ZERO else multiple
            multiple = MOST if multiple > MOST else multiple
            tried[part, lane] = multiple
            line[part, lane] = widths[part, lane] * multiple
        line[2, lane] = INFINITY if line[0, lane] == ZERO else line[0, lane]


@kernel(nogil=True)
def _add_errors(x: Array, line: Array, high: Any, error: Array) -> None:
    """Round one entry of each group; add the square of what is lost."""
    for lane in range(len(x)):
        q = np.rint((x[lane] + line[1, lane]) / line[2, lane])
        q = ZERO if q < ZERO else q
        q = high if q > high else q
        rest = x[lane] - (line[0, lane] * q - line[1, lane])
        error[lane] += rest * rest


@kernel(nogil=True)
def _keep_multiples(tried: Array, error: Array, least: Array, best: Array) -> None:
    """Keep the multiples with less error than those before."""
    for lane in range(best.shape[1]):
        if error[lane] < least[lane]:
            least[lane] = error[lane]
            best[0, lane], best[1, lane] = tried[0, lane], tried[1, lane]
