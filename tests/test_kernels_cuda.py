"""The CUDA kernels without a GPU: they compile for four architectures, and the same text, run on
the CPU, agrees with the definitions.

NPLLM_REQUIRE_CUDA_BUILD=1 makes a missing compiler (NVRTC for the first, g++ for the second) a
failure instead of a skip.
"""

import inspect
import os
import re
import shutil
import struct

import ml_dtypes
import numpy as np
import pytest
import tiny
from close import close
from composed import Composed, definitions
from guard import moved
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_shim import needs_gxx, ran
from seeds import draws
from strategies import normal, seeds

import npllm
from npllm import ops
from npllm.kernels import cuda
from npllm.kernels.cuda import launching
from npllm.ops.mask import Rule, bidirectional, causal, lookback, padding, sliding_window

pytestmark = pytest.mark.usefixtures("on_the_stand_in")

on_cuda = Composed(cuda.CUDA)
REQUIRED = os.environ.get("NPLLM_REQUIRE_CUDA_BUILD") == "1"
ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100")
BUILT = [  # tensor cores take bfloat16 from sm_80 on
    (kernel, architecture)
    for kernel in cuda.VARIANTS
    for architecture in ARCHITECTURES
    if architecture != "sm_75" or "mma" not in launching.INCLUDED.get(kernel, ())
]
if REQUIRED:
    from cupy_backends.cuda.libs import nvrtc

    nvrtc.getVersion()
    assert shutil.which("g++"), "NPLLM_REQUIRE_CUDA_BUILD=1 needs g++"
else:
    try:
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
    except (ImportError, RuntimeError) as error:  # RuntimeError: CuPy is there, its compiler is not
        nvrtc, why = None, str(error)

needs_nvrtc = pytest.mark.skipif(
    nvrtc is None,
    reason='compiles CUDA sources, and NVRTC is not installed: pip install -e ".[test-cuda]"',
)
FLOATS = {"float": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16}
# g++ takes a second for each variant of a kernel: by default one 16-bit type and one width are left out
stored = st.sampled_from(list(FLOATS.values())[: draws(2, 3)])
widths = st.sampled_from(cuda.HEADS[: draws(2, 3)])


# ----------------------------------------------------------------------------------------------------------------------- compiling

OF_CUPY = (
    "-ftz=true",
    "--device-as-default-execution-space",
)  # what CuPy adds to every compilation, beside -arch and -I of its headers


@needs_nvrtc
def test_the_options_are_those_of_cupy(monkeypatch):
    """CuPy's own way from a source to the compiler, stopped there: it adds -ftz=true, and nothing
    that these tests do not know.
    """
    from cupy.cuda import compiler

    class Stop(Exception):
        pass

    class Program:
        def __init__(self, source, *_, **__):
            self.source = source

        def compile(self, options=(), log_stream=None):  # noqa: ARG002
            if not self.source:  # asks for the version of the compiler
                return b"", {}
            seen.extend(options)
            raise Stop

    seen = []
    monkeypatch.setattr(compiler, "_NVRTCProgram", Program)
    monkeypatch.setattr(
        compiler, "_kernel_cache_backend", type("Cache", (), {"load": lambda *_: None})()
    )
    monkeypatch.setattr(
        compiler, "_get_arch_for_options_for_nvrtc", lambda arch=None: (f"-arch=sm_{arch}", "cubin")
    )
    monkeypatch.setattr(compiler, "_empty_file_preprocess_cache", {})
    for variable in ("CUPY_CUDA_COMPILE_WITH_DEBUG", "CUPY_NVRTC_USE_PCH"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(Stop):
        compiler._compile_module_with_cache(cuda.source("swiglu"), cuda.OPTIONS, arch="80")
    assert sorted(seen) == sorted((*cuda.OPTIONS, *OF_CUPY, "-arch=sm_80"))


def report(kernel, definitions, architecture, text=None):
    """Compile one variant; return the compiler's lines on registers and spills."""
    options = [
        *cuda.OPTIONS,
        *(f"-D{name}={value}" for name, value in definitions),
        *OF_CUPY,
        f"-arch={architecture}",
        "--ptxas-options=-v",
    ]
    program = nvrtc.createProgram(text or cuda.source(kernel), f"{kernel}.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        assert len(nvrtc.getCUBIN(program)) > 0
        return nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)


def common(definitions):
    """Whether a variant is for a width of heads that the known models have, or for all; of the
    block formats one stands for the others.
    """
    named = dict(definitions)
    rare = named.get("ENTRY") in cuda.BLOCKS and (named["ENTRY"], named.get("ROWS", 1)) != (
        "Q4_K",
        1,
    )
    return named.get("HEAD", 64) in cuda.HEADS and not rare


def build(kernel, architecture, variants, record_property):
    """Compile variants; see that none spills and that shared memory is enough."""
    version = ".".join(map(str, nvrtc.getVersion()))
    for variant in variants:
        log = report(kernel, variant, architecture)
        stack, stores, loads = map(
            int,
            re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
            ).groups(),
        )
        registers = int(re.search(r"Used (\d+) registers", log)[1])
        shared = int((re.search(r"(\d+) bytes smem", log) or "00")[1])
        line = (
            f"NVRTC {version} {architecture} {kernel} {dict(variant)}: {registers} registers, {shared} bytes shared, {stack} stack, "
            f"{stores} spill stores, {loads} spill loads"
        )
        print(line)
        record_property(f"{kernel} {dict(variant)} {architecture}", line)
        assert (stack, stores, loads) == (0, 0, 0), line
        assert shared <= 48 * 1024, line


