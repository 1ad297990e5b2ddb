"""Checkpoints that GPTQ and compressed-tensors quantised: the bits of a code, the values of a
matrix, whole folders, and what is refused.
"""

import json
from types import SimpleNamespace

import guard
import lora
import numpy as np
import optional
import pytest
import quantised_folders as folders
import tiny
from close import close
from composed import Composed
from hypothesis import given
from hypothesis import strategies as st
from kernel_shim import needs_gxx
from quantised_folders import LLAMA, SCHEMES, Scheme, dequantised, words_of, write_pair
from safetensors.numpy import load_file, save_file
from seeds import draws

import npllm
from npllm import NpllmError, kernels, ops
from npllm.analysis.inspect import checkpoint_facts
from npllm.arrays import array_namespace, asarray, to_numpy, widen
from npllm.checkpoints.finite import find_nonfinite
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.ops.rounded import rounded_linear
from npllm.quantized.activations import DEFAULTS, default_activations
from npllm.quantized.bit_stream import count_words, unpack
from npllm.quantized.block_weight import BlockWeight
from npllm.quantized.grouped import GroupedWeight
from npllm.quantized.int8 import Int8Weight
from npllm.quantized.packed import PackedMatrix
from npllm.quantized.permuted import PermutedWeight
from npllm.quantized.regrouping import exact_format, pack_groups
from npllm.quantized.stacked import StackedWeight, stack
from npllm.tracing.record import config_content

strict = optional.module("array_api_strict")
SETS = [
    Composed(s)
    for s in (ops.reference, ops.blockwise, kernels.tiled_ops(), kernels.compiled_ops())
    if s
]
every_set = pytest.mark.parametrize("fast", SETS, ids=lambda s: s.name)
every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
both_layouts = pytest.mark.parametrize("layout", [{}, LLAMA], ids=["phi3", "llama"])
BFLOAT16 = np.dtype(tiny.DTYPES["BF16"])
IDS = tiny.random_ids(2, 12)


def inputs(n, d_in, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d_in)).astype(np.float32)


def same_bits(actual, desired):
    assert (actual.dtype, actual.shape) == (desired.dtype, desired.shape)
    np.testing.assert_array_equal(actual.view(np.uint32), desired.view(np.uint32))


