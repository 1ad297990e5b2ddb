"""Budgets: correct code stays inside them and comes near, every planted mistake exceeds them."""

import importlib

import ml_dtypes
import numpy as np
import pytest
from budget_implementations import SUMS, library, naive
from budget_inputs import INPUTS, plain
from budget_mistakes import mistakes
from seeds import draws, run_seed

from npllm import kernels, ops
from npllm.errors import NpllmValueError
from npllm.quantized.int8 import quantize
from npllm.testing import budget, gold, verdict
from npllm.testing.arithmetic import UNITS, gamma, repeats
from npllm.testing.within_budget import absolute_errors as _errors
from npllm.testing.within_budget import judge

every_op = pytest.mark.parametrize("op", INPUTS)
SEED = run_seed()
SETS = {
    "reference": ops.reference,
    "blockwise": ops.blockwise,
    "tiled": kernels.tiled_ops(),
    "compiled": kernels.compiled_ops(),
}
NOT_IN_A_SET = ("qkv_projection", "softmax")


def implementations(op, inputs):
    """Every correct output: naive in each order of summation, and every set of npllm."""
    orders = (
        SUMS
        if op in ("linear", "qkv_projection", "rms_norm", "layer_norm", "softmax", "attention")
        else {"numpy_sum": SUMS["numpy_sum"]}
    )
    for name, total in orders.items():
        yield name, naive(op, inputs, total)
    for name, set_of_ops in SETS.items():
        if set_of_ops is not None and op not in NOT_IN_A_SET:
            yield name, library(op, set_of_ops, inputs)


def largest_share(op, n, seed, dtype="float32"):
    """Run n cases; raise for an output that is wrong, else return the largest share of the
    statistical budget.
    """
    rng, largest = np.random.default_rng([seed, *op.encode()]), 0.0
    for case in range(n):
        inputs = INPUTS[op](rng)
        exact = gold(op, inputs)
        with np.errstate(over="ignore"):
            bound = budget(op, inputs, dtype=dtype)
        for name, y in implementations(op, inputs):
            with np.errstate(over="ignore"):
                y = y.astype(dtype if dtype != "bfloat16" else ml_dtypes.bfloat16)
            promised = np.isfinite(bound.deterministic) & np.isfinite(exact)
            error = np.where(promised, _errors(y, exact, exact, bound), 0.0)
            status, share = judge(error, exact, bound)
            at = np.unravel_index(np.argmax(share), share.shape)
            assert status != "wrong", (
                f"{op} {name}, seed {seed}, case {case}: {share[at]:.3g} of the budget at {at}"
            )
            if status == "within":
                largest = max(largest, float(share[at]))
    return largest


@every_op
def test_correct_code_is_inside_the_budget_and_comes_near(op):
    print("seed", SEED)
    largest = largest_share(op, draws(20, 60) if op == "attention" else draws(70, 200), SEED)
    assert largest <= 1
    assert largest > 0.05 or op == "embed"  # which is exact


@pytest.mark.slow
@every_op
def test_ten_thousand_cases_are_inside_the_budget(op):
    print("seed", SEED)
    largest = largest_share(op, 10_000, SEED + 1)
    print(f"{op}: {largest:.3f} of the statistical budget")
    assert largest > 0.05 or op == "embed"


@every_op
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_one_rounding_to_a_short_dtype_is_inside(op, dtype):
    print("seed", SEED)
    largest = largest_share(op, draws(15, 40), SEED + 2, dtype)
    assert 0.05 < largest <= 1


MISTAKES = [(op, name) for op in INPUTS for name in mistakes(op)]


@pytest.mark.parametrize(("op", "name"), MISTAKES, ids=[f"{op}-{name}" for op, name in MISTAKES])
def test_a_mistake_exceeds_the_budget(op, name):
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    for _ in range(draws(1, 3)):
        inputs = plain(op, rng)
        found = verdict(op, inputs, mistakes(op)[name](inputs))
        assert found.status == "wrong"
        assert found.used > 1
    assert verdict(op, inputs, naive(op, inputs)).status == "within"


