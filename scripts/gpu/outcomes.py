"""A pytest plugin (`-p gpu.outcomes`): every outcome is in the file NPLLM_RECORDS at once.

A second run on the same file takes the tests that are not recorded yet.  A test that needs the
default checkpoint, or other versions of PyTorch and Transformers, is recorded as not run.
"""

import os
from pathlib import Path
from typing import Any

import pytest

from gpu.records import STARTED, UNUSABLE, Records, plant

NOT_RUN = {
    "weights": "needs the default checkpoint",
    "live": "pinned to other versions of PyTorch and Transformers",
}
LOST = (
    "ILLEGAL_ADDRESS",
    "LAUNCH_FAILED",
    "MISALIGNED_ADDRESS",
    "ILLEGAL_INSTRUCTION",
    "cudaErrorIllegalAddress",
    "cudaErrorLaunchFailure",
    "cudaErrorMisalignedAddress",
    "cudaErrorIllegalInstruction",
    "HARDWARE_STACK_ERROR",
)
_path = Path(os.environ["NPLLM_RECORDS"])
_records = Records(_path.parent, _path.stem)
_on_gpu = os.environ["NPLLM_STAGE"] == "tests"  # the other stage runs the tests that need no GPU
_state: dict[str, Any] = {"before": {}, "reports": [], "n": 0}


def pytest_sessionstart() -> None:
    """Read what an earlier process did; a test that it did not end was its last."""
    _records.close_started("the process ended in this test")
    _state["before"] = _records.latest()
    _state["n"] = sum("::" in name for name in _state["before"])


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what is recorded; count what is to run."""
    items[:] = [item for item in items if item.nodeid not in _state["before"]]
    _records.add("collected", "passed", tests=len(items))


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Record as not run what belongs to this stage and cannot run on this machine."""
    for item in items:
        why = next((NOT_RUN[name] for name in NOT_RUN if item.get_closest_marker(name)), None)
        belongs = (item.get_closest_marker("gpu") is not None) == _on_gpu
        if why and belongs and item.nodeid not in _state["before"]:
            _records.add(item.nodeid, "not run", why=why)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Record a module that cannot be read, or that is skipped as a whole."""
    if report.outcome != "passed" and report.nodeid not in _state["before"]:
        _records.add(report.nodeid, report.outcome, why=reason(report))


def pytest_runtest_logstart(nodeid: str) -> None:
    """Say that a test begins, so that one that ends the process is known."""
    _records.add(nodeid, STARTED)
    _state["reports"] = []
    plant(f"{os.environ['NPLLM_STAGE']}/{_state['n']}")
    _state["n"] += 1


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect what is said of setup, call and teardown."""
    _state["reports"].append(report)


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Record the outcome of a test; end the process where the device is lost."""
    reports = _state["reports"]
    worst = next((report for report in reports if report.failed), None)
    worst = worst or next((report for report in reports if report.skipped), None)
    seconds = sum(report.duration for report in reports)
    if worst is None:
        _records.add(nodeid, "passed", seconds=seconds)
        return
    _records.add(nodeid, worst.outcome, seconds=seconds, why=reason(worst))
    if any(word in worst.longreprtext for word in LOST):
        pytest.exit("the device answers no more: a new process runs the rest", returncode=UNUSABLE)


def reason(report: Any) -> str:
    """The last words of a failure, or why a test was skipped."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else report.longreprtext)[-1000:]
