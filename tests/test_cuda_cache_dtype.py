"""Keys and values in 16 bits on the CUDA kernels: rounded as the definition rounds, and read so.

Kernels run on the CPU (tests/kernel_shim.py).
"""

import guard
import kernel_shim
import ml_dtypes
import numpy as np
import pytest
import tiny
from close import close
from composed import Composed, definitions
from guard import moved
from kernel_shim import checking, needs_gxx

import npllm
from npllm import ops
from npllm.cache import KVCache
from npllm.kernels import cuda
from npllm.ops.mask import causal

on_cuda = Composed(cuda.CUDA)
pytestmark = [needs_gxx, pytest.mark.usefixtures("on_the_stand_in_apart")]
slow = pytest.mark.slow
DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16)}
dtypes = pytest.mark.parametrize("name", ["bf16", pytest.param("f16", marks=slow)])


def boundaries(dtype):
    """Every value of a 16-bit type, the middle to the next one, its neighbours; NaN, infinities."""
    x = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float32)
    x = np.unique(x[np.isfinite(x)])
    middle = ((x[:-1].astype(np.float64) + x[1:]) / 2).astype(np.float32)
    end = np.array([65519.99, 65520, 7e4, 3.4e38, np.nan, np.inf, 1e-45, 2.0**-25], np.float32)
    beside = [np.nextafter(middle, np.float32(side)) for side in (-np.inf, np.inf)]
    return np.concatenate([x, middle, *beside, end, -end])


NARROWED = """
extern "C" __global__ void narrowed(const float* x, ENTRY* y, unsigned n) {
    unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at < n) narrow(x[at], y[at]);
}
"""


@pytest.mark.parametrize("name", DTYPES)
def test_every_value_is_rounded_to_nearest_even(name):
    """At and beside every boundary between two values of the type."""
    dtype = DTYPES[name]
    x = boundaries(dtype)
    y, n = guard.xp.empty((len(x),), dtype=dtype), np.uint32(len(x))
    text = cuda.source("swiglu").partition("// y[row, i] = silu")[0] + NARROWED
    n_blocks = -(-len(x) // 256)
    variant = (("ENTRY", name),)
    kernel_shim.launch("narrowed", variant, n_blocks, 256, moved(x), y, n, text=text)
    with np.errstate(over="ignore"):
        want = x.astype(dtype)
    got, nan = y.get(), np.isnan(x)
    assert np.isnan(got.astype(np.float32))[nan].all()
    assert (got.view(np.uint16) == want.view(np.uint16))[~nan].all()


@dtypes
def test_the_kernel_appends_what_the_definition_appends(name):
    """Values to the bit; keys, which are rotated first, to one step; both sets attend alike."""
    rng, dtype = np.random.default_rng(0), DTYPES[name]
    qkv, (cos, sin) = rng.standard_normal((2, 3, 4 * 64)), rng.standard_normal((2, 3, 32))
    arrays = tuple(x.astype(np.float32) for x in (qkv, cos, sin))
    mine, theirs = (KVCache(2, 1, 64, dtype=dtype) for _ in range(2))
    got = on_cuda.rope_attention(*moved(arrays), 2, 1, cache=mine, mask=causal())
    want = definitions.rope_attention(*arrays, 2, 1, cache=theirs, mask=causal())
    (keys, values, _), (other_keys, other_values, _) = (x.state.layers[0] for x in (mine, theirs))
    assert values.get()[:, :, :3].tobytes() == other_values[:, :, :3].tobytes()
    k, other = (x[:, :, :3].astype(np.float32) for x in (keys.get(), other_keys))
    step = 2.0 ** (-7 if name == "bf16" else -10)
    assert (abs(k - other) <= step * abs(other)).all() and (k == other).mean() > 0.99
    close(got, moved(want), times=20 if (k == other).all() else 2e3)


def fed(model, ids, dtype, n=5):
    """Logits of each token behind a prompt of n, fed one by one into a cache of a dtype."""
    cache, logits = model.new_cache(len(ids), dtype=dtype), []
    for start, stop in [(0, n), *((at, at + 1) for at in range(n, ids.shape[1]))]:
        y = model.last_logits(ids[:, start:stop], np.ones((len(ids), stop), bool), cache)
        logits.append(npllm.arrays.to_numpy(y)[:, 0])
    return np.stack(logits, axis=1)


def pair(**changes):
    """A model on the engine, and the same on the definitions."""
    base = tiny.model(dtype=np.float32, ops=ops.reference, **{"hidden_size": 128} | changes)
    return npllm.Model(base.config, moved(base.params), ops=cuda.cuda_ops()), base


HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


@dtypes
@pytest.mark.parametrize("changes", [HEADS, HEADS | {"sliding_window": 5}], ids=["", "window"])
@slow
def test_the_engine_gives_the_logits_of_the_kernels_one_by_one(name, changes):
    """Their products have the same bits, so that the same keys are rounded to the same side."""
    model, ids, dtype = pair(**changes)[0], tiny.random_ids(2, 12), DTYPES[name].name
    guard.OPERATIONS.clear()
    got = fed(model, ids, dtype)
    assert guard.OPERATIONS["graph"] >= 5
    close(got, fed(model.on(model.ops.replace(decode_step=None)), ids, dtype), times=20)
    assert guard.OPERATIONS["graph"] < 10


@dtypes
def test_one_layer_gives_the_logits_of_the_definitions(name):
    """As close as a few keys that are rounded to the other side; rounding all moves logits more."""
    (model, base), ids = pair(num_hidden_layers=1, **HEADS), tiny.random_ids(2, 12)
    dtype = DTYPES[name].name
    got = fed(model, ids, dtype)
    error, moved_by = (abs(got - fed(base, ids, x)).max() for x in (dtype, None))
    assert error < moved_by / 3, (error, moved_by)


@slow
@dtypes
def test_a_row_has_the_same_bits_in_any_company(name):
    """Prompts of two tokens are 16 rows, which the kernel takes of float32 weights."""
    model, ids = pair(**HEADS)[0], tiny.random_ids(8, 6)
    dtype = DTYPES[name].name
    together = fed(model, ids, dtype, 2)
    for row in (0, 3, 7):
        assert fed(model, ids[row : row + 1], dtype, 2)[0].tobytes() == together[row].tobytes()


@slow
@dtypes
def test_the_whole_step_is_clean_under_the_checker(name):
    model, ids = pair(**HEADS)[0], tiny.random_ids(2, 7)
    want = fed(model, ids, DTYPES[name].name)
    with checking(1):
        assert fed(model, ids, DTYPES[name].name).tobytes() == want.tobytes()
