"""The registry: 34 entries that run; forms that share no code with npllm.ops."""

import ast
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from fresh import FRESH
from seeds import run_seed

from npllm import testing
from npllm.errors import NpllmValueError
from npllm.testing import forms
from npllm.testing.budgets import BUDGETS
from npllm.testing.forms import NotApplicableError, evaluate, prepare
from npllm.testing.forms.table import OPS
from npllm.testing.planted import run
from npllm.testing.probe_inputs import PROBES
from npllm.testing.registry import EVIDENCE, alternatives, conventions
from npllm.testing.registry.page import conventions_page

ROOT = Path(__file__).resolve().parents[1]
KNOWN = {*OPS, "detokenize"}


def test_there_are_34_entries_in_order():
    assert list(conventions) == [f"C{n}" for n in range(1, 35)]
    assert all(entry.id == name for name, entry in conventions.items())
    assert testing.conventions is conventions


@pytest.mark.parametrize("entry", conventions.values(), ids=conventions)
def test_an_entry_says_what_the_reader_needs(entry):
    assert entry.ours == next(iter(entry.options)) and len(entry.options) >= 2
    assert entry.evidence in EVIDENCE and set(entry.ops) <= KNOWN and entry.ops
    assert re.fullmatch(r"[\w.-]+#\d+(, [\w.-]+#\d+)*", entry.report)
    for name, option in entry.options.items():
        assert (
            option.says.endswith(".") and option.says[0] == option.says[0].upper()
        ) or option.says[0] in "-sy[cdel"
        assert option.evidence is None or option.evidence in EVIDENCE
        assert set(option.ops) <= set(entry.ops)
        assert " or " not in name and " & " not in name, "these words join names"
    assert {op for option in entry.options.values() for op in option.ops} == set(entry.ops)


def test_the_page_is_what_the_registry_writes():
    page = (ROOT / "docs" / "conventions.md").read_text(encoding="utf-8")
    assert page == conventions_page(), "python -m npllm.testing.registry docs/conventions.md"


