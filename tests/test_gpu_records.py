"""The parts of scripts/check_gpu.sh: records, the judgement of a run, and its weights."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import npllm
from npllm.kernels import cuda

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts"))
from gpu import cases, kernels, measure, records, report, weights  # noqa: E402

PATHS = os.pathsep.join((str(ROOT), str(ROOT / "scripts")))


# ---------------------------------------------------------------------------------------- records


def test_a_record_that_was_cut_off_costs_no_other(tmp_path):
    log = records.Records(tmp_path, "kernels")
    log.add("a", "passed", figure=1.5)
    log.add("b", records.STARTED)
    with open(log.path, "a", encoding="utf-8") as file:
        file.write('{"name": "b", "status": "pas')
    assert log.latest()["a"] == {"name": "a", "status": "passed", "figure": 1.5}
    assert log.done() == {"a"}
    assert log.close_started("killed") == ["b"]


def test_a_record_is_json_whatever_was_measured(tmp_path):
    log = records.Records(tmp_path, "kernels")
    log.add("a", "failed", max_error=float("nan"), rates={"x": [float("inf"), 1.0]})

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    found = json.loads(log.path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert found["max_error"] == "nan" and found["rates"] == {"x": ["inf", 1.0]}


def test_work_that_raises_is_recorded_as_failed(tmp_path):
    log = records.Records(tmp_path, "kernels")
    assert records.run_recorded(log, "good", lambda: {"figure": 2})
    assert not records.run_recorded(log, "bad", lambda: {"status": "failed", "why": "wrong"})
    assert not records.run_recorded(log, "ugly", lambda: 1 / 0)
    found = log.latest()
    assert found["good"]["figure"] == 2 and found["good"]["total_seconds"] >= 0
    assert found["ugly"]["why"].startswith("ZeroDivisionError")
    assert [record["status"] for record in found.values()] == ["passed", "failed", "failed"]


WORKER = """
import os, signal, sys
from gpu.records import Records
log = Records(sys.argv[1], "work")
for name in "abcd":
    if name not in log.done():
        log.add(name, "started")
        if name in "bc":
            os.kill(os.getpid(), signal.SIGKILL)
        log.add(name, "passed")
"""


def test_a_worker_that_dies_is_followed_by_another(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", PATHS)
    log = records.Records(tmp_path, "work")
    assert records.supervise(log, [sys.executable, "-c", WORKER, str(tmp_path)]) == 0
    statuses = [record["status"] for record in log.latest().values()]
    assert statuses == ["passed", "failed", "failed", "passed"]
    assert "SIGKILL" in log.latest()["b"]["why"]


def test_a_worker_that_dies_before_its_first_record_ends_the_stage(tmp_path):
    log = records.Records(tmp_path, "work")
    assert records.supervise(log, [sys.executable, "-c", "raise SystemExit(7)"]) == 7


# ---------------------------------------------------------------------------------------- pytest


TESTS = """
import os, signal
import pytest

def test_before(): pass
def test_wrong(): assert 1 == 2
def test_fatal():
    os.kill(os.getpid(), signal.SIGKILL)
