"""On a GPU: every op, every kernel, the whole model and the default checkpoint in CuPy beside
NumPy.

Run by `scripts/check_gpu.sh` (or `pytest -m gpu`).  Without a GPU these tests do not run, and when
they are asked for they fail.  Figures go to the JSON file that NPLLM_GPU_FIGURES names.
"""

import json
import os
from pathlib import Path

import guard
import kernel_shim
import ml_dtypes
import numpy as np
import pytest
import tiny
from close import close
from composed import Composed, definitions
from hypothesis import given
from hypothesis import strategies as st
from strategies import ARRAY_OPS, attention_calls, documented_calls, examples, normal
from test_cuda_attention_mma import QUERIES, check_product, heads, product_text, sizes, tiles_of
from test_cuda_attention_mma import SPECIAL as OVERFLOWING
from test_cuda_attention_mma import wide as widened
from test_cuda_blocks import on_device, random_blocks
from test_cuda_blocks import pair as block_pair
from test_cuda_cache_dtype import fed as fed_into
from test_cuda_decode import VARIANTS, one_query, products
from test_cuda_engine import KINDS as ENGINE_KINDS
from test_cuda_engine import fed
from test_cuda_prefill import rms, rounded_attention
from test_cuda_special import (
    CALLS,
    NAMES,
    SPECIAL,
    alike,
    check_widened,
    finite_weight,
    patterns,
    widened_text,
)
from test_guard import KINDS
from test_kernels_cuda import FLOATS, long_calls, projected, stored

import npllm
from npllm import ops
from npllm.arrays import to_numpy
from npllm.kernels import choose_ops, cuda
from npllm.kernels.cuda import decode_graph, gemm, launching
from npllm.kernels.cuda.attention import attention_in_parts
from npllm.ops.mask import causal, left_padding, sliding_window
from npllm.quantized.block_formats import FORMATS

on_cuda = Composed(cuda.CUDA)
pytestmark = pytest.mark.gpu
FIGURES = {}
REHEARSAL = (
    os.environ.get("NPLLM_REHEARSE") == "1"
)  # the stand-in runs a kernel on the CPU, thread by thread
TEXT = (
    "The capital of France is Paris. Water boils at a hundred degrees, and a stick in the ground shows noon when its shadow is "
    "shortest. Then, around 1300, somebody hung a weight on a rope and wound it around an axle."
)


@pytest.fixture(autouse=True, scope="module")
def _figures_of_an_earlier_process():
    path = Path(os.environ.get("NPLLM_GPU_FIGURES", os.devnull))
    if path.is_file():
        FIGURES.update(json.loads(path.read_text(encoding="utf-8")))


@pytest.fixture(autouse=True)
def _figures():
    """Written after every test: whatever ends the process, the figures up to there are on disk."""
    yield
    if "NPLLM_GPU_FIGURES" in os.environ:
        path = Path(os.environ["NPLLM_GPU_FIGURES"])
        path.with_suffix(".partial").write_text(json.dumps(FIGURES, indent=1), encoding="utf-8")
        path.with_suffix(".partial").rename(path)


def figure(name, got, want):
    """Note the largest |difference|, as a fraction of the largest |desired|."""
    got, want = to_numpy(got).astype(np.float64), to_numpy(want).astype(np.float64)
    finite = np.isfinite(want)
    if np.any(finite):
        worst = (
            float(np.abs(np.subtract(got, want, where=finite, out=np.zeros_like(want))).max())
            if got.shape == want.shape
            else np.inf
        )
        FIGURES[name] = max(
            FIGURES.get(name, 0.0), worst / max(float(np.abs(want[finite]).max()), 1e-30)
        )


def moved(x):
    """Turn NumPy arrays, also those in a dict, list or tuple, into CuPy arrays."""
    import cupy

    if isinstance(x, dict):
        return {name: moved(value) for name, value in x.items()}
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*map(moved, x))
    if isinstance(x, tuple | list):
        return type(x)(map(moved, x))
    return cupy.asarray(x) if isinstance(x, np.ndarray | np.generic) else x


def same(name, actual, desired, times=8.0):
    for one, other in (
        zip(actual, desired, strict=True) if isinstance(desired, tuple) else [(actual, desired)]
    ):
        assert type(one).__module__ == "cupy"
        figure(name, one, other)
        close(to_numpy(one), np.asarray(other), times=times)