def test_the_forms_share_no_code_with_the_operations():
    for path in Path(forms.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (
                [node.module]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            for name in names:
                assert not name.startswith("npllm") or name.startswith(
                    ("npllm.testing.forms", "npllm.errors")
                ), f"{path.name}: {name}"


def widened(inputs):
    """Arrays of float32 as float64: an operation computes in the dtype of its inputs."""
    kept = ("factors", "positions")
    return {
        name: x.astype(np.float64)
        if getattr(x, "dtype", None) == np.float32 and name not in kept
        else x
        for name, x in inputs.items()
    }


@pytest.mark.parametrize("op", [op for op in FRESH if op != "rope"])
def test_the_definition_of_a_form_is_that_of_the_operation(op):
    rng = np.random.default_rng(run_seed())
    for _ in range(5):
        inputs = {name: x for name, x in FRESH[op](rng).items() if name != "d_rope"}
        form = evaluate(op, prepare(op, inputs)).y
        desired = np.asarray(run(op, widened(inputs))).reshape(form.shape)
        finite = np.isfinite(desired)
        assert (finite == np.isfinite(form)).all()
        assert np.max(np.abs(form[finite] - desired[finite]), initial=0) <= 1e-12 * np.max(
            np.abs(desired[finite])
        )


def test_the_definition_of_rope_is_that_of_the_operation_to_within_its_tables():
    rng = np.random.default_rng(run_seed())
    for _ in range(8):
        inputs = FRESH["rope"](rng)
        form = evaluate("rope", prepare("rope", inputs))
        desired = run("rope", inputs).astype(np.float64)
        assert (np.abs(form.y - desired) <= form.slack + 2.0**-24 * np.abs(desired)).all()


@pytest.mark.parametrize("op", [op for op in FRESH if op in BUDGETS and op != "embed"])
def test_the_slack_of_a_form_is_of_the_size_of_the_budget_of_the_operation(op):
    rng = np.random.default_rng(run_seed())
    inputs = FRESH[op](rng)
    for name in ("documents", "d_rope", "n_original") if op == "attention" else ("n_original",):
        inputs.pop(name, None)
    if op == "rope":
        inputs["factors"] = inputs["factors"][0]
    answer = evaluate(op, prepare(op, inputs))
    bound = testing.budget(op, inputs)
    slack = (answer.slack + 2.0**-24 * np.abs(answer.y)).reshape(bound.deterministic.shape)
    used = slack[bound.deterministic > 0] / bound.deterministic[bound.deterministic > 0]
    assert np.median(used) > 0.3 and np.median(used) < 5 and used.min() > 0.1, (
        np.median(used),
        used.min(),
        used.max(),
    )


CASES = [(op, name, option) for op in KNOWN for name, option in alternatives(op)]


def tells(probe, name, option):
    """Whether an option is apart from the definition on a probe, by both allowances."""
    inputs = prepare(probe.op, probe.make())
    right = evaluate(probe.op, inputs)
    try:
        other = evaluate(probe.op, inputs, {name: option})
    except NotApplicableError:
        return False
    both = right.slack + other.slack + 2.0**-23 * (np.abs(right.y) + np.abs(other.y))
    with np.errstate(invalid="ignore"):
        return bool(
            (np.abs(right.y - other.y) > both).any()
            or (np.isnan(other.y) & np.isfinite(right.y)).any()
        )


@pytest.mark.parametrize(("op", "name", "option"), sorted(CASES), ids="-".join)
def test_every_option_shows_on_a_built_in_probe(op, name, option):
    probes = [probe for probe in PROBES.values() if probe.op == op and not probe.rounding]
    if op == "detokenize":
        texts = [
            "".join(conventions[name].run(op, probes[0].make(), choice))
            for choice in (option, conventions[name].ours)
        ]
        assert texts[0] != texts[1]
        return
    assert any(tells(probe, name, option) for probe in probes)


def test_a_convention_runs_in_the_shape_of_the_output():
    inputs = PROBES["attention-cached"].make()
    y = conventions["C9"].run("attention", inputs, "top-left")
    assert y.shape == inputs["q"].shape and y.dtype == np.float64
    assert np.array_equal(
        conventions["C9"].run("attention", inputs, "bottom-right"),
        conventions["C1"].run("attention", inputs, "half-split"),
    )
    one = {name: x[0] if getattr(x, "ndim", 0) > 3 else x for name, x in inputs.items()}
    assert np.allclose(conventions["C9"].run("attention", one, "top-left"), y[0], rtol=0, atol=0)


def test_the_rounding_options_run_in_the_dtype_that_is_asked_for():
    inputs = PROBES["rms-norm-bfloat16"].make()
    for dtype in (ml_dtypes.bfloat16, np.float16):
        before, after = (
            conventions["C13"].run("rms_norm", inputs, option, np.dtype(dtype).name)
            for option in ("cast before weight", "cast after weight")
        )
        assert after.shape == inputs["x"].shape and np.array_equal(
            after, after.astype(dtype).astype(np.float32)
        )
        assert 0.05 < np.mean(before != after) < 0.7


def test_what_cannot_be_run_is_an_error_that_says_so():
    inputs = PROBES["attention-cached"].make()
    with pytest.raises(NpllmValueError, match="C9 has the options bottom-right, top-left"):
        conventions["C9"].run("attention", inputs, "top-right")
    with pytest.raises(NpllmValueError, match="two operands of one shape"):
        conventions["C22"].run("attention", inputs, "q and k swapped")
    with pytest.raises(NpllmValueError, match="op must be one of"):
        conventions["C9"].run("attn", inputs, "top-left")
    with pytest.raises(NpllmValueError, match=r"missing: k, v; unknown: mass"):
        conventions["C9"].run("attention", {"q": inputs["q"], "mass": 1}, "top-left")
    with pytest.raises(
        NpllmValueError, match=r"q must be \[..., n_head, n_seq, d_head\], got \[16\]"
    ):
        conventions["C9"].run("attention", inputs | {"q": inputs["q"][0, 0, 0]}, "top-left")
