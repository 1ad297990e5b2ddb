"""The CUDA kernels of a decode step, run on the CPU: products of few rows, one query's attention."""

import guard
import kernel_shim
import ml_dtypes
import numpy as np
import pytest
from close import close
from composed import Composed, definitions
from guard import moved
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_shim import needs_gxx, ran
from strategies import normal, seeds

from npllm import ops
from npllm.kernels import cuda
from npllm.ops.mask import bidirectional, causal, left_padding, lookback, sliding_window

on_cuda = Composed(cuda.CUDA)
# A minute in all; the model on the kernels runs always.
pytestmark = [needs_gxx, pytest.mark.slow, pytest.mark.usefixtures("on_the_stand_in")]
FLOATS = [np.float32, ml_dtypes.bfloat16, np.float16]
stored = st.sampled_from(FLOATS)


# ----------------------------------------------------------------------------------------- products


@st.composite
def products(draw, even=False):
    """Rows x of one chunk of the kernel or more, a weight of whole packs, a bias and a gain."""
    dtype, n_rows = draw(stored), draw(st.sampled_from([1, 2, 3, 5, 8, 9, 16]))
    d_in = 16 // np.dtype(dtype).itemsize * draw(st.sampled_from([1, 2, 31, 33, 70, 129, 150]))
    d_out = draw(st.integers(1, 20)) * (2 if even else 1)
    x, weight = draw(normal((n_rows, d_in))), draw(normal((d_out, d_in), dtype))
    bias = draw(normal((d_out,), dtype)) if draw(st.booleans()) else None
    return x, weight, bias, draw(normal((d_in,), dtype))


@given(products())
@settings(max_examples=40)
def test_linear(call):
    x, weight, bias, _ = call
    want = moved(ops.linear(x, weight, bias))
    close(ran(lambda: cuda.linear(*moved((x, weight, bias))), "linear"), want, times=4)
    close(cuda.linear(moved(x)[:, None, :], *moved((weight, bias))), want[:, None, :], times=4)


@given(products())
@settings(max_examples=30)
def test_norm_linear(call):
    x, weight, bias, gain = call
    close(
        ran(lambda: on_cuda.norm_linear(*moved((x, gain)), 1e-5, *moved((weight, bias))), "linear"),
        moved(definitions.norm_linear(x, gain, 1e-5, weight, bias)),
        times=8,
    )


@given(products(even=True))
@settings(max_examples=30)
def test_norm_swiglu(call):
    x, weight, bias, gain = call
    close(
        ran(lambda: on_cuda.norm_swiglu(*moved((x, gain)), 1e-5, *moved((weight, bias))), "linear"),
        moved(definitions.norm_swiglu(x, gain, 1e-5, weight, bias)),
        times=20,
    )


@given(products(), seeds)
@settings(max_examples=30)
def test_linear_add(call, seed):
    x, weight, bias, _ = call
    residual = np.random.default_rng(seed).standard_normal((len(x), len(weight)), dtype=np.float32)
    close(
        ran(lambda: on_cuda.linear_add(*moved((x, weight, residual, bias))), "linear"),
        moved(definitions.linear_add(x, weight, residual, bias)),
        times=4,
    )


@pytest.mark.parametrize(
    ("dtype", "most"), [(np.float32, 16), (ml_dtypes.bfloat16, 64), (np.float16, 64)]
)
def test_up_to_how_many_rows(dtype, most):
    """One launch up to the limit; beyond it the tensor cores (tests/test_cuda_gemm.py) where the
    weight is bfloat16, else the definition, in blocks of 256 MiB of a device.
    """
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((9, 16), dtype=np.float32).astype(dtype)
    is_bf16 = dtype == ml_dtypes.bfloat16
    for n_rows in (most, most + 1):
        x = rng.standard_normal((n_rows, 16), dtype=np.float32)
        guard.OPERATIONS.clear()
        kernel = "linear" if n_rows <= most else "split"
        close(
            ran(
                lambda x=x: cuda.linear(*moved((x, weight))), *[kernel][: n_rows <= most or is_bf16]
            ),
            moved(ops.linear(x, weight)),
            times=4,
        )
        assert guard.OPERATIONS["matmul"] == (n_rows > most and not is_bf16)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_has_the_same_bits_in_any_company(dtype):
    """Alone, and as any row of a batch of up to 16; so has every fusion."""
    rng = np.random.default_rng(0)
    d_in = 1304
    x, weight = (
        rng.standard_normal((16, d_in), dtype=np.float32),
        rng.standard_normal((20, d_in), dtype=np.float32).astype(dtype),
    )
    gain, residual = (
        rng.standard_normal((d_in,), dtype=np.float32).astype(dtype),
        rng.standard_normal((16, 20), dtype=np.float32),
    )
    calls = [
        lambda x, _: cuda.linear(moved(x), moved(weight)),
        lambda x, _: on_cuda.norm_linear(*moved((x, gain)), 1e-5, moved(weight)),
        lambda x, _: on_cuda.norm_swiglu(*moved((x, gain)), 1e-5, moved(weight)),
        lambda x, r: on_cuda.linear_add(*moved((x, weight, r))),
    ]
    for call in calls:
        alone = [call(x[n : n + 1], residual[n : n + 1]).get()[0].tobytes() for n in range(16)]
        for n_rows in (2, 3, 4, 5, 8, 9, 16):
            assert [row.tobytes() for row in call(x[:n_rows], residual[:n_rows]).get()] == alone[
                :n_rows
            ]


