"""Threads of both CPU sets: one count, forked children, and layers of Numba that are not threadsafe.

Each case is a process of its own, since threads are started once.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from npllm import kernels, threads

ROOT = Path(__file__).resolve().parents[1]
COUNTS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
MODEL = """
import os, sys, threading
import numpy as np
from tiny import model, random_ids
from npllm import NpllmError, kernels, threads

m = model(ops=getattr(kernels, SET + "_ops")())
ids = random_ids(2, 40)
"""

needs_numba = pytest.mark.skipif(kernels.compiled_ops() is None, reason="Numba is not installed")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
needs_cores = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two cores",
)
each_set = pytest.mark.parametrize("name", ["tiled", pytest.param("compiled", marks=needs_numba)])


def run(script, name="tiled", **environment):
    """Run a script in a process of its own, and return what it printed."""
    inherited = {key: value for key, value in os.environ.items() if key not in COUNTS}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"SET = {name!r}\n{MODEL}{script}"],
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        timeout=600,
        env=inherited | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])} | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


FORK = """
want = m(ids)
child = os.fork()
if child == 0:
    status = 3
    try:
        status = 0 if np.array_equal(m(ids), want) else 4
        cache = m.new_cache(2)
        m(ids[:, :9], cache=cache)
        m(ids[:, 9:10], cache=cache)
    except NpllmError as error:
        status = 5 if "spawn" in str(error) and isinstance(error, RuntimeError) else 6
    finally:
        os._exit(status)
import signal
signal.signal(signal.SIGALRM, lambda *_: (os.kill(child, signal.SIGKILL), sys.exit("the child hangs")))
signal.alarm(400)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status))
assert np.array_equal(m(ids), want)  # the parent goes on
"""
WORKS, SAYS_SPAWN = 0, 5


@needs_fork
@pytest.mark.parametrize("count", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_a_forked_child_of_the_tiled_set_computes(count):
    assert int(run(FORK, "tiled", OPENBLAS_NUM_THREADS=count)) == WORKS


FORK_INSIDE = """
from npllm.threads import blas_threads, run_blocks
before, statuses = blas_threads(), []

def fork(block):
    child = os.fork()
    if child == 0:
        seen = []
        run_blocks(seen.append, range(50))
        os._exit(0 if sorted(seen) == list(range(50)) and blas_threads() == before else 1)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

