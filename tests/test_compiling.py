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


# Kernels of a module whose name counts as one of the package. Typing `factor` takes a second, which
# must be counted.
SCRIPT = """
import sys, time
import numpy as np
from numba.extending import overload
from npllm.kernels import compilation
from npllm.kernels.cpu.launching import kernel, launch
from npllm.progress import report

def factor():
    return 2

@overload(factor)
def compiled_factor():
    time.sleep(1)
    return lambda: 2

@kernel()
def double(x):
    for i in range(len(x)):
        x[i] *= factor()

@kernel()
def halve(x):
    for i in range(len(x)):
        x[i] /= 2

x = np.ones(5, np.float32)
BEFORE
compilation.announce(report)
launch(double, x)
launch(double, x)
assert np.array_equal(x, np.full(5, 4, np.float32))
print(compilation.compile_seconds())
"""
START = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='npllm.kernels_of_a_test')"


def run(folder, before=""):
    """Run the kernels in a process of its own; return its standard output and standard error."""
    script = folder / "kernels_of_a_test.py"
    script.write_text(SCRIPT.replace("BEFORE", before), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", START, str(script)],
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


@needs_numba
def test_a_first_process_says_that_it_compiles_once_and_a_second_says_nothing(tmp_path):
    out, err = run(tmp_path)
    assert float(out) > 1
    assert err == f"npllm: {compilation.MESSAGE}\n"
    out, err = run(tmp_path)
    assert err == "" and float(out) == 0


@pytest.mark.slow
@needs_numba
def test_the_library_writes_no_line_of_its_own(tmp_path):
    assert run(tmp_path, "compilation.announce(None); launch(halve, x); sys.exit()")[1] == ""


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