# ------------------------------------------------------------------------------------------------------------------------ every op


@pytest.mark.parametrize("name", ARRAY_OPS)
@given(st.data())
@examples(20)
def test_every_op(name, data):
    arguments, _ = data.draw(documented_calls(ARRAY_OPS[name]))
    result = ARRAY_OPS[name](**moved(arguments))
    if name not in ("padding", "left_padding", "documents"):
        same(f"op {name}", result, ARRAY_OPS[name](**arguments))


@pytest.mark.parametrize("op", [ops.attention, ops.blockwise_attention])
@given(st.data())
@examples(50)
def test_attention_in_every_dtype(op, data):
    call = data.draw(attention_calls(kinds=("none", "rule", "function", "array")))
    sizes = {"block_q": 2, "block_k": 3} if op is ops.blockwise_attention else {}
    same(
        f"op {op.__name__}, all dtypes",
        op(*moved((call.q, call.k, call.v)), return_lse=True, **moved(call.options), **sizes),
        op(call.q, call.k, call.v, return_lse=True, **call.options, **sizes),
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16, np.float16])
def test_a_large_product(dtype):
    rng = np.random.default_rng(0)
    x, w = (
        rng.standard_normal((33, 3072), dtype=np.float32),
        rng.standard_normal((1000, 3072), dtype=np.float32).astype(dtype),
    )
    same(f"linear 3072, {np.dtype(dtype).name}", ops.linear(*moved((x, w))), ops.linear(x, w))


# ------------------------------------------------------------------------------------------------------------------------- kernels


