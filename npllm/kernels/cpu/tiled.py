"""The set in plain NumPy: every operation in blocks that fit a core's cache, the blocks on all
threads, in place.
"""

from dataclasses import replace
from itertools import product
from math import prod

import numpy as np

from npllm import ops
from npllm.arrays import DTYPES, ieee_semantics
from npllm.kernels.cpu.layout import is_row_major
from npllm.ops.attention import check_attention, evaluate_mask
from npllm.ops.mask.rule import ALL, NONE, SOME
from npllm.threads import n_threads, run_blocks, scratch

__all__ = ["TILED", "blockwise_attention", "linear", "rms_norm", "swiglu"]

FEW_ROWS = 16  # up to here a product is bound by reading the weight: smaller blocks, which stay in the cache until they are used
BLOCK_FEW, BLOCK_MANY = 2**19, 2**21  # entries of a weight that are widened at a time
BLOCK_ROWS = 2**16  # entries of an activation that one thread takes at a time
BLOCK_Q, BLOCK_K = 256, 512  # a tile of scores is half a MiB


@ieee_semantics
def linear(x, weight, bias=None):
    """Compute `npllm.ops.linear`: blocks of rows of the weight are widened into a buffer and
    multiplied there.
    """
    if not fits_linear(x, weight, bias):
        return ops.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    few = len(rows) <= FEW_ROWS
    y = (
        product_few(rows, weight)
        if few
        else np.ascontiguousarray(columns_product(np.ascontiguousarray(rows.T), weight).T)
    )
    if bias is not None:
        y += bias.astype(np.float32, copy=False)
    return y.reshape(*x.shape[:-1], len(weight))


def columns_product(columns, weight, widen=None):
    """Return `weight @ columns`, [d_out, n]: so BLAS is some 8 % faster than with rows, and a block
    of the result is contiguous.
    """
    y = np.empty((len(weight), columns.shape[1]), np.float32)
    run_blocks(
        lambda span: np.dot((widen or widened)(weight[span]), columns, out=y[span]),
        weight_blocks(weight, BLOCK_MANY),
    )
    return y


def product_few(rows, weight):
    """Return `rows @ weight.T` for a few rows."""
    y = np.empty((len(rows), len(weight)), np.float32)
    product_of = _product_bf16 if weight.dtype == DTYPES["bfloat16"] else _product
    halves = (
        [np.ascontiguousarray(rows[:, n::2]) for n in (0, 1)]
        if product_of is _product_bf16
        else rows
    )
    run_blocks(
        lambda span: product_of(halves, weight[span], y[:, span]), weight_blocks(weight, BLOCK_FEW)
    )
    return y