def test_lost(): raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access")
def test_skipped(): pytest.importorskip("no_such_package")
@pytest.mark.weights
def test_of_the_checkpoint(): pass
@pytest.mark.live
def test_of_another_version(): pass
def test_after(): pass
"""


@pytest.mark.slow
def test_every_outcome_is_recorded_and_a_dead_process_costs_one_test(tmp_path, monkeypatch):
    (tmp_path / "test_it.py").write_text(TESTS, encoding="utf-8")
    markers = "[pytest]\nmarkers =\n  weights: w\n  live: l\n  gpu: g\n"
    (tmp_path / "pytest.ini").write_text(markers, encoding="utf-8")
    log = records.Records(tmp_path, "rest")
    monkeypatch.setenv("PYTHONPATH", PATHS)
    monkeypatch.setenv("NPLLM_RECORDS", str(log.path))
    monkeypatch.setenv("NPLLM_STAGE", "rest")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "gpu.outcomes",
        "-m",
        "not weights and not live",
    ]
    records.supervise(log, [*command, "--rootdir", str(tmp_path), "-q", str(tmp_path)])
    found = {name.rpartition("::")[2]: record for name, record in log.latest().items()}
    assert {name: record["status"] for name, record in found.items() if name != "collected"} == {
        "test_before": "passed",
        "test_wrong": "failed",
        "test_fatal": "failed",
        "test_lost": "failed",
        "test_skipped": "skipped",
        "test_of_the_checkpoint": "not run",
        "test_of_another_version": "not run",
        "test_after": "passed",
    }
    n_processes = log.path.read_text(encoding="utf-8").count('"name": "collected"')
    assert n_processes == 3  # one after the death, one after the lost device
    assert "assert 1 == 2" in found["test_wrong"]["why"]
    assert "default checkpoint" in found["test_of_the_checkpoint"]["why"]


# ---------------------------------------------------------------------------------------- judging


def run_folder(folder, *, device=True, exit_code=0, status="passed"):
    """What a run with one stage leaves."""
    machine = json.dumps({"device": {"found": device}, "commit": "c"})
    (folder / "machine.json").write_text(machine, encoding="utf-8")
    stages = records.Records(folder, "stages")
    stages.add("kernels", records.STARTED)
    if exit_code is not None:
        stages.add("kernels", "ended", exit_code=exit_code, seconds=2)
    log = records.Records(folder, "kernels")
    log.add("first", "passed", max_error=1e-7)
    log.add("second", status)
    return folder


def test_a_report_of_what_passed(tmp_path):
    assert report.main(run_folder(tmp_path)) == 0
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert found["passed"] and found["commit"] == "c"
    assert found["stages"]["kernels"]["counts"] == {
        "passed": 2,
        "failed": 0,
        "skipped": 0,
        "not run": 0,
    }
    assert found["stages"]["tests"]["ended"] == "not run"


@pytest.mark.parametrize(
    "changes",
    [
        {"device": False},
        {"exit_code": 1},
        {"exit_code": 124},
        {"exit_code": 137},
        {"exit_code": None},
        {"status": "failed"},
        {"status": records.STARTED},
    ],
    ids=str,
)
def test_what_did_not_pass_keeps_its_figures(tmp_path, changes):
    assert report.main(run_folder(tmp_path, **changes)) == 1
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert found["stages"]["kernels"]["records"][0]["max_error"] == 1e-7


def test_a_run_of_nothing_did_not_pass(tmp_path):
    assert report.main(tmp_path) == 1


@pytest.mark.parametrize("got", [[[1.0, np.nan]], [[1.0, np.inf]], [[1.0]], [[1.0, 2.1]]])
def test_a_wrong_result_fails(got):
    want = np.array([[1.0, 2.0]])
    assert kernels.largest_error(want, want) == 0
    assert not kernels.largest_error(np.array(got), want) <= cases.TOLERANCE
    assert "status" not in measure.judged(want, want)
    assert measure.judged(np.array(got), want)["status"] == "failed"


def test_every_kernel_has_a_case():
    assert set(cuda.VARIANTS) <= set(cases.CASES)
    n_variants = sum(map(len, cuda.VARIANTS.values()))
    assert len({kernels.name_of(*variant) for variant in cases.variants()}) == n_variants


# ---------------------------------------------------------------------------------------- weights


@given(st.sampled_from(weights.MODELS), st.floats(1e8, 2e10))
def test_layers_fit_and_one_more_would_not(name, free):
    data = weights.config(name)
    try:
        n_layers = weights.layers_that_fit(data, free)
    except RuntimeError:
        n_layers = 0
    allowed = weights.SHARE * free
    for n, fits in ((n_layers, True), (n_layers + 1, False)):
        if 0 < n <= data["num_hidden_layers"]:
            assert (weights.weight_bytes(data | {"num_hidden_layers": n}) <= allowed) == fits


@pytest.mark.parametrize("shards", [1, 2])
def test_a_random_checkpoint_loads(tmp_path, shards):
    from make_random_checkpoint import write_checkpoint

    data = weights.config("smollm2") | weights.SMALL
    write_checkpoint(data, tmp_path, shards=shards, layers=1)
    model = npllm.load(tmp_path)
    logits = model(np.array([[3, 4, 5]]))
    assert model.config.num_hidden_layers == 1 and np.isfinite(logits).all()
    assert 0.015 < np.asarray(model.params.layers[0].qkv_proj).astype(np.float32).std() < 0.025
