"""Weights in 8 bits: what rounding does, what linear and embed make of it, and whole models."""

from dataclasses import FrozenInstanceError

import numpy as np
import oracles
import pytest
from close import close
from composed import Composed, definitions
from hypothesis import given
from hypothesis import strategies as st
from tiny import CONFIG, random_ids, weights, write_folder

import npllm
from npllm import NpllmError, kernels, ops
from npllm.errors import NpllmValueError
from npllm.quantized import int8
from npllm.quantized.int8 import GROUP, Int8Weight, quantize

SHAPES = {
    "d_out": st.integers(1, 40),
    "d_in": st.sampled_from([1, 5, 63, 64, 65, 128, 192]),
    "seed": st.integers(0, 99),
    "scale": st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
}
SETS = [Composed(s) for s in (ops.reference, kernels.tiled_ops(), kernels.compiled_ops()) if s]
every_set = pytest.mark.parametrize("fast", SETS, ids=lambda s: s.name)
LEAST, MOST = 127 * 2.0**-14, 127 * 65504.0  # largest entries of groups whose scales are normal


def matrix(d_out, d_in, seed, scale=1.0):
    return (np.random.default_rng(seed).standard_normal((d_out, d_in)) * scale).astype(np.float32)


def with_float32_scales(weight):
    """The same numbers, with scales of the other type."""
    return Int8Weight(weight.values, weight.scales.astype(np.float32))


