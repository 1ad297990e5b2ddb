"""Everything of Numba that has no public name: its disk cache, its OpenMP, its array structs, its
events.

No other file but `numba_deferred` uses them.  They were checked with the versions that setup.cfg
allows, and tests/test_numba_internals.py fails where a new version changes them.
"""

import importlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import threading_layer
from numba.core import event
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc

from npllm.kernels import compilation
from npllm.kernels.cpu.numba_deferred import is_compiling, ordinary_code
from npllm.progress import warn

__all__ = ["DiskCache", "c_function", "openmp_dies_in_a_fork", "struct_value", "use_disk_cache"]

SOURCES = sorted(
    (path.name, path.stat().st_mtime, path.stat().st_size)
    for path in Path(__file__).parent.glob("*.py")
)
REMEDY = "set NUMBA_CACHE_DIR to a writable folder with free space"
_warned: list[str] = []


def use_disk_cache(dispatcher: Any, function: Callable | None = None) -> Any:
    """Let a compiled function keep its code for later processes; without a folder, do not."""
    try:
        dispatcher._cache = DiskCache(function or dispatcher.py_func)
    except (RuntimeError, OSError) as error:  # no folder that can be written to
        warn_once(error)
    return dispatcher


def c_function(function: Callable, signature: Any) -> Any:
    """Compile a function of C's calling convention; its `address` is what other kernels call.

    Its code is kept on disk: what it closes over must be numbers and strings.
    """
    compiled = CFunc(
        function, (signature.args, signature.return_type), {}, {"error_model": "numpy"}
    )
    use_disk_cache(compiled, function)
    compiled.compile()
    return compiled


def warn_once(error: Exception) -> None:
    """Say once for each process that compiled code is not kept."""
    if not _warned:
        _warned.append(str(error))
        warn(
            f"compiled kernels cannot be kept on disk ({error}), so that every process compiles "
            f"them again; {REMEDY}",
            RuntimeWarning,
        )


class DiskCache(FunctionCache):
    """Numba's cache of one function, which never raises: what cannot be read is compiled again.

    Three things differ from Numba's own.

    1. A file that cannot be read (truncated, empty, of another version) counts as missing, and is
       written again.
    2. A file that cannot be written (a full disk, a folder that is read-only by now) costs one
       warning, not the computation.
    3. Numba numbers its files by what the index lists, so that two processes which compile at the
       same time may write the code of different argument types under one name, and a third would
       run the wrong one.  Here every process has names of its own.
    """

    def __init__(self, function: Callable) -> None:
        super().__init__(function)
        file = self._cache_file
        own = f"{os.getpid()}-{time.time_ns()}-{{number:d}}"
        file._data_name_pattern = file._data_name_pattern.replace("{number:d}", own)
        file._source_stamp = (file._source_stamp, *SOURCES)  # kernels call each other across files

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the code for a signature, or None where there is none that can be read."""
        try:
            with ordinary_code(target_context):
                return super().load_overload(sig, target_context)
        except Exception:  # pickle raises nearly anything for a damaged file
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep the code for a signature where that is possible, and where it has any yet."""
        if is_compiling():
            return
        try:
            self._save(sig, data)
        except OSError as error:
            warn_once(error)

    def _save(self, sig: Any, data: Any) -> None:
        """Write the code; where the index cannot be read, begin a new one."""
        try:
            super().save_overload(sig, data)
        except OSError:
            raise
        except Exception:
            self.flush()
            super().save_overload(sig, data)


class CompileWatch(event.Listener):
    """Tells `compilation` when a kernel of this package is compiled, and not loaded from disk."""

    def on_start(self, event: Any) -> None:
        """Note the beginning of a compilation."""
        if is_ours(event):
            compilation.begin()

    def on_end(self, event: Any) -> None:
        """Note the end of a compilation."""
        if is_ours(event):
            compilation.end()


def is_ours(event: Any) -> bool:
    """Tell whether an event is the compilation of a kernel of this package."""
    return event.data["dispatcher"].py_func.__module__.startswith("npllm.")


event.register("numba:compile", CompileWatch())


def openmp_dies_in_a_fork() -> bool:
    """Tell whether Numba's threads are those of GNU OpenMP, which end a forked child."""
    if threading_layer() != "omp":
        return False
    return importlib.import_module("numba.np.ufunc.omppool").openmp_vendor == "GNU"


def struct_value(struct: Any) -> Any:
    """The LLVM value of an array's struct, with the members that were set."""
    return struct._getvalue()