@every_op
def test_each_operation_has_a_dozen_mistakes(op):
    assert len(mistakes(op)) >= 12


@every_op
def test_float64_is_judged_by_more_digits(op):
    """The gold in float64 is itself inside a float64 budget around 40 digits; the definitions in
    float64 are too.
    """
    pytest.importorskip("mpmath", reason="needs mpmath (the extra test)")
    rng, largest = np.random.default_rng(SEED), 0.0
    for _ in range(draws(1, 3)):
        inputs = in_float64(op, rng)
        exact, bound = (
            gold(op, inputs, digits=40),
            budget(op, inputs, dtype="float64", accumulate="float64"),
        )
        for y in [gold(op, inputs)] + (
            [] if op in NOT_IN_A_SET else [library(op, ops.reference, inputs)]
        ):
            error = np.abs(y - exact).astype(np.float64)
            share = np.where(error > 0, error / np.maximum(bound.statistical, 1e-300), 0)
            assert share.max() <= 1
            largest = max(largest, float(share.max()))
    assert largest > 0.05 or op == "embed"


def in_float64(op, rng):
    """Few inputs that float32 does not hold; rope by its tables, since a base leaves open how
    frequencies are rounded.
    """
    inputs = {
        name: x.astype(np.float64) * (1 + 1e-9 * rng.standard_normal(x.shape))
        if getattr(x, "dtype", None) == np.float32
        else x
        for name, x in plain(op, rng).items()
    }
    if op == "rope":
        phase = rng.uniform(0, 600, (4, 4))
        return {
            "x": inputs["x"],
            "cos": np.tile(np.cos(phase), 2),
            "sin": np.tile(np.sin(phase), 2),
        }
    return inputs


def test_a_float64_product_in_float32_is_wrong_for_float64():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 40)), rng.standard_normal((3, 40))
    assert verdict("linear", {"x": x, "weight": w}, x @ w.T).status == "within"
    rough = (x.astype(np.float32) @ w.astype(np.float32).T).astype(np.float64)
    assert verdict("linear", {"x": x, "weight": w}, rough).status == "wrong"


def test_a_product_with_8_bit_weights_has_a_budget():
    rng = np.random.default_rng(SEED)
    x, w = (
        rng.standard_normal((5, 200)).astype(np.float32),
        quantize(rng.standard_normal((7, 200)).astype(np.float32)),
    )
    for set_of_ops in (s for s in SETS.values() if s is not None):
        found = verdict("linear", {"x": x, "weight": w}, set_of_ops.linear(x, w))
        assert found.status == "within", str(found)
    unscaled = x @ w.values.astype(np.float32).T
    assert verdict("linear", {"x": x, "weight": w}, unscaled).status == "wrong"
    rows = ops.embed(np.arange(7), w)
    assert verdict("embed", {"ids": np.arange(7), "weight": w}, rows).status == "within"


@every_op
def test_the_statistical_budget_never_exceeds_the_deterministic_one(op):
    rng = np.random.default_rng(SEED)
    for _ in range(draws(5, 20)):
        for options in (
            {},
            {"dtype": "bfloat16"},
            {"accumulate": "float16"},
            {"operands": "tf32"},
            {"roundings": 2},
        ):
            bound = budget(op, INPUTS[op](rng), **options)
            assert (bound.statistical <= bound.deterministic).all()
            assert not np.isnan(bound.deterministic).any()
            assert (bound.statistical >= 0).all()


@every_op
def test_a_looser_arithmetic_never_has_a_smaller_budget(op):
    rng = np.random.default_rng(SEED)
    inputs = plain(op, rng)
    base = budget(op, inputs, dtype="bfloat16").statistical
    for options in (
        {"roundings": 2},
        {"accumulate": "float16"},
        {"accumulate": "bfloat16"},
        {"operands": "tf32"},
    ):
        if op == "add" and options.get("accumulate") == "bfloat16":
            continue  # the sum is then rounded once instead of twice
        assert (budget(op, inputs, dtype="bfloat16", **options).statistical >= base).all(), options