def shuffled(d_out=23, d_in=70, n_group=5, seed=0, dtype=np.int8, scale=BFLOAT16):
    """A matrix whose groups are no runs of columns."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-20, 20, (d_out, d_in)).astype(dtype)
    scales = rng.uniform(0.5, 1, (d_out, n_group)).astype(scale)
    return GroupedWeight(values, scales, rng.integers(0, n_group, d_in).astype(np.int32))


def exact(folder, **given):
    """The model of the fastest set, which rounds no activations where it is chosen by name."""
    return npllm.load(folder, ops=kernels.fastest_ops("numpy"), **given)


# --- the bits of a code


@given(
    n_bits=st.sampled_from([2, 3, 4, 8]),
    n_codes=st.integers(0, 100),
    n_rows=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_a_code_is_bits_of_one_long_number(n_bits, n_codes, n_rows, seed):
    codes = np.random.default_rng(seed).integers(0, 2**n_bits, (n_rows, n_codes))
    words = np.array([words_of(row, n_bits) for row in codes], np.int32).reshape(n_rows, -1)
    assert words.shape[1] == count_words(n_codes, n_bits)
    actual = unpack(words, n_bits)
    assert actual.dtype == np.uint8
    np.testing.assert_array_equal(actual[:, :n_codes], codes)
    assert not actual[:, n_codes:].any()


@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_codes_are_those_that_compressed_tensors_packs(n_bits, axis):
    torch = pytest.importorskip("torch")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    low = 2 ** (n_bits - 1)
    values = np.random.default_rng(0).integers(-low, low, (37, 53)).astype(np.int8)
    packed = helpers.pack_to_int32(torch.from_numpy(values), n_bits, packed_dim=axis).numpy()
    codes = unpack(packed, n_bits)[:, :53] if axis else unpack(packed.T, n_bits)[:, :37].T
    np.testing.assert_array_equal(codes.astype(np.int16) - low, values)


# --- the values of a matrix

MATRICES = {
    "n_bits": st.sampled_from([2, 3, 4, 8]),
    "group": st.sampled_from([16, 32, 64, 96, None]),
    "d_in": st.sampled_from([32, 64, 80, 192]),
    "kind": st.sampled_from(["symmetric", "asymmetric"]),
    "scale": st.sampled_from([np.float16, BFLOAT16, np.float32]),
    "is_shuffled": st.booleans(),
    "seed": st.integers(0, 2**32),
}


@given(**MATRICES)
def test_every_value_stays_as_it_is(n_bits, group, d_in, kind, scale, is_shuffled, seed):
    scheme = Scheme(
        bits=n_bits, group=group, symmetric=kind == "symmetric", act_order=is_shuffled, scale=scale
    )
    codes, zeros, scales, groups = folders.draw(np.random.default_rng(seed), (5, d_in), scheme)
    weight = pack_groups(
        lambda rows: codes[rows].astype(np.uint8),
        zeros.astype(np.int16),
        scales,
        groups.astype(np.int32),
        n_bits,
    )
    same_bits(weight.widened(), dequantised(codes, zeros, scales, groups))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, "Q4_0"),
        ({"group": None}, "Q4_0"),
        ({"n_bits": 3, "zero": 0}, "Q4_0"),
        ({"n_bits": 2, "zero": 3}, "Q4_0"),
        ({"zero": 7}, "Q5_0"),
        ({"zero": 0}, "Q5_0"),
        ({"zero": 16}, "Q5_0"),
        ({"n_bits": 8, "zero": 128}, "Q8_0"),
        ({"n_bits": 8, "zero": 127}, None),
        ({"group": 16}, None),
        ({"d_in": 80, "group": 16}, None),
        ({"scale": 1 + 2.0**-11}, None),
        ({"scale": 1e5}, None),
        ({"scale": 2.0**-24}, "Q4_0"),
        ({"scale": 2.0**-25}, None),
        ({"swap": True}, None),
    ],
)
def test_which_blocks_hold_a_matrix(changes, wanted):
    given = {"n_bits": 4, "zero": 8, "group": 64, "d_in": 192, "scale": 0.5, "swap": False}
    given |= changes
    size = given["group"] or given["d_in"]
    groups = np.arange(given["d_in"]) // size
    if given["swap"]:
        groups[[0, -1]] = groups[[-1, 0]]
    n_group = groups.max() + 1
    zeros = np.full((3, n_group), given["zero"], np.int16)
    scales = np.full((3, n_group), given["scale"], np.float32)
    assert exact_format(zeros, scales, groups, given["n_bits"]) == wanted


@every_set
@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0"])
@pytest.mark.parametrize("kind", ["float32", "int16", "int8"])
@pytest.mark.parametrize("n", [1, 5, 40])
def test_the_least_integers_of_a_format_are_multiplied_right(fast, name, kind, n):
    """-128 in Q8_0, which rounding never gives; |-128| is no signed byte."""
    n_bits = int(name[1])
    codes = np.random.default_rng(0).choice([0, 2**n_bits - 1], (24, 64)).astype(np.uint8)
    if name == "Q5_0":  # codes of 4 bits, zero points 0 and 16
        n_bits, codes = 4, codes & 15
    zeros = np.full((24, 2), 2 ** (n_bits - 1), np.int16)
    if name == "Q5_0":
        zeros = np.random.default_rng(1).choice([0, 16], (24, 2)).astype(np.int16)
    scales = np.random.default_rng(2).uniform(-1, 1, (24, 2)).astype(np.float16)
    groups = np.arange(64) // 32
    weight = pack_groups(lambda rows: codes[rows], zeros, scales, groups, n_bits)
    assert weight.format == name
    x = np.random.default_rng(3).choice([-1.0, 1.0], (n, 64)).astype(np.float32)
    chosen = fast
    if kind != "float32":
        if fast.name != "compiled":
            pytest.skip("only the compiled set rounds activations")
        chosen = kernels.choose_ops(None, "numpy", kind)
    want = x.astype(np.float64) @ weight.widened().T.astype(np.float64)
    close(chosen.linear(x, weight), want, dtype="float32")


# --- GroupedWeight


@given(seed=st.integers(0, 99))
def test_the_formula_entry_by_entry(seed):
    weight = shuffled(4, 30, 3, seed)
    want = [
        [float(weight.scales[o, g]) * int(q) for q, g in zip(row, weight.groups, strict=True)]
        for o, row in enumerate(weight.values)
    ]
    same_bits(weight.widened(), np.array(want, np.float32))


@every_set
@pytest.mark.parametrize("dtype", [np.int8, np.int16])
@pytest.mark.parametrize("n", [1, 2, 17, 70])
def test_sets_multiply_by_groups(fast, n, dtype):
    weight, x = shuffled(dtype=dtype), inputs(n, 70)
    wide = weight.widened().astype(np.float64)
    bias, residual = inputs(1, 23, 1)[0], inputs(n, 23, 2)
    close(fast.linear(x, weight, bias), x.astype(np.float64) @ wide.T + bias, dtype="float32")
    want = residual + x.astype(np.float64) @ wide.T
    close(fast.linear_add(x, weight, residual), want, dtype="float32", times=2)


@every_set
def test_sets_multiply_by_stacks_with_groups(fast):
    codes = np.random.default_rng(0).integers(0, 16, (9, 64)).astype(np.uint8)
    half = np.full((9, 1), 0.5, np.float16)
    zeros, one = np.full((9, 1), 8, np.int16), np.zeros(64, np.int32)
    blocks = pack_groups(lambda rows: codes[rows], zeros, half, one, 4)
    weight, x = StackedWeight((blocks, shuffled(7, 64))), inputs(3, 64)
    want = x.astype(np.float64) @ weight.widened().T.astype(np.float64)
    close(fast.linear(x, weight), want, dtype="float32")


@every_set
def test_rows_are_those_of_the_widened_matrix(fast):
    weight = shuffled()
    wide, ids = weight.widened(), np.array([[22, 0], [3, 3]])
    same_bits(fast.embed(ids, weight), wide[ids])
    for rows in (slice(0, 0), slice(3, 9), slice(20, None), slice(1, 20, 2)):
        same_bits(weight[rows].widened(), wide[rows])
        same_bits(weight[rows, :].widened(), wide[rows])
    assert np.shares_memory(weight[3:9].values, weight.values)


def test_groups_need_nothing_but_the_array_api():
    weight, x = shuffled(), inputs(2, 70)
    with strict.ArrayAPIStrictFlags(
        api_version="2024.12",
        boolean_indexing=False,
        data_dependent_shapes=False,
        enabled_extensions=(),
    ):
        moved = weight.to(strict)
        same_bits(np.asarray(widen(moved)), weight.widened())
        same_bits(np.asarray(ops.embed(strict.asarray([2, 0]), moved)), weight.widened()[[2, 0]])
        close(ops.linear(strict.asarray(x), moved), strict.asarray(ops.linear(x, weight)), times=2)
    assert weight.to(np) is weight


def test_groups_run_on_a_device(monkeypatch):
    cupy = guard.installed(monkeypatch)
    weight, x = shuffled(), inputs(3, 70)
    moved = asarray(weight, cupy)
    assert array_namespace(moved) is cupy and moved.scales.dtype == np.float32
    same_bits(widen(moved).get(), weight.widened())
    close(ops.linear(cupy.asarray(x), moved).get(), ops.linear(x, weight), times=2)


def test_what_a_grouped_weight_tells():
    weight = shuffled(4, 6, 2)
    assert (weight.shape, len(weight), weight.ndim, weight.dtype) == ((4, 6), 4, 2, np.int8)
    assert weight.nbytes == 4 * 6 + 4 * 2 * 2 + 6 * 4 and weight.facts == "GroupedWeight"


@pytest.mark.parametrize(
    ("error", "changes", "text"),
    [
        (
            NpllmTypeError,
            {"values": np.zeros((4, 6), np.uint8)},
            "must be int8 or int16, got uint8",
        ),
        (NpllmTypeError, {"groups": np.zeros(6, np.float32)}, "groups must be int32 or int64"),
        (NpllmValueError, {"groups": np.zeros(5, np.int32)}, "groups"),
        (NpllmValueError, {"scales": np.zeros((3, 2), np.float16)}, "scales"),
    ],
)
def test_parts_that_do_not_fit(error, changes, text):
    parts = {name: getattr(shuffled(4, 6, 2), name) for name in ("values", "scales", "groups")}
    with pytest.raises(error, match=text):
        GroupedWeight(**parts | changes)


# --- PermutedWeight


def permuted(d_out=23, d_in=96, seed=0, order=None):
    """A matrix of blocks whose columns are shuffled."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (d_out, d_in)).astype(np.uint8)
    zeros, groups = np.full((d_out, d_in // 32), 8, np.int16), np.arange(d_in) // 32
    scales = rng.uniform(0.5, 1, zeros.shape).astype(np.float16)
    base = pack_groups(lambda rows: codes[rows], zeros, scales, groups, 4)
    return PermutedWeight(base, rng.permutation(d_in) if order is None else order)


@given(seed=st.integers(0, 99))
def test_column_order_i_is_column_i_of_the_base(seed):
    weight = permuted(4, 64, seed)
    wide, base = weight.widened(), weight.base.widened()
    for i, column in enumerate(weight.order):
        same_bits(wide[:, column], base[:, i])


@every_set
@pytest.mark.parametrize("n", [1, 2, 17, 70])
def test_sets_multiply_by_permuted_columns(fast, n):
    weight, x = permuted(), inputs(n, 96)
    wide = weight.widened().astype(np.float64)
    bias, residual = inputs(1, 23, 1)[0], inputs(n, 23, 2)
    close(fast.linear(x, weight, bias), x.astype(np.float64) @ wide.T + bias, dtype="float32")
    close(fast.linear(x[None], weight), (x.astype(np.float64) @ wide.T)[None], dtype="float32")
    want = residual + x.astype(np.float64) @ wide.T
    close(fast.linear_add(x, weight, residual), want, dtype="float32", times=2)
    wide_x = x.astype(np.float64)
    close(fast.linear(wide_x, weight), wide_x @ wide.T)
    with pytest.raises(NpllmValueError, match="x must be"):
        fast.linear(x[:, 1:], weight)


@pytest.mark.parametrize("kind", ["int8", "int16"])
def test_rounded_activations_are_grouped_in_the_order_of_the_base(kind):
    weight, x = permuted(), inputs(20, 96)
    y = rounded_linear(x, weight, activations=kind)
    np.testing.assert_array_equal(
        y, rounded_linear(x[:, weight.order], weight.base, activations=kind)
    )
    assert not np.array_equal(y, rounded_linear(x, weight.widened(), activations=kind))
    if kernels.compiled_ops() is not None:
        fast = kernels.choose_ops(None, "numpy", kind)
        found = fast.linear(x, weight)
        np.testing.assert_array_equal(found, fast.linear(x[:, weight.order], weight.base))
        close(found, y)


def test_permuted_columns_have_the_default_of_their_blocks():
    params = SimpleNamespace(layers=(permuted(), StackedWeight((permuted(), permuted(seed=1)))))
    assert default_activations(params) == DEFAULTS["Q4_0"] == "int8"


@pytest.mark.skipif(kernels.compiled_ops() is None, reason="Numba is not installed")
def test_the_compiled_set_never_widens_permuted_columns(monkeypatch):
    def widened(_self):
        raise AssertionError("the kernels read the base")

    monkeypatch.setattr(PermutedWeight, "widened", widened)
    assert kernels.compiled_ops().linear(inputs(3, 96), permuted()).shape == (3, 23)


@every_set
def test_rows_of_permuted_columns(fast):
    weight = permuted()
    wide, ids = weight.widened(), np.array([[22, 0], [3, 3]])
    same_bits(fast.embed(ids, weight), wide[ids])
    for rows in (slice(0, 0), slice(3, 9), slice(20, None), slice(1, 20, 2)):
        same_bits(weight[rows, :].widened(), wide[rows])


def test_permuted_columns_need_nothing_but_the_array_api():
    weight, x = permuted(), inputs(2, 96)
    with strict.ArrayAPIStrictFlags(
        api_version="2024.12",
        boolean_indexing=False,
        data_dependent_shapes=False,
        enabled_extensions=(),
    ):
        moved = weight.to(strict)
        same_bits(np.asarray(widen(moved)), weight.widened())
        same_bits(np.asarray(ops.embed(strict.asarray([2, 0]), moved)), weight.widened()[[2, 0]])
        close(ops.linear(strict.asarray(x), moved), strict.asarray(ops.linear(x, weight)), times=2)


def test_stacks_of_one_order_are_one_matrix():
    one, other = permuted(seed=1), permuted(5, seed=2)
    apart = stack([one, other])
    assert isinstance(apart, StackedWeight)
    other = permuted(5, seed=2, order=one.order)
    both = stack([one, other])
    assert isinstance(both, PermutedWeight) and isinstance(both.base, BlockWeight)
    same_bits(both.widened(), np.concatenate([one.widened(), other.widened()]))
    numbers = np.array([27, 0, 23])
    mixed = PermutedWeight(StackedWeight((one.base, inputs(2, 96))), one.order)
    same_bits(widen(mixed.take(numbers[1:])), mixed.widened()[numbers[1:]])


def test_what_a_permuted_weight_tells():
    weight = permuted()
    assert (weight.shape, len(weight), weight.dtype) == ((23, 96), 23, np.uint8)
    assert weight.nbytes == 23 * 3 * 18 + 96 * 8 and weight.facts == "PermutedWeight"
    with pytest.raises(NpllmValueError, match="order"):
        PermutedWeight(weight.base, weight.order[1:])


# --- whole folders


@pytest.mark.parametrize("name", ["gptq act-order", "pack act-order"])
def test_groups_of_32_columns_that_are_not_adjacent_are_sorted(tmp_path, name):
    packed, _ = write_pair(tmp_path, SCHEMES[name])
    weight = npllm.load(packed).params.layers[0].o_proj
    assert isinstance(weight, PermutedWeight) and weight.base.format == "Q4_0"


@every_scheme
@both_layouts
def test_a_folder_computes_what_its_floats_compute(tmp_path, scheme, layout):
    packed, floats = write_pair(tmp_path, scheme, **layout)
    want = npllm.load(floats, ops="reference")(IDS)
    model = npllm.load(packed, ops="reference")
    close(model(IDS), want, times=0)
    close(exact(packed)(IDS), want, times=4)
    matrices = [getattr(x, name) for x in model.params.layers for name in folders.FIELDS]
    assert all(isinstance(x, PackedMatrix) for x in matrices)
    assert isinstance(model.params.lm_head, np.ndarray) != scheme.head


@both_layouts
@pytest.mark.parametrize("name", ["gptq", "gptq act-order", "pack asymmetric"])
@pytest.mark.parametrize("set_", SETS, ids=lambda s: s.name)
def test_decoding_goes_on_where_the_prompt_ended(tmp_path, name, layout, set_):
    packed, floats = write_pair(tmp_path, SCHEMES[name], **layout)
    model = npllm.load(packed, ops=set_.ops)
    cache = model.new_cache(n_batch=2)
    model(IDS[:, :9], cache=cache)
    rows = [model(IDS[:, n : n + 1], cache=cache) for n in range(9, 12)]
    close(np.concatenate(rows, axis=1), npllm.load(floats)(IDS)[:, 9:], times=4)


@pytest.mark.parametrize("name", ["gptq", "gptq act-order", "pack asymmetric", "int"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@both_layouts
def test_a_float_type_holds_the_values(tmp_path, name, dtype, layout):
    packed, floats = write_pair(tmp_path, SCHEMES[name], **layout)
    ours, theirs = (npllm.load(x, dtype=dtype).params for x in (packed, floats))
    for mine, wanted in zip(ours.layers, theirs.layers, strict=True):
        for x, y in zip(mine, wanted, strict=True):
            assert x is y is None or (x.dtype == y.dtype and (x == y).all())


@pytest.mark.parametrize("name", ["gptq", "gptq act-order", "pack asymmetric", "int"])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
@both_layouts
def test_rounding_starts_from_the_values(tmp_path, name, dtype, layout):
    packed, floats = write_pair(tmp_path, SCHEMES[name], **layout)
    ours, theirs = (npllm.load(x, dtype=dtype).params for x in (packed, floats))
    for mine, wanted in zip(ours.layers, theirs.layers, strict=True):
        for field in folders.FIELDS:
            x, y = getattr(mine, field), getattr(wanted, field)
            assert type(x) is type(y) and isinstance(x, Int8Weight | BlockWeight)
            same_bits(x.widened(), y.widened())


def test_a_copy_reads_no_file_later(tmp_path):
    packed, floats = write_pair(tmp_path, SCHEMES["gptq act-order"], **LLAMA)
    model = exact(packed, mmap=False)
    content = (packed / "model.safetensors").read_bytes()
    with open(packed / "model.safetensors", "r+b") as file:
        file.seek(len(content) // 2)
        file.write(b"\xff" * (len(content) // 2))
    close(model(IDS), npllm.load(floats)(IDS), times=4)


@pytest.mark.parametrize("name", ["gptq act-order, groups of 16", "pack 3 bits"])
def test_what_is_packed_anew_is_no_view_of_the_file(tmp_path, name):
    packed, _ = write_pair(tmp_path, SCHEMES[name])
    weight = npllm.load(packed).params.layers[0].o_proj
    assert isinstance(weight, GroupedWeight)
    assert all(x.flags.writeable for x in weight.arrays)  # a view of a mapped file is not


@pytest.mark.parametrize("name", ["gptq", "gptq act-order"])
@both_layouts
def test_an_adapter_goes_on_top(tmp_path, name, layout):
    packed, floats = write_pair(tmp_path, SCHEMES[name], **layout)
    content = tiny.config_dict(**folders.SIZES)
    adapter = lora.write_adapter(tmp_path / "adapter", lora.factors(content))
    ours, theirs = (npllm.load(x, ops="reference", adapter=adapter) for x in (packed, floats))
    close(ours(IDS), theirs(IDS), times=2)


@both_layouts
@pytest.mark.parametrize("name", ["gptq", "gptq act-order", "pack asymmetric"])
def test_a_folder_runs_on_a_device(tmp_path, name, layout, monkeypatch):
    packed, floats = write_pair(tmp_path, SCHEMES[name], **layout)
    want = npllm.load(floats, ops="reference")(IDS)
    cupy = guard.installed(monkeypatch)
    model = npllm.load(packed, backend="cupy", ops="reference")
    assert array_namespace(model.params.layers[0].o_proj) is cupy
    close(model(IDS), cupy.asarray(want), times=2)


@needs_gxx
@pytest.mark.usefixtures("on_the_stand_in")
@both_layouts
@pytest.mark.parametrize("name", ["gptq act-order", "gptq act-order, groups of 16"])
def test_cuda_kernels_leave_groups_to_the_definition(tmp_path, layout, name):
    packed, floats = write_pair(tmp_path, SCHEMES[name], **layout)
    want = npllm.load(floats, ops="reference")(IDS)
    model = npllm.load(packed, backend="cupy", ops="cuda")
    cache = model.new_cache(n_batch=2)
    first, last = model(IDS[:, :11], cache=cache), model(IDS[:, 11:], cache=cache)
    close(to_numpy(first), want[:, :11], times=8)
    close(to_numpy(last), want[:, 11:], times=8)


def test_loading_reports_every_byte_once(tmp_path, monkeypatch):
    packed, _ = write_pair(tmp_path, SCHEMES["pack asymmetric"], **LLAMA)
    from npllm.checkpoints import phi3_layout

    seen, real = [], phi3_layout.progress_bar

    def bar(total, *args, **kwargs):
        seen.append(total)
        return Recorder(real(total, *args, **kwargs), seen)

    monkeypatch.setattr(phi3_layout, "progress_bar", bar)
    npllm.load(packed)
    header = int.from_bytes((packed / "model.safetensors").read_bytes()[:8], "little") + 8
    n_bytes = (packed / "model.safetensors").stat().st_size - header
    assert seen[0] == sum(seen[1:]) == n_bytes


class Recorder:
    """A progress bar that notes what it is told."""

    def __init__(self, bar, seen):
        self.bar, self.seen = bar, seen

    def __enter__(self):
        advance = self.bar.__enter__()

        def note(n_bytes, label):
            self.seen.append(n_bytes)
            advance(n_bytes, label)

        return note

    def __exit__(self, *error):
        return self.bar.__exit__(*error)


def test_one_layer_may_stay_in_floats(tmp_path):
    """modules_in_block_to_quantize, or a name in `ignore`."""
    scheme = SCHEMES["gptq"]
    content = tiny.config_dict(**folders.SIZES, **LLAMA)
    packed, floats = folders.quantised(content, scheme)
    for name in ("k_proj", "down_proj"):
        for full in [x for x in packed if name in x]:
            del packed[full]
        packed |= {full: x for full, x in floats.items() if name in full}
    given = folders.SIZES | LLAMA
    mixed = tiny.write_folder(
        tmp_path / "a", tensors=packed, quantization_config=folders.settings(scheme), **given
    )
    whole = tiny.write_folder(tmp_path / "b", tensors=floats, **given)
    model = exact(mixed)
    assert isinstance(model.params.layers[0].qkv_proj, StackedWeight)
    assert isinstance(model.params.layers[0].down_proj, np.ndarray)
    close(model(IDS), npllm.load(whole)(IDS), times=4)


def add_biases(value):
    def change(tensors):
        for name in [x for x in tensors if x.endswith(".qweight")]:
            d_out = tensors[name].shape[1]
            tensors[name.replace("qweight", "bias")] = np.full(d_out, value, np.float16)

    return change


def test_a_bias_of_zeros_is_none(tmp_path):
    packed, floats = write_pair(tmp_path, SCHEMES["gptq"], change=add_biases(0), **LLAMA)
    close(exact(packed)(IDS), npllm.load(floats)(IDS), times=4)


def test_another_bias_is_an_unknown_tensor(tmp_path):
    packed, _ = write_pair(tmp_path, SCHEMES["gptq"], change=add_biases(1), **LLAMA)
    with pytest.raises(NpllmValueError, match=r"unknown: model.layers.0.mlp.down_proj.bias"):
        npllm.load(packed)


def test_biases_that_config_names_are_added(tmp_path):
    changes = LLAMA | {"attention_bias": True, "mlp_bias": True}
    packed, floats = write_pair(tmp_path, SCHEMES["gptq"], **changes)
    close(exact(packed)(IDS), npllm.load(floats)(IDS), times=4)


def test_an_index_of_runs_counts_as_none(tmp_path):
    def change(tensors):
        for name in [x for x in tensors if x.endswith(".qweight")]:
            d_in = 8 * tensors[name].shape[0]
            tensors[name.replace("qweight", "g_idx")] = (np.arange(d_in) // 32).astype(np.int32)

    packed, _ = write_pair(tmp_path, SCHEMES["gptq"], change=change)
    assert npllm.load(packed).params.layers[0].o_proj.format == "Q4_0"


def test_an_index_that_is_not_used_counts_as_none(tmp_path):
    def change(tensors):
        for name in [x for x in tensors if x.endswith("weight_packed")]:
            d_in = 8 * tensors[name].shape[1]
            tensors[name.replace("packed", "g_idx")] = np.full(d_in, -1, np.int32)

    packed, floats = write_pair(tmp_path, SCHEMES["pack"], change=change)
    close(exact(packed)(IDS), npllm.load(floats)(IDS), times=4)


@pytest.mark.parametrize("n_bits", [2, 4, 8])
def test_a_zero_point_of_0_borrows_as_in_gptqmodel(tmp_path, n_bits):
    """`convert_gptq_v2_to_v1_format_module` subtracts 1 from every code of a word at once."""
    ones = sum(1 << bit for bit in range(0, 32, n_bits))
    scheme = Scheme(bits=n_bits, symmetric=False)

    def borrow(tensors):
        for name in [x for x in tensors if x.endswith(".qzeros")]:
            words = tensors[name].view(np.uint32).astype(np.int64) + ones  # z as they are
            words &= ~(2**n_bits - 1)  # the first of each word becomes 0
            tensors[name] = ((words - ones) % 2**32).astype(np.uint32).view(np.int32)

    packed, floats = write_pair(tmp_path, scheme, change=borrow)
    zeros = npllm.load(packed, dtype="float32").params.layers[0].o_proj
    others = npllm.load(floats).params.layers[0].o_proj
    step = 32 // n_bits
    kept = np.arange(len(zeros)) % step > 0
    assert (zeros[kept] == others[kept]).all() and (zeros[~kept] != others[~kept]).all()


def test_a_zero_point_of_0_in_3_bits_is_a_stored_7(tmp_path):
    def change(tensors):
        for name in [x for x in tensors if x.endswith(".qzeros")]:
            tensors[name] = np.full_like(tensors[name], -1)

    packed, _ = write_pair(tmp_path, SCHEMES["gptq 3 bits"], change=change)
    assert (npllm.load(packed, dtype="float32").params.layers[0].o_proj >= 0).all()


# --- what else reads a folder


def test_inspect_counts_weights_and_not_words(tmp_path):
    packed, floats = write_pair(tmp_path, SCHEMES["gptq asymmetric"])
    ours, theirs = checkpoint_facts(packed), checkpoint_facts(floats)
    for name in ("parameters", "parameters_by_part", "kv_bytes_per_token", "tree"):
        assert ours[name] == theirs[name]
    assert ours["dtypes"] == ["float32", "gptq int4"]
    kind = ours["types"]["gptq int4"]
    assert kind["tensors"] == 8
    assert kind["bits_per_weight"] == pytest.approx(4 + (16 + 4) / 32)
    header = int.from_bytes((packed / "model.safetensors").read_bytes()[:8], "little") + 8
    assert ours["bytes"] == (packed / "model.safetensors").stat().st_size - header


def test_scales_that_are_not_finite_are_found(tmp_path):
    def change(tensors):
        tensors["model.layers.1.mlp.down_proj.scales"][1, 2] = np.nan

    packed, _ = write_pair(tmp_path, SCHEMES["gptq"], change=change)
    assert find_nonfinite(packed) == {"model.layers.1.mlp.down_proj.scales": (1, 0)}
    with pytest.raises(
        NpllmValueError, match=r"model.safetensors: model.layers.1.mlp.down_proj.scales must be fin"
    ):
        npllm.load(packed)


def test_merging_is_refused(tmp_path):
    packed, _ = write_pair(tmp_path, SCHEMES["gptq"])
    (tmp_path / "adapter").mkdir()
    with pytest.raises(NpllmValueError, match="quantised by gptq, which take no sum: merge"):
        npllm.merge(packed, tmp_path / "adapter", tmp_path / "out")


def test_a_changed_config_names_no_quantisation(tmp_path):
    packed, _ = write_pair(tmp_path, SCHEMES["gptq"])
    model = npllm.load(packed)
    assert config_content(model) == json.loads((packed / "config.json").read_text())
    model.folder = None
    assert "quantization" not in " ".join(config_content(model))


# --- what is refused


def broken(change, name="gptq"):
    """A test case: the scheme, and how its tensors are spoiled."""
    return name, change


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, x):
    return lambda tensors: tensors.update({name: x})


def cell(name, index, value):
    def change(tensors):
        tensors[name][index] = value

    return change


DOWN = "model.layers.1.mlp.down_proj."


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("gptq", drop(DOWN + "qzeros"), f"missing: {DOWN}qzeros"),
        ("gptq", drop(DOWN + "qweight"), f"missing: {DOWN}qweight"),
        ("gptq", put(DOWN + "weight", np.zeros((64, 96), np.float32)), f"unknown: {DOWN}weight"),
        (
            "gptq",
            put(DOWN + "qweight", np.zeros((96, 8), np.int32)),
            f"{DOWN}qweight must be [12, 64], got [96, 8]",
        ),
        (
            "gptq",
            put(DOWN + "scales", np.zeros((3, 64))),
            f"wrong dtype: {DOWN}scales must be F16 or BF16 or F32, got F64",
        ),
        (
            "gptq",
            put(DOWN + "qweight", np.zeros((12, 64), np.float32)),
            f"{DOWN}qweight must be I32, got F32",
        ),
        (
            "gptq act-order",
            cell(DOWN + "g_idx", 3, 3),
            f"model.safetensors: {DOWN}g_idx must lie in 0 ... n_group - 1 = 2, got 0 ... 3",
        ),
        ("gptq act-order", cell(DOWN + "g_idx", 3, -1), "got -1 ... 2"),
        (
            "gptq",
            cell(DOWN + "qzeros", (0, 0), 0x77777778),
            f"{DOWN}qzeros must stand for the zero point 8 (config.json says sym: true), got 9",
        ),
        ("gptq", cell(DOWN + "scales", (0, 0), np.inf), f"{DOWN}scales must be finite"),
        ("pack", cell(DOWN + "weight_scale", (0, 0), 3e38), f"{DOWN}weight_scale must be finite"),
        (
            "pack",
            cell(DOWN + "weight_shape", 1, 95),
            f"model.safetensors: {DOWN}weight_shape must be [64, 96], got [64, 95]",
        ),
        (
            "pack",
            put(DOWN + "weight_zero_point", np.zeros((8, 3), np.int32)),
            f"unknown: {DOWN}weight_zero_point",
        ),
        ("pack asymmetric", drop(DOWN + "weight_zero_point"), f"missing: {DOWN}weight_zero_point"),
        (
            "pack asymmetric",
            cell("lm_head.weight_zero_point", (-1, 0), -1),
            "lm_head.weight_zero_point must hold 0 after the 61 codes of a row, got other bits",
        ),
        (
            "naive 4 bits",
            cell(DOWN + "weight", (5, 5), 8),
            f"{DOWN}weight must lie in -8 ... 7, got -8 ... 8",
        ),
        (
            "int",
            put(DOWN + "weight", np.zeros((64, 96), np.float32)),
            f"{DOWN}weight must be I8, got F32",
        ),
    ],
)
def test_tensors_that_contradict_the_config(tmp_path, name, change, text):
    packed, _ = write_pair(tmp_path, SCHEMES[name], change=change)
    with pytest.raises(NpllmValueError) as caught:
        npllm.load(packed)
    assert text in str(caught.value) and str(tmp_path) in str(caught.value)


def test_bits_after_the_last_code_are_refused(tmp_path):
    def change(tensors):
        tensors["model.layers.0.mlp.down_proj.weight_packed"][3, -1] |= 1 << 30

    sizes = {"intermediate_size": 90}
    packed, floats = write_pair(tmp_path / "a", SCHEMES["pack"].but(group=None), **sizes)
    close(exact(packed)(IDS), npllm.load(floats)(IDS), times=4)
    packed, _ = write_pair(tmp_path / "b", SCHEMES["pack"].but(group=None), change=change, **sizes)
    with pytest.raises(NpllmValueError, match="must hold 0 after the 90 codes of a row"):
        npllm.load(packed)


def test_all_that_is_wrong_stands_in_one_error(tmp_path):
    def change(tensors):
        del tensors[DOWN + "scales"]
        tensors["spare"] = np.zeros(3, np.float32)
        tensors[DOWN + "qweight"] = tensors[DOWN + "qweight"][1:]

    packed, _ = write_pair(tmp_path, SCHEMES["gptq"], change=change)
    with pytest.raises(NpllmValueError) as caught:
        npllm.load(packed)
    for text in (f"missing: {DOWN}scales", "unknown: spare", f"{DOWN}qweight must be [12, 64]"):
        assert text in str(caught.value)


def test_a_gptq_v2_file_that_says_gptq_is_noticed(tmp_path):
    packed, _ = write_pair(tmp_path, Scheme("gptq_v2"))
    content = json.loads((packed / "config.json").read_text())
    content["quantization_config"]["checkpoint_format"] = "gptq"
    tiny.write_json(packed / "config.json", content)
    with pytest.raises(NpllmValueError, match="got 9; is checkpoint_format gptq right"):
        npllm.load(packed)


@pytest.mark.parametrize("seed", range(draws(60, 2000)))
def test_whatever_bytes_stand_in_the_file_the_error_is_ours(tmp_path, seed):
    rng = np.random.default_rng(seed)
    scheme = [*SCHEMES.values()][seed % len(SCHEMES)]

    def change(tensors):
        for name in rng.choice([*tensors], 3):
            raw = rng.integers(0, 256, tensors[name].nbytes).astype(np.uint8)
            tensors[name] = raw.view(tensors[name].dtype).reshape(tensors[name].shape)

    packed, _ = write_pair(tmp_path, scheme, change=change)
    try:
        params = npllm.load(packed).params
    except NpllmError as error:
        assert len(str(error)) < 3000
    else:
        for layer in params.layers:
            assert all(np.isfinite(getattr(layer, x)[:9].widened()).all() for x in folders.FIELDS)


@pytest.mark.parametrize("change", [{"bits": 8}, {"group_size": 16}, None])
def test_a_wrong_or_absent_setting_is_named(tmp_path, change):
    path = write_pair(tmp_path, SCHEMES["gptq asymmetric"])[0]
    content = json.loads((path / "config.json").read_text())
    if change is None:
        del content["quantization_config"]
    else:
        content["quantization_config"] |= change
    tiny.write_json(path / "config.json", content)
    wanted = "packed matrices need quantization_config" if change is None else "bits and group_size"
    with pytest.raises(NpllmValueError, match=wanted):
        npllm.load(path)


@pytest.mark.parametrize("name", ["gptq act-order", "pack act-order"])
def test_groups_that_need_not_be_adjacent_must_be_in_the_file(tmp_path, name):
    path = write_pair(tmp_path, SCHEMES[name])[0]
    content = json.loads((path / "config.json").read_text())
    settings = content["quantization_config"]
    if name.startswith("gptq"):
        settings["desc_act"] = True
    else:
        settings["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    tiny.write_json(path / "config.json", content)
    npllm.load(path)
    tensors = load_file(path / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "g_idx" not in k}, path / "model.safetensors")
    with pytest.raises(NpllmValueError, match="g_idx"):
        npllm.load(path)
