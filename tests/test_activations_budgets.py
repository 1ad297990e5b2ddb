"""Budgets of rounded activations: kernels are inside, planted mistakes outside."""

import ml_dtypes
import numpy as np
import pytest
from blocks import random_weight

from npllm import kernels
from npllm.errors import NpllmValueError
from npllm.ops.rounded import rounded_linear
from npllm.quantized.activations import round_activations, rounded_values
from npllm.quantized.int8 import quantize
from npllm.testing import budget, verdict

LIMITS = {"int8": 127, "int16": 32767}
SETS = [s for s in (kernels.tiled_ops(), kernels.compiled_ops()) if s]


def case(name, seed=0):
    """Rows whose groups differ in size by far, and a weight."""
    rng = np.random.default_rng(seed)
    sizes = np.repeat(np.exp(rng.standard_normal((24, 8))), 32, axis=1)
    x = (rng.standard_normal((24, 256)) * sizes).astype(np.float32)
    w = rng.standard_normal((9, 256)).astype(np.float32)
    if name == "bfloat16":
        return x, w.astype(ml_dtypes.bfloat16)
    return x, quantize(w) if name == "int8" else random_weight(name, 9, 256, seed)


@pytest.mark.parametrize("base", SETS, ids=lambda s: s.name)
@pytest.mark.parametrize("name", ["int8", "Q4_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("kind", list(LIMITS))
def test_every_set_is_inside_both_budgets(base, name, kind):
    """That of the rounding, and float32's for what is rounded."""
    ops = kernels.choose_ops("fast", activations=kind)
    linear = ops.linear if base is kernels.compiled_ops() else None
    for seed in range(3):
        x, weight = case(name, seed)
        y = linear(x, weight) if linear else rounded_linear(x, weight, activations=kind)
        given = {"x": x, "weight": weight}
        found = verdict("linear", given, y, operands=kind)
        assert found.status == "within" and found.used > 0.05
        assert found.model == f"float32 accumulation, {kind} products"
        values = rounded_values(x, kind, weight.activation_group)
        assert verdict("linear", {**given, "x": values}, y).status == "within"
        assert verdict("linear", given, y).status == "wrong"


def test_bfloat16_products_are_inside_the_budget_of_rounded_rows():
    x, weight = case("bfloat16")
    y = kernels.choose_ops("fast", activations="bfloat16").linear(x, weight)
    given = {"x": rounded_values(x, "bfloat16"), "weight": weight}
    assert verdict("linear", given, y).status == "within"
    assert verdict("linear", {**given, "x": x}, y, operands="bfloat16").status == "within"


def parts_of(x, weight, kind):
    """Codes, scales of x and of the weight by group, and the codes of the weight, in float64."""
    codes, scales = round_activations(x, kind, 64)
    groups = codes.reshape(len(x), -1, 64).astype(np.float64)
    w = weight.values.reshape(len(weight), -1, 64).astype(np.float64)
    return groups, scales.astype(np.float64), w, weight.scales.astype(np.float64)


def right(codes, scales, w, w_scales):
    return np.einsum("ngk,ogk,ng,og->no", codes, w, scales, w_scales)


def saturated(codes, scales, w, w_scales):
    """Pairs of products of an unsigned byte are cut to 16 bits, as VPMADDUBSW cuts them."""
    products = (codes[:, None] + 128) * w
    pairs = np.clip(products[..., ::2] + products[..., 1::2], -(2**15), 2**15 - 1)
    sums = pairs.sum(-1) - 128 * w.sum(-1)
    return np.einsum("nog,ng,og->no", sums, scales, w_scales)


MISTAKES = {
    "offset not corrected": lambda c, s, w, t: right(c + 128, s, w, t),
    "scale of the next group": lambda c, s, w, t: right(c, np.roll(s, 1, axis=1), w, t),
    "weight scale of the next group": lambda c, s, w, t: right(c, s, w, np.roll(t, 1, axis=1)),
    "one scale a row": lambda c, s, w, t: right(c, s.max(1, keepdims=True) + 0 * s, w, t),
    "last channel of a group lost": lambda c, s, w, t: right(c * (np.arange(64) < 63), s, w, t),
    "codes cut, not rounded": lambda c, s, w, t: right(c - (c % 2), s, w, t),
}


@pytest.mark.parametrize("name", [*MISTAKES, "saturation"])
def test_a_planted_mistake_is_outside(name):
    x, weight = case("int8")
    parts = parts_of(x, weight, "int8")
    given = {"x": x, "weight": weight}
    y = right(*parts).astype(np.float32)
    assert verdict("linear", given, y, operands="int8").status == "within"
    wrong = saturated(*parts) if name == "saturation" else MISTAKES[name](*parts)
    y = wrong.astype(np.float32)
    found = verdict("linear", given, y, operands="int8", explained=False)
    values = {**given, "x": rounded_values(x, "int8", 64)}
    assert verdict("linear", values, y, explained=False).status == "wrong"
    if name != "codes cut, not rounded":  # which is off by little more than rounding is
        assert found.status == "wrong"


def test_integers_are_operands_of_linear_maps_only():
    with pytest.raises(NpllmValueError, match=r"those of a linear map, got 'add'"):
        budget("add", {"x": np.ones(3), "y": np.ones(3)}, operands="int8")
