"""Kernels: the same operations, fast.  Same names, same signatures, same results as the definitions
in `npllm.ops`.

Each set is an `Ops`, and each of its kernels is tested against the definition whose place it takes.
What a kernel is not made for (float64, another array library, an unusual shape) it hands to the
definition, which also raises the errors.
"""

import importlib
import time
from functools import cache
from typing import Any

from npllm import ops as _ops
from npllm.errors import NpllmValueError, install_extra
from npllm.ops import Ops
from npllm.ops.rounded import rounded_ops
from npllm.quantized.activations import check_activations, default_activations

__all__ = [
    "FEW_ROWS",
    "SETS",
    "choose_ops",
    "compiled_ops",
    "cuda_ops",
    "fastest_ops",
    "ops_for",
    "product_forms",
    "seconds_to_prepare",
    "tiled_ops",
    "why_not_compiled",
]

FEW_ROWS = 16  # of a call: so many have the same bits each, alone and in company (compiled set)
SETS = ("fast", "cuda", "blockwise", "reference")  # sets of operations that have a name


def choose_ops(
    ops: Ops | str | None, backend: str = "numpy", activations: str | None = None
) -> Ops:
    """Return the set of operations that a caller means.

    Parameters
    ----------
    ops : Ops, str or None
        A set; or its name: "fast" (None as well) for the fastest of the backend, "cuda" for the
        CUDA kernels, "blockwise" for the definitions with blockwise attention, "reference" for the
        definitions.
    backend : str
        "numpy" or "cupy": where the arrays live.
    activations : str, optional
        What linear maps round, see `npllm.load`.  None: nothing, and what a given set rounds; for a
        model see `ops_for`.

    Returns
    -------
    ops : Ops

    Raises
    ------
    NpllmValueError
        For another name, for the CUDA kernels where the arrays are NumPy's, for unknown
        activations, and for activations beside a set that was made elsewhere.
    """
    kind = check_activations(activations)
    if ops is not None and not isinstance(ops, str):
        if activations is not None and kind != ops.activations:
            raise NpllmValueError(
                f'activations="{kind}" needs a set by its name ({", ".join(SETS)}), got the set '
                f"{ops.name!r}, which rounds to {ops.activations}"
            )
        return ops
    base = _named_ops(ops, backend)
    return base if kind == "float32" else _rounded(base, kind)


def ops_for(params: Any, ops: Ops | str | None, backend: str = "numpy") -> Ops:
    """Return the set of operations that a model runs on.

    Parameters
    ----------
    params : Params or BertParams
    ops : Ops, str or None
        See `choose_ops`.
    backend : str
        "numpy" or "cupy".

    Returns
    -------
    ops : Ops
        For None and "fast" with the activations that go with quantised weights,
        `default_activations`, where this processor multiplies integers faster than float32.
    """
    base = choose_ops(ops, backend)
    is_named = ops is None or isinstance(ops, str)
    if not (is_named and base is compiled_ops() and multiplies_integers()):
        return base
    kind = default_activations(params)
    return base if kind == "float32" else _rounded(base, kind)


@cache
def multiplies_integers() -> bool:
    """Tell whether the compiled set has an instruction for products of bytes here."""
    module = importlib.import_module("npllm.kernels.cpu.dot_products")
    return bool(module.has_instruction("int8"))


@cache
def _rounded(base: Ops, activations: str) -> Ops:
    """A set that rounds activations: with kernels where it is the compiled one."""
    if base is compiled_ops():
        module = importlib.import_module("npllm.kernels.cpu.rounded")
        return module.rounded_compiled(activations)
    if activations == "bfloat16" and base.name == "cuda" and base is cuda_ops():
        return importlib.import_module("npllm.kernels.cuda.rounded").rounded_cuda(base)
    return rounded_ops(base, activations)


def _named_ops(ops: str | None, backend: str) -> Ops:
    """The set of a name, or the fastest one."""
    if ops not in (None, *SETS):
        raise NpllmValueError(f"ops must be an Ops or one of {', '.join(SETS)}, got {ops!r}")
    if ops == "cuda" and backend == "numpy":
        raise NpllmValueError(
            'ops="cuda" runs on CuPy arrays and needs backend="cupy", got backend="numpy"'
        )
    if ops in ("blockwise", "reference"):
        return getattr(_ops, ops)
    return fastest_ops(backend)


def fastest_ops(backend: str = "numpy") -> Ops:
    """Return the fastest set of operations for a backend.

    Parameters
    ----------
    backend : str
        "numpy": the compiled set where Numba can be imported, else the tiled one.  "cupy": the CUDA
        kernels.

    Returns
    -------
    ops : Ops
    """
    if backend != "numpy":
        return cuda_ops()
    return compiled_ops() or tiled_ops()


@cache
def tiled_ops() -> Ops:
    """Return the set in plain NumPy: blocks that fit a core's cache, on as many threads as BLAS
    would use.
    """
    return importlib.import_module("npllm.kernels.cpu.tiled").TILED


@cache
def compiled_ops() -> Ops | None:
    """Return the set compiled with Numba (extra "fast"); None where Numba cannot be imported."""
    return (
        None
        if why_not_compiled()
        else importlib.import_module("npllm.kernels.cpu.compiled").COMPILED
    )


@cache
def cuda_ops() -> Ops:
    """Return the set of CUDA kernels for CuPy arrays: what `npllm.load(backend="cupy")` runs on."""
    return importlib.import_module("npllm.kernels.cuda").cuda_ops()


@cache
def why_not_compiled() -> str:
    """Say why the compiled set is not used; "" where it is."""
    try:
        importlib.import_module("numba")
    except ImportError as error:  # missing, or made for another NumPy
        return f"Numba cannot be imported ({error}); {install_extra('fast')} brings it"
    return ""


def product_forms() -> dict[str, str]:
    """Say how products with rounded activations are computed on this processor.

    Returns
    -------
    forms : dict of str to str
        Of "int8 and int16 activations" and "bfloat16 activations": by which instruction, by plain
        vectors, or in float32.  Without the compiled set in float32, as the definition does.
    """
    names = {"int8": "int8 and int16 activations", "bfloat16": "bfloat16 activations"}
    if compiled_ops() is None:
        return dict.fromkeys(names.values(), "float32 products of rounded entries")
    module = importlib.import_module("npllm.kernels.cpu.dot_products")
    return {names[kind]: module.spelled_form(kind) for kind in names}


def seconds_to_prepare(dtype: str = "bfloat16", activations: str = "float32") -> float | None:
    """Call every compiled kernel once, and return the time: Numba compiles them at the first use on
    a machine and keeps the result.

    Parameters
    ----------
    dtype : str
        Of the weights: a float type, "int8", or a format of blocks such as "Q4_K".
    activations : str
        What products of many rows round.

    Returns
    -------
    seconds : float or None
        None where there is no compiled set.
    """
    if compiled_ops() is None:
        return None
    start = time.perf_counter()
    importlib.import_module("npllm.kernels.cpu.preparing").compile_all(dtype, activations)
    return time.perf_counter() - start
