"""The block formats of GGUF: values bit for bit, and what linear, embed and rows make of them."""

from dataclasses import FrozenInstanceError

import guard
import numpy as np
import optional
import pytest
from blocks import FORMAT_NAMES, HALVES, KINDS, random_blocks, random_weight
from close import close
from composed import Composed, definitions
from hypothesis import given
from hypothesis import strategies as st
from strategies import fewer

from npllm import kernels, ops
from npllm.arrays import array_namespace, asarray, is_packed, widen
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.quantized import block_bytes
from npllm.quantized.block_formats import FORMATS
from npllm.quantized.block_weight import BlockWeight
from npllm.quantized.int8 import quantize
from npllm.quantized.stacked import StackedWeight

gguf = optional.module("gguf")
strict = optional.module("array_api_strict")
SETS = [
    Composed(s)
    for s in (ops.reference, ops.blockwise, kernels.tiled_ops(), kernels.compiled_ops())
    if s
]
every_set = pytest.mark.parametrize("fast", SETS, ids=lambda s: s.name)
every_format = pytest.mark.parametrize("name", FORMAT_NAMES)
every_kind = pytest.mark.parametrize("kind", KINDS)


def inputs(n, d_in, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d_in)).astype(np.float32)


def expected(blocks, name):
    """What GGML's own library makes of the blocks."""
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])


def same_bits(actual, desired):
    assert (actual.dtype, actual.shape) == (desired.dtype, desired.shape) and not np.isnan(
        desired
    ).any()
    np.testing.assert_array_equal(actual.view(np.uint32), desired.view(np.uint32))


def mixed(d_out=6, d_in=256, seed=0):
    """A stack of three formats and floats."""
    return StackedWeight(
        (
            random_weight("Q4_K", d_out, d_in, seed),
            random_weight("Q6_K", 2, d_in, seed + 1),
            quantize(inputs(3, d_in, seed + 2)),
            inputs(2, d_in, seed + 3).astype(np.float16),
        )
    )


# --- the numbers in a block


def test_half_precision_reads_every_pair_of_bytes():
    bits = np.arange(2**16, dtype=np.uint16)
    pairs = bits.view(np.uint8).reshape(-1, 2)
    actual = block_bytes.half_precision(pairs)[:, 0]
    with np.errstate(invalid="ignore"):
        wanted = bits.view(np.float16).astype(np.float32)
    is_nan = np.isnan(wanted)
    assert is_nan.sum() == 2046
    np.testing.assert_array_equal(np.isnan(actual), is_nan)
    np.testing.assert_array_equal(actual[~is_nan].view(np.uint32), wanted[~is_nan].view(np.uint32))


def test_signed_reads_every_byte():
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(block_bytes.signed(every), every.view(np.int8))


@every_format
def test_the_table_has_the_sizes_of_ggml(name):
    layout = FORMATS[name]
    kind = gguf.GGMLQuantizationType[name]
    assert gguf.GGML_QUANT_SIZES[kind] == (layout.n_entries, layout.n_bytes)
    assert layout.bits == 8 * layout.n_bytes / layout.n_entries


@every_kind
@every_format
@given(seed=st.integers(0, 2**32), n_rows=st.integers(1, 5), n_blocks=st.integers(1, 4))
def test_values_are_those_of_gguf_bit_for_bit(name, kind, seed, n_rows, n_blocks):
    blocks = random_blocks(name, n_rows, n_blocks, seed, kind)
    same_bits(BlockWeight(blocks, name).widened(), expected(blocks, name))


@every_format
def test_a_scale_that_is_not_finite_gives_no_finite_entry(name):
    for number in (np.inf, -np.inf, np.nan):
        blocks = random_blocks(name, 1, 1)
        start = HALVES[name][0]
        blocks[0, start : start + 2] = np.array([number], np.float16).view(np.uint8)
        assert not np.isfinite(BlockWeight(blocks, name).widened()).all()


# --- other array libraries


@every_format
def test_the_definition_needs_nothing_but_the_array_api(name):
    blocks = random_blocks(name, 3, 2)
    wanted = BlockWeight(blocks, name).widened()
    with strict.ArrayAPIStrictFlags(
        api_version="2024.12",
        boolean_indexing=False,
        data_dependent_shapes=False,
        enabled_extensions=(),
    ):
        weight = BlockWeight(blocks, name).to(strict)
        same_bits(np.asarray(widen(weight)), wanted)
        x = inputs(2, wanted.shape[1])
        close(ops.linear(strict.asarray(x), weight), strict.asarray(ops.linear(x, wanted)), times=2)


@every_format
def test_the_definition_runs_on_a_device(name, monkeypatch):
    cupy = guard.installed(monkeypatch)
    weight = random_weight(name, 4, 512)
    moved, x = asarray(weight, cupy), inputs(3, 512)
    assert array_namespace(moved) is cupy
    same_bits(widen(moved).get(), weight.widened())
    close(ops.linear(cupy.asarray(x), moved).get(), ops.linear(x, weight), times=2)
    ids = np.array([[3, 0]])
    same_bits(ops.embed(cupy.asarray(ids), moved).get(), ops.embed(ids, weight))


def test_a_stack_runs_on_a_device(monkeypatch):
    cupy = guard.installed(monkeypatch)
    weight, x = mixed(), inputs(3, 256)
    moved, numbers = asarray(weight, cupy), np.array([12, 0, 7, 6])
    close(ops.linear(cupy.asarray(x), moved).get(), ops.linear(x, weight), times=2)
    same_bits(moved.take(cupy.asarray(numbers)).get(), weight.take(numbers))


# --- as a weight