@needs_nvrtc
@pytest.mark.parametrize(("kernel", "architecture"), BUILT)
def test_every_variant_compiles_without_spills(kernel, architecture, record_property):
    """The report (registers, shared memory) is a property of the test: `pytest --junitxml` keeps
    it, `-s` prints it.
    """
    build(kernel, architecture, filter(common, cuda.VARIANTS[kernel]), record_property)


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "architecture"),
    [one for one in BUILT if not all(map(common, cuda.VARIANTS[one[0]]))],
)
def test_every_other_variant_compiles_without_spills(kernel, architecture, record_property):
    build(
        kernel,
        architecture,
        [one for one in cuda.VARIANTS[kernel] if not common(one)],
        record_property,
    )


def instructions(kernel, definitions, architecture, text=None):
    """The operation codes of a compiled kernel, in order: the low 12 bits of 16 bytes each."""
    options = [*cuda.OPTIONS, *(f"-D{n}={v}" for n, v in definitions), *OF_CUPY]
    program = nvrtc.createProgram(text or cuda.source(kernel), f"{kernel}.cu", (), ())
    try:
        nvrtc.compileProgram(program, [*options, f"-arch={architecture}"])
        binary = nvrtc.getCUBIN(program)
    finally:
        nvrtc.destroyProgram(program)
    (at,), (size, n, names) = (
        struct.unpack_from(f, binary, p) for f, p in (("<Q", 40), ("<HHH", 58))
    )
    sections = [struct.unpack_from("<IIQQQQ", binary, at + i * size) for i in range(n)]
    for name, _, _, _, start, n_bytes in sections:
        where = sections[names][4] + name
        if binary[where : where + 200].split(b"\0")[0] == f".text.{kernel}".encode():
            words = struct.iter_unpack("<QQ", binary[start : start + n_bytes])
            return [low & 0xFFF for low, _ in words]
    raise AssertionError(f"no code of {kernel}")


LOAD_GLOBAL, FMA = 0x981, 0x223


def loads_in_flight(codes):
    """The most global loads in a row with no multiplication and at most three other operations
    between two of them: those that are issued before the first of them is waited for.
    """
    text = "".join({LOAD_GLOBAL: "L", FMA: "F"}.get(code, ".") for code in codes)
    return max((run.count("L") for run in re.findall(r"L(?:\.{0,3}L)*", text)), default=0)


