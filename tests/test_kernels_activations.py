"""Compiled products of rounded activations: against their definitions, in every form."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from blocks import FORMAT_NAMES, random_weight
from close import close
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import model, random_ids

import npllm
from npllm import kernels, ops
from npllm.arrays import widen
from npllm.errors import NpllmRuntimeError
from npllm.models.params import LayerParams
from npllm.ops import Step
from npllm.quantized.activations import round_activations, rounded_values
from npllm.quantized.int8 import Int8Weight, quantize
from npllm.quantized.stacked import StackedWeight

if kernels.compiled_ops() is None:
    pytest.skip("the compiled kernels need Numba", allow_module_level=True)
from npllm.kernels.cpu import dot_products
from npllm.kernels.cpu.dot_products import forced_form, has_instruction, has_tiles

INTEGERS = ("int8", "int16")
FORMATS = ("int8", "int8_float32", *FORMAT_NAMES)
# By default: a scale, a scale and a minimum, scales in blocks of 256; each pair compiles its kernels
COMPILED = [
    ("int8", "int8"),
    ("int8_float32", "int8"),
    ("Q4_0", "int16"),
    ("Q4_1", "int8"),
    ("Q6_K", "int16"),
    ("Q4_K", "int8"),
]


def forms(kind):
    """The forms that this processor has."""
    feature = "bfloat16" if kind == "bfloat16" else "int8"
    found = ["plain"] + ["instruction"] * has_instruction(feature) + ["tiles"] * has_tiles(feature)
    return found + ["float32"] * (kind == "bfloat16")


def rows(n, d, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def weight_of(name, d_out, d_in, seed=0):
    if name == "bfloat16":
        return rows(d_out, d_in, seed).astype(ml_dtypes.bfloat16)
    if name.startswith("int8"):
        weight = quantize(rows(d_out, d_in, seed))
        kind = np.float32 if name == "int8_float32" else np.float16
        return Int8Weight(weight.values, weight.scales.astype(kind))
    return random_weight(name, d_out, d_in, seed)


def rounded_set(kind):
    return kernels.choose_ops("fast", activations=kind)


def exact(x, weight, kind):
    """The product of rounded rows in float64."""
    values = rounded_values(x, kind, getattr(weight, "activation_group", 1))
    return values.astype(np.float64) @ widen(weight, np.float32).astype(np.float64).T


def test_the_forms_that_run_here_are_printed(capsys):
    with capsys.disabled():
        chosen = {kind: dot_products.form_of(kind) for kind in (*INTEGERS, "bfloat16")}
        print(f"\nproducts of rounded activations: {chosen}; tested: {forms('bfloat16')}")
    assert chosen["int8"] in forms("int8") and chosen["bfloat16"] in forms("bfloat16")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[pytest.mark.slow] * ((name, kind) not in COMPILED))
        for name in FORMATS
        for kind in INTEGERS
    ],
)
def test_every_format_in_every_form_is_the_exact_product_of_what_is_rounded(name, kind):
    x, weight = rows(70, 512), weight_of(name, 101, 512)
    found = {}
    for form in forms(kind):
        with forced_form(form):
            found[form] = rounded_set(kind).linear(x, weight)
        close(found[form], exact(x, weight, kind), dtype="float32")
    assert all((y == found["plain"]).all() for y in found.values())  # integer sums are exact
    assert np.abs(found["plain"] - ops.linear(x, weight)).max() > 0


@pytest.mark.parametrize(("name", "kind"), [*COMPILED, ("bfloat16", "bfloat16")])
def test_a_row_has_the_same_bits_in_a_panel_of_any_width(name, kind):
    x, weight = rows(132, 512), weight_of(name, 101, 512)
    for form in forms(kind):
        with forced_form(form):
            linear = rounded_set(kind).linear
            gold = linear(x, weight)
            assert all((linear(x[:n], weight) == gold[:n]).all() for n in (20, 40, 72, 100))


BEYOND = """
import ctypes, mmap
import ml_dtypes, numpy as np
from npllm import kernels
from npllm.kernels.cpu.dot_products import forced_form, has_instruction
libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
linear = kernels.choose_ops("fast", activations="bfloat16").linear
memory = mmap.mmap(-1, 10 * page)
raw = np.frombuffer(memory, np.uint8)
for at in (0, 9):
    assert libc.mprotect(ctypes.c_void_p(raw.ctypes.data + at * page), page, 0) == 0
for d_out in (1, 5, 7, 97):
    for d_in in (64, 128):
        size = 2 * d_out * d_in
        for start in (page, 9 * page - size):
            weight = raw[start : start + size].view(ml_dtypes.bfloat16).reshape(d_out, d_in)
            weight[...] = 1
            for form in ("plain", *["instruction"] * has_instruction("bfloat16")):
                with forced_form(form):
                    assert (linear(np.ones((20, d_in), np.float32), weight) == d_in).all()