@every_set
@every_format
@fewer(2)
@given(n=st.sampled_from([1, 2, 16, 17, 70]), d_out=st.integers(1, 40), seed=st.integers(0, 99))
def test_linear_takes_it(fast, name, n, d_out, seed):
    weight, x = random_weight(name, d_out, 256, seed), inputs(n, 256, seed + 1)
    wide = weight.widened().astype(np.float64)
    close(fast.linear(x, weight), x.astype(np.float64) @ wide.T, dtype="float32")
    residual, bias = inputs(n, d_out, seed + 2), inputs(1, d_out, seed + 3)[0]
    want = residual + x.astype(np.float64) @ wide.T + bias
    terms = np.abs(residual) + np.abs(x) @ np.abs(wide).T + np.abs(bias)
    y = fast.linear_add(x, weight, residual, bias)
    assert y.dtype == np.float32 and (np.abs(y - want) <= 5e-6 * terms).all()


@every_set
@every_format
def test_the_gated_product_takes_it(fast, name):
    weight, x, gain = random_weight(name, 12, 256), inputs(3, 256), inputs(1, 256, 7)[0]
    want = definitions.norm_swiglu(
        x.astype(np.float64), gain.astype(np.float64), 1e-5, weight.widened().astype(np.float64)
    )
    close(fast.norm_swiglu(x, gain, 1e-5, weight), want, dtype="float32", times=4)


@every_set
@every_format
@fewer(4)
@given(seed=st.integers(0, 99))
def test_embed_and_rows_are_those_of_the_widened_matrix(fast, name, seed):
    weight = random_weight(name, 23, 512, seed)
    wide = expected(weight.blocks, name)
    ids = np.random.default_rng(seed).integers(0, 23, (2, 3))
    same_bits(fast.embed(ids, weight), wide[ids])
    for rows in (slice(0, 0), slice(3, 9), slice(20, None), slice(1, 20, 2)):
        assert np.shares_memory(weight[rows].blocks, weight.blocks) or not len(wide[rows])
        same_bits(weight[rows].widened(), wide[rows])
        same_bits(weight[rows, :].widened(), wide[rows])


@every_set
def test_sets_take_a_stack_of_formats(fast):
    weight, x = mixed(), inputs(5, 256)
    wide = np.concatenate([widen(part) for part in weight.parts])
    assert (weight.shape, len(weight), weight.ndim) == ((13, 256), 13, 2)
    assert weight.nbytes == 6 * 144 + 2 * 210 + 3 * (256 + 4 * 2) + 2 * 512
    same_bits(weight.widened(), wide)
    close(fast.linear(x, weight), x.astype(np.float64) @ wide.T.astype(np.float64), dtype="float32")
    ids = np.array([[0, 12, 8], [5, 6, 10]])
    same_bits(fast.embed(ids, weight), wide[ids])


@given(start=st.integers(0, 13), stop=st.integers(0, 13))
def test_rows_of_a_stack_are_rows_of_its_parts(start, stop):
    weight = mixed()
    same_bits(weight[start:stop].widened(), weight.widened()[start:stop])


def test_a_stack_with_float64_computes_in_float64():
    weight = StackedWeight((random_weight("Q8_0", 2, 32), inputs(2, 32).astype(np.float64)))
    y = ops.linear(inputs(3, 32), weight)
    assert weight.widened().dtype == np.float64 and y.dtype == np.float32


def test_float64_inputs_are_multiplied_in_float64():
    weight, x = random_weight("Q6_K", 5, 256), inputs(3, 256).astype(np.float64)
    close(ops.linear(x, weight), x @ weight.widened().astype(np.float64).T)


def test_a_product_widens_a_band_at_a_time(traced_peak):
    weight, x = random_weight("Q4_K", 16384, 1024), inputs(1, 1024)
    whole = 4 * 16384 * 1024
    assert traced_peak(lambda: ops.linear(x, weight)) < whole / 2


# --- what is refused


def test_a_packed_weight_is_known_and_cannot_be_changed():
    weight = random_weight("Q4_0", 2, 32)
    assert is_packed(weight) and is_packed(mixed()) and not is_packed(inputs(1, 2))
    with pytest.raises(FrozenInstanceError):
        weight.format = "Q8_0"
    with pytest.raises(FrozenInstanceError):
        mixed().parts = ()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BlockWeight(np.zeros((2, 35), np.uint8), "Q8_0"), "blocks of 34 bytes, got 35"),
        (lambda: BlockWeight(np.zeros((2, 34), np.uint8), "Q9_9"), "must be one of Q4_0.*'Q9_9'"),
        (lambda: BlockWeight(np.zeros(34, np.uint8), "Q8_0"), r"blocks must be \[d_out, n_bytes\]"),
        (lambda: random_weight("Q4_0", 4, 32)[2], "slices of rows only, got index 2"),
        (lambda: random_weight("Q4_0", 4, 32)[:, 3], "slices of rows only"),
        (lambda: mixed()[::2], "with step 1, got 2"),
        (lambda: StackedWeight((inputs(2, 3), inputs(2, 4))), r"one width d_in, got \[3, 4\]"),
        (lambda: ops.linear(inputs(1, 64), random_weight("Q4_0", 2, 32)), "d_in"),
    ],
    ids=range(8),
)
def test_what_makes_no_weight_is_named(make, words):
    with pytest.raises(NpllmValueError, match=words):
        make()


def test_blocks_must_be_bytes():
    with pytest.raises(NpllmTypeError, match="must be uint8, got int8"):
        BlockWeight(np.zeros((2, 34), np.int8), "Q8_0")
    for bad in (lambda: BlockWeight([[1, 2]], "Q8_0"), lambda: StackedWeight(())):
        with pytest.raises(NpllmTypeError):
            bad()
