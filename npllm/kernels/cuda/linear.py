"""Products with a weight matrix, fused with the norm before and the operation after."""

from typing import Any, NamedTuple

import numpy as np

from npllm.arrays import array_namespace, is_packed
from npllm.kernels.cuda import gemm, launching, prefill
from npllm.kernels.cuda.launching import entry, even_rows, pointer
from npllm.kernels.cuda.rows import MOST
from npllm.kernels.cuda.weights import is_read, operand, parts_of, put_in_place
from npllm.ops import blockwise
from npllm.quantized.stacked import StackedWeight

__all__ = [
    "MOST_ROWS",
    "ROWS",
    "Vectors",
    "launch_linear",
    "linear",
    "is_few",
    "linear_add",
    "mlp_block",
    "norm_linear",
    "norm_swiglu",
]

Array = Any

THREADS, WARPS = 128, 4  # of product.cu
ROWS = (1, 2, 4, 8)  # rows of x that a block can take

# Rows of x up to which a kernel is used, by the bytes of what is stored; 1 for int8 and blocks.
#
# With more, the definition widens a 16-bit weight in large blocks and multiplies by cuBLAS: of a
# weight of W bytes it moves 5 W (reads W, writes 2 W of float32, reads those), at any number of
# rows.  The kernel moves W through DRAM, since blocks that share rows of the weight run side by
# side, and n / 8 * W through the second-level cache, which is about twice as fast: at n = 80 rows
# both cost the same.  64 is the last multiple of 8 rows a block that is well below.
#
# A float32 weight is not widened, and the definition moves W.  16 rows keep the promise that a row
# has the same bits in a batch of 1 to 16.  Both numbers are reckoned, and not measured.
MOST_ROWS = {1: 64, 2: 64, 4: 16}


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """Multiply each row by the transposed weight matrix: the twin of `npllm.ops.linear`.

    The weight, of floats or packed, is read once, as it is stored, for up to 64 rows, 16 with a
    float32 weight.  More rows take the tensor cores with a bfloat16 weight (`gemm`), else the
    definition.
    """
    if _fits(x, weight, bias):
        return _launch(x, weight, bias=bias)
    if gemm.multiplies(x, weight) and (bias is None or bias.shape == weight.shape[:1]):
        return gemm.product(x, weight, bias)
    return blockwise.linear(x, weight, bias)


def norm_linear(
    x: Array, norm_weight: Array, eps: float, weight: Array, bias: Array | None = None
) -> Array:
    """Normalise and multiply by a weight: rms_norm and linear in one kernel; of many rows in the
    parts of `prefill`.
    """
    if _fits(x, weight, bias) and _is_vector(norm_weight, weight, 1):
        return _launch(x, weight, gain=norm_weight, eps=eps, bias=bias)
    return NotImplemented if is_few(x) else prefill.norm_linear(x, norm_weight, eps, weight, bias)


def norm_swiglu(
    x: Array, norm_weight: Array, eps: float, weight: Array, bias: Array | None = None
) -> Array:
    """Normalise, multiply and gate: rms_norm, linear and swiglu in one kernel."""
    fits = _fits(x, weight, bias) and _is_vector(norm_weight, weight, 1)
    if not fits or weight.shape[0] % 2 or isinstance(weight, StackedWeight):
        return NotImplemented
    return _launch(x, weight, gain=norm_weight, eps=eps, bias=bias, gated=True)


def linear_add(x: Array, weight: Array, residual: Array, bias: Array | None = None) -> Array:
    """Multiply by a weight and add to the stream: linear and add in one kernel; of many rows by
    `prefill`.
    """
    shape = (*x.shape[:-1], weight.shape[0])
    if _fits(x, weight, bias) and entry(residual) == "float" and residual.shape == shape:
        return _launch(x, weight, bias=bias, residual=residual)
    return NotImplemented if is_few(x) else prefill.linear_add(x, weight, residual, bias)


def mlp_block(x: Array, layer: Any, step: Any) -> Array:
    """Compute the second half of a layer of many rows by `prefill`; few take smaller kernels."""
    return NotImplemented if is_few(x) else prefill.mlp_block(x, layer, step)


def is_few(x: Array) -> bool:
    """Tell whether the kernels for a few rows take so many with a 16-bit weight."""
    return bool(x.size <= MOST_ROWS[2] * x.shape[-1])


