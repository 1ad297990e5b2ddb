"""scripts/check_gpu.sh rehearsed without a GPU, in a bare environment, with faults planted.

The environment has few packages, npllm is not installed, and the tree is a copy without its
history.  NPLLM_BARE_PYTHON names the Python of an environment that is there already.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts"))
from gpu import cases, kernels, measure, weights  # noqa: E402

pytestmark = pytest.mark.slow
HELD = (
    "numpy",
    "ml_dtypes",
    "safetensors",
    "tokenizers",
    "hypothesis",
    "sortedcontainers",
    "attrs",
    "pytest",
    "iniconfig",
    "packaging",
    "pluggy",
    "pygments",
)
COMMIT = "0123456789abcdef"
SHORT = {  # little of each stage, for the runs with faults
    "NPLLM_ONLY_kernels": "swiglu rms_norm",
    "NPLLM_PYTEST_tests": "-k test_a_large_product",
    "NPLLM_ONLY_timings": "logits parity/smollm2/blockwise",
    "NPLLM_ONLY_bench": "copy transformers",
    "NPLLM_PYTEST_rest": "tests/test_ops_norm.py",
}
STAGES = ("kernels", "tests", "weights", "timings", "bench", "rest")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A folder with a `python3` of an environment that holds little."""
    given = os.environ.get("NPLLM_BARE_PYTHON")
    folder = tmp_path_factory.mktemp("bare")
    if given:
        return Path(given).parent
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin" / "pip", "install", "-q", "--no-deps", *HELD], check=True)
    return folder / "bin"


@pytest.fixture(scope="module")
def check(bare, tmp_path_factory):
    """Run the script in a copy of the tree; return its exit code and its report."""
    tree, kept = tmp_path_factory.mktemp("copy") / "npllm", tmp_path_factory.mktemp("shim")
    hidden = shutil.ignore_patterns(".*", "__pycache__", "weights", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, tree, ignore=hidden)

    def run(*arguments, **environment):
        out = tmp_path_factory.mktemp("out")
        clean = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("NPLLM", "PYTHON", "CI"))
        }
        clean |= {
            "PATH": f"{bare}:{clean['PATH']}",
            "OUT": str(out),
            "NPLLM_COMMIT": COMMIT,
            "NPLLM_SHIM_CACHE": str(kept),
        } | {f"NPLLM_SECONDS_{name}": "600" for name in STAGES}
        ended = subprocess.run(
            ["bash", tree / "scripts" / "check_gpu.sh", "--rehearse", *arguments],
            env=clean | environment,
            cwd=out,
            capture_output=True,
            text=True,
            check=False,
        )
        (path,) = out.glob("*/report.json")
        return ended.returncode, json.loads(path.read_text(encoding="utf-8")), ended.stdout

    return run


@pytest.fixture(scope="module")
def whole(check):
    """One run of everything, in which nothing is planted."""
    code, report, output = check("--all")
    assert code == 0, output
    return report


def names(report, stage, status=None):
    """Names of the records of a stage."""
    return {
        record["name"]
        for record in report["stages"][stage]["records"]
        if status in (None, record["status"])
    }


def test_the_machine_is_described(whole):
    machine = whole["machine"]
    assert set(machine) == {
        "rehearsal",
        "commit",
        "driver",
        "python",
        "platform",
        "cores",
        "missing",
        "device",
        "versions",
        "room",
        "npllm",
    }
    assert whole["rehearsal"] is True and whole["commit"] == COMMIT and whole["passed"] is True
    assert {"name", "bytes", "compute_capability", "cuda_runtime", "cuda_driver"} <= set(
        machine["device"]
    )
    assert {"click", "jinja2", "threadpoolctl", "gguf", "array_api_strict"} <= set(
        machine["missing"]
    )
    assert machine["versions"]["numpy"] and machine["versions"]["torch"] is None
    assert set(machine["room"]) == {"disk", "memory", "device"}


def test_every_stage_is_in_the_report(whole):
    for name in STAGES:
        stage = whole["stages"][name]
        assert set(stage) == {
            "ended",
            "passed",
            "seconds",
            "counts",
            "failed",
            "not_run",
            "records",
        }
        assert (stage["ended"], stage["passed"], stage["failed"]) == ("exit code 0", True, {})
        assert stage["counts"]["passed"] > 0
        assert sum(stage["counts"].values()) == len(stage["records"])


def test_the_figures_of_the_tests_are_kept(whole):
    assert {"kernel linear", "kernel attention", "tiny models, cuda"} <= set(whole["figures"])
    assert all(figure >= 0 for figure in whole["figures"].values())


def test_every_variant_of_every_kernel_has_its_figures(whole):
    assert names(whole, "kernels", "passed") == {
        kernels.name_of(*variant) for variant in cases.variants(common=True)
    }
    for record in whole["stages"]["kernels"]["records"]:
        assert {
            "kernel",
            "definitions",
            "compiled",
            "compile_seconds",
            "registers",
            "shared_bytes",
            "spilled_bytes",
            "max_error",
            "tolerance",
            "seconds",
        } <= set(record)
        assert record["compiled"] and 0 <= record["max_error"] <= record["tolerance"]


