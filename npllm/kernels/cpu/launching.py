"""How Python reaches a compiled kernel: `kernel` compiles a function, `launch` calls it.

Three things are decided here and nowhere else: how many threads a kernel runs on (`contention` says
when fewer), that only one caller is inside where Numba's threads need that, and what a forked child
is told.
"""

import contextlib
import importlib
import os
import threading
from collections.abc import Callable
from typing import Any

from numba import config, get_num_threads, njit, set_num_threads, threading_layer

from npllm.errors import NpllmRuntimeError
from npllm.kernels.compilation import compile_seconds
from npllm.kernels.cpu.contention import Controller, can_measure, read_usage
from npllm.kernels.cpu.numba_deferred import use_deferred_code
from npllm.kernels.cpu.numba_internals import openmp_dies_in_a_fork, use_disk_cache
from npllm.threads import n_threads, threads_are_fixed

__all__ = ["kernel", "launch", "n_workers"]

SPINS = "30000"  # about a tenth of a millisecond: longer than the Python between two kernels takes
FORKED = (
    "the compiled kernels cannot run in a forked process whose parent has loaded them: GNU OpenMP, "
    'which Numba uses, does not survive fork.  Start processes with the "spawn" method, '
    'multiprocessing.get_context("spawn"), or start Python with NUMBA_THREADING_LAYER=workqueue'
)


def _start_threads() -> None:
    """Start Numba's threads; those of OpenMP soon stop spinning when they have nothing to do.

    Their own choice takes cores from others.  Numba starts threads where it compiles or loads a
    parallel function, but not where it loads another that calls one: that one would end in a
    segmentation fault.
    """
    before = os.environ.get("GOMP_SPINCOUNT")
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # is read when the library is loaded
    with contextlib.suppress(ImportError):  # another of Numba's threading layers then serves
        importlib.import_module("numba.np.ufunc.omppool")
    get_num_threads()
    if before is None:
        del os.environ["GOMP_SPINCOUNT"]


_start_threads()

_controller: Controller | None = None
_inside: set[object] = set()  # one mark for each launch that is measured and has not ended
_newest: object = None  # the mark of the launch that began last
_forked = False
# Numba's own threads ("workqueue", what its macOS wheels have) abort the process when a second
# thread calls them.
_turn: contextlib.AbstractContextManager = (
    threading.RLock() if threading_layer() == "workqueue" else contextlib.nullcontext()
)


def _reset_after_fork() -> None:
    """Note in a forked child whether its kernels can still run."""
    global _forked, _turn
    _inside.clear()
    _forked = _forked or openmp_dies_in_a_fork()
    if threading_layer() == "workqueue":
        _turn = threading.RLock()  # another thread of the parent may have held the old one


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)


def kernel(**options: Any) -> Callable[[Callable], Any]:
    """Compile a function with Numba when it is first called, and keep the code for later processes.

    Parameters
    ----------
    **options
        Of `numba.njit`.

    Returns
    -------
    decorate : function (function) -> Numba's dispatcher
        Kernels call it directly, Python through `launch`.
    """

    def decorate(function: Callable) -> Any:
        # x / 0 is no exception; no kernel is called from C
        compiled = njit(error_model="numpy", no_cfunc_wrapper=True, **options)(function)
        return use_deferred_code(use_disk_cache(compiled))

    return decorate


def n_workers() -> int:
    """Count the threads on which `launch` runs a kernel that this thread calls, at most."""
    return min(get_num_threads(), n_threads())


def launch(compiled: Any, *arguments: Any) -> Any:
    """Call a compiled kernel that runs on Numba's threads.

    Parameters
    ----------
    compiled : Numba's dispatcher
        Made by `kernel`.
    *arguments

    Returns
    -------
    result
        What the kernel returns.

    Raises
    ------
    NpllmRuntimeError
        In a forked process, where the threads are gone and Numba would end the process.
    """
    if _forked:
        raise NpllmRuntimeError(FORKED)
    with _turn:
        before, most = get_num_threads(), n_workers()
        if most == config.NUMBA_NUM_THREADS > 1 and can_measure() and not threads_are_fixed():
            return _launch_measured(compiled, arguments, most)
        if most == before:
            return compiled(*arguments)
        return _launch_on(most, before, compiled, arguments)


def _launch_on(count: int, before: int, compiled: Any, arguments: tuple) -> Any:
    """Call a kernel on so many threads; another count is current before and afterwards."""
    set_num_threads(count)
    try:
        return compiled(*arguments)
    finally:
        set_num_threads(before)


def _launch_measured(compiled: Any, arguments: tuple, full: int) -> Any:
    """Call a kernel on as many threads as the controller says, and tell it what they used.

    A launch that overlaps another one is not measured, since what the process uses is the sum of
    both; nor is one that compiled its kernel.
    """
    global _controller, _newest
    if _controller is None:
        _controller = Controller(full)
    usage, compiled_for = read_usage(), compile_seconds()
    count = _controller.choose(usage.seconds)
    mark, is_first = object(), not _inside
    try:
        _newest = mark
        _inside.add(mark)
        if count == full:
            return compiled(*arguments)
        return _launch_on(count, full, compiled, arguments)
    finally:
        _inside.discard(mark)
        if is_first and _newest is mark and compiled_for == compile_seconds():
            _controller.record(count, usage, read_usage())