def test_a_sum_with_more_terms_than_the_arithmetic_can_count_promises_nothing():
    x = np.ones((1, 600), np.float32)
    bound = budget("linear", {"x": x, "weight": x}, accumulate="bfloat16")
    assert np.isinf(bound.deterministic).all()
    assert np.isinf(
        budget("rms_norm", {"x": 1e19 * x, "weight": x[0], "eps": 1e-5}).deterministic
    ).all()


def test_gamma_is_that_of_the_book():
    assert gamma(10, 2.0**-24) == 10 * 2.0**-24 / (1 - 10 * 2.0**-24)
    assert np.isinf(gamma(2**24, 2.0**-24))


@pytest.mark.parametrize("n", [5, 300])
def test_entries_that_a_sum_rounds_alike_are_counted(n):
    def count(x):
        return repeats(x[None], np.abs(x).sum(keepdims=True), 2.0**-24)[0]

    noise = np.random.default_rng(0).standard_normal(n)
    assert 0.9 * n < count(np.full(n, 0.1)) <= n + 1
    assert 0.9 * n < count(1 + 1e-9 * noise) <= n + 1
    assert count(1 + 1e-3 * noise) == 1
    assert count(noise) == 1
    assert count(np.zeros(n)) == 1
    assert 0.3 * n < count(np.tile([1.5, 2.5], n)[:n]) < 0.6 * n


def test_nearly_equal_terms_drift_in_one_direction():
    """A row of nearly equal entries and an outlier: sequential sums err by more than a walk of
    independent roundings would.
    """
    rng = np.random.default_rng(2)
    largest = 0.0
    for _ in range(100):
        p = (1 + rng.random()) * (1 + 1e-7 * rng.standard_normal((1, 400)))
        p[0, 0] = 10.0 ** rng.uniform(1, 4)
        p = p.astype(np.float32)
        inputs = {"x": p, "weight": np.ones((1, 400), np.float32)}
        exact, bound = gold("linear", inputs), budget("linear", inputs, dtype="float32")
        error = np.abs(SUMS["sequential"](p)[0] - exact)
        largest = max(largest, (error / (5 * 2.0**-24 * np.sqrt(400 / 3) * exact)).max())
        assert (error <= bound.statistical).all()
    assert largest > 1  # of what independent roundings allow


def test_units_are_those_of_the_formats():
    for name in ("float16", "float32", "float64"):
        assert UNITS[name] == np.finfo(name).eps / 2
    assert UNITS["bfloat16"] == float(ml_dtypes.finfo(ml_dtypes.bfloat16).eps) / 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dtype": "float8"}, "dtype must be one of"),
        ({"accumulate": "x"}, "accumulate must be one of"),
        ({"roundings": 0}, "roundings must be an integer of at least 1, got 0"),
        ({"operands": "int4"}, "operands must be one of"),
        ({"operands": "int8"}, "are those of a linear map, got .add."),
    ],
)
def test_what_is_no_arithmetic_raises(options, text):
    with pytest.raises(NpllmValueError, match=text):
        budget("add", {"x": np.ones(2), "y": np.ones(2)}, **options)


def test_an_unknown_operation_raises():
    for function in (budget, gold):
        with pytest.raises(NpllmValueError, match="'conv'"):
            function("conv", {})


def test_nothing_here_needs_pytest_or_hypothesis():
    import ast
    import inspect

    for name in (
        "arithmetic",
        "budgets",
        "attention_budget",
        "exact",
        "verdicts",
        "location",
        "adapters",
        "layouts",
        "libraries",
        "inputs",
    ):
        module = importlib.import_module(f"npllm.testing.{name}")
        tree = ast.parse(inspect.getsource(module))
        imported = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & {"pytest", "hypothesis"}
