"""Threads for the kernels: one count, one pool, and one owner of the cores at a time.

Blocks of a product run on the threads of the pool, each calling a BLAS that keeps to one thread.
If BLAS started threads of its own under each of them, there would be more threads than cores.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import prod
from typing import Any

import numpy as np

from npllm.arguments import check_integer
from npllm.arrays import ieee_semantics

__all__ = ["n_threads", "run_blocks", "scratch", "set_threads", "threads_are_fixed"]

Array = Any

LINE = 64  # bytes of a cache line
KEPT = 2**26  # bytes of the largest buffer that outlives its use
VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMBA_NUM_THREADS",
)

_lock = threading.Lock()
_users: set[object] = set()  # one mark for each caller inside `one_blas_thread`
_limit: contextlib.AbstractContextManager | None = None
_fixed: int | None = None  # what `set_threads` was given
_local = threading.local()


class _NoControl:
    """Stands for threadpoolctl's controller where it is missing: BLAS keeps its threads."""

    def info(self) -> list[dict[str, Any]]:
        """List no library."""
        return []

    def limit(self, *, limits: int) -> contextlib.AbstractContextManager:  # noqa: ARG002
        """Change nothing."""
        return contextlib.nullcontext()


@cache
def _blas() -> Any:
    """The controller of BLAS's threads."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return _NoControl()
    return ThreadpoolController().select(user_api="blas")


def blas_facts() -> dict[str, Any]:
    """Say what threadpoolctl knows of BLAS; an empty dict where it knows nothing or is missing."""
    return next(iter(_blas().info()), {})


def blas_threads() -> int:
    """Count the threads that BLAS uses now; 1 while `run_blocks` is at work."""
    return max([library["num_threads"] for library in _blas().info()], default=1)


def requested_counts() -> Iterator[int]:
    """The counts that environment variables name; what is no positive integer is ignored."""
    for name in VARIABLES:
        first = os.environ.get(name, "").partition(",")[0].strip()  # OpenMP allows "4,2"
        if first.isdecimal() and int(first) > 0:
            yield int(first)


def _n_cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def n_threads() -> int:
    """Count the threads of every kernel, of every set: one count for BLAS, the pool and Numba.

    It is what `set_threads` was given, else the smallest of: the cores of this process, the threads
    that BLAS uses, and each of the `VARIABLES` that is set.  `OMP_NUM_THREADS=1` alone means one
    thread everywhere.
    """
    return _default_threads() if _fixed is None else _fixed


@cache
def _default_threads() -> int:
    """Count the threads where `set_threads` was not called."""
    blas = [blas_threads()] if _blas().info() else []
    return max(1, min([_n_cores(), *requested_counts(), *blas]))


def threads_are_fixed() -> bool:
    """Tell whether the user chose the count, which the kernels then do not change."""
    return _fixed is not None or _is_requested()


@cache
def _is_requested() -> bool:
    """Tell whether the environment named a count, when a kernel first asked: it is asked often."""
    return any(True for _ in requested_counts())


def set_threads(count: int | None) -> None:
    """Fix the number of threads of this process, BLAS's included.

    Parameters
    ----------
    count : int or None
        From 1 to the cores of this process.  None: leave it as it is.

    Raises
    ------
    NpllmValueError
        For anything else.
    """
    global _fixed, _limit
    if count is None:
        return
    count = check_integer("threads", count, 1, _n_cores(), " (the cores of this process)")
    with _lock:
        _default_threads()  # as BLAS was before
        _fixed = count
        if _limit is not None:
            _limit.__exit__(None, None, None)
        _blas().limit(limits=count)
        if _limit is not None:
            _limit = _blas().limit(limits=1)


def _pool_threads() -> int:
    """Count the threads of `run_blocks`: 1 where BLAS cannot be limited to one thread for each."""
    return n_threads() if _blas().info() else 1


@cache
def _pool() -> ThreadPoolExecutor:
    """The threads beside the caller's own; each starts when it is first needed."""
    return ThreadPoolExecutor(max(1, _n_cores() - 1), thread_name_prefix="npllm")


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit BLAS to one thread while any caller is inside: the first one sets the limit, the last
    one lifts it.

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
                _default_threads()  # as it was before the limit
                _limit = _blas().limit(limits=1)
        yield
    finally:
        with _lock:
            _users.discard(caller)
            if not _users and _limit is not None:
                _limit.__exit__(None, None, None)
                _limit = None


def _reset_after_fork() -> None:
    """Give a forked child a new pool and new locks, and BLAS its threads back.

    A child has the thread that called fork and no other: the pool's threads are gone, and a lock
    that another thread held would stay locked.
    """
    global _limit, _lock
    _lock = threading.Lock()
    _pool.cache_clear()
    _users.clear()
    if _limit is not None:
        _limit.__exit__(None, None, None)
        _limit = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)


def run_blocks(function: Callable[[Any], Any], blocks: Sequence[Any]) -> None:
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
    def work() -> None:
        while True:
            with turn:
                block = next(todo, todo)
            if block is todo:
                return
            function(block)

    with one_blas_thread():
        helpers = [_pool().submit(work) for _ in range(min(_pool_threads(), len(blocks)) - 1)]
        try:
            work()
        finally:
            errors = [helper.exception() for helper in helpers]  # waits for them
    for error in errors:
        if error is not None:
            raise error


def scratch(name: str, shape: tuple[int, ...], dtype: Any) -> Array:
    """Lend a buffer of this thread's own, not cleared; it is valid until the thread asks for `name`
    again.  It begins at a multiple of 64 bytes: a vector, or a row of a tile, is one cache line.

    A new array costs the time in which the system clears its pages; one of more than KEPT bytes is
    new each time all the same, so that the longest input ever seen does not occupy memory for good.
    """
    buffers = _local.__dict__.setdefault("buffers", {})
    size = prod(shape)
    if size * np.dtype(dtype).itemsize > KEPT:
        return _aligned(size, dtype).reshape(shape)
    if name not in buffers or buffers[name].size < size or buffers[name].dtype != dtype:
        buffers[name] = _aligned(size, dtype)
    return buffers[name][:size].reshape(shape)


def _aligned(size: int, dtype: Any) -> Array:
    """Allocate a vector that begins at a multiple of LINE bytes."""
    n_bytes = size * np.dtype(dtype).itemsize
    memory = np.empty(n_bytes + LINE, np.uint8)
    start = -memory.__array_interface__["data"][0] % LINE
    return memory[start : start + n_bytes].view(dtype)