@pytest.mark.parametrize(
    ("d_in", "dtype", "kernels"),
    [(12, ml_dtypes.bfloat16, ("split",)), (6, np.float32, ()), (16, np.float64, ())],
)
def test_other_weights_take_the_matrix_library(d_in, dtype, kernels):
    """Those in bfloat16 the tensor cores, whose factors `split` makes."""
    rng = np.random.default_rng(0)
    x, weight = (
        rng.standard_normal((2, d_in), dtype=np.float32),
        rng.standard_normal((5, d_in)).astype(dtype),
    )
    close(ran(lambda: cuda.linear(*moved((x, weight))), *kernels), moved(ops.linear(x, weight)))


def test_a_gain_or_bias_of_another_type_takes_the_parts():
    rng = np.random.default_rng(0)
    x, weight = (
        rng.standard_normal((2, 16), dtype=np.float32),
        rng.standard_normal((6, 16), dtype=np.float32).astype(ml_dtypes.bfloat16),
    )
    gain, bias = (
        rng.standard_normal((16,), dtype=np.float32),
        rng.standard_normal((6,), dtype=np.float32),
    )
    close(
        ran(
            lambda: on_cuda.norm_linear(*moved((x, gain)), 1e-5, moved(weight)),
            "rms_norm",
            "linear",
        ),
        moved(definitions.norm_linear(x, gain, 1e-5, weight)),
        times=4,
    )
    close(
        ran(
            lambda: on_cuda.norm_swiglu(*moved((x, gain)), 1e-5, moved(weight)),
            "rms_norm",
            "linear",
            "swiglu",
        ),
        moved(definitions.norm_swiglu(x, gain, 1e-5, weight)),
        times=8,
    )
    close(
        ran(lambda: cuda.linear(*moved((x, weight, bias))), "split"),
        moved(ops.linear(x, weight, bias)),
        times=4,
    )


def test_a_weight_and_rows_that_begin_anywhere():
    """Copied where not at multiples of 16 bytes; rows at equal distances are taken as they lie."""
    rng = np.random.default_rng(0)
    x, weight = (
        rng.standard_normal((2, 3, 24), dtype=np.float32),
        rng.standard_normal((5, 24)).astype(ml_dtypes.bfloat16),
    )
    view = moved(weight)[:, 3:19]
    flat = guard.Array(
        np.frombuffer(bytearray(2 + 160), dtype=ml_dtypes.bfloat16)[1:].reshape(5, 16)
    )
    flat[:, :] = view
    for there in (view, flat):
        for columns in (slice(0, 16), slice(3, 19), slice(4, 20)):
            close(
                ran(
                    lambda there=there, columns=columns: cuda.linear(
                        moved(x)[:, -1:, columns], there
                    ),
                    "linear",
                ),
                moved(ops.linear(x[:, -1:, columns], weight[:, 3:19])),
                times=4,
            )


# ----------------------------------------------------------------------------- one query, many keys

VARIANTS = [
    (64, np.float32),
    (96, ml_dtypes.bfloat16),
    (128, np.float16),
    (32, np.float16),
    (160, ml_dtypes.bfloat16),
    (256, np.float32),
]


def masks(n_ctx):
    return st.sampled_from([None, causal(), bidirectional(), causal() & lookback(3)]) | st.integers(
        1, n_ctx + 2
    ).map(sliding_window)


@st.composite
def one_query(draw):
    """One query, and keys around the sizes of a split (128), columns of a longer array."""
    d_head, dtype = draw(st.sampled_from(VARIANTS))
    group, n_kv_head = draw(st.sampled_from([1, 2, 4, 5])), draw(st.integers(1, 2))
    n_ctx, lead = (
        draw(st.sampled_from([1, 2, 31, 127, 128, 129, 256, 257, 300])),
        draw(st.sampled_from([(), (1,), (3,)])),
    )
    rng = np.random.default_rng(draw(seeds))
    q = rng.standard_normal((*lead, group * n_kv_head, 1, d_head), dtype=np.float32)
    first, room = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    k, v = (
        rng.standard_normal(
            (*lead, n_kv_head, first + n_ctx + room, d_head), dtype=np.float32
        ).astype(dtype)
        for _ in range(2)
    )
    options = {"mask": draw(masks(n_ctx)), "scale": draw(st.sampled_from([None, 0.02, 1.0]))}
    if draw(st.booleans()):
        k_slot = draw(st.integers(0, 9))
        options |= {
            "q_slots": range(k_slot + draw(st.integers(-3, n_ctx + 3)), 10**6)[:1],
            "k_slots": range(k_slot, k_slot + n_ctx),
        }
    return q, k, v, slice(first, first + n_ctx), options


