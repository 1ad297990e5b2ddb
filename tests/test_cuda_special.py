"""The CUDA kernels with every 16-bit pattern, NaN, infinities and nothing; and without barriers.

Run on the CPU with subnormals flushed to zero, as CuPy compiles for a GPU; `tests/test_gpu.py` runs
the same cases there.
"""

import re

import kernel_shim
import ml_dtypes
import numpy as np
import pytest
from close import close
from composed import Composed, definitions
from guard import moved, xp
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_shim import needs_gxx
from strategies import seeds

from npllm import ops
from npllm.kernels import cuda
from npllm.kernels.cuda import launching
from npllm.ops.mask import causal, left_padding, sliding_window
from npllm.quantized.block_packing import quantize_blocks

on_cuda = Composed(cuda.CUDA)
# A minute in all; the model on the kernels runs always.
pytestmark = [needs_gxx, pytest.mark.slow, pytest.mark.usefixtures("on_the_stand_in")]
BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
NAMES = {BF16: "bf16", F16: "f16"}
SMALLEST_NORMAL = np.float32(2.0**-126)
SPECIAL = [np.nan, np.inf, -np.inf]


def widened_text():
    """A kernel that widens and does nothing else."""
    common = cuda.source("swiglu").partition("// y[row, i] = silu")[0]
    return (
        common
        + """
extern "C" __global__ void widened(const ENTRY* x, float* y, unsigned n) {
    unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at < n) y[at] = widen(x[at]);
}
"""
    )


def patterns(dtype):
    """All 65,536 patterns of a 16-bit type, and what they are in float32."""
    x = np.arange(2**16, dtype=np.uint16).view(dtype)
    if dtype == BF16:
        return x, (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)
    return x, x.astype(np.float32)


def check_widened(got, want):
    """Equal bits; NaN where NaN is, whatever its bits."""
    close(np.isnan(got), np.isnan(want))
    close(
        np.where(np.isnan(got), 0, got.view(np.uint32)),
        np.where(np.isnan(want), 0, want.view(np.uint32)),
    )


def finite_weight(dtype):
    """All finite patterns as a weight of 8 columns, and what arithmetic makes of them."""
    x, wide = patterns(dtype)
    keep = np.isfinite(wide)
    x, wide = x[keep], wide[keep]
    return x.reshape(-1, 8), np.where(np.abs(wide) < SMALLEST_NORMAL, np.float32(0), wide).reshape(
        -1, 8
    )


@pytest.mark.parametrize("dtype", NAMES)
def test_every_16_bit_pattern_is_widened_exactly(dtype):
    x, want = patterns(dtype)
    there, y = xp.asarray(x), xp.empty((2**16,), dtype=xp.float32)
    kernel_shim.launch(
        "widened",
        (("ENTRY", NAMES[dtype]),),
        2**16 // 256,
        256,
        there,
        y,
        np.uint32(2**16),
        text=widened_text(),
    )
    check_widened(y.get(), want)


@pytest.mark.parametrize("dtype", NAMES)
def test_every_finite_weight_is_exact_in_a_product(dtype):
    """float16 is exact, subnormals included; bfloat16's are subnormal in float32, and zero."""
    weight, want = finite_weight(dtype)
    close(
        cuda.linear(*moved((np.eye(8, dtype=np.float32), weight))),
        moved(np.ascontiguousarray(want.T)),
        times=0,
    )
    assert (dtype == F16) == bool((want == weight.astype(np.float32)).all())


def test_subnormal_results_are_zero():
    """As with CuPy's -ftz=true: else a fault of flushing would not show on the CPU."""
    x, weight = np.full((1, 8), 2.0**-70, np.float32), np.full((1, 8), 2.0**-70, np.float32)
    assert ops.linear(x, weight)[0, 0] > 0
    assert cuda.linear(*moved((x, weight))).get()[0, 0] == 0
    assert np.float32(2.0**-70) * np.float32(2.0**-70) > 0, "and the mode is left as it was found"


# ------------------------------------------------------------------------- NaN, infinities, nothing


def drawn(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape, dtype=np.float32).astype(dtype)


def _layer(rng, dtype):
    return {
        "x": drawn(rng, 3, 40),
        "gain": drawn(rng, 40, dtype=dtype),
        "weight": drawn(rng, 10, 40, dtype=dtype),
        "bias": drawn(rng, 10, dtype=dtype),
        "residual": drawn(rng, 3, 10),
    }


