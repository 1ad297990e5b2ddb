"""Threads for the kernels: one pool, and one owner of the cores at a time.

Blocks of a product run on the threads of the pool, each calling a BLAS that keeps to one thread.
If BLAS started threads of its own under each of them, there would be more threads than cores.
"""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import prod

import numpy as np

from npllm.arrays import ieee_semantics

__all__ = ["n_threads", "run_blocks", "scratch"]

KEPT = 2**26  # bytes of the largest buffer that outlives its use

_lock = threading.Lock()
_users: set[object] = set()  # one mark for each caller inside `_one_blas_thread`
_limit: contextlib.AbstractContextManager | None = None
_local = threading.local()


class _NoControl:
    """What stands in for threadpoolctl where it is not installed: BLAS keeps its own threads."""

    def info(self):
        """No library is known."""
        return []

    def limit(self, *, limits):  # noqa: ARG002 - the name is threadpoolctl's
        """Change nothing."""
        return contextlib.nullcontext()


@cache
def _blas():
    """The controller of BLAS's threads."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return _NoControl()
    return ThreadpoolController().select(user_api="blas")


def blas_facts():
    """Say what threadpoolctl knows of BLAS; an empty dict where it knows nothing or is missing."""
    return next(iter(_blas().info()), {})


def blas_threads():
    """Count the threads that BLAS uses now; 1 while `run_blocks` is at work."""
    return max([library["num_threads"] for library in _blas().info()], default=1)


@cache
def n_threads():
    """Count the threads to use: as many as BLAS found cores for, which `OPENBLAS_NUM_THREADS` and
    the like limit.

    Without threadpoolctl it is 1: BLAS cannot be kept to one thread, so the blocks of a product run
    one after the other.
    """
    return blas_threads()


@cache
def _pool():
    return (
        ThreadPoolExecutor(n_threads() - 1, thread_name_prefix="npllm") if n_threads() > 1 else None
    )


@contextlib.contextmanager
def _one_blas_thread():
    """Keep BLAS to one thread while anybody is inside: the first to come sets the limit, the last
    to go lifts it.

    Ctrl-C can raise at any line.  A caller is therefore a mark in a set, not a step of a counter:
    removing it is right whether it was added or not, and a limit that is missing is set by the next
    caller.
    """
    global _limit
    caller = object()
    try:
        with _lock:
            _users.add(caller)
            if _limit is None:
                n_threads()  # as it was before the limit
                _limit = _blas().limit(limits=1)
        yield
    finally:
        with _lock:
            _users.discard(caller)
            if not _users and _limit is not None:
                _limit.__exit__(None, None, None)
                _limit = None


def run_blocks(function, blocks):
    """Call a function on every block, on all threads; whichever is free takes the next one.

    Parameters
    ----------
    function : function (block)
        Writes its result where it belongs.
    blocks : sequence

    Raises
    ------
    Exception
        The first that a call raised; blocks that were not begun by then are left out.
    """
    todo, turn = iter(blocks), threading.Lock()

    @ieee_semantics  # NumPy keeps them for each thread
    def work():
        while True:
            with turn:
                block = next(todo, todo)
            if block is todo:
                return
            function(block)

    with _one_blas_thread():
        helpers = [_pool().submit(work) for _ in range(min(n_threads(), len(blocks)) - 1)]
        try:
            work()
        finally:
            errors = [helper.exception() for helper in helpers]  # waits for them
    for error in errors:
        if error is not None:
            raise error


def scratch(name, shape, dtype):
    """Lend a buffer of this thread's own, not cleared; it is valid until the thread asks for `name`
    again.

    A new array costs the time in which the system clears its pages; one of more than KEPT bytes is
    new each time all the same, so that the longest input ever seen does not occupy memory for good.
    """
    buffers = _local.__dict__.setdefault("buffers", {})
    size = prod(shape)
    if size * np.dtype(dtype).itemsize > KEPT:
        return np.empty(shape, dtype)
    if name not in buffers or buffers[name].size < size or buffers[name].dtype != dtype:
        buffers[name] = np.empty(size, dtype)
    return buffers[name][:size].reshape(shape)