@given(st.data(), st.integers(1, 4000), stored)
@examples(30)
def test_rms_norm_kernel(data, d_model, dtype):
    x, weight = data.draw(normal((3, d_model), scale=3)), data.draw(normal((d_model,), dtype))
    same("kernel rms_norm", cuda.rms_norm(*moved((x, weight)), 1e-5), ops.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", FLOATS.values())
@pytest.mark.parametrize("n_rows", [1, 2, 3, 8, 9, 16, 64, 65])
def test_product_kernels(n_rows, dtype):
    rng, d_in, d_out = np.random.default_rng(0), *((264, 12) if REHEARSAL else (3072, 1004))
    x, w = (
        rng.standard_normal((n_rows, d_in), dtype=np.float32),
        rng.standard_normal((d_out, d_in), dtype=np.float32).astype(dtype),
    )
    gain, residual = (
        rng.standard_normal((d_in,), dtype=np.float32).astype(dtype),
        rng.standard_normal((n_rows, d_out), dtype=np.float32),
    )
    same("kernel linear", cuda.linear(*moved((x, w))), ops.linear(x, w))
    same(
        "kernel linear, norm",
        on_cuda.norm_linear(*moved((x, gain)), 1e-5, moved(w)),
        definitions.norm_linear(x, gain, 1e-5, w),
    )
    same(
        "kernel linear, gate",
        on_cuda.norm_swiglu(*moved((x, gain)), 1e-5, moved(w)),
        definitions.norm_swiglu(x, gain, 1e-5, w),
        times=20,
    )
    same(
        "kernel linear, residual",
        on_cuda.linear_add(*moved((x, w, residual))),
        definitions.linear_add(x, w, residual),
    )


@pytest.mark.parametrize("n_parts", [1, 3])
@pytest.mark.parametrize("n_rows", [17, 512])
def test_products_on_the_tensor_cores(n_rows, n_parts):
    """Within the bound of npllm/kernels/cuda/gemm.py, entry by entry, beside float64."""
    if gemm.library() is None:
        pytest.skip("the device has no tensor cores for bfloat16")
    rng, d_in, d_out = np.random.default_rng(0), 3072, 1000
    x, w = (rng.standard_normal(n, dtype=np.float32) for n in ((n_rows, d_in), (d_out, d_in)))
    w = w.astype(ml_dtypes.bfloat16)
    rounded = x if n_parts == 3 else x.astype(ml_dtypes.bfloat16)
    wide, weight = rounded.astype(np.float64), w.astype(np.float64)
    got = to_numpy(gemm.product(*moved((x, w)), n_parts=n_parts))
    want, size = wide @ weight.T, abs(wide) @ abs(weight.T)
    figure("tensor cores", moved(got), want.astype(np.float32))
    assert (abs(got - want) <= 1.01 * (d_in + 3) * 2.0**-23 * size).all()


every_format = pytest.mark.parametrize("name", ["Q4_0"] if REHEARSAL else list(FORMATS))


@every_format
@pytest.mark.parametrize("n_rows", [1, 3, 8] if REHEARSAL else [1, 2, 3, 8, 9, 64, 65])
def test_products_of_blocks(name, n_rows):
    import cupy

    n_blocks = (512 if REHEARSAL else 3072) // FORMATS[name].n_entries
    w = random_blocks(name, 12 if REHEARSAL else 1004, n_blocks, scale=0.01)
    x = np.random.default_rng(0).standard_normal((n_rows, w.shape[1]), dtype=np.float32)
    same("kernel linear_blocks", cuda.linear(moved(x), w.to(cupy)), ops.linear(x, w))


@every_format
def test_the_engine_on_blocks(name):
    import cupy

    _, base = block_pair(name)
    there = npllm.Model(base.config, on_device(base.params, cupy), ops=cuda.CUDA)
    ids = tiny.random_ids(2, 9)
    same("decode engine, blocks", moved(fed(there, ids, 5)[0]), fed(base, ids, 5)[0], times=20)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_engine_on_keys_in_16_bits(dtype):
    """As the kernels one by one, whose products have the same bits."""
    _, there = model_pair(cuda.CUDA, hidden_size=128, num_attention_heads=2, num_key_value_heads=2)
    ids = tiny.random_ids(2, 12)
    apart = there.on(there.ops.replace(decode_step=None))
    got, want = (fed_into(one, ids, dtype) for one in (there, apart))
    same("decode engine, 16-bit keys", moved(got), want, times=20)


@given(products())
@examples(60)
def test_products_of_all_sizes(call):
    x, weight, bias, gain = call
    same(
        "kernel linear, small",
        on_cuda.norm_linear(*moved((x, gain)), 1e-5, *moved((weight, bias))),
        definitions.norm_linear(x, gain, 1e-5, weight, bias),
    )


@pytest.mark.parametrize("dtype", FLOATS.values())
def test_a_row_has_the_same_bits_in_any_company(dtype):
    rng, d_in, d_out = np.random.default_rng(0), *((264, 12) if REHEARSAL else (3072, 100))
    x, w = (
        rng.standard_normal((16, d_in), dtype=np.float32),
        rng.standard_normal((d_out, d_in), dtype=np.float32).astype(dtype),
    )
    gain = rng.standard_normal((d_in,), dtype=np.float32).astype(dtype)
    alone = [
        to_numpy(on_cuda.norm_linear(*moved((x[n : n + 1], gain)), 1e-5, moved(w)))[0].tobytes()
        for n in range(16)
    ]
    for n_rows in range(2, 17):
        assert [
            row.tobytes()
            for row in to_numpy(on_cuda.norm_linear(*moved((x[:n_rows], gain)), 1e-5, moved(w)))
        ] == alone[:n_rows]


@pytest.mark.parametrize("dtype", NAMES)
def test_every_16_bit_pattern_is_widened_exactly(dtype):
    """Compiled by CuPy with its own options; float16 is exact in a product as well."""
    import cupy

    options = (*launching.OPTIONS, f"-DENTRY={NAMES[dtype]}")
    kernel = cupy.RawModule(code=widened_text(), options=options).get_function("widened")
    x, want = patterns(dtype)
    y = cupy.empty(2**16, dtype=cupy.float32)
    kernel((256,), (256,), (moved(x), y, np.uint32(2**16)))
    check_widened(to_numpy(y), want)
    weight, want = finite_weight(dtype)
    close(
        to_numpy(cuda.linear(*moved((np.eye(8, dtype=np.float32), weight)))),
        np.ascontiguousarray(want.T),
        times=0,
    )


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", FLOATS.values())
def test_nan_and_infinities(name, dtype):
    draw, call = CALLS[name]
    for full in draw(np.random.default_rng(0), dtype):
        for special in SPECIAL:
            for place in (0, -1, ...):
                inputs = draw(np.random.default_rng(0), dtype)
                inputs[full].reshape(-1)[place] = special
                with np.errstate(all="ignore"):
                    alike(to_numpy(call(on_cuda, moved(inputs))), call(definitions, inputs))


@given(st.data(), st.integers(1, 3000))
@examples(30)
def test_swiglu_kernel(data, d_ff):
    both = data.draw(normal((2, 3, 2 * d_ff), scale=30))
    there = moved(both)
    same(
        "kernel swiglu",
        cuda.swiglu(there[..., :d_ff], there[..., d_ff:]),
        ops.swiglu(both[..., :d_ff], both[..., d_ff:]),
    )


@given(long_calls())
@examples(100)
def test_attention_kernel(call):
    q, k, v, options = call
    same(
        "kernel attention",
        cuda.attention(*moved((q, k, v)), **options),
        ops.attention(q, k, v, **options),
    )


@pytest.mark.parametrize("d_head", cuda.HEADS)
@pytest.mark.parametrize("dtype", FLOATS.values())
def test_attention_kernel_over_a_thousand_keys(d_head, dtype):
    rng = np.random.default_rng(0)
    n_seq, n_ctx = (9, 43) if REHEARSAL else (999, 1203)
    q = rng.standard_normal((2, 8, n_seq, d_head), dtype=np.float32)
    k, v = (
        rng.standard_normal((2, 2, n_ctx, d_head), dtype=np.float32).astype(dtype) for _ in range(2)
    )
    same(
        f"kernel attention, {n_ctx} keys",
        cuda.attention(*moved((q, k, v)), mask=causal()),
        ops.attention(q, k, v, mask=causal()),
    )


@pytest.fixture
def tensor_cores(monkeypatch):
    """A device with tensor cores; a rehearsal takes the stand-ins of a warp's product and of
    cuBLAS.
    """
    if REHEARSAL:
        monkeypatch.setattr(launching, "has_tensor_cores", lambda: True)
        monkeypatch.setattr(gemm, "library", lambda: (kernel_shim.Cublas, lambda: "handle"))
    elif not launching.has_tensor_cores():
        pytest.skip("the device has no tensor cores for bfloat16")


@pytest.mark.usefixtures("tensor_cores")
def test_the_product_of_a_warp_is_laid_out_as_its_source_says():
    import cupy

    def launch(a, b, d):
        kernel = cupy.RawModule(code=product_text(), options=launching.OPTIONS)
        there = moved(d)
        arguments = *moved((a, b)), there, np.uint32(len(a))
        kernel.get_function("product")((1,), (64,), arguments)
        return to_numpy(there)

    check_product(launch)


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("d_head", cuda.HEADS[:1] if REHEARSAL else cuda.HEADS)
@pytest.mark.parametrize("dtype", FLOATS.values())
def test_attention_in_one_part(d_head, dtype):
    """Beside the definition of rounded queries, keys and values: a weight that is rounded moves by
    2**-8 of itself; sums of products may truncate, d_head of a score and n_ctx of a mean.
    """
    n_seq, n_ctx = (9, 43) if REHEARSAL else (999, 1203)
    arrays = heads(0, d_head, dtype, n_seq, n_ctx, 8, 2, (2,))
    rounded = widened(*arrays, rounded=True)
    got = to_numpy(attention_in_parts(1, *moved(arrays), mask=causal()))
    want, (largest, size) = ops.attention(*rounded, mask=causal()), sizes(*rounded, mask=causal())
    figure(f"kernel attention_mma, 1 part, {n_ctx} keys", moved(got), want.astype(np.float32))
    sums = (n_ctx + 2 * d_head * (1 + largest)) * 2.0**-22
    assert np.isfinite(got).all() and (abs(got - want) <= (2.0**-8 + sums) * size).all()


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("n_parts", [gemm.PARTS, 1])
@pytest.mark.parametrize("special", OVERFLOWING)
@pytest.mark.parametrize("n", range(3), ids="qkv")
def test_what_is_not_finite_is_left_to_the_other_kernel(n, special, n_parts, monkeypatch):
    """Tiles with a result that is not finite have its bits; the other sequence has the bits that it
    has without the special value.
    """
    n_seq, n_ctx = (20, 35) if REHEARSAL else (150, 170)
    arrays = heads(0, 64, np.float32, n_seq, n_ctx, 2, 2, (2,))
    clean = to_numpy(attention_in_parts(n_parts, *moved(arrays), mask=causal()))
    arrays[n][0, 1, QUERIES + 2, 7] = special
    got = to_numpy(attention_in_parts(n_parts, *moved(arrays), mask=causal()))
    monkeypatch.setattr(launching, "has_tensor_cores", lambda: False)
    want = to_numpy(cuda.attention(*moved(arrays), mask=causal()))
    alike(got, want, times=20 if n_parts == gemm.PARTS else 2.0**12)
    finite = tiles_of(np.isfinite(want).all(axis=-1)[..., None])
    for one, other, fine in zip(tiles_of(got), tiles_of(want), finite, strict=True):
        assert one == other or all(fine)
    assert got[1].tobytes() == clean[1].tobytes() and got[0, 0].tobytes() == clean[0, 0].tobytes()


@given(one_query())
@examples(100)
def test_attention_kernel_of_one_query(call):
    q, k, v, columns, options = call
    same(
        "kernel attend_one",
        cuda.attention(moved(q), moved(k)[..., columns, :], moved(v)[..., columns, :], **options),
        ops.attention(q, k[..., columns, :], v[..., columns, :], **options),
    )


@pytest.mark.parametrize("window", [None, 2047])
@pytest.mark.parametrize(("d_head", "dtype"), VARIANTS)
def test_attention_kernel_of_one_query_over_thousands_of_keys(d_head, dtype, window):
    """Padded on the left; each sequence has the bits that it has alone."""
    n_ctx = 300 if REHEARSAL else 3500
    rng, lengths = np.random.default_rng(0), [n_ctx, n_ctx * 3 // 5, 129, 1]
    q = rng.standard_normal((4, 8, 1, d_head), dtype=np.float32)
    k, v = (
        rng.standard_normal((4, 2, n_ctx, d_head), dtype=np.float32).astype(dtype) for _ in range(2)
    )
    start, mask = (
        np.array([n_ctx - n for n in lengths]),
        causal() if window is None else sliding_window(window),
    )
    there = cuda.attention(*moved((q, k, v)), mask=mask & left_padding(moved(start)))
    same(
        f"kernel attend_one, {n_ctx} keys",
        there,
        ops.attention(q, k, v, mask=mask & left_padding(start)),
    )
    for row, first in enumerate(start):
        alone = cuda.attention(
            *moved((q[row : row + 1], k[row : row + 1, :, first:], v[row : row + 1, :, first:])),
            mask=mask,
        )
        assert to_numpy(alone)[0].tobytes() == to_numpy(there)[row].tobytes()


@given(projected())
@examples(40)
def test_rope_append_kernel(call):
    qkv, cos, sin, n_head, n_kv_head = call
    n_batch, n_seq, width = qkv.shape
    caches = [npllm.cache.KVCache(n_batch, 1, 64) for _ in range(2)]
    same(
        "kernel rope_append",
        on_cuda.rope_attention(
            *moved((qkv, cos, sin)), n_head, n_kv_head, mask=causal(), cache=caches[0]
        ),
        definitions.rope_attention(
            qkv, cos, sin, n_head, n_kv_head, mask=causal(), cache=caches[1]
        ),
    )
    for there, here in zip(
        caches[0].state.layers[0][:2], caches[1].state.layers[0][:2], strict=True
    ):
        same("kernel rope_append, cache", there[:, :, :n_seq, :], here[:, :, :n_seq, :])
    assert width % (n_head + 2 * n_kv_head) == 0


# ----------------------------------------------------------------------------------------------------------------------- the model


def model_pair(set_, dtype=np.float32, **changes):
    here = tiny.model(ops=ops.blockwise, dtype=dtype, **changes)
    return here, npllm.Model(
        here.config, moved(here.params), ops=set_, generation_config=here.generation_config
    )


every_set = pytest.mark.parametrize(
    "set_", [ops.reference, ops.blockwise, cuda.cuda_ops()], ids=lambda set_: set_.name
)
every_kind = pytest.mark.parametrize("kind", ["plain", "window"] if REHEARSAL else KINDS)


@every_set
@every_kind
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16, np.float16])
def test_logits_of_tiny_models(set_, kind, dtype):
    here, there = model_pair(set_, dtype, **KINDS[kind])
    ids, mask = tiny.random_ids(2, 17), np.ones((2, 17), int)
    mask[0, :4] = 0
    same(
        f"tiny models, {set_.name}",
        there(ids, attention_mask=mask),
        here(ids, attention_mask=mask),
        times=20,
    )
    caches = here.new_cache(2), there.new_cache(2)
    for start, stop in ((0, 9), (9, 10), (10, 17)):
        same(
            f"tiny models, {set_.name}",
            there(ids[:, start:stop], cache=caches[1]),
            here(ids[:, start:stop], cache=caches[0]),
            times=20,
        )