def _fits(x: Array, weight: Array, bias: Array | None) -> bool:
    """Tell whether a kernel takes these: a few float32 rows, and a weight of whole packs."""
    if not is_read(weight) or entry(x) != "float" or x.shape[-1:] != weight.shape[1:]:
        return False
    d_out, d_in = weight.shape
    most = min(MOST_ROWS[operand(part).values.dtype.itemsize] for part in parts_of(weight))
    few = 0 < x.size < MOST and 0 < d_out < MOST and x.size // d_in <= most
    return few and (bias is None or _is_vector(bias, weight, 0))


def _is_vector(x: Array, weight: Array, axis: int) -> bool:
    """Tell whether `x` has the length of an axis of the weight, and the type beside it."""
    if entry(x) is None:
        return False
    dtype = np.float32 if is_packed(weight) else weight.dtype
    return x.dtype == dtype and x.shape == weight.shape[axis : axis + 1]


def _launch(
    x: Array,
    weight: Array,
    *,
    gain: Array | None = None,
    eps: float = 0.0,
    bias: Array | None = None,
    residual: Array | None = None,
    gated: bool = False,
) -> Array:
    """Run the kernel on what fits it; return y [..., d_out], d_out / 2 channels where gated."""
    xp, d_out = array_namespace(x, weight), weight.shape[0]
    y = xp.empty((*x.shape[:-1], d_out // 2 if gated else d_out), dtype=xp.float32)
    x, x_row = even_rows(x, xp, launching.ALIGNMENT)
    gain, bias, residual = (
        z if z is None else xp.ascontiguousarray(z) for z in (gain, bias, residual)
    )
    vectors = Vectors(gain, bias, residual)
    launch_linear(x, put_in_place(weight, xp), y, vectors, x_row=x_row, eps=eps, gated=gated)
    return y


class Vectors(NamedTuple):
    """What a product is fused with; None: not."""

    gain: Array | None = None  # [d_in]: the norm before
    bias: Array | None = None  # [d_out]
    residual: Array | None = None  # [..., d_out]: is added

    def columns(self, first: int, stop: int) -> "Vectors":
        """What belongs to the outputs first ... stop - 1."""
        bias, residual = (_columns(x, first, stop) for x in (self.bias, self.residual))
        return Vectors(self.gain, bias, residual)


def launch_linear(
    x: Array,
    weight: Array,
    y: Array,
    vectors: Vectors = Vectors(),
    *,
    x_row: int | None = None,
    eps: float = 0.0,
    gated: bool = False,
) -> None:
    """Launch linear.cu or linear_blocks.cu, which write y; nothing is allocated.

    Parameters
    ----------
    x : float32 array [n, d_in]
    weight : array [d_out, d_in]
        In place: contiguous, at a multiple of 16 bytes; or packed in such.  A `StackedWeight`
        takes a launch for each part, and is not gated.
    y : float32 array [n, d_out]
        Contiguous; [n, d_out / 2] where gated.
    vectors : Vectors
    x_row : int, optional
        Distance of rows of `x` in entries; default d_in.
    eps : float
        Of the norm.
    gated : bool
        Rows of the weight are gate | up, and y = silu(gate) * up.
    """
    d_in, parts, first = weight.shape[1], parts_of(weight), 0
    strides = d_in if x_row is None else x_row, y.shape[-1]
    for part in parts:
        stop = first + part.shape[0]
        if len(parts) > 1:
            outs = _columns(y, first, stop), vectors.columns(first, stop)
        else:
            outs = y, vectors
        _launch_part(x, part, *outs, strides, eps, gated)
        first = stop


def _columns(x: Array | None, first: int, stop: int) -> Array | None:
    return None if x is None else x[..., first:stop]


def _launch_part(
    x: Array,
    weight: Array,
    y: Array,
    vectors: Vectors,
    strides: tuple[int, int],
    eps: float,
    gated: bool,
) -> None:
    """Launch the kernel of one matrix; strides: of rows of x, and of y and residual."""
    (d_out, d_in), (suffix, name, values, scales) = weight.shape, operand(weight)
    n_rows = x.size // d_in
    rows = next((rows for rows in ROWS if rows >= n_rows), ROWS[-1])
    outs = WARPS * (4 if rows >= 4 else 2)  # of a block
    launching.launch(
        f"linear{suffix}",
        (("ENTRY", name), ("ROWS", rows)),
        -(-d_out // outs) * -(-n_rows // rows),
        THREADS,
        x,
        values,
        *map(pointer, (scales, *vectors)),
        y,
        *map(np.uint32, (n_rows, d_in, d_out, d_out // 2 if gated else 0)),
        *map(np.int64, strides),
        np.float32(eps),
    )