run_blocks(fork, range(2))
print(statuses)
"""


@needs_fork
def test_a_child_that_is_forked_while_blocks_run_has_a_pool_and_blas_of_its_own():
    assert run(FORK_INSIDE) == "[0, 0]\n"


SEVERAL = """
want, got = m(ids), {}
workers = [threading.Thread(target=lambda n=n: got.update({n: [m(ids) for _ in range(10)]}))
           for n in range(4)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
assert all(np.array_equal(x, want) for n in range(4) for x in got[n])
"""


COUNT = """
m(ids)
m(ids[:, :1], cache=m.new_cache(2))
used = [threads.n_threads()]
if SET == "compiled":
    from npllm.kernels.cpu.launching import launch, n_workers
    from numba import get_num_threads, njit, prange

    @njit(parallel=True)
    def count(n):
        x = np.zeros(n, np.int64)
        for i in prange(n):
            x[i] = get_num_threads()
        return x.max()

    before = get_num_threads()
    used += [n_workers(), launch(count, 64)]
    assert get_num_threads() == before
else:
    seen = set()
    threads.run_blocks(lambda _: seen.add(threading.get_ident()), range(200))
    used.append(len(seen))
print(max(used))
"""


@needs_cores
@pytest.mark.parametrize(
    ("name", "variable"),
    [
        *(pytest.param("tiled", variable, marks=pytest.mark.slow) for variable in COUNTS[:-1]),
        ("tiled", COUNTS[-1]),
        *(
            pytest.param("compiled", variable, marks=[needs_numba, pytest.mark.slow])
            for variable in COUNTS
        ),
    ],
)
def test_one_variable_means_one_thread_in_every_kernel(name, variable):
    assert int(run(COUNT, name, **{variable: "1"})) == 1


ADAPTS = """
from npllm.kernels.cpu import launching
m(ids)
print(launching._controller is not None)
"""
FEWER_THREADS = """
want = [m(ids), m(ids[:, :1], cache=m.new_cache(2))]
launching._controller.count, launching._controller.next_attempt = 1, float("inf")
got = [m(ids), m(ids[:, :1], cache=m.new_cache(2))]
assert launching._controller.count == 1
assert all(map(np.array_equal, got, want))
"""
FIXED_BY_A_VARIABLE = """
from npllm import threads
os.environ["OMP_NUM_THREADS"] = "2"
threads._is_requested.cache_clear()  # as if it had been set at the start
launching._controller = None
m(ids)
print(launching._controller is not None)
del os.environ["OMP_NUM_THREADS"]
threads._is_requested.cache_clear()
"""


@pytest.mark.slow
@needs_cores
@needs_fork
@needs_numba
@pytest.mark.parametrize(
    ("layer", "child"), [("default", {WORKS, SAYS_SPAWN}), ("workqueue", {WORKS})]
)
def test_kernels_use_every_core_and_change_no_bit_under_every_layer_of_numba(layer, child):
    """All cores unless a variable fixes the count; with fewer threads, and called by four threads
    at once, the same bits; a forked child computes or says spawn.
    """
    script = COUNT + ADAPTS + SEVERAL + FEWER_THREADS + FIXED_BY_A_VARIABLE + FORK
    count, adapts, fixed, status = run(script, "compiled", NUMBA_THREADING_LAYER=layer).split()
    assert int(count) == len(os.sched_getaffinity(0))
    assert (adapts, fixed) == ("True", "False")
    assert int(status) in child


def test_doctor_reports_the_count_that_is_used():
    from npllm.analysis.machine import machine_facts

    assert machine_facts()["kernels"]["threads"] == threads.n_threads()


@pytest.mark.parametrize(
    ("value", "counts"), [("3", [3]), ("4,2", [4]), ("0", []), ("many", []), ("", []), (" 2 ", [2])]
)
def test_a_count_that_openmp_would_ignore_is_ignored(monkeypatch, value, counts):
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert list(threads.requested_counts()) == counts


@pytest.mark.parametrize(
    "name",
    [*COUNTS, "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"],
)
def test_every_variable_is_read(monkeypatch, name):
    for other in threads.VARIABLES:
        monkeypatch.delenv(other, raising=False)
    asked = threads._is_requested.__wrapped__  # the answer is kept
    monkeypatch.setattr(threads, "_is_requested", asked)
    assert not threads.threads_are_fixed()
    monkeypatch.setenv(name, "3")
    assert list(threads.requested_counts()) == [3] and threads.threads_are_fixed()


@needs_numba
def test_python_reaches_parallel_kernels_through_launch_alone():
    """A direct call would skip the lock, the count and the check for a forked child.

    Kernels without threads are marked nogil, and may be called on the threads of `run_blocks`.
    """
    import importlib

    from numba.core.dispatcher import Dispatcher

    def runs_threads(called):
        return isinstance(called, Dispatcher) and not called.targetoptions.get("nogil")

    direct = []
    for path in sorted((ROOT / "npllm/kernels/cpu").glob("*.py")):
        module = importlib.import_module(f"npllm.kernels.cpu.{path.stem}")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if (
                isinstance(node, ast.FunctionDef)
                and not isinstance(getattr(module, node.name, None), Dispatcher)
                and not any("overload" in ast.unparse(x) for x in node.decorator_list)  # compiled
            ):
                direct += [
                    f"{path.name}:{call.lineno}"
                    for call in ast.walk(node)
                    if isinstance(call, ast.Call)
                    and isinstance(call.func, ast.Name)
                    and runs_threads(getattr(module, call.func.id, None))
                ]
    assert not direct


SET_THREADS = """
from npllm.threads import set_threads, threads_are_fixed
before = threads.n_threads(), threads_are_fixed()
m(ids)
for wrong in (0, -1, 10**6, 1.5, True, "2", [1]):
    try:
        set_threads(wrong)
    except NpllmError as error:
        assert "threads" in str(error) and "cores of this process" in str(error), error
    else:
        raise AssertionError(wrong)
assert threads.n_threads() == before[0]
set_threads(None)
assert (threads.n_threads(), threads_are_fixed()) == before
want = m(ids)
set_threads(1)
assert threads_are_fixed() and threads.n_threads() == threads.blas_threads() == 1
assert np.array_equal(m(ids), want)
set_threads(len(os.sched_getaffinity(0)))
assert np.array_equal(m(ids), want)
print(threads.n_threads())
"""


NEVER_CHANGED = """
if SET == "compiled":
    from npllm.kernels.cpu import launching
    launching._controller = None
    m(ids)
    assert launching._controller is None
"""


@needs_cores
@each_set
def test_threads_are_set_exactly_and_change_no_bit(name):
    script = SET_THREADS.replace("set_threads(1)\n", "set_threads(1)\n" + COUNT, 1)
    assert run(script + NEVER_CHANGED, name).split() == ["1", str(len(os.sched_getaffinity(0)))]
