"""The compiled kernels of blocks: values, bits alone and in company, memory, and what is fused."""

import subprocess
import sys

import numpy as np
import pytest
from blocks import FORMAT_NAMES, HALVES, KINDS, random_blocks, random_weight
from close import close
from hypothesis import given
from hypothesis import strategies as st
from strategies import fewer

from npllm import kernels, ops
from npllm.cache import KVCache
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.models import phi3
from npllm.models.params import LayerParams
from npllm.ops import Step
from npllm.ops.mask import causal
from npllm.quantized.block_formats import FORMATS
from npllm.quantized.block_weight import BlockWeight
from npllm.quantized.stacked import StackedWeight

pytestmark = pytest.mark.skipif(
    kernels.compiled_ops() is None, reason="the compiled kernels need Numba"
)
every_format = pytest.mark.parametrize("name", FORMAT_NAMES)


FORMS = "digits", "plain digits", "looked up", "converted"


def is_rare(name, form):
    """Whether no other test compiles a format in this form, and others stand for it."""
    if kernels.compiled_ops() is None:
        return False
    from npllm.kernels.cpu.block_forms import default_form

    return form != default_form() and name not in ("Q4_0", "Q4_1", "Q6_K", "Q8_0")


def in_forms(names, forms):
    """Formats in forms; what is rare is slow."""
    return pytest.mark.parametrize(
        ("name", "form"),
        [
            pytest.param(name, form, marks=[pytest.mark.slow] * is_rare(name, form))
            for name in names
            for form in forms
        ],
    )


every_format_in_every_form = in_forms(FORMAT_NAMES, FORMS)
every_digit_form = in_forms(FORMAT_NAMES, FORMS[:2])
EPS = np.finfo(np.float32).eps


def inputs(n, d_in, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d_in)).astype(np.float32)


def width(name, n_block):
    """Entries of rows of so many blocks; of 256 a block is large enough."""
    return FORMATS[name].n_entries * (n_block if FORMATS[name].n_entries == 32 else 1 + n_block % 3)


def require(form):
    """Skip where the processor does not have what a form needs."""
    from npllm.kernels.cpu.block_functions import has_lookup
    from npllm.kernels.cpu.dot_products import has_instruction

    if form == "looked up" and not has_lookup():
        pytest.skip("the processor has no look-up of sixteen floats")
    if form == "digits" and not has_instruction("int8"):
        pytest.skip("the processor has no products of bytes")


def product(weight, x, form=None):
    """The product of up to 16 rows by the kernel itself."""
    from npllm.kernels.cpu.block_gemv import block_table
    from npllm.kernels.cpu.gemv import add_product
    from npllm.kernels.cpu.launching import launch
    from npllm.kernels.cpu.layout import EMPTY
    from npllm.kernels.cpu.operands import NO_SCALES

    require(form)
    memory = np.full(len(x) * len(weight) + 64, np.nan, np.float32)
    y = memory[32:-32].reshape(len(x), len(weight))
    y[...] = 0
    table = block_table(weight, form)
    launch(add_product, table, NO_SCALES, x.copy(), EMPTY, np.float32(0), y)
    assert np.isnan(memory[:32]).all() and np.isnan(memory[-32:]).all()
    return y


def largest_terms(weight, x):
    """sum_i |x[i]| times the largest |entry| of the 32 around it: what rounding is relative to."""
    wide = np.abs(weight.widened().astype(np.float64))
    groups = wide.reshape(len(wide), -1, 32).max(axis=-1)
    return np.abs(x.astype(np.float64)) @ np.repeat(groups, 32, axis=1).T


@every_format_in_every_form
@fewer(2)
@given(
    n=st.integers(1, 16),
    n_block=st.integers(1, 9),
    d_out=st.sampled_from([1, 31, 32, 33, 70]),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["usual", "zero", "subnormal", "largest", "any finite"]),
)
def test_a_product_lies_within_rounding_of_the_exact_one(name, form, n, n_block, d_out, seed, kind):
    weight = random_weight(name, d_out, width(name, n_block), seed, kind)
    x = inputs(n, weight.shape[1], seed + 1)
    want = x.astype(np.float64) @ weight.widened().astype(np.float64).T
    bound = 8 * EPS * largest_terms(weight, x) + 1e-44
    assert (np.abs(product(weight, x, form) - want) <= bound).all()


