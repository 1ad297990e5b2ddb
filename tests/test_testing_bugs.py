"""Planted bugs: each is over budget, and diagnosed by its convention or its place."""

import copy

import numpy as np
import pytest

from npllm import testing
from npllm.errors import NpllmValueError
from npllm.testing import diagnose
from npllm.testing.planted import TESTED_AS, run
from npllm.testing.probe_inputs import PROBES
from npllm.testing.registry import alternatives, conventions

BUGS = testing.bugs
LSE = {"C24"}  # conventions that show in the log-sum-exp
ROUNDED_FLOAT32 = {
    "C14"
}  # shows in equal bits of 16-bit outputs; a float32 output is over budget and has no name


def probes_of(bug):
    op = TESTED_AS.get(bug.op, bug.op)
    ops = [op, "attention_lse"] if bug.convention in LSE else [op]
    return [
        probe
        for probe in PROBES.values()
        if probe.op in ops and not (probe.rounding and bug.convention != "C30")
    ]


def output_of(bug, op, inputs):
    return run(op, inputs, **{bug.op: bug.fn})


def test_there_are_more_than_60_under_names_that_say_what_they_are():
    assert len(BUGS) >= 100 and sum(bug.convention is None for bug in BUGS.values()) >= 35
    for name, bug in BUGS.items():
        label = f"{bug.convention} {bug.option}" if bug.convention else name.split(": ", 1)[1]
        assert name == f"{bug.op}: {label}"
        assert bug.says.endswith(".") and len(bug.says) > 10
        assert bug.convention is None or bug.option in conventions[bug.convention].options


def test_every_option_that_can_be_run_has_a_bug():
    planted = {(bug.convention, bug.option) for bug in BUGS.values()}
    ops = {op for entry in conventions.values() for op in entry.ops}
    wanted = {choice for op in ops for choice in alternatives(op)}
    assert wanted <= planted, wanted - planted


@pytest.mark.parametrize(
    "probe",
    [probe for probe in PROBES.values() if not probe.rounding and probe.op != "detokenize"],
    ids=lambda probe: probe.name,
)
def test_nothing_replaced_is_right(probe):
    found = diagnose(probe.op, probe.make(), run(probe.op, probe.make()))
    assert found.status == "right" and not found.names, str(found)


def changes(bug, op, make):
    """What a bug changes besides its result: an input, or an output that was returned before."""
    inputs = make()
    output = output_of(bug, op, inputs)
    if any(
        not np.array_equal(x, make()[name])
        for name, x in inputs.items()
        if isinstance(x, np.ndarray)
    ):
        return "input"
    kept = copy.deepcopy(output)
    output_of(
        bug,
        op,
        {
            name: x * np.float32(0.5) if getattr(x, "dtype", None) == np.float32 else x
            for name, x in make().items()
        },
    )
    return (
        ""
        if np.array_equal(np.asarray(kept), np.asarray(output), equal_nan=op != "detokenize")
        else "output"
    )


HARMLESS = {
    "attention: input mutated": "input",
    "rms_norm: input mutated": "input",
    "attention: unsynchronised scratch": "output",
}
"""Bugs whose first result is right."""


@pytest.mark.parametrize(
    "bug",  # that each option is named: test_testing_diagnosis.py
    [
        pytest.param(
            bug, id=name, marks=[pytest.mark.slow] * bool(n % (3 if bug.convention else 2))
        )
        for n, (name, bug) in enumerate(BUGS.items())
    ],
)
def test_a_bug_is_over_budget_on_some_probe_and_diagnosed_by_its_convention_or_by_where_it_lives(
    bug,
):
    wanted, seen = f"{bug.convention} {bug.option}", []
    for probe in probes_of(bug):
        found = diagnose(probe.op, probe.make(), output_of(bug, probe.op, probe.make()))
        names = [part for name in found.names for part in name.split(" or ")]
        seen.append((probe.name, found.status, names, found.where))
        if bug.convention in ROUNDED_FLOAT32 or bug.convention is None:
            shown = found.status == "wrong" and not names and found.where
        else:
            shown = found.status == "wrong" and wanted in names
        if shown:
            return
    assert any(BUGS[name] is bug for name in HARMLESS), seen


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_changes_nothing_but_its_result_unless_that_is_the_bug(name):
    bug = BUGS[name]
    assert {changes(bug, probe.op, probe.make) for probe in probes_of(bug)} == {
        HARMLESS.get(name, "")
    }


def test_a_bug_takes_a_mask_as_an_array_as_well():
    from npllm import ops

    inputs = PROBES["attention-cached"].make()
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    mask = ops.mask.to_bool(ops.mask.sliding_window(inputs["window"]), q.shape[-2], k.shape[-2])
    for name in (
        "C9 one key late",
        "C8 tile",
        "C11 NaN",
        "C23 zero tail to 16",
        "last tile skipped",
    ):
        y = BUGS[f"attention: {name}"].fn(q, k, v, mask=mask, scale=inputs["scale"])
        assert y.shape == q.shape


def test_what_is_no_part_of_an_operation_cannot_replace_it():
    inputs = PROBES["rope-long"].make()
    with pytest.raises(
        NpllmValueError,
        match="rope is made of rope, rope_frequencies, rope_tables, apply_rope, got attention",
    ):
        run("rope", inputs, attention=lambda: None)
    with pytest.raises(NpllmValueError, match="op must be one of attention"):
        run("swish", {})
