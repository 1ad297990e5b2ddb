"""Kernels have machine code only where Python calls them."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from npllm import kernels as sets

if sets.compiled_ops() is None:
    pytest.skip(sets.why_not_compiled(), allow_module_level=True)
import numba

from npllm.kernels import compilation
from npllm.kernels.cpu import numba_deferred
from npllm.kernels.cpu.launching import kernel

needs_tested = pytest.mark.skipif(
    not numba_deferred.is_tested(numba.__version__),
    reason="with this version of Numba kernels are compiled as Numba does it",
)


def chain():
    """An outer kernel, and the inner one that it calls twice."""

    @kernel()
    def inner(x):
        for i in range(len(x)):
            x[i] = 2 * x[i] + 1

    @kernel()
    def outer(x):
        inner(x)
        inner(x)

    for function in (inner, outer):
        function._cache = NoCache()
    return inner, outer


class NoCache:
    """A disk cache that is empty."""

    def load_overload(self, *_):
        return None

    def save_overload(self, *_):
        pass


def code_of(function):
    """What stands for the machine code of each variant of a kernel."""
    return [result.entry_point for result in function.overloads.values()]


@needs_tested
def test_a_kernel_gets_machine_code_when_python_calls_it():
    inner, outer = chain()
    x = np.zeros(3, np.float32)
    outer(x)
    assert (x == 3).all()
    assert [type(code) for code in code_of(inner)] == [numba_deferred.Deferred]
    assert not any(isinstance(code, numba_deferred.Deferred) for code in code_of(outer))
    inner(x)
    assert (x == 7).all()
    assert not any(isinstance(code, numba_deferred.Deferred) for code in code_of(inner))
    outer(x)
    assert (x == 31).all()


@needs_tested
def test_a_kernel_that_cannot_be_compiled_leaves_numba_as_it_was():
    @kernel()
    def wrong(x):
        return x.no_such_thing

    @kernel()
    def caller(x):
        return wrong(x)

    with pytest.raises(numba.TypingError):
        caller(np.zeros(3, np.float32))
    context = caller.targetctx
    assert "get_executable" not in vars(context) and "_library_class" not in vars(context.codegen())
    assert "create_cpython_wrapper" not in vars(context)
    assert numba.core.dispatcher.Dispatcher.add_overload is numba_deferred.insert
    assert not numba_deferred.is_compiling()
    assert numba.njit(lambda x: x + 1)(1) == 2
    assert gc.isenabled()


@needs_tested
def test_other_functions_that_a_kernel_calls_have_no_machine_code_until_python_calls_them():
    @numba.njit
    def plain(x):
        return x + 1

    @kernel()
    def outer(x):
        return plain(plain(x))

    outer._cache = NoCache()
    assert outer(1.5) == 3.5
    assert [type(code) for code in code_of(plain)] == [numba_deferred.Deferred]
    assert plain(1.5) == 2.5 and plain(1.5) == 2.5
    assert not any(isinstance(code, numba_deferred.Deferred) for code in code_of(plain))
    assert numba.njit(lambda x: plain(x) + outer(x))(1.5) == 6.0


def test_another_version_of_numba_compiles_by_itself(monkeypatch):
    monkeypatch.setattr(numba_deferred.numba, "__version__", "0.61.2")
    inner, outer = chain()
    x = np.zeros(3, np.float32)
    outer(x)
    assert (x == 3).all()
    assert not any(isinstance(code, numba_deferred.Deferred) for code in code_of(inner))


@pytest.mark.parametrize("collects", [True, False])
def test_no_garbage_is_collected_while_kernels_are_compiled(monkeypatch, collects):
    monkeypatch.setattr(compilation, "_said", True)
    before = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        compilation.begin()
        compilation.begin()  # a kernel that the first one calls
        compilation.end()
        assert not gc.isenabled()
        compilation.end()
        assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()


PARALLEL = """
import numpy as np
from numba import prange
from npllm.kernels.cpu.launching import kernel
@kernel(parallel=True)
def inner(x):
    for i in prange(len(x)):
        x[i] += 1
@kernel()
def outer(x):
    inner(x)
    inner(x)
"""


@pytest.mark.slow
@needs_tested
@pytest.mark.parametrize("calls", ["inner outer inner", "outer inner outer"])
def test_a_process_that_loads_the_inner_kernel_compiles_the_outer_one(tmp_path, calls):
    """Machine code from the disk, and LLVM code of the same kernel inside another one."""
    (tmp_path / "kernels_of_a_test.py").write_text(PARALLEL, encoding="utf-8")
    expected = sum(2 if name == "outer" else 1 for name in calls.split())
    root = Path(__file__).resolve().parents[1]
    found = os.pathsep.join([str(tmp_path), str(root), *sys.path])
    environment = {**os.environ, "PYTHONPATH": found, "NUMBA_CACHE_DIR": str(tmp_path)}
    script = (
        "import numpy, kernels_of_a_test as k; x = numpy.zeros(64); "
        f"[getattr(k, name)(x) for name in {calls.split()}]; assert (x == {expected}).all()"
    )
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