def _heads(rng, dtype, n_seq, n_ctx=150):
    return {
        "q": drawn(rng, 2, 4, n_seq, 64),
        "k": drawn(rng, 2, 2, n_ctx, 64, dtype=dtype),
        "v": drawn(rng, 2, 2, n_ctx, 64, dtype=dtype),
    }


def _rotated(rng, _):
    return {"qkv": drawn(rng, 2, 3, 4 * 64), "cos": drawn(rng, 3, 32), "sin": drawn(rng, 3, 32)}


# name -> how its inputs are drawn, and how a set of operations is called with them
CALLS = {
    "linear": (_layer, lambda o, x: o.linear(x["x"], x["weight"], x["bias"])),
    "rms_norm": (_layer, lambda o, x: o.rms_norm(x["x"], x["gain"], 1e-5)),
    "rms_norm, no eps": (_layer, lambda o, x: o.rms_norm(x["x"] * 0.0, x["gain"], 0.0)),
    "norm_linear": (
        _layer,
        lambda o, x: o.norm_linear(x["x"], x["gain"], 1e-5, x["weight"], x["bias"]),
    ),
    "norm_linear, no eps": (
        _layer,
        lambda o, x: o.norm_linear(x["x"] * 0.0, x["gain"], 0.0, x["weight"], x["bias"]),
    ),
    "norm_swiglu": (
        _layer,
        lambda o, x: o.norm_swiglu(x["x"], x["gain"], 1e-5, x["weight"], x["bias"]),
    ),
    "linear_add": (
        _layer,
        lambda o, x: o.linear_add(x["x"], x["weight"], x["residual"], x["bias"]),
    ),
    "swiglu": (
        lambda rng, _: {"gate": drawn(rng, 3, 40), "up": drawn(rng, 3, 40)},
        lambda o, x: o.swiglu(x["gate"], x["up"]),
    ),
    "attention": (
        lambda rng, dtype: _heads(rng, dtype, 18, 40),
        lambda o, x: o.attention(x["q"], x["k"], x["v"]),
    ),
    "attention of one query": (
        lambda rng, dtype: _heads(rng, dtype, 1),
        lambda o, x: o.attention(x["q"], x["k"], x["v"]),
    ),
    "rope_attention": (_rotated, lambda o, x: o.rope_attention(x["qkv"], x["cos"], x["sin"], 2, 1)),
}
every_call = pytest.mark.parametrize("name", CALLS)


def alike(got, want, times=20):
    """NaN in the same places, and elsewhere the same values, infinities included."""
    close(np.isnan(got), np.isnan(want))
    close(np.where(np.isnan(got), 0, got), np.where(np.isnan(want), 0, want), times=times)


@every_call
@pytest.mark.parametrize("dtype", [np.float32, BF16, F16])
@given(st.data())
@settings(max_examples=25)
def test_nan_and_infinities_give_what_the_definition_gives(name, dtype, data):
    """One of them, or one after another, anywhere in any of the inputs."""
    draw, call = CALLS[name]
    inputs = draw(np.random.default_rng(data.draw(seeds)), dtype)
    for _ in range(data.draw(st.integers(1, 2))):
        place = inputs[data.draw(st.sampled_from(sorted(inputs)))]
        place[np.unravel_index(data.draw(st.integers(0, place.size - 1)), place.shape)] = data.draw(
            st.sampled_from(SPECIAL)
        )
    with np.errstate(all="ignore"):
        alike(call(on_cuda, moved(inputs)).get(), call(definitions, inputs))


@every_call
@pytest.mark.parametrize("special", SPECIAL)
def test_each_input_full_of_them(name, special):
    draw, call = CALLS[name]
    for full in draw(np.random.default_rng(0), BF16):
        inputs = draw(np.random.default_rng(0), BF16)
        inputs[full][...] = special
        with np.errstate(all="ignore"):
            alike(call(on_cuda, moved(inputs)).get(), call(definitions, inputs))


@pytest.mark.parametrize("n_seq", [1, 18])
def test_a_nan_key_gives_nan_and_a_row_without_keys_gives_zero(n_seq):
    inputs = _heads(np.random.default_rng(0), np.float32, n_seq)
    inputs["k"][0, 1, 149, 3] = np.nan
    y = CALLS["attention"][1](on_cuda, moved(inputs)).get()
    assert np.isnan(y[0, 2:]).all() and np.isfinite(y[0, :2]).all() and np.isfinite(y[1]).all()
    nothing = cuda.attention(
        *moved(tuple(inputs.values())), mask=causal(), q_slots=range(-n_seq, 0), k_slots=range(150)
    )
    assert not nothing.get().any()