@every_format_in_every_form
@fewer(2)
@given(
    n=st.integers(1, 16),
    n_block=st.sampled_from([1, 2, 5, 18, 96]),
    seed=st.integers(0, 99),
)
def test_a_row_has_the_same_bits_alone_and_in_company(name, form, n, n_block, seed):
    weight, x = random_weight(name, 40, width(name, n_block), seed), inputs(n, width(name, n_block))
    together = product(weight, x, form)
    for row, y in zip(x, together, strict=True):
        np.testing.assert_array_equal(product(weight, row[None], form)[0], y)


@every_format
def test_looked_up_and_converted_codes_give_the_same_bits(name):
    weight, x = random_weight(name, 70, width(name, 7)), inputs(5, width(name, 7))
    a, b = (product(weight, x, form) for form in ("looked up", "converted"))
    np.testing.assert_array_equal(a, b)


@in_forms(FORMAT_NAMES, ["plain digits"])
def test_the_instruction_and_plain_vectors_give_the_same_bits_of_digits(name, form):
    weight, x = random_weight(name, 35, width(name, 11)), inputs(5, width(name, 11))
    np.testing.assert_array_equal(product(weight, x, form), product(weight, x, "digits"))


@every_digit_form
@fewer(3)
@given(k=st.sampled_from([-149, -140, -126, -118, -100, -30, 0, 60, 100]), seed=st.integers(0, 99))
def test_digits_are_as_exact_of_inputs_of_any_magnitude(name, form, k, seed):
    weight, x = random_weight(name, 5, width(name, 9), seed), inputs(2, width(name, 9), seed)
    x = np.ldexp(x, k).astype(np.float32)
    want = x.astype(np.float64) @ weight.widened().astype(np.float64).T
    n_sum = 16 * 3 * -(-x.shape[1] // 256)  # sums that are rounded to a multiple of 2**-149
    bound = 8 * EPS * largest_terms(weight, x) + n_sum * 2.0**-150
    assert (np.abs(product(weight, x, form) - want) <= bound).all()


@every_digit_form
@pytest.mark.parametrize("fill", [0, 255])
@pytest.mark.parametrize("largest", [8355711 * 2.0**-22, -8355711 * 2.0**-20, 8355712 * 2.0**-22])
def test_sums_of_the_largest_integers_do_not_overflow(name, form, fill, largest):
    blocks = np.full((3, 8, FORMATS[name].n_bytes), fill, np.uint8)
    for at in HALVES[name]:
        blocks[..., at : at + 2] = np.array([1.0], "<f2").view(np.uint8)
    if name == "Q6_K":
        blocks[..., 192:208] = 127
    if name in ("Q4_K", "Q5_K"):
        blocks[..., 4:16] = 0x21
    weight = BlockWeight(blocks.reshape(3, -1), name)
    x = np.full((2, weight.shape[1]), largest, np.float32)
    want = x.astype(np.float64) @ weight.widened().astype(np.float64).T
    assert (np.abs(product(weight, x, form) - want) <= 8 * EPS * largest_terms(weight, x)).all()


@every_digit_form
def test_one_entry_of_x_meets_one_entry_of_the_weight(name, form):
    """Powers of two are digits without an error: of formats without a minimum nothing is rounded
    that the definition does not round.
    """
    weight = random_weight(name, 4, 512)
    wide = weight.widened()
    for start in range(0, 512, 16):
        x = np.zeros((16, 512), np.float32)
        x[np.arange(16), np.arange(start, start + 16)] = 0.5
        y, want = product(weight, x, form).T, wide[:, start : start + 16] / 2
        if len(HALVES[name]) == 1:
            np.testing.assert_array_equal(y, want)
        else:
            close(y, want, times=4)


@every_format
@pytest.mark.parametrize("n", [1, 3, 16, 17, 40])
def test_scales_that_are_not_finite_give_what_the_definition_gives(name, n):
    d_in = width(name, 5)
    blocks = random_blocks(name, 12, d_in // FORMATS[name].n_entries).copy()
    pieces = blocks.reshape(12, -1, FORMATS[name].n_bytes)
    for row, value in enumerate([np.inf, -np.inf, np.nan, 2.0**-24]):
        for half, at in enumerate(HALVES[name]):
            pieces[2 * row + half, -1, at : at + 2] = np.array([value], "<f2").view(np.uint8)
    weight, x = BlockWeight(blocks, name), inputs(n, d_in)
    with np.errstate(invalid="ignore"):
        want = ops.linear(x, weight)
        y = kernels.compiled_ops().linear(x, weight)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(want))
    assert not np.isfinite(want).all()
    infinite = np.isinf(y) | np.isinf(want)
    np.testing.assert_array_equal(y[infinite], want[infinite])
    close(np.where(np.isfinite(y), y, 0), np.where(np.isfinite(want), want, 0))


@every_format
@pytest.mark.parametrize("value", [np.inf, np.nan, 3e38])
def test_inputs_that_are_not_finite_give_what_the_definition_gives(name, value):
    weight, x = random_weight(name, 9, width(name, 3)), inputs(2, width(name, 3))
    x[1, 5] = value
    with np.errstate(invalid="ignore", over="ignore"):
        want, y = ops.linear(x, weight), kernels.compiled_ops().linear(x, weight)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(want))
    np.testing.assert_array_equal(np.isinf(y), np.isinf(want))
    close(y[0], want[0], times=4)


