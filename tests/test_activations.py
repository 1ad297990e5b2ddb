"""Rounded activations: their formulas, what linear makes of them, sets, models, errors."""

import pickle

import guard
import ml_dtypes
import numpy as np
import optional
import pytest
from blocks import FORMAT_NAMES, random_weight
from close import close
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_ids, write_folder

import npllm
from npllm import kernels, ops
from npllm.arrays import widen
from npllm.errors import NpllmValueError
from npllm.ops.rounded import FEWEST_ROWS, rounded_linear
from npllm.quantized.activations import (
    ACTIVATIONS,
    DEFAULTS,
    default_activations,
    is_rounded_for,
    restore,
    round_activations,
    rounded_values,
)
from npllm.quantized.int8 import quantize
from npllm.quantized.stacked import StackedWeight

LIMITS = {"int8": 127, "int16": 32767}
ROWS = {
    "n": st.integers(1, 4),
    "d": st.sampled_from([1, 31, 32, 33, 64, 96, 100]),
    "group": st.sampled_from([32, 64]),
    "seed": st.integers(0, 99),
    "scale": st.sampled_from([1e-28, 1e-3, 1.0, 1e30]),
    "kind": st.sampled_from(list(LIMITS)),
}


def rows(n, d, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal((n, d)) * scale).astype(np.float32)


def naive(x, kind, group):
    """What each entry stands for, one by one, in float64."""
    y = np.zeros(x.shape)
    for r, row in enumerate(x.astype(np.float64)):
        for start in range(0, len(row), group):
            part = row[start : start + group]
            step = np.abs(part).max() / LIMITS[kind]
            y[r, start : start + group] = np.rint(part / step) * step
    return y