@pytest.mark.parametrize("n_seq", [1, 18])
def test_scores_of_minus_infinity_alone_give_zero_and_the_lowest_scores_their_weights(n_seq):
    inputs = _heads(np.random.default_rng(0), np.float32, n_seq)
    inputs["k"][..., 0] = -1
    for large in (np.inf, 2.5e38):  # the latter: below -1e38 for every key, and finite
        inputs["q"][..., 0] = large
        with np.errstate(all="ignore"):
            want = ops.attention(*inputs.values(), scale=1.0)
        close(cuda.attention(*moved(tuple(inputs.values())), scale=1.0), moved(want), times=4)
        assert np.isfinite(want).all() and bool(want.any()) == (large != np.inf)


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("n_seq", [1, 18])
def test_a_hidden_key_counts_for_nothing_whatever_it_holds(n_seq, special):
    """Before the first slot of a row, outside a window, after the query."""
    inputs, start = _heads(np.random.default_rng(0), np.float32, n_seq), np.array([100, 130])
    mask = sliding_window(30) & left_padding(moved(start))
    slots = {"q_slots": range(140, 140 + n_seq), "k_slots": range(150)}
    clean = cuda.attention(*moved(tuple(inputs.values())), mask=mask, **slots).get()
    for b, first in enumerate(start):
        hidden = [*range(max(first, 140 - 29)), *range(140 + n_seq, 150)]
        for name in ("k", "v"):
            inputs[name][b, :, hidden] = special
    assert (
        cuda.attention(*moved(tuple(inputs.values())), mask=mask, **slots).get().tobytes()
        == clean.tobytes()
    )
    assert np.isfinite(clean).all() and clean.any()


# ----------------------------------------------------------------------------------------- barriers


def on_tensor_cores(call, *args):
    """A call on a device that has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "has_tensor_cores", lambda: True)
        return call(*args)


# kernel -> a call that runs it on several blocks and passes through every part of it
BARRIERS = {
    "rms_norm": lambda o, rng: o.rms_norm(*moved((drawn(rng, 4, 700), drawn(rng, 700))), 1e-5),
    "linear": lambda o, rng: o.norm_linear(
        *moved((drawn(rng, 2, 9000), drawn(rng, 9000))), 1e-5, moved(drawn(rng, 20, 9000))
    ),
    "linear_blocks": lambda o, rng: o.norm_linear(
        *moved((drawn(rng, 2, 9216), drawn(rng, 9216))),
        1e-5,
        quantize_blocks(drawn(rng, 20, 9216), "Q4_0").to(xp),
    ),
    "attention": lambda o, rng: o.attention(
        *moved(tuple(drawn(rng, 2, n, 64) for n in (40, 70, 70)))
    ),
    "attention_mma": lambda o, rng: on_tensor_cores(
        o.attention, *moved(tuple(drawn(rng, 2, n, 64) for n in (40, 70, 70)))
    ),
    "attend_one": lambda o, rng: o.attention(
        *moved(tuple(drawn(rng, 3, n, 64) for n in (1, 100, 100)))
    ),
    "attend_merge": lambda o, rng: o.attention(
        *moved(tuple(drawn(rng, 3, n, 64) for n in (1, 700, 700)))
    ),
}


def barriers():
    return [
        (kernel, n)
        for kernel in cuda.VARIANTS
        if kernel != "choose"  # tests/test_cuda_checks.py
        for n in range(cuda.source(kernel).count("__syncthreads();"))
    ]


def without_barrier(kernel, n):
    """The text of a kernel without its nth barrier."""
    places = [match.span() for match in re.finditer(r"__syncthreads\(\);", cuda.source(kernel))]
    text, (start, stop) = cuda.source(kernel), places[n]
    return text[:start] + text[stop:]


@pytest.mark.parametrize(("kernel", "n"), barriers())
def test_each_barrier_is_needed(kernel, n, monkeypatch):
    """Without it the same call gives something else, in one of the orders of the shim."""
    want = BARRIERS[kernel](on_cuda, np.random.default_rng(0)).get()
    broken = without_barrier(kernel, n)

    def launch(name, *arguments):
        kernel_shim.launch(name, *arguments, text=broken if name == kernel else None)

    monkeypatch.setattr(cuda.launching, "launch", launch)
    got = BARRIERS[kernel](on_cuda, np.random.default_rng(0)).get()
    assert not np.array_equal(got, want)


def test_every_kernel_with_a_barrier_is_tried():
    assert {kernel for kernel, _ in barriers()} == set(BARRIERS)
