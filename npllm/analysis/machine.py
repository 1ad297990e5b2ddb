"""What npllm runs on: versions, BLAS, threads, kernels, GPU, memory."""

import importlib
import importlib.metadata
import os
import platform
import sys
from typing import Any

import numpy as np

from npllm import kernels
from npllm.arrays import backend_namespace
from npllm.checkpoints.fetch import DEFAULT_MODEL, find_checkpoint, weights_folder
from npllm.errors import NpllmError
from npllm.threads import blas_facts, n_threads

__all__ = ["machine_facts", "peak_memory"]

PACKAGES = (
    "numpy",
    "ml_dtypes",
    "safetensors",
    "tokenizers",
    "jinja2",
    "click",
    "gguf",
    "huggingface_hub",
    "platformdirs",
    "tqdm",
    "numba",
    "threadpoolctl",
    "cupy-cuda13x",
)
THREAD_VARIABLES = (
    "OPENBLAS_CORETYPE",
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUPY_TF32",
)
COMPILED_NOW = 3  # seconds: preparing the kernels takes longer only where Numba had to compile them


def machine_facts() -> dict[str, Any]:
    """Describe the machine: versions, BLAS and its threads, the set of operations, CuPy and the GPU
    or the reason why there is none.

    Returns
    -------
    facts : dict
    """
    checkpoint = find_checkpoint(DEFAULT_MODEL)
    return {
        "npllm": _npllm_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": _n_cores(),
        "packages": {name: _version(name) for name in PACKAGES},
        "blas": _blas_facts(),
        "kernels": _kernel_facts(),
        "environment": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        "gpu": _gpu_facts(),
        "weights_folder": str(weights_folder()),
        "default_checkpoint": str(checkpoint or "not fetched yet (npllm fetch)"),
    }


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes, touched pages of mapped weights
    included; 0 where the system does not report it.
    """
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _npllm_version() -> str:
    """The version in the source, which exists also where npllm is not installed."""
    return importlib.import_module("npllm").__version__


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _n_cores() -> int | None:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _blas_facts() -> dict[str, Any]:
    """NumPy's BLAS: name, version; kernel set and threads where threadpoolctl finds them."""
    built = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    pool = blas_facts()
    return {
        "name": built.get("name"),
        "version": built.get("version"),
        "kernels": pool.get("architecture"),
        "threads": pool.get("num_threads"),
    }


def _kernel_facts() -> dict[str, Any]:
    """The set of operations that `load` picks and why, its threads, and the compile time."""
    facts = {
        "set": kernels.fastest_ops().name,
        "threads": n_threads(),
        "why": kernels.why_not_compiled() or "Numba is here",
    }
    facts |= kernels.product_forms()
    seconds = kernels.seconds_to_prepare()
    if seconds is not None:
        compiled = ", compiled just now and kept" if seconds > COMPILED_NOW else ""
        facts["ready in"] = f"{seconds:.1f} s{compiled}"
    return facts


def _gpu_facts() -> dict[str, Any]:
    """The CUDA device, or the reason why there is none."""
    try:
        cupy = backend_namespace("cupy")
    except NpllmError as error:
        return {"found": False, "why": str(error)}
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    return {
        "found": True,
        "name": properties["name"].decode(),
        "bytes": properties["totalGlobalMem"],
        "cuda_runtime": cupy.cuda.runtime.runtimeGetVersion(),
        "cupy": cupy.__version__,
    }