@given(**ROWS)
def test_an_entry_is_off_by_half_a_step_and_codes_fill_their_range(n, d, group, seed, scale, kind):
    x = rows(n, d, seed, scale)
    codes, scales = round_activations(x, kind, group)
    assert codes.dtype == np.dtype(kind) and scales.shape == (n, -(-d // group))
    steps = np.repeat(scales, group, axis=1)[:, :d].astype(np.float64)
    off = np.abs(restore(codes, scales, group).astype(np.float64) - x)
    assert (off <= (0.5 + LIMITS[kind] * 2.0**-22) * steps).all()
    for start in range(0, d, group):
        assert (np.abs(codes[:, start : start + group].astype(int)).max(1) == LIMITS[kind]).all()
    near = np.abs(restore(codes, scales, group) - naive(x, kind, group)) <= 1e-6 * np.abs(x) + 1e-35
    assert near.mean() > 0.97  # others lie half way between two codes


def test_small_groups_are_zero_and_those_with_infinity_or_nan_are_nan():
    x = np.ones((4, 64), np.float32)
    x[0] *= 2.0**-101
    x[1, 3], x[2, 40] = np.inf, np.nan
    for kind in LIMITS:
        y = rounded_values(x, kind, 32)
        assert (y[0] == 0).all() and (y[3] == 1).all()
        assert np.isnan(y[1, :32]).all() and (y[1, 32:] == 1).all()
        assert np.isnan(y[2, 32:]).all() and (y[2, :32] == 1).all()


def test_bfloat16_is_the_nearest_and_float32_is_left_alone():
    x = rows(3, 8)
    assert rounded_values(x, "float32") is x
    close(rounded_values(x, "bfloat16"), x.astype(ml_dtypes.bfloat16).astype(np.float32), times=0)


@pytest.mark.parametrize("kind", ["int8", "int16", "bfloat16"])
def test_the_definitions_run_on_other_libraries(kind, monkeypatch):
    guard.installed(monkeypatch)
    x = rows(20, 96)
    w = rows(5, 96).astype(ml_dtypes.bfloat16) if kind == "bfloat16" else quantize(rows(5, 96))
    here = rounded_linear(x, w, activations=kind)
    there = guard.moved(w) if kind == "bfloat16" else w.to(guard.xp)
    got = rounded_linear(guard.moved(x), there, activations=kind)
    close(got.get(), here)
    if kind != "bfloat16":
        strict = optional.module("array_api_strict")
        codes, scales = round_activations(strict.asarray(x), kind, 32)
        close(np.asarray(restore(codes, scales, 32)), rounded_values(x, kind, 32), times=0)


@pytest.mark.parametrize("kind", ["int8", "int16", "bfloat16"])
def test_linear_rounds_from_seventeen_rows_on_and_for_fitting_weights_only(kind):
    x, w = rows(FEWEST_ROWS, 64), rows(7, 64)
    weights = {"int": quantize(w), "bfloat16": w.astype(ml_dtypes.bfloat16), "float32": w}
    fitting = "bfloat16" if kind == "bfloat16" else "int"
    for name, weight in weights.items():
        y = rounded_linear(x, weight, activations=kind)
        values = rounded_values(x, kind, 64) if name == fitting else x
        gold = values.astype(np.float64) @ widen(weight, np.float32).astype(np.float64).T
        close(y, gold, dtype="float32")
        few = rounded_linear(x[1:], weight, activations=kind)
        close(few, ops.linear(x[1:], weight), times=0)
    assert (
        np.abs(
            ops.linear(x, weights[fitting]) - rounded_linear(x, weights[fitting], activations=kind)
        ).max()
        > 1e-5
    )


def test_which_weights_each_kind_is_for():
    blocks, array = random_weight("Q4_0", 4, 64), rows(4, 64).astype(ml_dtypes.bfloat16)
    stack = StackedWeight((blocks, random_weight("Q8_0", 4, 64)))
    mixed = StackedWeight((blocks, array))
    for kind in ("int8", "int16"):
        assert is_rounded_for(blocks, kind) and is_rounded_for(stack, kind)
        assert not is_rounded_for(mixed, kind) and not is_rounded_for(array, kind)
    assert is_rounded_for(array, "bfloat16")
    assert not any(is_rounded_for(w, "bfloat16") for w in (blocks, stack, rows(4, 64)))
    assert not any(is_rounded_for(w, "float32") for w in (blocks, array))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("rounded"))


@pytest.mark.parametrize("ops_name", ["fast", "blockwise", "reference"])
@pytest.mark.parametrize(
    ("dtype", "kind"), [("int8", "int8"), ("int8", "int16"), ("bfloat16", "bfloat16")]
)
def test_a_model_says_what_it_rounds_and_keeps_it_through_a_pickle(folder, dtype, kind, ops_name):
    model = npllm.load(folder, dtype=dtype, activations=kind, ops=ops_name)
    assert model.ops.activations == kind and f"({kind} activations)" in repr(model)
    again = pickle.loads(pickle.dumps(model))
    assert again.ops is model.ops
    ids = random_ids(1, 24)
    plain = npllm.load(folder, dtype=dtype, ops=ops_name, activations="float32")
    assert plain.ops.activations == "float32"
    few = ids[:, : FEWEST_ROWS - 1]
    close(model(few), plain(few), times=0)
    assert np.abs(model(ids) - plain(ids)).max() > 0
    tapped = model(ids, tap=lambda _name, x: x)
    assert np.abs(tapped - plain(ids)).max() > 0


def test_every_value_that_is_no_kind_raises(folder):
    for value in ("int4", "", 8, True, "INT8"):
        with pytest.raises(NpllmValueError, match="activations must be one of float32, int16"):
            npllm.load(folder, activations=value)
    assert npllm.load(folder, activations="float32").ops is npllm.load(folder).ops


@pytest.mark.parametrize(
    ("dtype", "kind", "message"),
    [
        ("bfloat16", "int8", 'activations="int8" goes with weights in int8 .* got bfloat16'),
        ("float32", "bfloat16", 'activations="bfloat16" goes with bfloat16 weights, got float32'),
        ("int8", "bfloat16", "got Int8Weight"),
        ("float64", "int16", "got float64"),
    ],
)
def test_a_kind_that_applies_to_no_weight_raises_and_quotes_both(folder, dtype, kind, message):
    with pytest.raises(NpllmValueError, match=message):
        npllm.load(folder, dtype=dtype, activations=kind)


def test_a_set_of_ones_own_refuses_another_kind(folder):
    with pytest.raises(NpllmValueError, match=r"needs a set by its name .* 'reference'"):
        npllm.load(folder, dtype="int8", activations="int8", ops=ops.reference)
    rounded = kernels.choose_ops("reference", activations="int8")
    assert npllm.load(folder, dtype="int8", activations="int8", ops=rounded).ops is rounded
    own = rounded.replace(rms_norm=ops.rms_norm)
    assert own.activations == "int8" and own.linear is rounded.linear


def test_without_numba_the_definition_runs(folder, monkeypatch):
    tiled = kernels.tiled_ops()
    monkeypatch.setattr(kernels, "fastest_ops", lambda _backend: tiled)
    model = npllm.load(folder, dtype="int8", activations="int8")
    assert model.ops.name == "tiled (int8 activations)"
    assert model.ops.linear.func is rounded_linear and model.ops.mlp_block is None
    x, w = rows(20, 64), quantize(rows(6, 64))
    close(model.ops.linear(x, w), rounded_linear(x, w, activations="int8"), times=0)


def test_activations_are_listed_in_the_docstring_of_load():
    for kind in ACTIVATIONS:
        assert f'"{kind}"' in npllm.load.__doc__


# ------------------------------------------------------------------------- what None stands for


class Weights:
    """Layers of a vector and a matrix each, of these types."""

    def __init__(self, *names):
        made = {"int8": quantize(rows(4, 256)), "float": rows(4, 256)}
        packed = {x: random_weight(x, 4, 256) for x in names if x not in made}
        self.layers = tuple((rows(1, 256)[0], (made | packed)[x]) for x in names)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["float"], "float32"),
        (["int8"], "int16"),
        (["Q8_0"], "int16"),
        (["Q6_K"], "float32"),
        (["Q5_K"], "int8"),
        (["Q4_K", "Q4_K", "Q6_K"], "int8"),
        (["Q6_K", "Q6_K", "Q4_K"], "float32"),
        (["float", "float", "Q4_0"], "int8"),
    ],
)
def test_the_type_of_most_weights_says_what_is_rounded(names, kind):
    assert default_activations(Weights(*names)) == kind


def test_every_packed_type_has_a_default():
    assert set(DEFAULTS) == {"int8", "grouped", *FORMAT_NAMES} and set(DEFAULTS.values()) <= set(
        ACTIVATIONS
    )


@pytest.mark.parametrize("has_instruction", [True, False])
def test_the_fastest_set_rounds_by_itself_where_bytes_are_multiplied_faster(
    folder, monkeypatch, has_instruction
):
    monkeypatch.setattr(kernels, "multiplies_integers", lambda: has_instruction)
    is_compiled = kernels.compiled_ops() is not None
    kind = "int16" if has_instruction and is_compiled else "float32"
    model = npllm.load(folder, dtype="int8")
    assert model.ops.activations == kind
    assert model.ops is kernels.choose_ops(None, activations=kind)
    assert pickle.loads(pickle.dumps(model)).ops is model.ops
    for plain in ("reference", "blockwise", kernels.fastest_ops(), kernels.tiled_ops()):
        assert npllm.load(folder, dtype="int8", ops=plain).ops.activations == "float32"
    assert npllm.load(folder, dtype="int8", activations="float32").ops is kernels.fastest_ops()
    assert npllm.load(folder).ops is kernels.fastest_ops()
