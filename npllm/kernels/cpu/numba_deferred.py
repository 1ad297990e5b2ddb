"""Machine code for the kernels that Python calls, and for no other.

Numba optimises every function by itself and emits machine code for it, together with all functions
that it calls and a wrapper for Python; the function that calls it does all of this again.  A kernel
of six levels is optimised six times.  Here a function that is compiled because a kernel calls it
(another kernel, an overload, one of Numba's own) stays LLVM code, optimised cheaply, without a
wrapper: the kernel that Python calls contains it, and is optimised as a whole and emitted once.
Where Python calls such a function later, that is done then.

This file and `numba_internals` alone use parts of Numba that have no public name.  It does so with
the versions in `TESTED`; with any other one a kernel is compiled as Numba does it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numba
from numba.core import sigutils
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler_lock import global_compiler_lock
from numba.core.dispatcher import Dispatcher

from npllm.kernels import compilation

__all__ = ["is_compiling", "ordinary_code", "use_deferred_code"]

TESTED = ("0.68.",)  # beginnings of the versions whose inner parts are those that are used here

_local = threading.local()  # depth: of kernels that are compiled because others call them


class LateLibrary(JITCodeLibrary):
    """Code that is optimised fully and emitted when an address in it is asked for."""

    is_emitted = False

    def _optimize_final_module(self) -> None:
        """Inline, and leave the rest to the library that contains this one."""
        manager, builder = self._codegen._module_pass_manager(
            loop_vectorize=False, slp_vectorize=False, opt=0, cost="cheap"
        )
        manager.run(self._final_module, builder)

    def _finalize_final_module(self) -> None:
        """Let other libraries link this one."""
        self._finalize_dynamic_globals()
        self._verify_declare_only_symbols()
        self._finalized = True

    def _raise_if_finalized(self) -> None:
        """Take more code, the wrapper for Python, until machine code is emitted."""
        if self.is_emitted:
            super()._raise_if_finalized()

    def get_pointer_to_function(self, name: str) -> int:
        """The address of a function; 0 where there is none of that name."""
        self._ensure_finalized()
        if not self.is_emitted:
            self.is_emitted = True
            manager, builder = self._codegen._module_pass_manager()
            manager.run(self._final_module, builder)
            super()._finalize_final_module()
        return super().get_pointer_to_function(name)


class Deferred:
    """Stands for the entry point of a function that has no machine code yet."""

    def __init__(self, environment: Any) -> None:
        self.environment = environment
        self.emit: Any = None  # makes machine code and returns its entry point

    def __call__(self, *arguments: Any) -> Any:
        """Call the function from Python, which is rare for one of Numba's own."""
        return self.emit()(*arguments)


def is_compiling() -> bool:
    """Tell whether this thread is compiling a kernel with deferred code."""
    return getattr(_local, "depth", 0) > 0


@contextmanager
def late_code(context: Any) -> Iterator[None]:
    """Inside, new libraries are late ones; no entry point is made, and no wrapper for one."""
    _local.depth = getattr(_local, "depth", 0) + 1
    if _local.depth == 1:
        defer_code(context)
    try:
        yield
    finally:
        _local.depth -= 1
        if _local.depth == 0:
            reset(context)


def defer_code(context: Any) -> None:
    """Let Numba make LLVM code only."""
    context.codegen()._library_class = LateLibrary
    context.get_executable = lambda _library, _description, environment: Deferred(environment)
    context.create_cpython_wrapper = context.create_cfunc_wrapper = no_wrapper
    Dispatcher.add_overload = keep  # type: ignore[method-assign, assignment]


def reset(context: Any) -> None:
    """Let Numba make libraries, entry points and wrappers as it does by itself."""
    context.codegen().__dict__.pop("_library_class", None)
    for name in ("get_executable", "create_cpython_wrapper", "create_cfunc_wrapper"):
        context.__dict__.pop(name, None)
    Dispatcher.add_overload = insert  # type: ignore[method-assign]


@contextmanager
def ordinary_code(context: Any) -> Iterator[None]:
    """Inside, Numba does as it does by itself: for code that comes from the disk."""
    is_late = "get_executable" in context.__dict__
    reset(context)
    try:
        yield
    finally:
        if is_late:
            defer_code(context)


def no_wrapper(*_: Any, **_options: Any) -> None:
    """Make no wrapper."""


insert = Dispatcher.add_overload


def keep(dispatcher: Any, result: Any) -> None:
    """As `add_overload` of Numba's dispatchers: keep code that has no entry point from Python."""
    if isinstance(result.entry_point, Deferred):
        result.entry_point.emit = partial(emit, dispatcher, result)
        dispatcher.overloads[tuple(result.signature.args)] = result
    else:
        insert(dispatcher, result)


class _Compile:
    """The method `compile` of a kernel's dispatcher."""

    def __init__(self, dispatcher: Any) -> None:
        self.dispatcher, self.compile = dispatcher, dispatcher.compile

    def __call__(self, signature: Any) -> Any:
        dispatcher = self.dispatcher
        arguments = tuple(sigutils.normalize_signature(signature)[0])
        with global_compiler_lock:
            with late_code(dispatcher.targetctx):
                entry = self.compile(signature)
            if isinstance(entry, Deferred) and not is_compiling():
                entry = entry.emit()
                dispatcher._cache.save_overload(signature, dispatcher.overloads[arguments])
        return entry


def is_tested(version: str) -> bool:
    """Tell whether the inner parts of a version of Numba are those that are used here."""
    return version.startswith(TESTED)


def use_deferred_code(dispatcher: Any) -> Any:
    """Let a kernel have machine code only where Python calls it.

    Parameters
    ----------
    dispatcher : Numba's dispatcher
        Whose code `numba_internals.DiskCache` keeps.

    Returns
    -------
    dispatcher
        The same one.
    """
    if not is_tested(numba.__version__):
        return dispatcher
    dispatcher.compile = _Compile(dispatcher)
    return dispatcher


def emit(dispatcher: Any, deferred: Any) -> Any:
    """Make the wrapper for Python and machine code; return the entry point in it."""
    compilation.begin()
    try:
        result = with_entry_point(deferred, dispatcher.targetoptions.get("nogil", False))
    finally:
        compilation.end()
    insert(dispatcher, result)
    return result.entry_point


def with_entry_point(result: Any, releases_gil: bool) -> Any:
    """What is known of a compiled function, with its entry point."""
    context, library, description = result.target_context, result.library, result.fndesc
    kind, parts = type(context), (library, description, result.environment)
    library._shared_module = None  # for other libraries; where it exists, it has no wrapper
    kind.create_cpython_wrapper(context, *parts, result.call_helper, release_gil=releases_gil)
    entry = kind.get_executable(context, *parts)
    context.insert_user_function(entry, description, [library])
    engine = library.codegen._engine
    for environment in result._find_referenced_environments():
        name = environment.env_name
        if engine.get_global_value_address(name):
            library.codegen.set_env(name, environment)
    return result._replace(entry_point=entry)
