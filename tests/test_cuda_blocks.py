"""Weights in GGUF's block formats on the CUDA kernels: the same values as the definitions, bit for
bit, and the same logits, in every format; the checker of memory; planted faults.

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
from kernel_shim import KernelFault, checking, needs_gxx, ran

import npllm
from npllm import ops
from npllm.kernels import cuda
from npllm.kernels.cuda import decode, launching, weights
from npllm.quantized.block_formats import FORMATS
from npllm.quantized.block_packing import quantize_blocks
from npllm.quantized.block_weight import BlockWeight
from npllm.quantized.int8 import Int8Weight, quantize
from npllm.quantized.stacked import StackedWeight

on_cuda = Composed(cuda.CUDA)
pytestmark = [needs_gxx, pytest.mark.usefixtures("on_the_stand_in_apart")]
slow = pytest.mark.slow
FAST = "Q4_0"  # g++ takes seconds for each variant
formats = pytest.mark.parametrize(
    "name", [x if x == FAST else pytest.param(x, marks=slow) for x in FORMATS]
)
SMALLEST_NORMAL = 2.0**-126


def random_blocks(name, n_rows, n_blocks, seed=0, scale=None):
    """Blocks of any bytes; float16 scales and minimums are finite, or near `scale`."""
    layout, rng = FORMATS[name], np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (n_rows, n_blocks, layout.n_bytes), dtype=np.uint8)
    places = {"Q6_K": (208,), "Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,)}.get(name, (0, 2))
    for at in places:
        half = rng.standard_normal((n_rows, n_blocks)) * (scale or 1)
        any_bits = rng.integers(0, 0x7C00, half.shape, dtype=np.uint16).view(np.float16)
        half = np.where(rng.random(half.shape) < 0.5, half, any_bits) if scale is None else half
        blocks[:, :, at : at + 2] = half.astype(np.float16)[..., None].view(np.uint8)
    return BlockWeight(blocks.reshape(n_rows, -1), name)


def there(weight):
    """A weight on the stand-in's device."""
    return weight.to(guard.xp)