@every_format
@given(
    n_block=st.integers(1, 6),
    start=st.integers(0, 40),
    n=st.integers(1, 40),
    kind=st.sampled_from(list(KINDS)),
)
def test_a_run_of_a_row_is_widened_to_the_numbers_of_the_definition(name, n_block, start, n, kind):
    from npllm.kernels.cpu.block_functions import widen_function

    weight = random_weight(name, 1, width(name, n_block), n_block, kind)
    start = min(16 * start, weight.shape[1] - 16)
    n = min(16 * n, weight.shape[1] - start)
    y, address = np.full(n + 32, np.nan, np.float32), weight.blocks.__array_interface__["data"][0]
    call = widen_function(name).ctypes
    call(address, start, n, y[16:].ctypes.data, 0)
    np.testing.assert_array_equal(y[16:-16], weight.widened()[0, start : start + n])
    assert np.isnan(y[:16]).all() and np.isnan(y[-16:]).all()


@given(
    n=st.sampled_from([1, 4, 16, 30]), names=st.permutations(FORMAT_NAMES), seed=st.integers(0, 9)
)
def test_a_stack_of_formats_is_multiplied_part_by_part(n, names, seed):
    parts = tuple(random_weight(names[i], 33 * i + 1, 512, seed + i) for i in range(3))
    fast, x = kernels.compiled_ops(), inputs(n, 512, seed)
    want = np.concatenate([fast.linear(x, part) for part in parts], axis=1)
    np.testing.assert_array_equal(fast.linear(x, StackedWeight(parts)), want)


@every_format
@pytest.mark.parametrize("ids", [[[0]], [3, 3, 0, 4], [[1, 2], [3, 0]], np.zeros((0, 2), np.int64)])
def test_rows_are_looked_up_as_the_definition_does(name, ids):
    weight, ids = random_weight(name, 5, width(name, 3)), np.asarray(ids, np.uint16)
    embed = kernels.compiled_ops().embed
    np.testing.assert_array_equal(embed(ids, weight), ops.embed(ids, weight))
    with pytest.raises(NpllmTypeError, match="byte order"):
        embed(ids.astype(">i4"), weight)
    for bad, error in (([5], NpllmValueError), ([-1], NpllmValueError), ([0.0], NpllmTypeError)):
        with pytest.raises(error):
            embed(np.array(bad), weight)


def test_a_table_has_the_rows_of_all_its_parts():
    from npllm.kernels.cpu.block_gemv import block_table
    from npllm.kernels.cpu.simd_arrays import rows_of_weight

    parts = tuple(random_weight("Q4_0", n, 64) for n in (3, 5))
    assert rows_of_weight(block_table(StackedWeight(parts))) == 8


