"""CUDA kernels for CuPy arrays: twins of the definitions in `npllm.ops`, with their signatures and their results.

A twin takes what it was written for and hands everything else to the definition: float64 always, and shapes, dtypes and masks
that a kernel does not know.  Activations are float32 and sums are float32; weights, keys and values may also be bfloat16 or
float16, which are widened in registers.  Sources (`*.cu`) are compiled by NVRTC at the first use of each variant, and kept.
"""

import functools
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np

from npllm.arrays import array_namespace, expect_shape, widen
from npllm.ops import blockwise
from npllm.ops.attention import check_attention
from npllm.ops.linear import merge_heads
from npllm.ops.mask.rule import FAR

__all__ = ["HEADS", "VARIANTS", "attention", "cuda_ops", "linear", "rms_norm", "rope_attention", "source", "swiglu"]

TYPES = {"float32": "float", "bfloat16": "bf16", "float16": "f16"}  # NumPy's name -> the name in common.cu
HEADS = (64, 96, 128)
THREADS = 256
QUERIES, ATTENTION_THREADS = 16, 128  # WARPS * ROWS and WARPS * 32 of attention.cu
MOST_ROWS, WIDENED = 8, 2**26  # rows of x for linear.cu; entries of a 16-bit weight that are widened at a time beyond that
MOST = 2**31  # entries that a kernel counts in 32 bits

# Every variant that can be asked for: kernel -> list of its definitions.
VARIANTS = {
    "linear": [{"ENTRY": name, "ROWS": rows} for name in ("bf16", "f16") for rows in (1, 8)],
    "rms_norm": [{"WEIGHT": name} for name in TYPES.values()],
    "swiglu": [{"ENTRY": "float"}],
    "rope_append": [{"ENTRY": "float"}],
    "attention": [{"HEAD": d_head, "ENTRY": name} for d_head in HEADS for name in TYPES.values()],
}


def cuda_ops():
    """Return the set of operations that runs these kernels, and the definitions where there is no kernel.

    Returns
    -------
    ops : Ops
    """
    return blockwise.replace(linear=linear, rms_norm=rms_norm, swiglu=swiglu, attention=attention, rope_attention=rope_attention,
                             name="cuda")


def source(kernel):
    """Return the CUDA C++ text of a kernel, what it shares with the others included."""
    folder = Path(__file__).parent
    return "".join((folder / name).read_text(encoding="utf-8") for name in ("common.cu", f"{kernel}.cu"))