def flushed(x):
    """What arithmetic makes of subnormal results."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.float32(0), x)


# ------------------------------------------------------------------------------------ one operation


@formats
def test_an_entry_has_the_bits_of_the_definition(name):
    """Each column picked out by a unit vector: any bytes, any finite scale, subnormals included."""
    layout = FORMATS[name]
    n_blocks = 1280 // layout.n_entries  # more than one batch of 1,024 entries, and no whole one
    weight = random_blocks(name, 4, n_blocks)
    d_in, step = weight.shape[1], 8
    want = flushed(weight.widened())
    assert np.isfinite(want).all()
    for first in range(0, d_in, d_in // 5):  # some at every place of a unit
        columns = np.arange(first, min(d_in, first + 64))
        for chosen in np.split(columns, range(step, len(columns), step)):
            x = np.zeros((len(chosen), d_in), np.float32)
            x[np.arange(len(chosen)), chosen] = 1
            got = ran(lambda x=x: cuda.linear(moved(x), there(weight)), "linear_blocks").get()
            assert (got == want[:, chosen].T).all()


def rows_of_table(weight, ids):
    """Rows of a table of 6 * 256 entries at most, in float32: embed.cu or embed_blocks.cu."""
    suffix, entry, values, scales = weights.operand(there(weight))
    x = guard.xp.empty((len(ids), weight.shape[1]), dtype=np.float32)
    variant = (("ENTRY", entry),)
    sizes = map(np.int64, (x.size, x.shape[1]))
    arguments = moved(ids), values, launching.pointer(scales), x, *sizes
    launching.launch(f"embed{suffix}", variant, 6, 256, *arguments)
    return x


@formats
def test_a_row_of_a_table_has_the_bits_of_the_definition(name):
    weight = random_blocks(name, 6, 512 // FORMATS[name].n_entries)
    ids = np.array([5, 0, 3])
    assert (rows_of_table(weight, ids).get() == flushed(weight.take(ids).widened())).all()


@pytest.mark.parametrize("d_model", [64, 80, 144])
def test_a_row_of_a_table_in_int8(d_model):
    """The last group of 64 entries, which share a scale, may be shorter."""
    table = quantize(np.random.default_rng(0).standard_normal((6, d_model), dtype=np.float32))
    ids = np.array([5, 0, 3])
    assert table.scales.dtype == np.float16
    assert (rows_of_table(table, ids).get() == table.take(ids).widened()).all()


def test_scales_are_float32_on_a_device_and_others_are_left_to_the_definition():
    """The kernels would read pairs of float16 scales as one."""
    rng = np.random.default_rng(0)
    here = quantize(rng.standard_normal((6, 64), dtype=np.float32))
    x, on_device = rng.standard_normal((2, 64), dtype=np.float32), there(here)
    assert on_device.scales.dtype == np.float32 and weights.is_read(on_device)
    half = Int8Weight(on_device.values, moved(here.scales))
    assert not weights.is_read(half)
    close(on_cuda.linear(moved(x), half).get(), definitions.linear(x, here), times=8)


@formats
@pytest.mark.parametrize("n_rows", [1, pytest.param(2, marks=slow), pytest.param(9, marks=slow)])
def test_products(name, n_rows):
    """Alone, and fused with norm, bias, gate and residual; more outputs than a block has."""
    rng = np.random.default_rng(1)
    weight = random_blocks(name, 38, 2560 // FORMATS[name].n_entries, scale=0.01)
    d_out, d_in = weight.shape
    x, gain, bias, residual = (
        rng.standard_normal(shape, dtype=np.float32)
        for shape in ((n_rows, d_in), (d_in,), (d_out,), (n_rows, d_out))
    )
    calls = [
        lambda o, w, x, gain, bias, _: o.norm_linear(x, gain, 1e-5, w, bias),
        lambda o, w, x, gain, bias, _: o.norm_swiglu(x, gain, 1e-5, w, bias),
        lambda o, w, x, _, bias, residual: o.linear_add(x, w, residual, bias),
    ]
    inputs = x, gain, bias, residual
    for call in calls:
        got = ran(lambda c=call: c(on_cuda, there(weight), *moved(inputs)), "linear_blocks")
        close(got, moved(call(definitions, weight, *inputs)), times=20)


@slow
@formats
def test_a_row_has_the_same_bits_in_any_company(name):
    weight = there(random_blocks(name, 20, 2560 // FORMATS[name].n_entries, scale=0.01))
    x = np.random.default_rng(0).standard_normal((16, weight.shape[1]), dtype=np.float32)
    alone = [cuda.linear(moved(x[n : n + 1]), weight).get()[0].tobytes() for n in range(16)]
    for n_rows in (2, 3, 4, 5, 8, 9, 16):
        rows = cuda.linear(moved(x[:n_rows]), weight).get()
        assert [row.tobytes() for row in rows] == alone[:n_rows]


@slow
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@formats
def test_nan_and_infinite_inputs_give_what_the_definition_gives(name, special):
    weight = random_blocks(name, 8, 1, scale=0.01)
    x = np.ones((2, weight.shape[1]), np.float32)
    x[0, 5] = special
    with np.errstate(all="ignore"):
        want = ops.linear(x, weight)
    got = cuda.linear(moved(x), there(weight)).get()
    close(np.isnan(got), np.isnan(want))
    close(np.nan_to_num(got), np.nan_to_num(want), times=20)


@slow
def test_matrices_of_several_formats():
    """One launch for each part, each into its columns; a float32 part among them."""
    rng = np.random.default_rng(0)
    floats = rng.standard_normal((6, 256), dtype=np.float32)
    parts = (random_blocks("Q4_K", 10, 1, scale=0.01), random_blocks("Q6_K", 6, 1, 1, 0.01), floats)
    weight = StackedWeight(parts)
    x, gain, residual = (rng.standard_normal(n, dtype=np.float32) for n in ((3, 256), 256, (3, 22)))
    kernels = "linear_blocks", "linear_blocks", "linear"
    got = ran(lambda: on_cuda.norm_linear(*moved((x, gain)), 1e-5, there(weight)), *kernels)
    close(got, moved(definitions.norm_linear(x, gain, 1e-5, weight)), times=20)
    got = ran(lambda: on_cuda.linear_add(moved(x), there(weight), moved(residual)), *kernels)
    close(got, moved(definitions.linear_add(x, weight, residual)), times=20)
    swiglu = ran(
        lambda: on_cuda.norm_swiglu(*moved((x, gain)), 1e-5, there(weight)), *kernels, "swiglu"
    )
    close(swiglu, moved(definitions.norm_swiglu(x, gain, 1e-5, weight)), times=20)


def test_a_stack_with_a_part_in_16_bits_takes_the_definition():
    """Beside blocks the kernel reads vectors in float32, beside bfloat16 in bfloat16."""
    rng = np.random.default_rng(0)
    half = rng.standard_normal((6, 64)).astype(ml_dtypes.bfloat16)
    weight = StackedWeight((random_blocks(FAST, 10, 2, scale=0.01), half))
    x, gain, bias = (rng.standard_normal(n, dtype=np.float32) for n in ((3, 64), 64, 16))
    for vectors in ((gain, bias), (gain.astype(half.dtype), bias.astype(half.dtype))):
        got = ran(
            lambda v=vectors: on_cuda.norm_linear(
                *moved((x, v[0])), 1e-5, there(weight), moved(v[1])
            ),
            "rms_norm",
        )
        close(
            got, moved(definitions.norm_linear(x, vectors[0], 1e-5, weight, vectors[1])), times=20
        )


def test_up_to_how_many_rows_a_stack_takes_the_kernel():
    """As many as the part of which it takes the fewest: of float32 fewer than of blocks."""
    rng, most = np.random.default_rng(0), min(cuda.MOST_ROWS[1], cuda.MOST_ROWS[4])
    floats = rng.standard_normal((6, 64), dtype=np.float32)
    weight = StackedWeight((random_blocks(FAST, 10, 2, scale=0.01), floats))
    for n_rows, kernels in ((most, ("linear_blocks", "linear")), (most + 1, ())):
        x = rng.standard_normal((n_rows, 64), dtype=np.float32)
        got = ran(lambda x=x: cuda.linear(moved(x), there(weight)), *kernels)
        close(got, moved(ops.linear(x, weight)), times=20)


def test_a_matrix_that_is_no_whole_words_takes_the_definition():
    """Of 17 rows of one block of 18 bytes the last word would end behind the matrix."""
    x = np.ones((1, 32), np.float32)
    for n_rows, kernels in ((17, ()), (16, ("linear_blocks",))):
        weight = random_blocks("Q4_0", n_rows, 1, scale=0.01)
        got = ran(lambda w=weight: cuda.linear(moved(x), there(w)), *kernels)
        close(got, moved(ops.linear(x, weight)), times=20)


@slow
def test_a_weight_that_begins_anywhere_is_copied():
    weight = there(random_blocks("Q4_0", 17, 2, scale=0.01))
    rows = weight[1:17]
    assert not weights.is_in_place(rows) and weights.is_in_place(weight)
    x = moved(np.random.default_rng(0).standard_normal((2, 64), dtype=np.float32))
    whole = cuda.linear(x, weight).get()[:, 1:17]
    close(ran(lambda: cuda.linear(x, rows), "linear_blocks").get(), whole, times=0)


# ---------------------------------------------------------------------------------- the whole model


def pair(name, mixed=None, **changes):
    """A model with all matrices in a format, on the engine and on the definitions.

    mixed: the format of the last rows of qkv_proj.
    """
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4}
    base = tiny.model(dtype=np.float32, ops=ops.reference, **sizes | {"vocab_size": 64} | changes)

    def packed(weight, of=name):
        return quantize_blocks(np.asarray(weight), of)

    def stacked(weight):
        n = 3 * weight.shape[0] // 4
        return StackedWeight((packed(weight[:n]), packed(weight[n:], mixed)))

    layers = tuple(
        layer._replace(**{x: packed(getattr(layer, x)) for x, *_ in decode.PRODUCTS})
        for layer in base.params.layers
    )
    if mixed:
        old = base.params.layers
        layers = tuple(
            one._replace(qkv_proj=stacked(was.qkv_proj))
            for one, was in zip(layers, old, strict=True)
        )
    table, tied = packed(base.params.embed_tokens), base.config.tie_word_embeddings
    head = table if tied else packed(base.params.lm_head)
    params = base.params._replace(embed_tokens=table, layers=layers, lm_head=head)
    model = npllm.Model(base.config, on_device(params), ops=cuda.cuda_ops())
    return model, npllm.Model(base.config, params, ops=ops.reference)


def on_device(params, xp=guard.xp):
    """Params with every array and packed matrix moved."""

    def move(x):
        return x if x is None else x.to(xp) if hasattr(x, "to") else xp.asarray(x)

    layers = tuple(layer._make(map(move, layer)) for layer in params.layers)
    names = ("embed_tokens", "norm", "lm_head")
    return params._replace(layers=layers, **{x: move(getattr(params, x)) for x in names})


def fed(model, ids, n_prompt):
    """Logits of each token behind a prompt, fed one by one."""
    cache, logits = model.new_cache(len(ids)), []
    for start, stop in [(0, n_prompt), *((at, at + 1) for at in range(n_prompt, ids.shape[1]))]:
        y = model.last_logits(ids[:, start:stop], np.ones((len(ids), stop), bool), cache)
        logits.append(npllm.arrays.to_numpy(y)[:, 0])
    return np.stack(logits, axis=1)


@formats
@pytest.mark.parametrize(
    "changes",
    [{}, *(pytest.param(x, marks=slow) for x in ({"tie_word_embeddings": True}, {"n_batch": 3}))],
    ids=str,
)
def test_a_model_on_the_engine_gives_the_logits_of_the_reference(name, changes):
    """The captured step reads the blocks; greedy tokens are chosen on the device."""
    n_batch = changes.get("n_batch", 1)
    model, base = pair(name, **{k: x for k, x in changes.items() if k != "n_batch"})
    ids = tiny.random_ids(n_batch, 8)
    guard.OPERATIONS.clear()
    kernel_shim.LAUNCHES.clear()
    close(fed(model, ids, 5), fed(base, ids, 5), times=20)
    assert guard.OPERATIONS["graph"] >= 1 and "linear" not in kernel_shim.LAUNCHES
    want = base.generate(ids, max_new_tokens=4)
    assert (model.generate(ids, max_new_tokens=4) == want).all()


@slow
def test_blocks_with_longrope_a_window_and_grouped_heads():
    """Three rows, over the crossing of longrope."""
    factors = {"type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
    changes = {"rope_scaling": factors, "original_max_position_embeddings": 12}
    model, base = pair("Q4_0", sliding_window=5, num_key_value_heads=1, **changes)
    ids = tiny.random_ids(3, 15)
    guard.OPERATIONS.clear()
    close(fed(model, ids, 9), fed(base, ids, 9), times=20)
    assert guard.OPERATIONS["graph"] >= 1


@slow
def test_a_model_of_several_formats():
    """As Q4_K_M stores it: value rows in more bits than the others."""
    model, base = pair("Q4_K", mixed="Q6_K")
    ids = tiny.random_ids(2, 8)
    guard.OPERATIONS.clear()
    close(fed(model, ids, 5), fed(base, ids, 5), times=20)
    assert guard.OPERATIONS["graph"] >= 1


@slow
def test_float_vectors_of_another_type():
    """Gains in bfloat16 beside blocks: widened once, when the plan is made."""
    model, base = pair("Q4_0")
    gain = np.asarray(base.params.norm).astype(ml_dtypes.bfloat16)
    mine, theirs = (one.params._replace(norm=g) for one, g in ((model, moved(gain)), (base, gain)))
    ids = tiny.random_ids(1, 7)
    got = fed(npllm.Model(base.config, mine, ops=cuda.cuda_ops()), ids, 5)
    close(got, fed(npllm.Model(base.config, theirs, ops=ops.reference), ids, 5), times=20)


# ------------------------------------------------------------------------------ the checker, faults


def product_of_blocks(name=FAST):
    """Nine rows of x, a matrix that ends a block early, entries that fill no batch."""
    weight = random_blocks(name, 18, 2304 // FORMATS[name].n_entries, scale=0.01)
    x = np.random.default_rng(0).standard_normal((3, weight.shape[1]), dtype=np.float32)
    return cuda.linear(moved(x), there(weight))


def embedded():
    return rows_of_table(random_blocks(FAST, 6, 2), np.array([5, 0, 3]))


@slow
@formats
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_product_is_clean_in_any_order(name, seed):
    """No access out of bounds at the end of the matrix, no race; the bits of the fixed order."""
    want = product_of_blocks(name).get()
    with checking(seed):
        assert product_of_blocks(name).get().tobytes() == want.tobytes()


@slow
@formats
def test_the_whole_step_is_clean_under_the_checker(name):
    model, _ = pair(name)
    ids = tiny.random_ids(2, 7)
    want = fed(model, ids, 5)
    with checking(1):
        assert fed(model, ids, 5).tobytes() == want.tobytes()


# (call, kernel, text, its replacement, what is found: a fault of memory, or "wrong")
PLANTED = {
    "the word behind the last": (
        product_of_blocks,
        "linear_blocks",
        "at & 2;",
        "at % 4 == 0;",
        "wrong",
    ),
    "a unit behind the row": (
        product_of_blocks,
        "linear_blocks",
        "unit < d_in / 32",
        "unit < d_in / 32 + 64",
        "out of bounds",
    ),
    "one word too many": (
        product_of_blocks,
        "linear_blocks",
        "k < N; ++k) word[k] = from[k]",
        "k <= N; ++k) word[k] = from[k]",
        "out of bounds",
    ),
    "staged while others still multiply": (
        product_of_blocks,
        "linear_blocks",
        "        __syncthreads();\n        stage<",
        "        stage<",
        "race",
    ),
    "nibbles exchanged": (
        product_of_blocks,
        "linear_blocks",
        "bytes.at(2 + part * 4) >> half * 4;",
        "bytes.at(2 + part * 4) >> 4 - half * 4;",
        "wrong",
    ),
    "an order of lanes for the reader only": (
        product_of_blocks,
        "linear_blocks",
        "((unit % 32) ^ part) * 4",
        "unit % 32 * 4",
        "wrong",
    ),
    "threads behind the last row": (
        embedded,
        "embed_blocks",
        "if (at >= n / 32) return;",
        "",
        "out of bounds",
    ),
    "the row before": (
        embedded,
        "embed_blocks",
        "token[b] * (d_model",
        "(token[b] - (token[b] > 0)) * (d_model",
        "wrong",
    ),
}


@slow
@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_caught(fault, monkeypatch):
    """By the checker of memory where it is one of memory, else by its result."""
    call, kernel, text, replacement, found = PLANTED[fault]
    source, want = cuda.source(kernel), call().get()
    assert source.count(text) == 1
    edited = source.replace(text, replacement)

    def launch(name, *arguments):
        kernel_shim.launch(name, *arguments, text=edited if name == kernel else None)

    monkeypatch.setattr(launching, "launch", launch)
    if found == "wrong":
        assert not np.array_equal(call().get(), want)
        return
    with pytest.raises(KernelFault, match=found):
        for seed in range(1, 6):
            with checking(seed):
                call()
