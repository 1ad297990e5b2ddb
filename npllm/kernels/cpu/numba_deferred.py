"""Machine code for the kernels that Python calls, and for no other.

Numba optimises every function by itself and emits machine code for it, together with all functions
that it calls; the function that calls it does both again.  A kernel of six levels is optimised six
times.  Here a kernel that is compiled because another one calls it stays LLVM code, optimised
cheaply: the kernel that Python calls contains it, and is optimised as a whole and emitted once.
Where Python calls such a kernel later, that is done then.

This file and `numba_internals` alone use parts of Numba that have no public name.  It does so with
the versions in `TESTED`; with any other one a kernel is compiled as Numba does it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numba
from numba.core import event, sigutils
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler_lock import global_compiler_lock

from npllm.kernels import compilation

__all__ = ["is_compiling", "ordinary_code", "use_deferred_code"]

TESTED = ("0.68.",)  # beginnings of the versions whose inner parts are those that are used here

# depth: of kernels that are compiled because others call them; ours: of each function that is being
# compiled, whether it is a kernel of this package
_local = threading.local()


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
    """Stands for the entry point of a kernel that has no machine code yet."""

    def __init__(self, environment: Any) -> None:
        self.environment = environment


class _Watch(event.Listener):
    """Tracks which functions are being compiled."""

    def on_start(self, event: Any) -> None:
        """Push a function whose compilation begins."""
        stack = _local.__dict__.setdefault("ours", [])
        stack.append(isinstance(event.data["dispatcher"].__dict__.get("compile"), _Compile))

    def on_end(self, event: Any) -> None:  # noqa: ARG002
        """Pop it."""
        _local.ours.pop()


event.register("numba:compile", _Watch())


def is_compiling() -> bool:
    """Tell whether this thread is compiling a kernel with deferred code."""
    return getattr(_local, "depth", 0) > 0


@contextmanager
def late_code(context: Any) -> Iterator[None]:
    """Inside, new libraries are late ones, and no entry point is made."""
    codegen = context.codegen()
    _local.depth = getattr(_local, "depth", 0) + 1
    if _local.depth == 1:
        codegen._library_class = LateLibrary
        context.get_executable = partial(defer, context)
    try:
        yield
    finally:
        _local.depth -= 1
        if _local.depth == 0:
            reset(context)


def defer(context: Any, library: Any, description: Any, environment: Any) -> Any:
    """Stand in for the entry point of a kernel; make that of one of Numba's own functions."""
    if _local.ours[-1]:
        return Deferred(environment)
    return type(context).get_executable(context, library, description, environment)


def reset(context: Any) -> None:
    """Let Numba make libraries and entry points as it does by itself."""
    context.codegen().__dict__.pop("_library_class", None)
    context.__dict__.pop("get_executable", None)


@contextmanager
def ordinary_code(context: Any) -> Iterator[None]:
    """Inside, Numba does as it does by itself: for code that comes from the disk."""
    late = context.__dict__.get("get_executable")
    reset(context)
    try:
        yield
    finally:
        if late is not None:
            context.codegen()._library_class = LateLibrary
            context.get_executable = late


class _Compile:
    """The method `compile` of a kernel's dispatcher."""

    def __init__(self, dispatcher: Any) -> None:
        self.dispatcher, self.compile = dispatcher, dispatcher.compile
        self.insert = dispatcher.add_overload

    def __call__(self, signature: Any) -> Any:
        dispatcher = self.dispatcher
        arguments = tuple(sigutils.normalize_signature(signature)[0])
        with global_compiler_lock:
            with late_code(dispatcher.targetctx):
                self.compile(signature)
            result = dispatcher.overloads[arguments]
            if not is_compiling() and isinstance(result.entry_point, Deferred):
                compilation.begin()
                try:
                    result = emit(result)
                finally:
                    compilation.end()
                self.insert(result)
                dispatcher._cache.save_overload(signature, result)
        return result.entry_point

    def add_overload(self, result: Any) -> None:
        """Keep a kernel that has no machine code from Python."""
        if isinstance(result.entry_point, Deferred):
            self.dispatcher.overloads[tuple(result.signature.args)] = result
        else:
            self.insert(result)


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
    late = _Compile(dispatcher)
    dispatcher.compile, dispatcher.add_overload = late, late.add_overload
    return dispatcher


def emit(result: Any) -> Any:
    """Make machine code, and the entry point in it."""
    context, library = result.target_context, result.library
    entry = type(context).get_executable(context, library, result.fndesc, result.environment)
    context.insert_user_function(entry, result.fndesc, [library])
    engine = library.codegen._engine
    for environment in result._find_referenced_environments():
        name = environment.env_name
        if engine.get_global_value_address(name):
            library.codegen.set_env(name, environment)
    return result._replace(entry_point=entry)