def weight_blocks(weight, entries):
    """Cut a weight into slices of rows of at most so many entries, and at least two for each
    thread.
    """
    d_out, d_in = weight.shape
    return spans(d_out, max(1, min(entries // d_in, -(-d_out // (2 * n_threads())))))


def spans(n, size):
    """Cut 0 ... n - 1 into slices of at most `size`."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _product(rows, weight, y):
    """One block: widen it, and multiply."""
    y[...] = dot(rows, widened(weight).T, "product")


def widened(weight):
    """A block of a weight in float32: itself, or its values in a buffer of this thread."""
    if weight.dtype == np.float32:
        return weight
    wide = scratch("weight", weight.shape, np.float32)
    if weight.dtype == DTYPES["bfloat16"]:  # its bits are the upper half of the float32's
        bits = wide.view(np.uint32)
        bits[...] = weight.view(np.uint16)
        np.left_shift(bits, 16, out=bits)
    else:
        wide[...] = weight
    return wide


def _product_bf16(halves, weight, y):
    """One block of bfloat16, two neighbours at a time: a 32-bit word holds the even channel below
    and the odd one above.
    """
    pairs = weight.view(np.uint32)
    wide = scratch("weight", pairs.shape, np.uint32)
    np.left_shift(pairs, 16, out=wide)
    y[...] = dot(halves[0], wide.view(np.float32).T, "product")
    np.bitwise_and(pairs, np.uint32(0xFFFF0000), out=wide)
    y += dot(halves[1], wide.view(np.float32).T, "product")


def dot(a, b, name):
    """Multiply matrices into a buffer of this thread; `np.dot` lets other threads run meanwhile,
    `np.matmul` often does not.
    """
    return np.dot(a, b, out=scratch(name, (len(a), b.shape[1]), np.float32))


def fits_linear(x, weight, bias=None):
    """Tell whether a product is one that the kernels are made for; the definition does the others,
    and raises the errors.
    """
    return is_float32(x) and x.size > 0 and fits_weight(weight, x.shape[-1], bias)


def fits_weight(weight, d_in, bias=None):
    """Tell whether a weight is one that the kernels are made for."""
    return (
        type(weight) is np.ndarray
        and weight.ndim == 2
        and is_row_major(weight)
        and weight.dtype in STORED
        and weight.shape[1] == d_in > 0
        and d_in % 2 == 0
        and len(weight) > 0
        and fits_bias(bias, weight)
    )


def fits_bias(bias, weight):
    """Tell whether a bias, where there is one, goes with a weight."""
    return bias is None or (
        type(bias) is np.ndarray and bias.shape == weight.shape[:1] and bias.dtype in STORED
    )


FLOAT32 = np.dtype(np.float32)
STORED = frozenset(DTYPES[name] for name in ("bfloat16", "float16", "float32"))


def is_float32(*arrays):
    """Tell whether all are NumPy arrays of float32 with at least one axis."""
    for (
        x
    ) in arrays:  # called for every operation: a generator would take as long as the check itself
        if type(x) is not np.ndarray or x.dtype != FLOAT32 or x.ndim == 0:
            return False
    return True


# -------------------------------------------------------------------------------------------------------------- row by row


@ieee_semantics
def rms_norm(x, weight, eps):
    """Compute `npllm.ops.rms_norm` in blocks of rows."""
    if not (
        is_float32(x)
        and x.size
        and type(weight) is np.ndarray
        and weight.shape == x.shape[-1:]
        and weight.dtype in STORED
    ):
        return ops.rms_norm(x, weight, eps)
    rows, gain = x.reshape(-1, x.shape[-1]), weight.astype(np.float32, copy=False)
    y = np.empty(rows.shape, np.float32)

    def norm(span):
        root = np.sqrt(
            np.vecdot(rows[span], rows[span])[:, None] / np.float32(rows.shape[-1])
            + np.float32(eps)
        )
        np.divide(rows[span], root, out=y[span])
        y[span] *= gain

    over_rows(norm, rows)
    return y.reshape(x.shape)


@ieee_semantics
def swiglu(gate, up):
    """Compute `npllm.ops.swiglu` in blocks of rows."""
    if not is_float32(gate, up) or gate.shape != up.shape or gate.size == 0:
        return ops.swiglu(gate, up)
    gates, ups = (x.reshape(-1, x.shape[-1]) for x in (gate, up))
    y = np.empty(gates.shape, np.float32)

    def gated(span):
        g, part = gates[span], y[span]
        np.abs(g, out=part)
        np.negative(part, out=part)
        np.exp(part, out=part)  # of -|x|: cannot overflow
        denominator = part + 1
        np.copyto(part, 1, where=g >= 0)
        part /= denominator
        part *= g
        part *= ups[span]

    over_rows(gated, gates)
    return y.reshape(gate.shape)


def over_rows(function, rows):
    """Call a function on slices of rows; a few rows are not worth a thread."""
    blocks = spans(len(rows), max(1, BLOCK_ROWS // max(1, rows.shape[-1])))
    if len(blocks) == 1:
        function(blocks[0])
    else:
        run_blocks(function, blocks)


# --------------------------------------------------------------------------------------------------------------- attention


def blockwise_attention(
    q,
    k,
    v,
    *,
    mask=None,
    bias=None,
    scale=None,
    softcap=None,
    q_slots=None,
    k_slots=None,
    return_lse=False,
):
    """Compute `npllm.ops.blockwise_attention`: a tile of scores in one buffer, changed in place,
    the heads on all threads.
    """
    if not fits_attention(q, k, v, mask, bias, softcap):
        return ops.blockwise_attention(
            q,
            k,
            v,
            mask=mask,
            bias=bias,
            scale=scale,
            softcap=softcap,
            q_slots=q_slots,
            k_slots=k_slots,
            return_lse=return_lse,
        )
    y, lse = attend(q, k, v, mask, scale, q_slots, k_slots)
    return (y, lse) if return_lse else y


def fits_attention(q, k, v, mask, bias, softcap):
    """Tell whether this is attention that the kernels are made for; the definition does the others,
    and raises the errors.
    """
    return (
        bias is None
        and softcap is None
        and is_float32(q, k, v)
        and q.size > 0
        and (mask is None or callable(mask))
    )


@ieee_semantics
def attend(q, k, v, mask, scale, q_slots, k_slots, fold=None):
    """Attention over blocks of queries and keys; `fold` replaces `fold_scores`."""
    q_slots, k_slots = check_attention(np, q, k, v, mask, None, q_slots, k_slots)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    n_batch, n_head, n_seq, n_kv_head = prod(q.shape[:-3]), q.shape[-3], q.shape[-2], k.shape[-3]
    group = n_head // n_kv_head
    y, lse = (
        np.empty((*q.shape[:-1], v.shape[-1]), np.float32),
        np.empty((*q.shape[:-1], 1), np.float32),
    )
    lead = (n_batch, n_kv_head, group, n_seq)
    heads = [x.reshape(*lead, x.shape[-1]) for x in (q, y, lse)]
    keys, values = (x.reshape(n_batch, n_kv_head, *x.shape[-2:]) for x in (k, v))
    at_all = list(product(range(n_batch), range(n_kv_head)))
    for rows in spans(n_seq, max(1, BLOCK_Q // group)):
        seen = list(_visible(mask, q, q_slots[rows], k_slots, lead))

        def one_head(at, rows=rows, seen=seen):
            mine = [(columns, see if see is None else see[at]) for columns, see in seen]
            _attend(
                *(x[at][:, rows] for x in heads),
                keys[at],
                values[at],
                scale,
                mine,
                fold or fold_scores,
            )

        run_blocks(one_head, at_all)
    return y, lse[..., 0]


def _visible(mask, q, i, k_slots, lead):
    """For a block of queries: the blocks of keys that any of them sees, and which of those; None
    where all see all.
    """
    n_batch, n_kv_head, group, _ = lead
    for columns in spans(len(k_slots), BLOCK_K):
        j = k_slots[columns]
        bound = ALL if mask is None else getattr(mask, "bound", unknown)(*_ends(i), *_ends(j))
        if bound == ALL:
            yield columns, None
        elif bound != NONE:
            see = np.asarray(evaluate_mask(np, mask, q, i, j), bool)
            if see.ndim > 2:  # it differs by sequence or by head
                see = np.broadcast_to(see, (*q.shape[:-2], len(i), len(j))).reshape(
                    n_batch, n_kv_head, group, len(i), len(j)
                )
            yield (
                columns,
                np.broadcast_to(
                    see, (n_batch, n_kv_head, see.shape[2] if see.ndim > 2 else 1, len(i), len(j))
                ),
            )


def unknown(*_):
    """Bound of a mask that has none: some pairs may be visible."""
    return SOME


def _ends(slots):
    """Smallest and largest slot."""
    return (
        (min(slots[0], slots[-1]), max(slots[0], slots[-1]))
        if isinstance(slots, range)
        else (slots.min(), slots.max())
    )


def _attend(q, y, lse, k, v, scale, seen, fold):
    """One key/value head, one block of queries of its group: q [group, n_rows, d_head] -> y [group,
    n_rows, d_value].
    """
    group, n_rows, d_head = q.shape
    rows = scratch("q", (group * n_rows, d_head), np.float32)
    np.multiply(q, np.float32(scale), out=rows.reshape(q.shape))
    m = np.full((len(rows), 1), -np.inf, np.float32)
    total, a = np.zeros_like(m), np.zeros((len(rows), v.shape[-1]), np.float32)
    for columns, see in seen:
        s = dot(rows, k[columns].T, "scores")
        if see is not None:
            np.copyto(s.reshape(group, n_rows, -1), np.float32(-np.inf), where=~see)
        fold(s, m, total, a)
        a += dot(s, v[columns], "values")
    total[total == 0] = 1
    np.divide(a.reshape(y.shape), total.reshape(group, n_rows, 1), out=y)
    lse[...] = (m + np.log(total)).reshape(lse.shape)


def fold_scores(s, m, total, a):
    """Turn a tile of scores into exp(s - m), and bring maximum m, sum and weighted sum a up to
    date, all in place.
    """
    m_new = np.maximum(m, s.max(axis=1, keepdims=True))
    shift = np.where(
        m_new == -np.inf, np.float32(0), m_new
    )  # nothing seen yet: any finite number will do
    s -= shift
    np.exp(s, out=s)
    decay = np.exp(m - shift)
    total *= decay
    total += s.sum(axis=1, keepdims=True)
    a *= decay
    m[...] = m_new


TILED = replace(
    ops.reference,
    name="tiled",
    linear=linear,
    rms_norm=rms_norm,
    swiglu=swiglu,
    attention=blockwise_attention,
)
