"""Compilation of the kernels: what is said, and what is counted.

Each case is a process of its own with an empty cache on disk.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from npllm import kernels
from npllm.kernels import compilation

ROOT = Path(__file__).resolve().parents[1]

needs_numba = pytest.mark.skipif(kernels.compiled_ops() is None, reason="Numba is not installed")


def run(script, folder):
    """Run a script in a process of its own; return its standard output and standard error."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
            "NUMBA_CACHE_DIR": str(folder),
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


SCRIPT = """
import time
import numpy as np
from npllm.kernels import compilation
from npllm.progress import report
start = time.perf_counter()
compilation.announce(report if ANNOUNCE else None)
from npllm.kernels.cpu import gemv
from npllm.kernels.cpu.launching import launch
x, y = np.ones((1, 64), np.float32), np.zeros((1, 64), np.float32)
clock = compilation.working_seconds()
weight, none = np.eye(64, dtype=np.float32), np.zeros((0, 0), np.float32)
launch(gemv.add_product, weight, none, x, none[0:0, 0:0].reshape(-1), np.float32(0), y)
inside = compilation.working_seconds() - clock
assert np.array_equal(y, x)
print(compilation.compile_seconds(), inside)
"""


@needs_numba
def test_a_first_process_says_that_it_compiles_once_and_a_second_says_nothing(tmp_path):
    out, err = run("ANNOUNCE = True" + SCRIPT, tmp_path)
    compiled, inside = map(float, out.split()[:2])
    assert compiled > 0.5 and inside < compiled / 2
    assert err == f"npllm: {compilation.MESSAGE}\n"
    out, err = run(
        f"ANNOUNCE = True{SCRIPT.replace('assert all', 'assert inner == {} or all')}", tmp_path
    )
    assert err == "" and float(out.split()[0]) == 0


@needs_numba
def test_the_library_writes_no_line_of_its_own(tmp_path):
    assert run("ANNOUNCE = False" + SCRIPT, tmp_path)[1] == ""


def test_the_clock_stands_still_between_begin_and_end(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(compilation.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(compilation, "_seconds", 0.0)
    said = []
    monkeypatch.setattr(compilation, "_said", False)
    monkeypatch.setattr(compilation, "_say", said.append)
    before = compilation.working_seconds()
    for _ in range(2):
        compilation.begin()
        now[0] += 1
        compilation.begin()  # a kernel that the first one calls
        now[0] += 1
        compilation.end()
        compilation.end()
    now[0] += 5
    assert compilation.working_seconds() - before == 5
    assert compilation.compile_seconds() == 4
    assert said == [compilation.MESSAGE]