@needs_nvrtc
@pytest.mark.parametrize(
    "architecture",
    ["sm_90", *(pytest.param(a, marks=pytest.mark.slow) for a in ("sm_80", "sm_100"))],
)
@pytest.mark.parametrize("rows", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4, 8))])
def test_a_product_has_eight_loads_of_16_bytes_in_flight(rows, architecture):
    assert (
        loads_in_flight(instructions("linear", (("ENTRY", "bf16"), ("ROWS", rows)), architecture))
        >= 8
    )


def loads_before_a_multiplication(codes):
    """For each stretch of code without a multiplication: its global loads."""
    text = "".join({LOAD_GLOBAL: "L", FMA: "F"}.get(code, ".") for code in codes)
    return [run.count("L") for run in re.findall(r"[L.]+", text)]


@needs_nvrtc
@pytest.mark.parametrize("rows", [1, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "n_loads"),
    [("Q4_K", 2), *(pytest.param(*x, marks=pytest.mark.slow) for x in (("Q4_0", 5), ("Q6_K", 14)))],
)
def test_a_product_of_blocks_has_four_units_in_flight(name, n_loads, rows):
    """The loads of all of them come before the first product: at the start, and in the loop."""
    codes = instructions("linear_blocks", (("ENTRY", name), ("ROWS", rows)), "sm_90")
    found = sorted(loads_before_a_multiplication(codes))
    assert found.count(4 * n_loads) >= 1 and found[-1] > 4 * n_loads, found


@needs_nvrtc
@pytest.mark.slow
def test_a_product_that_waits_for_each_load_is_seen():
    text = cuda.source("linear").replace("STEPS = 8 / OUTS", "STEPS = 1")
    assert (
        loads_in_flight(instructions("linear", (("ENTRY", "bf16"), ("ROWS", 1)), "sm_90", text)) < 8
    )


@needs_nvrtc
def test_a_kernel_that_spills_is_seen():
    """The report is no formality: with too few registers the largest kernel does not fit."""
    text = cuda.source("attention").replace(
        "__launch_bounds__(WARPS * 32)", "__launch_bounds__(1024, 2)"
    )
    log = report("attention", (("HEAD", 128), ("ENTRY", "float")), "sm_80", text)
    assert int(re.search(r"(\d+) bytes spill stores", log)[1]) > 0


def test_sources_are_part_of_the_package():
    for kernel in cuda.VARIANTS:
        assert re.search(
            rf'extern "C" __global__ void\s+(__launch_bounds__\(.*\))?\s*{kernel}\(',
            cuda.source(kernel),
        )


TWINS = ["linear", "rms_norm", "swiglu", "attention"]
KERNELS = [*TWINS, "rope_attention", "norm_linear", "norm_swiglu", "linear_add"]


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_has_the_signature_of_its_definition(name):
    ours, theirs = (
        inspect.signature(getattr(module, name)).parameters.values() for module in (cuda, ops)
    )
    assert [(p.name, p.kind, p.default) for p in ours] == [
        (p.name, p.kind, p.default) for p in theirs
    ]
    assert getattr(cuda.cuda_ops(), name) is getattr(cuda, name)


# --------------------------------------------------------------------------------------------------------- against the definitions


@needs_gxx
@given(st.data(), st.lists(st.integers(1, 4), max_size=2), st.integers(1, 700), stored)
@settings(max_examples=30)
def test_rms_norm(data, lead, d_model, dtype):
    x, weight = data.draw(normal((*lead, d_model), scale=3)), data.draw(normal((d_model,), dtype))
    close(
        ran(lambda: cuda.rms_norm(*moved((x, weight)), 1e-5), "rms_norm"),
        moved(ops.rms_norm(x, weight, 1e-5)),
        times=2,
    )


@needs_gxx
@given(st.data(), st.lists(st.integers(1, 3), max_size=2), st.integers(1, 300), st.booleans())
@settings(max_examples=30)
def test_swiglu(data, lead, d_ff, halves):
    both = data.draw(normal((*lead, 2 * d_ff), scale=30))
    there = moved(both)
    gate, up = (
        (there[..., :d_ff], there[..., d_ff:])
        if halves
        else moved((both[..., :d_ff].copy(), both[..., d_ff:].copy()))
    )
    close(
        ran(lambda: cuda.swiglu(gate, up), "swiglu"),
        moved(ops.swiglu(both[..., :d_ff], both[..., d_ff:])),
    )