@pytest.mark.usefixtures("tensor_cores")
def test_a_prefill_in_three_parts_and_in_one():
    """bfloat16 weights.  Three parts beside float32; one beside products and attention of rounded
    inputs, from which it is half as far at most as these are from float32.
    """
    changes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    longest = {"max_position_embeddings": 512, "original_max_position_embeddings": 512}
    here, there = model_pair(cuda.CUDA, ml_dtypes.bfloat16, **changes | longest)
    ids = tiny.random_ids(1, 70 if REHEARSAL else 300)
    exact = here(ids)
    same("tiny models, prefill", there(ids), exact, times=40)
    got = to_numpy(there.on(choose_ops("cuda", "cupy", "bfloat16"))(ids))
    products = choose_ops("reference", "numpy", "bfloat16")
    rounded = here.on(products.replace(attention=rounded_attention))(ids)
    figure("tiny models, prefill, bfloat16 activations", moved(got), rounded)
    assert rms(got - rounded) < 0.5 * rms(rounded - exact)


@pytest.mark.parametrize("dtype", FLOATS.values())
@pytest.mark.parametrize("kind", ["window"] if REHEARSAL else ENGINE_KINDS)
def test_the_decode_engine(kind, dtype, monkeypatch):
    """Eager, captured and replayed; a row alone has the same bits; queued greedy tokens are those
    of the logits.

    Bits are equal where all products are kernels: float32 weights promise it for 16 rows at most.
    Where longrope changes its frequencies, three rows of 12 tokens are computed anew, 36 at once,
    by the matrix library, whose order of summation depends on their number.
    """
    graphs, captured = [], decode_graph.captured
    monkeypatch.setattr(decode_graph, "captured", lambda run: graphs.append(1) or captured(run))
    here, there = model_pair(cuda.CUDA, dtype, **{"hidden_size": 128} | ENGINE_KINDS[kind])
    ids = tiny.random_ids(3, 9 if REHEARSAL else 40)
    want, (got, _) = fed(here, ids, 5)[0], fed(there, ids, 5)
    same("decode engine", moved(got), want, times=20)
    assert graphs
    alone = fed(there, ids[1:2], 5)[0]
    close(alone, got[1:2], times=20)
    recomputed = "rope_scaling" in ENGINE_KINDS[kind]
    if not (recomputed and dtype == np.float32):
        assert alone.tobytes() == got[1:2].tobytes()
    caches = [there.new_cache(3) for _ in range(2)]
    for cache in caches:
        there.last_logits(ids[:, :5], np.ones((3, 5), bool), cache)
    queued = there.greedy_ids(ids[:, 5:6], np.ones((3, 6), bool), caches[0], 6)
    one = ids[:, 5:6]
    for n in range(6):
        logits = to_numpy(there.last_logits(one, np.ones((3, 6 + n), bool), caches[1]))
        one = logits[:, 0].argmax(axis=-1)[:, None]
        assert (queued[:, n : n + 1] == one).all()