def linear(x, weight, bias=None):
    """Multiply each row by the transposed weight matrix: the twin of `npllm.ops.linear`, for up to 8 rows and a 16-bit weight.

    The weight is read once, as it is stored.  More rows go to the definition, with the weight widened in blocks that suit a GPU.
    """
    if not (_is(x, "float32") and _is(weight, "bfloat16", "float16") and weight.ndim == 2 and x.shape[-1:] == weight.shape[1:]
            and 0 < x.size < MOST and 0 < weight.shape[0] and weight.shape[1] % 8 == 0):
        return blockwise.linear(x, weight, bias)
    xp, (d_out, d_in) = array_namespace(x, weight, bias), weight.shape
    n_rows = x.size // d_in
    if n_rows > MOST_ROWS:
        n = max(1, WIDENED // d_in)
        blocks = [blockwise.linear(x, widen(weight[start : start + n, :])) for start in range(0, d_out, n)]
        y = blocks[0] if len(blocks) == 1 else xp.concat(blocks, axis=-1)
    else:
        x, weight, y = _aligned(x, xp), _aligned(weight, xp), xp.empty((*x.shape[:-1], d_out), dtype=xp.float32)
        _launch("linear", {"ENTRY": _type(weight), "ROWS": 1 if n_rows == 1 else MOST_ROWS}, -(-d_out // (THREADS // 32)), THREADS,
                x, weight, y, *map(np.uint32, (n_rows, d_in, d_out)))
    if bias is None:
        return y
    expect_shape("bias", bias, d_out=d_out)
    return y + widen(bias, xp.float32)


def rms_norm(x, weight, eps):
    """Divide each row by its root mean square, then scale it: the twin of `npllm.ops.rms_norm`, in one pass over the row."""
    if not (_is(x, "float32") and _is(weight, *TYPES) and x.size and weight.shape == x.shape[-1:]):
        return blockwise.rms_norm(x, weight, eps)
    xp = array_namespace(x, weight)
    x, weight, y = xp.ascontiguousarray(x), xp.ascontiguousarray(weight), xp.empty(x.shape, dtype=xp.float32)
    d_model = x.shape[-1]
    _launch("rms_norm", {"WEIGHT": _type(weight)}, x.size // d_model, THREADS, x, weight, y, np.int64(d_model), np.float32(eps))
    return y


def swiglu(gate, up):
    """Gate one projection by the SiLU of another: the twin of `npllm.ops.swiglu`, in one pass over both."""
    if not (_is(gate, "float32") and _is(up, "float32") and gate.shape == up.shape and gate.ndim and 0 < gate.size < MOST):
        return blockwise.swiglu(gate, up)
    xp = array_namespace(gate, up)
    (gate, gate_row), (up, up_row) = _rows(gate, xp), _rows(up, xp)
    y = xp.empty(gate.shape, dtype=xp.float32)
    _launch("swiglu", {"ENTRY": "float"}, -(-y.size // THREADS), THREADS, gate, up, y, *map(np.uint32, (y.size, gate.shape[-1])),
            *map(np.int64, (gate_row, up_row)))
    return y


def attention(q, k, v, *, mask=None, bias=None, scale=None, softcap=None, q_slots=None, k_slots=None, return_lse=False):
    """Attend block by block: the twin of `npllm.ops.attention`, for many queries of 64, 96 or 128 channels.

    Masks that are a band of distances (causal, sliding window) are evaluated in the kernel.  Padding and other rules, tables,
    biases, softcap, `return_lse` and a single query go to the blockwise definition.
    """
    options = {"mask": mask, "bias": bias, "scale": scale, "softcap": softcap, "return_lse": return_lse}
    band = (-FAR, FAR) if mask is None else getattr(mask, "band", None)
    fits = (bias is None and softcap is None and not return_lse and band is not None and _is(q, "float32") and _is(k, *TYPES)
            and _is(v, *TYPES) and k.dtype == v.dtype and q.ndim in (3, 4) and q.shape[-1] in HEADS and q.shape[-2] > 1 and q.size)
    if not fits or k.shape != v.shape:
        return blockwise.attention(q, k, v, q_slots=q_slots, k_slots=k_slots, **options)
    xp = array_namespace(q, k, v)
    q_range, k_range = check_attention(xp, q, k, v, mask, bias, q_slots, k_slots)
    if not all(isinstance(slots, range) and slots.step == 1 for slots in (q_range, k_range)):
        return blockwise.attention(q, k, v, q_slots=q_slots, k_slots=k_slots, **options)
    return _attention(xp, q, k, v, q_range.start - k_range.start, band, q.shape[-1] ** -0.5 if scale is None else scale)


def _attention(xp, q, k, v, shift, band, scale):
    """Launch the kernel.  `shift`: the slot of the first query minus that of the first key."""
    (k, k_steps), (v, v_steps) = _heads(k, xp), _heads(v, xp)
    q, y = xp.ascontiguousarray(q), xp.empty(q.shape, dtype=xp.float32)
    n_head, n_seq, d_head = q.shape[-3:]
    n_tiles = -(-n_seq // QUERIES)
    sizes = (n_tiles, n_head, k.shape[-3], n_seq, k.shape[-2], *k_steps, *v_steps, shift, *band)
    _launch("attention", {"HEAD": d_head, "ENTRY": _type(k)}, n_tiles * n_head * prod(q.shape[:-3]), ATTENTION_THREADS,
            q, k, v, y, *map(np.int64, sizes), np.float32(scale))
    return y


def rope_attention(qkv, cos, sin, n_head, n_kv_head, *, mask=None, cache=None, layer=0):
    """Cut into heads, rotate, append to the cache, attend: the twin of `npllm.ops.rope_attention`.

    Everything before the attention is one kernel, which writes keys and values straight into the cache.
    """
    fits = all(_is(x, "float32") for x in (qkv, cos, sin)) and qkv.ndim == 3 and 0 < qkv.size < MOST and cos.shape == sin.shape
    if not (fits and qkv.shape[-1] % (n_head + 2 * n_kv_head) == 0 and _tables_fit(qkv, cos, n_head + 2 * n_kv_head)):
        return blockwise.replace(attention=attention).rope_attention(qkv, cos, sin, n_head, n_kv_head, mask=mask, cache=cache,
                                                                     layer=layer)
    xp = array_namespace(qkv, cos, sin)
    n_batch, n_seq, width = qkv.shape
    d_head = width // (n_head + 2 * n_kv_head)
    q = xp.empty((n_batch, n_head, n_seq, d_head), dtype=xp.float32)
    slots = {}
    if cache is None:
        k, v = (xp.empty((n_batch, n_kv_head, n_seq, d_head), dtype=xp.float32) for _ in range(2))
    else:
        like = q[:, :n_kv_head]  # of the shape, dtype and library of new keys and values
        k, v, k_slots = cache.extend(layer, like, like)
        slots = {"q_slots": range(k_slots.stop - n_seq, k_slots.stop), "k_slots": k_slots}
    _rope_append(xp, qkv, cos, sin, q, k[..., -n_seq:, :], v[..., -n_seq:, :])
    return merge_heads(attention(q, k, v, mask=mask, **slots))


def _rope_append(xp, qkv, cos, sin, q, k, v):
    """Launch the kernel that fills q, k and v."""
    qkv, cos, sin = (xp.ascontiguousarray(x) for x in (qkv, cos, sin))
    n_batch, n_head, n_seq, d_head = q.shape
    d_rope = cos.shape[-1]
    table_batch = n_seq * d_rope if cos.ndim == 3 and cos.shape[0] == n_batch > 1 else 0
    sizes = qkv.size, n_seq, n_head, k.shape[1], d_head, d_rope
    _launch("rope_append", {"ENTRY": "float"}, -(-qkv.size // THREADS), THREADS, qkv, cos, sin, q, k, v,
            *map(np.uint32, sizes), *map(np.int64, (table_batch, *_steps(k)[:3], *_steps(v)[:3])))


def _aligned(x, xp):
    """An array in one piece that begins at a multiple of 16 bytes: `x` itself where it does."""
    x = xp.ascontiguousarray(x)
    return x if x.data.ptr % 16 == 0 else xp.astype(x, x.dtype)


def _rows(x, xp):
    """An array whose rows lie at equal distances, and that distance in entries: `x` itself where its strides allow it."""
    steps = _steps(x)
    lead = [(n, step) for n, step in zip(x.shape[:-1], steps[:-1], strict=True) if n > 1]
    even = all(outer == n * inner for (_, outer), (n, inner) in pairwise(lead))
    if even and (x.shape[-1] == 1 or steps[-1] == 1):
        return x, lead[-1][1] if lead else 0
    return xp.ascontiguousarray(x), x.shape[-1]


def _heads(x, xp):
    """An array [..., n_kv_head, n_ctx, d_head] whose rows are in one piece, and its steps by batch, head and row in entries."""
    x = x if _steps(x)[-1] == 1 else xp.ascontiguousarray(x)
    return x, (0, *_steps(x))[-4:-1]


def _steps(x):
    """Strides in entries."""
    return tuple(stride // x.dtype.itemsize for stride in x.strides)


def _tables_fit(qkv, cos, n_heads):
    """Whether the tables are [n_seq, d_rope] or [n_batch, n_seq, d_rope], of an even width that a head has room for."""
    d_head, d_rope = qkv.shape[-1] // n_heads, cos.shape[-1]
    return (cos.ndim in (2, 3) and cos.shape[-2] == qkv.shape[-2] and d_rope % 2 == 0 and 0 < d_rope <= d_head
            and (cos.ndim == 2 or cos.shape[0] in (1, qkv.shape[0])))


def _launch(kernel, definitions, n_blocks, n_threads, *arguments):
    """Run a kernel on the current stream of the arguments' device.  Numbers are NumPy scalars of the width that it expects."""
    _compiled(kernel, tuple(sorted(definitions.items())))((n_blocks,), (n_threads,), arguments)


@functools.cache
def _compiled(kernel, definitions):
    """Compile one variant; CuPy keeps the binary in its own cache between runs as well."""
    import cupy

    options = ("-std=c++17", *(f"-D{name}={value}" for name, value in definitions))
    return cupy.RawModule(code=source(kernel), options=options).get_function(kernel)


def _is(x, *dtypes):
    return str(getattr(x, "dtype", None)) in dtypes


def _type(x):
    return TYPES[str(x.dtype)]