def decode(q, k, v, **options):
    """Call the twin; see that it launched the kernel, and nothing else but the merge."""
    kernel_shim.LAUNCHES.clear()
    y = cuda.attention(q, k, v, **options)
    assert kernel_shim.LAUNCHES in (["attend_one"], ["attend_one", "attend_merge"])
    return y


@given(one_query())
@settings(max_examples=80)
def test_attention_of_one_query(call):
    q, k, v, columns, options = call
    close(
        decode(moved(q), moved(k)[..., columns, :], moved(v)[..., columns, :], **options),
        moved(ops.attention(q, k[..., columns, :], v[..., columns, :], **options)),
        times=8,
    )


@given(one_query(), seeds, st.booleans())
@settings(max_examples=40)
def test_padding_on_the_left(call, seed, outside):
    """A first slot for each row, from before all keys to beyond them, where the row is zero."""
    q, k, v, columns, options = call
    q, k, v = (x if x.ndim == 4 else x[None] for x in (q, k[..., columns, :], v[..., columns, :]))
    k_slot = options.get("k_slots", range(k.shape[-2])).start
    start = k_slot + np.random.default_rng(seed).integers(-2, k.shape[-2] + 3, len(q))
    rule = options.pop("mask") or bidirectional()
    ours, theirs = rule & left_padding(moved(start)), rule & left_padding(start)
    close(
        decode(*moved((q, k, v)), mask=ours, **options),
        moved(ops.attention(q, k, v, mask=theirs, **options)),
        times=8,
    )
    if outside:
        assert (
            not decode(*moved((q, k, v)), mask=left_padding(moved(start * 0 + 10**6)), **options)
            .get()
            .any()
        )


@pytest.mark.parametrize("before", [1, 5, 200])
def test_a_row_that_begins_before_the_first_key(before):
    """As where a window has dropped the slots between: every key counts, and nothing before it."""
    q, k, v = (
        np.random.default_rng(0).standard_normal((2, 2, n, 64), np.float32) for n in (1, 9, 9)
    )
    start, slots = np.array([10 - before, 12]), {"q_slots": range(18, 19), "k_slots": range(10, 19)}
    inside = [np.full((2, 2, 220, 64), 1e3, np.float32) for _ in range(2)]
    for whole, x in zip(inside, (k, v), strict=True):
        whole[:, :, 205:214] = x
    there = [moved(x)[:, :, 205:214] for x in inside]
    got = decode(moved(q), *there, mask=causal() & left_padding(moved(start)), **slots)
    want = ops.attention(q, k, v, mask=causal() & left_padding(start), **slots)
    close(got, moved(want), times=8)


@pytest.mark.parametrize("window", [None, 140])
@pytest.mark.parametrize(("d_head", "dtype"), VARIANTS[:3])
def test_a_sequence_has_the_same_bits_in_any_company(d_head, dtype, window):
    """Sequences of different lengths, padded on the left; each has the bits that it has alone."""
    rng, n_ctx, lengths = np.random.default_rng(0), 300, [300, 260, 129, 128, 90, 1]
    mask = causal() if window is None else sliding_window(window)
    q = rng.standard_normal((len(lengths), 4, 1, d_head), dtype=np.float32)
    k, v = (
        rng.standard_normal((len(lengths), 2, n_ctx, d_head), dtype=np.float32).astype(dtype)
        for _ in range(2)
    )
    start = np.array([n_ctx - n for n in lengths])
    together = decode(*moved((q, k, v)), mask=mask & left_padding(moved(start))).get()
    for row, first in enumerate(start):
        alone = decode(
            *moved((q[row : row + 1], k[row : row + 1, :, first:], v[row : row + 1, :, first:])),
            mask=mask,
        ).get()
        assert alone[0].tobytes() == together[row].tobytes()


@pytest.mark.parametrize("n_ctx", [8 * 128, 8 * 128 + 1, 2 * 8 * 128 + 70, 32 * 128 + 1])
def test_more_splits_than_warps_and_lanes(n_ctx):
    """A warp of the merge takes every eighth split, and each lane every 32nd maximum."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, n, 32), dtype=np.float32) for n in (1, n_ctx, n_ctx))
    k[:, :, -1] = 9 * q[:, :, 0]  # the largest score stands in the last split
    want = moved(ops.attention(q, k, v, scale=0.1))
    close(decode(*moved((q, k, v)), scale=0.1), want, times=8)


def test_keys_of_any_layout():
    """Columns of a longer array; rows that do not begin at multiples of 16 bytes are copied."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 3, n, 101), dtype=np.float32) for n in (1, 40, 40))
    for columns in (slice(0, 96), slice(1, 97), slice(4, 100)):
        for keys in (slice(None), slice(7, 30)):
            there = [x[..., columns] if x is q else x[:, :, keys, columns] for x in (q, k, v)]
            ours = moved((q, k, v))
            ours = [x[..., columns] if x is ours[0] else x[:, :, keys, columns] for x in ours]
            close(decode(*ours), moved(ops.attention(*there)), times=4)