def bands(n_ctx):
    """Masks that the kernel evaluates by itself, windows around the length of the keys among them."""
    return st.sampled_from([None, causal(), bidirectional(), causal() & lookback(3)]) | st.integers(
        1, n_ctx + 2
    ).map(sliding_window)


@st.composite
def long_calls(draw):
    """Attention of sizes around the tiles of the kernel (16 queries, 32 keys): q, k, v, options."""
    d_head, group, n_kv_head = (
        draw(widths),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
    )
    n_seq, extra = (
        draw(st.sampled_from([2, 3, 15, 16, 17, 31, 33])),
        draw(st.sampled_from([0, 1, 14, 15, 16, 31, 32, 40])),
    )
    n_ctx = draw(st.sampled_from([1, 2, 31, 32, 33, n_seq, n_seq + extra]))
    lead = draw(st.sampled_from([(), (1,), (2,)]))
    rng, dtype = np.random.default_rng(draw(seeds)), draw(stored)
    q = rng.standard_normal((*lead, group * n_kv_head, n_seq, d_head), dtype=np.float32)
    k, v = (
        rng.standard_normal((*lead, n_kv_head, n_ctx, d_head), dtype=np.float32).astype(dtype)
        for _ in range(2)
    )
    options = {"mask": draw(bands(n_ctx))}
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.02, 1.0]))
    if draw(st.booleans()):
        start = draw(st.integers(-5, 50))
        options |= {
            "q_slots": range(start, start + n_seq),
            "k_slots": range(draw(st.integers(0, 9)), 99)[:n_ctx],
        }
    return q, k, v, options


@needs_gxx
@given(long_calls())
@settings(max_examples=40)
def test_attention(call):
    q, k, v, options = call
    close(
        ran(lambda: cuda.attention(*moved((q, k, v)), **options), "attention"),
        moved(ops.attention(q, k, v, **options)),
        times=4,
    )