def test_what_needs_the_default_checkpoint_is_not_counted_as_passed(whole):
    reasons = whole["stages"]["tests"]["not_run"]
    assert reasons["needs the default checkpoint"] >= 10
    assert (
        whole["stages"]["rest"]["not_run"]["pinned to other versions of PyTorch and Transformers"]
        > 0
    )
    for name in ("test_greedy_text_of_the_default_model[cuda]", "test_a_decode_step_waits_once"):
        assert f"tests/test_gpu.py::{name}" in names(whole, "tests", "not run")


def test_weights_and_timings_are_complete(whole):
    for record in whole["stages"]["weights"]["records"]:
        assert {"folder", "layers", "layers_wanted", "bytes", "reused"} <= set(record)
    assert names(whole, "weights") == set(weights.MODELS)
    assert names(whole, "timings") == set(measure.TASKS)
    for record in whole["stages"]["timings"]["records"]:
        kind = record["name"].partition("/")[0]
        wanted = {
            "logits": "seconds",
            "parity": "max_error",
            "speed": "tokens_per_second",
            "context": "seconds_per_token",
        }.get(kind, "why")
        assert wanted in record, record  # `why`: command and generate need click
        assert record["status"] == ("not run" if wanted == "why" else "passed")


def test_the_benchmark_is_complete_and_beside_the_predictions(whole):
    """Every figure of it, and for each kernel of a step its bytes in a second; but those of torch,
    which is not here, and of tensor cores, which the stand-in has not.
    """
    found = {record["name"]: record for record in whole["stages"]["bench"]["records"]}
    kernels_ = {"embed", "qkv", "rope", "attention", "o", "gate_up", "down", "lm_head"}
    assert {f"kernels/{name}" for name in kernels_} <= set(found)
    assert {"copy/device", "npllm/load", "npllm/cache on", "npllm/cache off"} <= set(found)
    assert sum("decode" in name for name in found) >= 9
    prompts = [record["n_prompt"] for name, record in found.items() if "prefill" in name]
    assert sorted(prompts) == [5] * 3 + [12] * 3, "in three kinds of products"
    for name, record in found.items():
        is_left_out = name.startswith(("transformers/", "vllm/", "copy/matrix"))
        assert record["status"] == ("not run" if is_left_out else "passed"), record


PLANTS = {
    "kernels": "kill@kernels/1",
    "tests": "kill@tests/1",
    "weights": "kill@weights/1",
    "timings": "kill@timings/1",
    "bench": "kill@bench/1",
    "rest": "kill@rest/3",
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_is_killed_leaves_what_it_had_and_the_others(check, stage):
    code, report, output = check("--all", NPLLM_PLANT=PLANTS[stage], **SHORT)
    assert code == 1, output
    killed = report["stages"][stage]
    assert killed["ended"] == "exit code 137: timed out, or killed" and not killed["passed"]
    assert killed["counts"]["passed"] >= 1 and len(killed["failed"]) == 1
    need_weights = {"timings", "bench"}  # the benchmark makes weights that it misses, and is killed
    others = set(STAGES) - {stage} - (need_weights if stage == "weights" else set())
    for name in others:
        assert report["stages"][name]["passed"], (name, report["stages"][name], output)
    if stage == "weights":  # the first checkpoint is there, the second is not
        assert {"logits/smollm2", "parity/smollm2/blockwise"} == names(report, "timings", "passed")


def test_a_process_that_dies_inside_a_stage_costs_one_record(check):
    plants = "die@kernels/1,die@tests/1,raise@weights/1,raise@timings/2,die@rest/3"
    code, report, output = check("--all", NPLLM_PLANT=plants, **SHORT)
    assert code == 1, output
    for name in ("kernels", "tests", "rest"):
        counts = report["stages"][name]["counts"]
        assert counts["failed"] == 1 and counts["passed"] >= 3, (name, output)
    assert report["stages"]["weights"]["counts"]["failed"] == 1
    assert len(report["figures"]) == 3  # of both processes


def test_a_stage_that_hangs_is_ended_and_a_broken_kernel_is_named(check):
    plants = "hang@timings/2,raise@kernel/swiglu"
    code, report, output = check(
        "--all", NPLLM_PLANT=plants, **SHORT | {"NPLLM_SECONDS_timings": "20"}
    )
    assert code == 1, output
    assert report["stages"]["timings"]["ended"] == "exit code 124: timed out, or killed"
    assert names(report, "timings", "passed") == {"logits/smollm2", "logits/phi-3-mini"}
    assert {name.split()[0] for name in report["stages"]["kernels"]["failed"]} == {"swiglu"}
    assert report["stages"]["kernels"]["counts"]["passed"] == 9  # rms_norm: types by parts
    assert report["stages"]["rest"]["passed"]