print("read what it may")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is protected by a call of Linux")
def test_no_byte_beside_a_weight_in_bfloat16_is_read():
    """The pages before and behind it cannot be read: the process would end."""
    run = subprocess.run(
        [sys.executable, "-c", BEYOND], capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == "read what it may", run.stderr[-2000:]


def test_the_type_of_the_scales_changes_no_bit():
    x, linear = rows(70, 1600), rounded_set("int8").linear  # several runs of channels
    close(
        linear(x, weight_of("int8", 101, 1600)),
        linear(x, weight_of("int8_float32", 101, 1600)),
        times=0,
    )


def test_bfloat16_in_every_form_is_the_product_of_what_is_rounded():
    x, weight = rows(70, 576), weight_of("bfloat16", 101, 576)
    found = {}
    for form in forms("bfloat16"):
        with forced_form(form):
            found[form] = rounded_set("bfloat16").linear(x, weight)
        close(found[form], exact(x, weight, "bfloat16"), dtype="float32")
    if "instruction" in found:
        assert (found["instruction"] == found["plain"]).all()  # one order of sums


@pytest.mark.slow
@settings(deadline=None)
@given(
    n=st.integers(17, 140),
    d_out=st.integers(1, 200),
    n_unit=st.integers(1, 5),
    name=st.sampled_from((*FORMATS, "bfloat16")),
    kind=st.sampled_from(INTEGERS),
    seed=st.integers(0, 99),
)
def test_any_shape(n, d_out, n_unit, name, kind, seed):
    kind = "bfloat16" if name == "bfloat16" else kind
    d_in = n_unit * (256 if name.endswith("_K") else 64)
    x, weight = rows(n, d_in, seed), weight_of(name, d_out, d_in, seed)
    close(rounded_set(kind).linear(x, weight), exact(x, weight, kind), dtype="float32", times=2)


@pytest.mark.parametrize("kind", INTEGERS)
def test_the_largest_codes_neither_saturate_nor_overflow(kind):
    x = np.ones((20, 128), np.float32)
    x[::2, 1::2] = -1
    for value in (127, -127, -128):
        weight = Int8Weight(np.full((7, 128), value, np.int8), np.ones((7, 2), np.float32))
        for form in forms(kind):
            with forced_form(form):
                y = rounded_set(kind).linear(x, weight)
            gold = x.astype(np.float64) @ np.full((128, 7), float(value))
            close(y, gold + 0 * y, dtype="float32")


@pytest.mark.parametrize("kind", INTEGERS)
def test_codes_are_those_of_the_definition(kind):
    """A weight that picks single channels gives each code back."""
    x = rows(20, 128, 3) * np.exp(rows(20, 128, 4))
    weight = Int8Weight(np.eye(128, dtype=np.int8), np.ones((128, 2), np.float32))
    codes, scales = round_activations(x, kind, 64)
    close(
        rounded_set(kind).linear(x, weight),
        np.repeat(scales, 64, axis=1) * codes.astype(np.float32),
        times=0,
    )


@pytest.mark.parametrize("kind", INTEGERS)
def test_small_groups_are_zero_and_those_with_nan_or_infinity_are_nan(kind):
    x = rows(20, 128)
    x[0, :64], x[0, 64:] = 2.0**-101, 0
    x[1, 5], x[2, 70], x[3, 0] = np.nan, np.inf, -np.inf
    y = rounded_set(kind).linear(x, weight_of("int8", 9, 128))
    assert (y[0] == 0).all() and np.isnan(y[1:4]).all() and np.isfinite(y[4:]).all()


def test_bfloat16_keeps_nan_and_infinity():
    x = rows(20, 64)
    x[1, 5], x[2, 7] = np.nan, np.inf
    x.view(np.uint32)[3, 3] = 0x7F800001  # a NaN whose upper half alone is infinity
    for form in forms("bfloat16"):
        with forced_form(form):
            y = rounded_set("bfloat16").linear(x, weight_of("bfloat16", 9, 64))
        assert np.isnan(y[[1, 3]]).all() and np.isinf(y[2]).all() and np.isfinite(y[4:]).all()


@pytest.mark.parametrize("kind", INTEGERS)
def test_stacks_of_formats(kind):
    parts = tuple(weight_of(name, 7, 512, i) for i, name in enumerate(("Q4_K", "Q6_K", "Q8_0")))
    stack = StackedWeight(parts)
    x = rows(30, 512)
    close(rounded_set(kind).linear(x, stack), exact(x, stack, kind), dtype="float32")


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("d_in", [63, 96])
def test_widths_that_the_kernels_do_not_take_are_the_definitions(kind, d_in):
    x = rows(20, d_in)
    weight = quantize(rows(5, d_in)) if d_in % 32 else weight_of("Q4_0", 5, d_in)
    close(rounded_set(kind).linear(x, weight), exact(x, weight, kind), dtype="float32")


@pytest.mark.parametrize(("kind", "name"), [("int8", "int8"), ("int16", "Q4_1"), ("bfloat16",) * 2])
def test_every_slot_is_the_composition_of_its_parts(kind, name):
    fast = rounded_set(kind)
    x, gain, bias = rows(40, 128), rows(1, 128)[0], rows(1, 128, 5)[0]
    square, wide = weight_of(name, 128, 128), weight_of(name, 256, 128, 1)
    down = weight_of(name, 128, 128, 2)
    h = fast.rms_norm(x, gain, 1e-5)
    close(fast.norm_linear(x, gain, 1e-5, square, bias), fast.linear(h, square, bias), times=200)
    close(fast.linear_add(x, square, x, bias), x + fast.linear(x, square, bias))
    both = fast.linear(h, wide)
    gated = fast.swiglu(both[:, :128], both[:, 128:])
    close(fast.norm_swiglu(x, gain, 1e-5, wide), gated, times=200)
    layer = LayerParams(gain, square, square, gain, wide, down)
    y = fast.mlp_block(x[None], layer, Step(None, None, 2, 2, 1e-5))
    close(y, (x + fast.linear(gated, down))[None], times=2000)


@pytest.mark.parametrize(("kind", "name"), [("int8", "int8"), ("bfloat16", "bfloat16")])
def test_a_row_has_the_same_bits_alone_and_in_company_up_to_sixteen(kind, name):
    x, weight = rows(16, 128), weight_of(name, 30, 128)
    alone = np.concatenate([rounded_set(kind).linear(x[k : k + 1], weight) for k in range(16)])
    close(rounded_set(kind).linear(x, weight), alone, times=0)
    assert rounded_set(kind).decoder_layers is kernels.compiled_ops().decoder_layers


def steps_of_tiles(x, weight):
    """The sums of TDPBF16PS: of 32 channels the even ones, then the odd ones, step after step."""
    y = np.zeros((len(x), len(weight)), np.float32)
    for start in range(0, x.shape[1], 32):
        pair = np.zeros((2, *y.shape), np.float32)
        for i in range(start, start + 32):
            product = x[:, i, None].astype(np.float64) * weight[:, i].astype(np.float64)
            pair[i % 2] = (pair[i % 2] + product).astype(np.float32)
        y += pair[0] + pair[1]
    return y


@pytest.mark.skipif(not has_tiles("bfloat16"), reason="this processor has no matrix units")
@pytest.mark.parametrize(("d_out", "d_in"), [(101, 512), (96, 64), (1, 320)])
def test_matrix_units_sum_as_their_manual_says(d_out, d_in):
    x, weight = rows(70, d_in), weight_of("bfloat16", d_out, d_in)
    with forced_form("tiles"):
        y = rounded_set("bfloat16").linear(x, weight)
    close(y, steps_of_tiles(rounded_values(x, "bfloat16"), weight.astype(np.float32)), times=0)


def test_without_matrix_units_nobody_can_ask_for_them(monkeypatch):
    monkeypatch.setattr(dot_products, "has_tiles", lambda _: False)
    assert dot_products.form_of("bfloat16") in ("instruction", "float32")
    with forced_form("tiles"), pytest.raises(NpllmRuntimeError, match="matrix units"):
        rounded_set("bfloat16").linear(rows(20, 64), weight_of("bfloat16", 6, 64))


def test_the_form_of_a_product_is_told_in_words():
    with forced_form("plain"):
        assert kernels.product_forms()["int8 and int16 activations"] == "plain vectors"
    with forced_form("instruction"):
        assert "VDPBF16PS" in kernels.product_forms()["bfloat16 activations"]
    told = kernels.product_forms()["int8 and int16 activations"]
    assert ("VPDPBUSD" in told) == has_instruction("int8")


MANY = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("name", "kind", "n_taken"),
    [
        ("bfloat16", "float32", 2),
        ("bfloat16", "bfloat16", 2),
        ("int8", "int8", 2),
        ("Q4_0", "int16", 2),
        ("mixed", "int8", 0),
    ],
)
def test_many_tokens_through_half_a_layer_have_the_bits_of_its_parts(
    monkeypatch, name, kind, n_taken
):
    from npllm.kernels.cpu import compiled

    taken, half = [], compiled.attention_of_many
    monkeypatch.setattr(
        compiled, "attention_of_many", lambda *args: (taken.append(1), half(*args))[1]
    )
    m, ids = model(**MANY), random_ids(2, 40)
    layers = []
    for number, layer in enumerate(m.params.layers):
        new = {
            leaf: weight_of("int8" if name == "mixed" else name, *x.shape, seed=number)
            for leaf, x in layer._asdict().items()
            if np.ndim(x) == 2 and not (name == "mixed" and leaf == "qkv_proj")
        }
        layers.append(layer._replace(**new))
    m = npllm.Model(m.config, m.params._replace(layers=tuple(layers)), ops=rounded_set(kind))
    parts = m.on(m.ops.replace(attention_block=None))
    for dtype in (None, "bfloat16"):
        caches = [way.new_cache(2, dtype=dtype) for way in (m, parts)]
        for span in (slice(0, 20), slice(20, 40)):
            got, want = (
                way(ids[:, span], cache=c) for way, c in zip((m, parts), caches, strict=True)
            )
            assert got.tobytes() == want.tobytes()
    assert m(ids).tobytes() == parts(ids).tobytes()
    assert len(taken) >= n_taken * 3 and bool(taken) == bool(n_taken)