BEYOND = """
import ctypes, mmap, sys
import numpy as np
from blocks import random_blocks
from npllm import kernels
from npllm.quantized.block_formats import FORMATS
from npllm.quantized.block_weight import BlockWeight
libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
for name in FORMATS:
    for n_block in (1, 3, 8, 9):
        rows = random_blocks(name, 33, n_block)
        n_page = -(-rows.size // page)
        memory = mmap.mmap(-1, (n_page + 2) * page)
        raw = np.frombuffer(memory, np.uint8)
        first = raw.ctypes.data
        for at in (0, n_page + 1):
            assert libc.mprotect(ctypes.c_void_p(first + at * page), page, 0) == 0
        for start in (page, (n_page + 1) * page - rows.size):
            blocks = raw[start : start + rows.size].reshape(rows.shape)
            blocks[...] = rows
            blocks.flags.writeable = False  # as in a mapped file: the kernels of other tests
            for n in (1, 5, 9, 20):
                x = np.ones((n, BlockWeight(rows, name).shape[1]), np.float32)
                y = kernels.compiled_ops().linear(x, BlockWeight(blocks, name))
                assert np.isfinite(y).all()
print("read what it may")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is protected by a call of Linux")
def test_no_byte_beside_the_blocks_is_read():
    """The pages before and behind them cannot be read: the process would end."""
    run = subprocess.run(
        [sys.executable, "-c", BEYOND], cwd="tests", capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == "read what it may", run.stderr[-2000:]


def apart(blocks):
    """The same bytes in rows that are further apart than they are long."""
    memory = np.full((blocks.shape[0], blocks.shape[1] + 3), 255, np.uint8)
    memory[:, 2:-1] = blocks
    return memory[:, 2:-1]


def shifted(blocks):
    """The same bytes at an odd address."""
    memory = np.full(blocks.size + 2, 255, np.uint8)
    start = 1 - memory.ctypes.data % 2
    memory[start : start + blocks.size] = blocks.reshape(-1)
    return memory[start : start + blocks.size].reshape(blocks.shape)


@every_format
@pytest.mark.parametrize("layout", [apart, shifted, np.asfortranarray, lambda b: b[::-1]])
def test_blocks_are_read_in_logical_order_wherever_they_lie(name, layout):
    blocks = np.array(random_blocks(name, 34, 2))
    x = inputs(3, BlockWeight(blocks, name).shape[1])
    moved = BlockWeight(layout(blocks), name)
    want = ops.linear(x, BlockWeight(np.ascontiguousarray(moved.blocks), name))
    close(kernels.compiled_ops().linear(x, moved), want)


def test_what_is_no_matrix_of_blocks_is_left_to_the_definition():
    from npllm.kernels.cpu.operands import fits_weight

    good = random_weight("Q4_0", 3, 64)
    assert fits_weight(good, 64)
    assert not fits_weight(good, 32)
    for name, blocks in (
        ("blocks", good.blocks[:, :35]),
        ("blocks", good.blocks.view(np.int8)),
        ("blocks", good.blocks[:0]),
        ("blocks", np.asfortranarray(good.blocks)),
        ("blocks", np.ma.asarray(good.blocks)),
    ):
        bad = random_weight("Q4_0", 3, 64)
        object.__setattr__(bad, name, blocks)  # as no caller can, who has no other way
        assert not fits_weight(bad, 64)
    assert not fits_weight(StackedWeight((good,) * 4), 64)
    assert not fits_weight(StackedWeight((good, np.zeros((2, 64), np.float32))), 64)
    assert not fits_weight(good, 64, np.zeros(4, np.float32))


def layer(qkv, o, gate_up, down, seed=0):
    """A layer whose matrices have the given formats: 2 query heads, 1 key and 1 value head of 64."""
    gain, rows = np.ones(256, np.float32), (256,) if len(qkv) == 1 else (128, 64, 64)
    parts = tuple(random_weight(*part, 256, seed) for part in zip(qkv, rows, strict=True))
    return LayerParams(
        gain,
        parts[0] if len(parts) == 1 else StackedWeight(parts),
        random_weight(o, 256, 128, seed + 1),
        gain,
        random_weight(gate_up, 512, 256, seed + 2),
        random_weight(down, 256, 256, seed + 3),
    )


MIXES = {
    "one format": (["Q4_0"], "Q4_0", "Q4_0", "Q4_0"),
    "a stack": (["Q4_K", "Q6_K", "Q4_0"], "Q8_0", "Q4_K", "Q6_K"),
    "others": (["Q5_K"], "Q5_1", "Q4_1", "Q5_0"),
}


@pytest.mark.parametrize("n", [1, 5, 16])
def test_layers_in_blocks_of_different_formats_take_one_kernel(n):
    layers = tuple(layer(*mix, seed) for seed, mix in enumerate(MIXES.values()))
    tables, x = np.ones((2, n, 64), np.float32), inputs(n, 256)[None]

    def step():
        return Step(*tables, 2, 1, 1e-5, [causal()] * 3, KVCache(1, 3, 64))

    fast = kernels.compiled_ops()
    want = phi3.decoder_layers(x, layers, step(), ops.reference)
    close(fast.decoder_layers(x, layers, step()), want, times=4)
    for number, one in enumerate(layers):
        here = step().at(number)
        want = phi3.attention_block(x, one, here, ops.reference)
        close(fast.attention_block(x, one, step().at(number)), want, times=4)
        close(fast.mlp_block(x, one, here), phi3.mlp_block(x, one, here, ops.reference), times=4)
