"""Products of a few rows: the weights are read once, straight from where they lie, and that is the
time it takes.

A weight is widened in registers, `fma(load(weight, p), load(x, i), acc)`; several distant streams
of its rows are read at once, and each is fetched ahead.  `attention_step` and `mlp_step` are the
halves of a layer: between two kernels the memory would wait for Python, for longer than it takes to
read the weights of a small model.
"""

import numpy as np
from numba import prange

from npllm.kernels.cpu.attention import attend_step
from npllm.kernels.cpu.gemm import root_mean_square
from npllm.kernels.cpu.simd import (
    LANES,
    fma,
    is_int8,
    kernel,
    like,
    load,
    load_pairs,
    pairs,
    prefetch,
    prefetch_pairs,
    silu,
    single,
    splat,
    store,
    total,
)
from npllm.quantized.int8 import GROUP

__all__ = [
    "FEW_ROWS",
    "add_product",
    "attention_step",
    "gate_all",
    "gated_product",
    "layers_step",
    "mlp_step",
]

FEW_ROWS = 12  # up to here reading the weight straight is faster than panels; a multiple of 4
AHEAD = 512  # entries of each stream of weights that are fetched ahead
STEP = 2 * LANES


@kernel()
def rest(weight, p, x):
    """What a row's product has beyond the last whole step."""
    n, y = len(x), np.float32(0)
    for i in range(n // STEP * STEP, n):
        y += single(weight, p + i) * x[i]
    return y


@kernel()
def distance(d_out, streams):
    """Rows between streams that share d_out rows: odd, since streams a power of two of bytes apart
    take each other's banks.
    """
    return (d_out + streams - 1) // streams | 1


@kernel()
def dot_four(weight, p, q, r, s, x, n):
    """Products of four rows of a weight, which begin at p, q, r and s, with one vector."""
    a = b = c = d = splat(np.float32(0))
    whole = n // STEP * STEP
    for i in range(0, whole, STEP):
        prefetch_pairs(weight, p + i + AHEAD)
        prefetch_pairs(weight, q + i + AHEAD)
        prefetch_pairs(weight, r + i + AHEAD)
        prefetch_pairs(weight, s + i + AHEAD)
        x0, x1 = load(x, i), load(x, i + LANES)
        w0, w1 = load_pairs(weight, p + i)
        a = fma(w1, x1, fma(w0, x0, a))
        w0, w1 = load_pairs(weight, q + i)
        b = fma(w1, x1, fma(w0, x0, b))
        w0, w1 = load_pairs(weight, r + i)
        c = fma(w1, x1, fma(w0, x0, c))
        w0, w1 = load_pairs(weight, s + i)
        d = fma(w1, x1, fma(w0, x0, d))
    return (
        total(a) + rest(weight, p, x),
        total(b) + rest(weight, q, x),
        total(c) + rest(weight, r, x),
        total(d) + rest(weight, s, x),
    )


@kernel()
def dot_two_by_four(weight, p, q, x, k, n):
    """Products of two rows of a weight, which begin at p and q, with four vectors: rows k ... k + 3
    of x.
    """
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = splat(np.float32(0))
    k0, k1, k2, k3 = k * n, (k + 1) * n, (k + 2) * n, (k + 3) * n
    whole = n // STEP * STEP
    for i in range(0, whole, STEP):
        if k == 0:
            prefetch_pairs(weight, p + i + AHEAD)
            prefetch_pairs(weight, q + i + AHEAD)
        u0, u1 = load_pairs(weight, p + i)
        w0, w1 = load_pairs(weight, q + i)
        x0, x1 = load(x, k0 + i), load(x, k0 + i + LANES)
        a0, b0 = fma(u1, x1, fma(u0, x0, a0)), fma(w1, x1, fma(w0, x0, b0))
        x0, x1 = load(x, k1 + i), load(x, k1 + i + LANES)
        a1, b1 = fma(u1, x1, fma(u0, x0, a1)), fma(w1, x1, fma(w0, x0, b1))
        x0, x1 = load(x, k2 + i), load(x, k2 + i + LANES)
        a2, b2 = fma(u1, x1, fma(u0, x0, a2)), fma(w1, x1, fma(w0, x0, b2))
        x0, x1 = load(x, k3 + i), load(x, k3 + i + LANES)
        a3, b3 = fma(u1, x1, fma(u0, x0, a3)), fma(w1, x1, fma(w0, x0, b3))
    return total(a0), total(a1), total(a2), total(a3), total(b0), total(b1), total(b2), total(b3)


@kernel()
def dot_four_int8(values, scales, p, q, r, s, x):
    """As `dot_four`, of a weight in 8 bits: each group is summed up, and scaled then."""
    zero = splat(np.float32(0))
    a = b = c = d = zero
    for i in range(0, len(x), GROUP):
        prefetch(values, p + i + 2 * AHEAD)
        prefetch(values, q + i + 2 * AHEAD)
        prefetch(values, r + i + 2 * AHEAD)
        prefetch(values, s + i + 2 * AHEAD)
        u = v = w = z = zero
        for j in range(i, i + GROUP, LANES):
            part = load(x, j)
            u, v = fma(load(values, p + j), part, u), fma(load(values, q + j), part, v)
            w, z = fma(load(values, r + j), part, w), fma(load(values, s + j), part, z)
        a = fma(u, splat(single(scales, (p + i) // GROUP)), a)
        b = fma(v, splat(single(scales, (q + i) // GROUP)), b)
        c = fma(w, splat(single(scales, (r + i) // GROUP)), c)
        d = fma(z, splat(single(scales, (s + i) // GROUP)), d)
    return total(a), total(b), total(c), total(d)


@kernel(parallel=True)
def add_product_one(weight, x, y):
    """Compute y [d_out] += weight [d_out, d_in] @ x [d_in]; four distant streams of rows are read
    at once.
    """
    d_out, d_in = weight.shape
    n, last = distance(d_out, 4), (d_out - 1) * d_in
    for o in prange(n):
        p, step = o * d_in, n * d_in
        four = dot_four(
            weight,
            p,
            min(p + step, last),
            min(p + 2 * step, last),
            min(p + 3 * step, last),
            x,
            d_in,
        )
        for j in range(4):
            if o + j * n < d_out:
                y[o + j * n] += four[j]


@kernel(parallel=True)
def add_product_int8(values, scales, x, y):
    """Compute y [n, d_out] += x [n, d_in] @ weight.T, of a weight in 8 bits; four distant streams
    of rows are read at once.
    """
    d_out, d_in = values.shape
    n, last = distance(d_out, 4), (d_out - 1) * d_in
    for o in prange(n):
        p, step = o * d_in, n * d_in
        for k in range(len(y)):
            four = dot_four_int8(
                values,
                scales,
                p,
                min(p + step, last),
                min(p + 2 * step, last),
                min(p + 3 * step, last),
                x[k],
            )
            for j in range(4):
                if o + j * n < d_out:
                    y[k, o + j * n] += four[j]


@kernel(parallel=True)
def add_product_few(weight, x, y):
    """Compute y [n, d_out] += x [4m, d_in] @ weight.T, for n up to 4m rows; two distant streams of
    rows are read at once.
    """
    d_out, d_in = weight.shape
    n = distance(d_out, 2)
    for o in prange(n):
        other = min(o + n, d_out - 1)
        for k in range(0, len(y), 4):
            sums = dot_two_by_four(weight, o * d_in, other * d_in, x, k, d_in)
            for j in range(min(4, len(y) - k)):
                y[k + j, o] += sums[j] + rest(weight, o * d_in, x[k + j])
                if o + n < d_out:
                    y[k + j, other] += sums[4 + j] + rest(weight, other * d_in, x[k + j])


@kernel()
def ready(weight, x, gain, eps):
    """The rows of x as products want them: normalised where there is a gain, padded to a multiple
    of 4, in the weight's order.
    """
    n, d = x.shape
    rows = np.zeros((1 if n == 1 else (n + 3) // 4 * 4, d), np.float32)
    for k in range(n):
        rows[k] = x[k]
        if len(gain):
            normalise(rows[k], gain, eps)
        pairs(weight, rows[k])
    return rows


@kernel()
def normalise(x, gain, eps):
    """Divide a row by its root mean square, in place, and scale it."""
    root = root_mean_square(x, eps)
    for i in range(len(x)):
        x[i] = single(gain, i) * (x[i] / root)


@kernel()
def add_product(weight, scales, x, gain, eps, y):
    """Compute y [n, d_out] += rms_norm(x) @ weight.T; without a gain x is not normalised."""
    rows = ready(weight, x, gain, eps)
    if is_int8(weight):
        add_product_int8(weight, scales, rows, y)
    elif len(x) == 1:
        add_product_one(weight, rows[0], y[0])
    else:
        add_product_few(weight, rows, y)


@kernel()
def gated_product(weight, scales, x, gain, eps, bias, y):
    """Compute y [n, d_ff] = swiglu of the two halves of rms_norm(x) @ weight.T, with a bias where
    there is one.
    """
    d_ff = y.shape[1]
    both = np.zeros((len(x), 2 * d_ff), np.float32)
    if len(bias):
        for k in range(len(x)):
            both[k] = bias
    add_product(weight, scales, x, gain, eps, both)
    for k in range(len(x)):
        gate(both[k, :d_ff], both[k, d_ff:], y[k])


@kernel(nogil=True)
def gate(g, u, y):
    """Compute y = silu(g) * u on one run of channels."""
    whole = len(g) // LANES * LANES
    zero = splat(np.float32(-0.0))  # which leaves the sign of a product that is 0
    for i in range(0, whole, LANES):
        store(y, i, fma(silu(load(g, i)), load(u, i), zero))
    for i in range(whole, len(g)):
        x = np.float64(g[i])
        y[i] = np.float32(x / (1 + np.exp(-x))) * u[i]


@kernel(parallel=True)
def gate_all(both, y):
    """Compute y = silu(g) * u in panels: y [n_panel, d_ff, columns], and both [n_panel, at least
    2*d_ff, columns] is g, then u.
    """
    d_ff = y.shape[1]
    for p in prange(len(both)):
        for i in range(d_ff):
            gate(both[p, i], both[p, d_ff + i], y[p, i])


@kernel()
def mlp_step(x, gain, eps, gate_up, gate_up_scales, gate_up_bias, down, down_scales):
    """Add to x [n, d_model], in place: down @ swiglu of the two halves of rms_norm(x) @ gate_up.T."""
    y = np.empty((len(x), down.shape[1]), np.float32)
    gated_product(gate_up, gate_up_scales, x, gain, eps, gate_up_bias, y)
    add_product(down, down_scales, y, np.zeros(0, np.float32), np.float32(0), x)


@kernel()
def attention_step(
    x,
    gain,
    eps,
    qkv_weight,
    qkv_scales,
    qkv_bias,
    cos,
    sin,
    keys,
    values,
    seen,
    n_head,
    o_weight,
    o_scales,
):
    """Add to x [n, d_model], a token of each sequence, in place: o_weight @ attention of heads of
    rms_norm(x) @ qkv_weight.T.
    """
    n = len(x)
    qkv = np.zeros((n, len(qkv_weight)), np.float32)
    if len(qkv_bias):
        for k in range(n):
            qkv[k] = qkv_bias
    add_product(qkv_weight, qkv_scales, x, gain, eps, qkv)
    y = np.empty((n, 1, o_weight.shape[1]), np.float32)
    attend_step(qkv.reshape(n, 1, -1), cos, sin, keys, values, seen, n_head, y)
    add_product(o_weight, o_scales, y.reshape(n, -1), np.zeros(0, np.float32), np.float32(0), x)


@kernel()
def layers_step(x, first, table, eps, cos, sin, seen, n_head):
    """Take x [n, d_model], one token of each sequence, through all layers, in place.

    first: of the first layer, gain, weight and scales of qkv_proj and of o_proj, gain, weight and
    scales of gate_up_proj and of down_proj, keys, values; table [n_layer, 12]: where those of each
    layer lie.
    """
    nothing = np.zeros(0, np.float32)
    for at in table:
        attention_step(
            x,
            like(first[0], at[0]),
            eps,
            like(first[1], at[1]),
            like(first[2], at[2]),
            nothing,
            cos,
            sin,
            like(first[10], at[10]),
            like(first[11], at[11]),
            seen,
            n_head,
            like(first[3], at[3]),
            like(first[4], at[4]),
        )
        mlp_step(
            x,
            like(first[5], at[5]),
            eps,
            like(first[6], at[6]),
            like(first[7], at[7]),
            nothing,
            like(first[8], at[8]),
            like(first[9], at[9]),
        )