def expanded(weight):
    """The values one by one."""
    return np.array(
        [
            [
                float(weight.scales[o, i // GROUP]) * int(weight.values[o, i])
                for i in range(weight.shape[1])
            ]
            for o in range(weight.shape[0])
        ]
    )


@given(**SHAPES)
def test_no_entry_is_off_by_more_than_half_a_step_and_the_largest_hardly_at_all(
    d_out, d_in, seed, scale
):
    w = matrix(d_out, d_in, seed, scale)
    q = quantize(w)
    off = np.abs(q.widened() - w)
    steps = np.repeat(q.scales, GROUP, axis=1)[:, :d_in]
    assert (off <= 0.5001 * steps).all()
    assert q.values.dtype == np.int8 and q.values.min() >= -127
    for start in range(0, d_in, GROUP):
        assert (np.abs(q.values[:, start : start + GROUP]).max(axis=1) == 127).all()
    close(q.widened(), expanded(q), dtype="float32")


@given(**SHAPES | {"scale": st.integers(-40, 40).map(lambda k: 2.0**k)})
def test_scales_are_float16_where_the_largest_is_a_normal_number(d_out, d_in, seed, scale):
    w = matrix(d_out, d_in, seed, scale)
    w[0] = 0  # a group of zeros has no say
    padded = np.pad(w, [(0, 0), (0, -d_in % GROUP)]).reshape(d_out, -1, GROUP)
    exact = np.abs(padded).max(axis=-1) / np.float32(127)
    with np.errstate(over="ignore"):
        half = exact.astype(np.float16)
    short = (exact < 2.0**-14) & (half.astype(np.float64) < exact)
    half += np.where(short, np.float16(2.0**-24), np.float16(0))
    fits = half.max() == 0 or 2.0**-14 <= half.max() < np.inf
    q = quantize(w)
    assert q.scales.dtype == (np.float16 if fits else np.float32)
    close(q.scales.astype(np.float32), (half if fits else exact).astype(np.float32), times=0)


@pytest.mark.parametrize("row", [0, 4])
@pytest.mark.parametrize(
    ("largest", "dtype"),
    [
        (0, np.float16),
        (LEAST, np.float16),
        (0.99 * LEAST, np.float16),
        (127 * 2.0**-20 * 1.01, np.float16),
        (1e-30, np.float16),
        (MOST, np.float16),
        (1.001 * MOST, np.float32),
    ],
)
def test_a_group_of_another_size_than_the_rest(largest, dtype, row, monkeypatch):
    """In the first or in the last band of rows; a scale that is too large decides for all."""
    monkeypatch.setattr(int8, "BLOCK", GROUP)  # bands of a row
    w = matrix(5, 2 * GROUP, 0)
    w[row, :GROUP] *= largest / np.abs(w[row, :GROUP]).max()
    q = quantize(w)
    assert q.scales.dtype == dtype
    off = np.abs(q.widened().astype(np.float64) - w)
    assert (off <= 0.5001 * np.repeat(q.scales, GROUP, axis=1).astype(np.float64)).all()


@pytest.mark.parametrize(
    ("largest", "dtype"), [(LEAST, np.float16), (0.99 * LEAST, np.float32), (1e-30, np.float32)]
)
def test_a_matrix_of_small_numbers_keeps_scales_in_float32(largest, dtype):
    w = matrix(5, 2 * GROUP, 0)
    w *= largest / np.abs(w).max()
    q = quantize(w)
    assert q.scales.dtype == dtype
    off = np.abs(q.widened().astype(np.float64) - w)
    assert (off <= 0.5001 * np.repeat(q.scales, GROUP, axis=1).astype(np.float64)).all()


def test_nan_raises_behind_a_scale_that_is_too_large_for_float16(monkeypatch):
    monkeypatch.setattr(int8, "BLOCK", GROUP)
    w = np.full((50, GROUP), np.float32(1e30))  # each thread stops at its first band
    w[49, 3] = np.nan
    with pytest.raises(NpllmValueError, match="NaN or infinity cannot be rounded to int8"):
        quantize(w)


def test_the_error_is_that_of_float32_scales():
    w = matrix(64, 3072, 0)
    steps = np.abs(w.reshape(64, -1, GROUP)).max(axis=-1, keepdims=True) / np.float32(127)
    exact = (np.rint(w.reshape((64, -1, GROUP)) / steps) * steps).reshape(w.shape)
    lost = [np.sqrt(np.mean((y - w) ** 2)) for y in (quantize(w).widened(), exact)]
    assert quantize(w).scales.dtype == np.float16 and lost[0] <= 1.0003 * lost[1]


@given(**SHAPES)
def test_rounding_is_symmetric_and_rounding_again_changes_nothing(d_out, d_in, seed, scale):
    q = quantize(matrix(d_out, d_in, seed, scale))
    close(quantize(-matrix(d_out, d_in, seed, scale)).widened(), -q.widened(), times=0)
    close(quantize(q.widened()).values, q.values)


def test_a_group_of_zeros_stays_zero_and_one_of_denormals_stays_finite():
    w = matrix(3, 192, 0)
    w[:, :64], w[:, 64:128] = 0, 1e-44
    y = quantize(w).widened()
    assert (y[:, :64] == 0).all() and np.isfinite(y).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_has_no_scale_raises(bad):
    w = matrix(3, 70, 0)
    w[2, 69] = bad
    with pytest.raises(NpllmValueError, match="NaN or infinity cannot be rounded to int8"):
        quantize(w)


@every_set
@given(n=st.sampled_from([1, 2, 5, 16, 17, 70]), **SHAPES)
def test_linear_takes_it(fast, n, d_out, d_in, seed, scale):
    x, q = matrix(n, d_in, seed + 1), quantize(matrix(d_out, d_in, seed, scale))
    close(fast.linear(x, q), x.astype(np.float64) @ expanded(q).T, dtype="float32")
    residual = matrix(n, d_out, seed)
    y, want = fast.linear_add(x, q, residual), residual + x.astype(np.float64) @ expanded(q).T
    terms = (
        np.abs(residual) + np.abs(x) @ np.abs(expanded(q)).T
    )  # the sum may be far smaller than what it is made of
    assert y.dtype == np.float32 and (np.abs(y - want) <= 5e-6 * terms).all()


@every_set
@given(
    n=st.sampled_from([1, 3, 17, 70]),
    d_out=st.integers(1, 20),
    d_in=SHAPES["d_in"],
    seed=SHAPES["seed"],
)
def test_the_gated_product_takes_it(fast, n, d_out, d_in, seed):
    x, gain, q = (
        matrix(n, d_in, seed + 1),
        matrix(1, d_in, seed + 2)[0],
        quantize(matrix(2 * d_out, d_in, seed)),
    )
    want = definitions.norm_swiglu(x.astype(np.float64), gain.astype(np.float64), 1e-5, expanded(q))
    y = fast.norm_swiglu(x, gain, 1e-5, q)
    assert (
        y.dtype == np.float32
        and (
            np.abs(y - want) <= oracles.gated_bound(oracles.rms_norm(x, gain, 1e-5), expanded(q))
        ).all()
    )


@every_set
@pytest.mark.parametrize("d_in", [64, 1024, 1088, 2112, 100])
def test_rows_have_the_same_bits_alone_in_company_and_with_either_type_of_scales(fast, d_in):
    """More groups than are scaled at once, whole spans and others."""
    x, q = matrix(16, d_in, 1), quantize(matrix(21, d_in, 0))
    assert q.scales.dtype == np.float16
    other, residual, gain = with_float32_scales(q), matrix(16, 21, 2), matrix(1, d_in, 3)[0]
    want = x.astype(np.float64) @ expanded(q).T
    for n in range(1, 17):
        y = fast.linear(x[:n], q)
        close(y, want[:n], dtype="float32")
        close(fast.linear(x[:n], other), y, times=0)
        if fast.name.startswith("compiled"):
            close(y, np.concatenate([fast.linear(row[None], q) for row in x[:n]]), times=0)
    for n in (1, 16, 17, 70):
        rows = matrix(n, d_in, 4)
        y = fast.linear(rows, q)
        close(y, rows.astype(np.float64) @ expanded(q).T, dtype="float32")
        close(fast.linear(rows, other), y, times=0)
        if n <= 16:
            y = fast.linear_add(rows, q, residual[:n])
            close(fast.linear_add(rows, other, residual[:n]), y, times=0)
        y = fast.norm_swiglu(rows, gain, 1e-5, q[:20])
        close(fast.norm_swiglu(rows, gain, 1e-5, other[:20]), y, times=0)
    ids = np.array([[3, 20, 0]])
    close(fast.embed(ids, q), q.widened()[ids], times=0)
    close(fast.embed(ids, other), q.widened()[ids], times=0)


@every_set
def test_subnormal_scales_and_scales_that_are_nan(fast):
    """`quantize` makes none; a caller may."""
    q = quantize(matrix(5, 128, 0))
    scales = q.scales.copy()
    scales[1], scales[3, 1] = 2.0**-20, np.nan
    for n in (1, 2, 4, 70):
        x = matrix(n, 128, 1)
        y = fast.linear(x, Int8Weight(q.values, scales))
        want = x.astype(np.float64) @ expanded(Int8Weight(q.values, scales)).T
        assert np.isnan(y[:, 3]).all() and np.isnan(y).sum() == n
        close(y[:, [0, 1, 2, 4]], want[:, [0, 1, 2, 4]], dtype="float32")


@every_set
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_of_x_with_nan_or_infinity(fast, bad):
    q = quantize(np.abs(matrix(5, 192, 0)) + 0.1)
    for n in (1, 2, 4, 16, 70):
        x = matrix(n, 192, 1)
        x[n - 1, 130] = bad
        y = fast.linear(x, q)
        assert np.isfinite(y[: n - 1]).all()
        assert (np.isnan(y[-1]) if np.isnan(bad) else y[-1] == bad).all()


@given(**SHAPES)
def test_embed_takes_it(d_out, d_in, seed, scale):
    q = quantize(matrix(d_out, d_in, seed, scale))
    ids = np.random.default_rng(seed).integers(0, d_out, (2, 3))
    close(ops.embed(ids, q), expanded(q)[ids], dtype="float32")


def test_rows_can_be_cut_and_nothing_else():
    q = quantize(matrix(9, 70, 0))
    close(q[2:5].widened(), q.widened()[2:5], times=0)
    close(q[2:5, :].widened(), q.widened()[2:5], times=0)
    assert len(q) == 9 and q.nbytes == 9 * (70 + 2 * 2)
    for index in (3, (slice(None), slice(0, 3))):
        with pytest.raises(NpllmValueError, match="slices of rows only"):
            q[index]


def test_values_and_scales_must_fit():
    with pytest.raises(
        NpllmValueError, match=r"scales must be \[d_out, n_group\] = \[4, 2\], got \[4, 1\]"
    ):
        Int8Weight(np.zeros((4, 65), np.int8), np.zeros((4, 1), np.float32))


# ---------------------------------------------------------------------------------------------------------------- whole models


def test_a_loaded_model_computes_with_the_rounded_matrices(tmp_path):
    folder = write_folder(tmp_path)
    rounded = {
        name: quantize(x).widened() if x.ndim == 2 else x for name, x in weights(CONFIG).items()
    }
    ids = random_ids(2, 20)
    want = npllm.load(write_folder(tmp_path / "rounded", tensors=rounded), dtype="float64")(ids)
    for fast in SETS:
        m = npllm.load(folder, dtype="int8", ops=fast.ops)
        matrices = [x for layer in m.params.layers for x in layer if isinstance(x, Int8Weight)]
        assert {x.scales.dtype for x in (*matrices, m.params.lm_head)} == {np.dtype(np.float16)}
        close(m(ids), want, dtype="float32", times=4)
        cache = m.new_cache(2)
        for n in range(20):
            step = m(ids[:, n : n + 1], cache=cache)
        close(step[:, -1], want[:, -1], dtype="float32", times=4)


def test_a_layer_with_float32_scales_among_others_changes_no_bit(tmp_path):
    folder = write_folder(tmp_path, hidden_size=64, intermediate_size=128)  # whole groups
    m = npllm.load(folder, dtype="int8")
    first, *others = m.params.layers
    wide = first._replace(
        qkv_proj=with_float32_scales(first.qkv_proj), down_proj=with_float32_scales(first.down_proj)
    )
    params = m.params._replace(
        layers=(wide, *others), embed_tokens=with_float32_scales(m.params.embed_tokens)
    )
    mixed, ids, logits = npllm.Model(m.config, params, ops=m.ops), random_ids(1, 24), []
    for one in (m, mixed):
        cache = one.new_cache(1)
        parts = ids[:, :20], *(ids[:, n : n + 1] for n in range(20, 24))
        logits.append([one(part, cache=cache)[:, -1:] for part in parts])
    close(np.concatenate(logits[1], axis=1), np.concatenate(logits[0], axis=1), times=0)


def test_another_array_library_gets_float32_scales():
    strict = pytest.importorskip("array_api_strict")
    q = quantize(matrix(5, 70, 0))
    moved = q.to(strict)
    assert q.scales.dtype == np.float16 and moved.scales.dtype == strict.float32
    close(np.asarray(moved.widened()), q.widened(), times=0)
    assert q.to(np) is q


def test_a_split_llama_folder_loads_in_8_bits(tmp_path):
    folder = write_folder(
        tmp_path, model_type="llama", architectures=["LlamaForCausalLM"], sliding_window=...
    )
    m, plain = npllm.load(folder, dtype="int8"), npllm.load(folder)
    ids = random_ids(1, 9)
    assert isinstance(m.params.layers[0].qkv_proj, Int8Weight)
    assert np.abs(m(ids) - plain(ids)).max() < 0.1 * np.abs(plain(ids)).max()


def test_nan_in_a_checkpoint_names_file_and_tensor(tmp_path):
    tensors = weights(CONFIG)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = np.nan
    with pytest.raises(
        NpllmError,
        match=r"model.safetensors: model.layers.1.mlp.down_proj.weight: .*NaN or infinity",
    ):
        npllm.load(write_folder(tmp_path, tensors=tensors), dtype="int8")


@pytest.mark.weights
def test_the_default_model_keeps_its_mind(default_folder, default_model):
    m = npllm.load(default_folder, dtype="int8")
    ids = np.array([m.tokenizer.encode("The capital of France is")])
    logits, plain = m(ids)[0, -1], default_model(ids)[0, -1]
    assert logits.argmax() == plain.argmax()
    assert np.sqrt(np.mean((logits - plain) ** 2)) < 0.05 * np.std(plain)


@every_set
def test_entries_of_another_type_are_left_to_the_definition(fast):
    plain = quantize(np.random.default_rng(0).standard_normal((8, 64)))
    x = np.random.default_rng(1).standard_normal((1, 64)).astype(np.float32)
    for other in (
        Int8Weight(plain.values.astype(np.int16), plain.scales),
        Int8Weight(plain.values, plain.scales.astype(np.float64)),
    ):
        close(fast.linear(x, other), ops.linear(x, plain), times=4)


def test_a_weight_in_8_bits_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        quantize(np.ones((2, 64))).values = np.zeros((2, 64), np.int8)
