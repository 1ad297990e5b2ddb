"""The tests of each operation fail when a planted bug stands in its place."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from planted_in_ops import FILES, PLANTED

from npllm import testing

TESTS = Path(__file__).parent
OPERATIONS = {name: bug.op for name, bug in testing.bugs.items() if bug.op in FILES}


def run_tests(op, name=None):
    """Run the tests of an operation until one fails; return the finished process."""
    files = [str(TESTS / file) for file in FILES[op]]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
    environment = os.environ | ({} if name is None else {PLANTED: name})
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("op", FILES)
def test_the_tests_pass_without_a_bug(op):
    run = run_tests(op)
    assert run.returncode == 0, run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_tests_of_an_operation_catch_a_planted_bug(name):
    run = run_tests(OPERATIONS[name], name)
    assert run.returncode == 1, f"{name} survives\n{run.stdout}"


def test_a_bug_that_is_planted_runs_and_what_is_refused_stays_refused(monkeypatch):
    import numpy as np
    import planted_in_ops

    from npllm import NpllmError, ops

    name, right = "swiglu: ReLU", ops.swiglu
    monkeypatch.setenv(PLANTED, name)
    with monkeypatch.context() as patch:
        for module in [m for key, m in sys.modules.items() if key.startswith("npllm.ops")]:
            if vars(module).get("swiglu") is right:
                patch.setattr(module, "swiglu", right)  # restored at the end
        planted_in_ops.plant_named_bug()
        one = np.ones((1, 4), np.float32)
        assert float(ops.swiglu(-one, one)[0, 0]) == 0
        with pytest.raises(NpllmError):
            ops.swiglu(one, one[..., :3])
    assert ops.swiglu is right