@needs_gxx
def test_attention_on_views_of_a_cache():
    """Keys and values as the cache gives them, columns of a longer array."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 4, 5, 96), dtype=np.float32)
    k, v = (rng.standard_normal((2, 2, 64, 96), dtype=np.float32) for _ in range(2))
    views = [moved(x)[:, :, 3:40, :] for x in (k, v)]
    want = ops.attention(q, k[:, :, 3:40], v[:, :, 3:40], mask=causal())
    close(
        ran(lambda: cuda.attention(moved(q), *views, mask=causal()), "attention"),
        moved(want),
        times=4,
    )


@needs_gxx
def test_scores_that_would_overflow_and_scores_far_apart():
    q = np.full((1, 2, 64), 30.0, np.float32)
    k = np.stack([np.full(64, 30.0), np.full(64, -30.0), np.full(64, 29.0)]).astype(np.float32)[
        None
    ]
    v = np.random.default_rng(0).standard_normal((1, 3, 64), dtype=np.float32)
    close(cuda.attention(*moved((q, k, v))), moved(ops.attention(q, k, v)), times=4)


@st.composite
def projected(draw):
    """Projected rows, tables, and the numbers of heads."""
    n_batch, n_seq, n_kv_head, d_head = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 18)),
        draw(st.integers(1, 2)),
        draw(st.sampled_from([2, 6, 64])),
    )
    n_head, d_rope = n_kv_head * draw(st.integers(1, 3)), 2 * draw(st.integers(1, d_head // 2))
    rng = np.random.default_rng(draw(seeds))
    qkv = rng.standard_normal((n_batch, n_seq, (n_head + 2 * n_kv_head) * d_head), dtype=np.float32)
    lead = draw(st.sampled_from([(), (n_batch,), (1,)]))
    cos, sin = (rng.standard_normal((*lead, n_seq, d_rope), dtype=np.float32) for _ in range(2))
    return qkv, cos, sin, n_head, n_kv_head


@needs_gxx
@given(projected(), st.booleans(), st.integers(0, 3), st.sampled_from([None, 3, 40]))
@settings(max_examples=40)
def test_rope_attention_with_and_without_a_cache(call, cached, n_before, window):
    """Keys and values stand in the cache as the definition would have put them, also behind earlier
    ones.
    """
    qkv, cos, sin, n_head, n_kv_head = call
    n_batch, n_seq, _ = qkv.shape
    d_head = qkv.shape[-1] // (n_head + 2 * n_kv_head)
    options = {"mask": causal() if window is None else sliding_window(window)}
    caches = [npllm.cache.KVCache(n_batch, 1, 64, window) if cached else None for _ in range(2)]
    for cache, move in zip(caches, (moved, lambda x: x), strict=True):
        for _ in range(n_before if cached else 0):
            old = np.random.default_rng(7).standard_normal(
                (2, n_batch, n_kv_head, 1, d_head), dtype=np.float32
            )
            cache.append(0, *(move(x) for x in old))
            cache.advance(
                *np.zeros((2, n_batch, 1), np.int64),
                np.ones((n_batch, cache.n_ctx + 1), bool),
                np.zeros(n_batch),
            )
    kernels = (
        ("rope_append", "attention" if n_seq > 1 else "attend_one")
        if d_head in cuda.HEADS
        else ("rope_append",)
    )
    got = ran(
        lambda: on_cuda.rope_attention(
            *moved((qkv, cos, sin)), n_head, n_kv_head, cache=caches[0], **options
        ),
        *kernels,
    )
    close(
        got,
        moved(
            definitions.rope_attention(qkv, cos, sin, n_head, n_kv_head, cache=caches[1], **options)
        ),
        times=8,
    )
    if cached:
        (keys, values, first), (other_keys, other_values, other_first) = (
            cache.state.layers[0] for cache in caches
        )
        used = slice(0, caches[1].n_ctx + n_seq - first)
        assert first == other_first
        close(keys[:, :, used, :], moved(other_keys[:, :, used, :]), times=1)
        close(values[:, :, used, :], moved(other_values[:, :, used, :]), times=0)


# --------------------------------------------------------------------------------------- what no kernel takes goes to the definition


@needs_gxx
@pytest.mark.parametrize(
    "call",
    [
        lambda x: (cuda.rms_norm(x, x[0], 1e-5), ops.rms_norm(x, x[0], 1e-5)),
        lambda x: (cuda.swiglu(x, x), ops.swiglu(x, x)),
        lambda x: (
            cuda.attention(x[None], x[None], x[None]),
            ops.attention(x[None], x[None], x[None]),
        ),
        lambda x: (
            on_cuda.rope_attention(x[None], x[:, :8], x[:, :8], 2, 1),
            definitions.rope_attention(x[None], x[:, :8], x[:, :8], 2, 1),
        ),
    ],
)
def test_float64_takes_the_definition(call):
    x = moved(np.random.default_rng(0).standard_normal((5, 64)))
    one, other = ran(lambda: call(x))
    close(one, other, times=8)


@needs_gxx
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 3.0},
        {"bias": np.zeros((4, 4), np.float32)},
        {"return_lse": True},
        {"mask": causal() | sliding_window(2)},
        {"mask": ~causal()},
        {"mask": np.tri(4, dtype=bool)},
        {"mask": Rule(lambda i, j: j <= i)},
        {"mask": padding},
        {"q_slots": np.arange(4)},
        {"k_slots": range(8)[::2], "q_slots": range(4)},
    ],
    ids=lambda options: str(list(options)),
)
def test_options_that_the_kernel_does_not_know_take_the_definition(options):
    q = np.random.default_rng(0).standard_normal((1, 2, 4, 64), dtype=np.float32)
    if options.get("mask") is padding:
        options = {
            "mask": causal() & padding(moved(np.ones((1, 4), bool)))
        }  # anywhere, as far as the rule says
    got = ran(lambda: cuda.attention(*moved((q, q, q)), **moved(options)))
    want = ops.blockwise_attention(*moved((q, q, q)), **moved(options))
    for one, other in zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]:
        close(one, other, times=0)


@needs_gxx
@pytest.mark.parametrize(
    ("n_seq", "d_head", "d_value"),
    [(1, 48, 48), (1, 288, 288), (1, 64, 32), (4, 48, 48), (4, 64, 32), (0, 64, 64)],
)
def test_sizes_that_the_kernel_does_not_know_take_the_definition(n_seq, d_head, d_value):
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal((2, *shape), dtype=np.float32)
        for shape in ((n_seq, d_head), (4, d_head), (4, d_value))
    )
    close(ran(lambda: cuda.attention(*moved((q, k, v)))), moved(ops.attention(q, k, v)))


@pytest.mark.parametrize("name", KERNELS)
def test_arguments_that_do_not_fit_raise_as_in_the_definition(name):
    x, w = np.zeros((1, 3, 64), np.float32), np.zeros((2, 64), ml_dtypes.bfloat16)
    calls = {
        "linear": (x, w, x[0, 0, :5]),
        "rms_norm": (x, x[0, 0, :5], 1e-5),
        "swiglu": (x, x[:, :2]),
        "attention": (x, x[:, :, :9], x[:, :, :9]),
        "rope_attention": (x, x[0, :, :3], x[0, :, :3], 2, 1),
        "norm_linear": (x, x[0, 0, :5], 1e-5, w),
        "norm_swiglu": (x, x[0, 0], 1e-5, w[:, :8]),
        "linear_add": (x, w, x),
    }
    with pytest.raises(npllm.NpllmError) as wanted:
        getattr(definitions, name)(*moved(calls[name]))
    with pytest.raises(npllm.NpllmError) as got:
        getattr(on_cuda, name)(*moved(calls[name]))
    assert str(got.value) == str(wanted.value)


# ------------------------------------------------------------------------------------------------------------------ the whole model


@needs_gxx
@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 5},
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in ({}, {"num_key_value_heads": 1}, {"partial_rotary_factor": 0.5})
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "dtype", [pytest.param(np.float32, marks=pytest.mark.slow), ml_dtypes.bfloat16]
)
def test_a_model_runs_on_the_kernels(changes, dtype):
    """Heads of 64 channels; prefill, decode, padding; the same text."""
    base = tiny.model(hidden_size=256, dtype=dtype, ops=ops.reference, **changes)
    model = npllm.Model(base.config, moved(base.params), ops=cuda.cuda_ops())
    ids = tiny.random_ids(2, 19)  # 38 rows: more than the kernel takes of a float32 weight
    half = ["linear"] if dtype != np.float32 else ["rms_norm"]
    layer = (
        ["linear", "rope_append", "attention", *["linear"] * 3]
        if dtype != np.float32
        else ["rms_norm", "rope_append", "attention", "rms_norm", "swiglu"]
    )
    close(
        ran(lambda: model(ids), *layer * 2, "rms_norm", *half[: dtype != np.float32]),
        moved(base(ids)),
        times=20,
    )
    layer = ["linear", "rope_append", "attend_one", "linear", "linear", "linear"]
    close(
        ran(lambda: model(ids[:, :1]), *layer * 2, "rms_norm", "linear"),
        moved(base(ids[:, :1])),
        times=20,
    )
    few = ids[:, :7]  # each row of a prefill costs the stand-in time
    mask = np.ones(few.shape, int)
    mask[0, :4] = 0
    for options in ({}, {"temperature": 0.9, "seed": 3}):
        close(
            model.generate(few, attention_mask=mask, max_new_tokens=4, **options),
            base.generate(few, attention_mask=mask, max_new_tokens=4, **options),
        )


@needs_gxx
def test_a_replaced_part_is_the_one_that_runs():
    base, calls = tiny.model(hidden_size=256), []

    def attention(*args, **options):
        calls.append(1)
        return ops.blockwise_attention(*args, **options)

    model = npllm.Model(
        base.config, moved(base.params), ops=cuda.cuda_ops().replace(attention=attention)
    )
    model(tiny.random_ids(1, 3))
    assert len(calls) == base.config.num_hidden_layers
