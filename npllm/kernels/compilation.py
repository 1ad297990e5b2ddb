"""Compilation of the kernels: how long it took, and a line that says what happens.

Numba compiles a kernel at its first use on a machine, and a command would be silent meanwhile.
This file does not import Numba.
"""

import gc
import logging
import threading
import time
from collections.abc import Callable

__all__ = ["announce", "begin", "compile_seconds", "end", "working_seconds"]

MESSAGE = (
    "compiling the kernels that this command needs, which are kept for later runs; it takes 10 to "
    "60 seconds"
)

_local = threading.local()  # depth: a kernel is compiled while another that calls it is
_lock = threading.Lock()
_seconds = 0.0
_said = False
_say: Callable[[str], object] | None = None
_n_compiling = 0  # threads that are compiling
_collects = False  # whether garbage was collected before


def announce(say: Callable[[str], object] | None) -> None:
    """Say once for each process that kernels are compiled, when they are.

    Parameters
    ----------
    say : function (str) or None
        Commands write the line to stderr.  None: it only goes to the logger "npllm".
    """
    global _say
    _say = say


def compile_seconds() -> float:
    """Return for how many seconds this process has compiled kernels."""
    return _seconds


def working_seconds() -> float:
    """Read a clock that does not count the time in which kernels are compiled."""
    return time.perf_counter() - compile_seconds()


def begin() -> None:
    """Note that a kernel is compiled from now on; say so for the first one."""
    global _said
    _local.depth = getattr(_local, "depth", 0) + 1
    if _local.depth == 1:
        _local.start = time.perf_counter()
        with _lock:
            first, _said = not _said, True
            _pause_collection()
        if first:
            logging.getLogger("npllm").info(MESSAGE)
            if _say is not None:
                _say(MESSAGE)


def end() -> None:
    """Note that the kernel of the last `begin` has been compiled."""
    global _seconds
    _local.depth -= 1
    if _local.depth == 0:
        with _lock:
            _seconds += time.perf_counter() - _local.start
            _resume_collection()


def _pause_collection() -> None:
    """Disable garbage collection: Numba makes millions of objects that live on, and the collector
    visits them repeatedly, a sixth of the time.
    """
    global _n_compiling, _collects
    if _n_compiling == 0:
        _collects = gc.isenabled()
        gc.disable()
    _n_compiling += 1


def _resume_collection() -> None:
    """Enable garbage collection, if it was enabled, once no thread compiles."""
    global _n_compiling
    _n_compiling -= 1
    if _n_compiling == 0 and _collects:
        gc.enable()