@every_set
@every_kind
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
        {"repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_the_same_seed_gives_the_same_text(set_, kind, options):
    here, there = model_pair(set_, **KINDS[kind])
    ids, mask, n_new = tiny.random_ids(3, 9), np.ones((3, 9), int), 4 if REHEARSAL else 10
    mask[1, :3] = 0
    for prompt in (ids, moved(ids)):
        close(
            there.generate(prompt, attention_mask=mask, max_new_tokens=n_new, seed=5, **options),
            here.generate(ids, attention_mask=mask, max_new_tokens=n_new, seed=5, **options),
        )


@pytest.mark.parametrize("head", ["Sequence", "Token"])
def test_classifiers(head, tmp_path):
    folder = tiny.write_folder(
        tmp_path, architectures=[f"Phi3For{head}Classification"], num_labels=3, pad_token_id=0
    )
    there, here = (npllm.load(folder, backend=backend) for backend in ("cupy", "numpy"))
    ids = tiny.random_ids(3, 6)
    same("tiny classifiers", there(ids), here(ids), times=20)


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float64"])
def test_weights_arrive_unchanged(default_folder, dtype):
    there, here = (
        npllm.load(default_folder, backend=backend, dtype=dtype).params
        for backend in ("cupy", "numpy")
    )
    for name in ("embed_tokens", "norm"):
        close(to_numpy(getattr(there, name)), np.asarray(getattr(here, name)), times=0)
    for one, other in zip(there.layers, here.layers, strict=True):
        close(to_numpy(one.gate_up_proj), np.asarray(other.gate_up_proj), times=0)


@every_set
def test_logits_of_the_default_model(default_folder, set_):
    """float32 weights: within 1e-3 of NumPy's.  bfloat16 weights: within 1.5 times the error of
    NumPy, which rounds nowhere else either.
    """
    exact = npllm.load(default_folder, dtype="float64")
    ids = np.array([exact.tokenizer.encode(TEXT)])
    exact = exact(ids)
    for dtype in ("float32", "bfloat16"):
        here = npllm.load(default_folder, dtype=dtype)(ids)
        there = to_numpy(npllm.load(default_folder, backend="cupy", dtype=dtype, ops=set_)(ids))
        figure(f"default model, {dtype}, {set_.name}, beside NumPy", there, here)
        numpy_error, error = (float(np.abs(x - exact).max()) for x in (here, there))
        FIGURES[f"default model, {dtype}, {set_.name}, |logit - float64|"] = {
            "cupy": error,
            "numpy": numpy_error,
        }
        assert np.abs(there - here).max() < 1e-3
        if dtype == "bfloat16":
            assert error <= 1.5 * numpy_error
        best = np.sort(here[0], axis=-1)
        clear = best[:, -1] - best[:, -2] > 2 * np.abs(there - here).max()
        assert (there[0].argmax(axis=-1) == here[0].argmax(axis=-1))[clear].all()


@every_set
def test_greedy_text_of_the_default_model(default_folder, set_):
    """Equal up to the first token whose margin is within the error."""
    here, there = npllm.load(default_folder), npllm.load(default_folder, backend="cupy", ops=set_)
    ids = np.array([here.tokenizer.encode("The capital of France is")])
    want, got = (model.generate(ids, max_new_tokens=40) for model in (here, there))
    if np.array_equal(want, got):
        return
    assert want.shape == got.shape
    first = int(np.flatnonzero(want[0] != got[0])[0])
    logits = np.sort(here(want[:, :first], logits_to_keep=1)[0, -1])
    assert logits[-1] - logits[-2] < 2e-3, f"token {first} differs, and it was no near tie"


@pytest.mark.filterwarnings("ignore")
def test_a_decode_step_waits_once(default_folder):
    """As on the stand-in: nothing between the ids and the logits waits for the device.  (CuPy's own
    detector; deprecated, so optional.)
    """
    import cupyx

    if not hasattr(cupyx, "allow_synchronize"):
        pytest.skip("this CuPy has no detector of synchronisation")
    model = npllm.load(default_folder, backend="cupy", ops=cuda.cuda_ops())
    cache = model.new_cache()
    for n_seq in (5, 1, 1):  # the first calls compile
        model(tiny.random_ids(1, n_seq), cache=cache)
    with cupyx.allow_synchronize(False):
        model(tiny.random_ids(1, 1), cache=cache, logits_to_keep=1)


@pytest.mark.skipif(REHEARSAL, reason="asks CuPy itself, and this is a rehearsal without it")
def test_the_stand_in_is_as_strict_as_cupy():
    """What tests/guard.py says of CuPy, asked of CuPy itself."""
    import cupy

    x = cupy.asarray([10.0, 11.0, 12.0], dtype=cupy.float32)
    with pytest.raises(TypeError):
        np.asarray(x)
    with pytest.raises(TypeError):
        x + np.ones(3, np.float32)
    with pytest.raises(TypeError):
        cupy.add(x, [1.0, 2.0, 3.0])
    assert cupy.sum(x).shape == () and type(cupy.sum(x)).__module__ == "cupy"
    assert cupy.take(x, cupy.asarray([3, -4, 7]), axis=0).get().tolist() == [10, 12, 11]
    half = cupy.asarray(np.ones((1, 4096), ml_dtypes.bfloat16))
    assert float((half @ half.T).get().astype(np.float32)[0, 0]) == 4096
    assert set(guard.FUNCTIONS) <= set(dir(cupy))
