"""The limits of the machine: bytes read per second, float32 operations per second."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from npllm import kernels
from npllm.kernels.compilation import working_seconds
from npllm.threads import run_blocks

__all__ = ["machine_limits", "seconds"]


def machine_limits() -> dict[str, Any]:
    """Measure the limits of the machine.

    Returns
    -------
    limits : dict
        "read" in bytes/s and "flops" in 1/s: the best of "read_probes", and of "sgemm" (NumPy's
        float32 matrix product) by size.
    """
    rng = np.random.default_rng(0)
    sgemm, b = {}, rng.standard_normal((3072, 4096), dtype=np.float32)
    for n in (256, 512, 1024):
        a = rng.standard_normal((n, 3072), dtype=np.float32)
        sgemm[f"{n} x 3072 x 4096"] = (
            2 * n * 3072 * 4096 / _median_seconds(partial(np.matmul, a, b))
        )
    reads = _read_probes()
    return {
        "read": max(reads.values()),
        "flops": max(sgemm.values()),
        "read_probes": reads,
        "sgemm": sgemm,
    }


def _read_probes(size: int = 2**30) -> dict[str, float]:
    """Bytes/s of reading 1 GiB, more than the caches hold: two reductions on all threads, BLAS, and
    the kernel of decoding.
    """
    x = np.random.default_rng(0).standard_normal(size // 4, dtype=np.float32)
    blocks, vector = np.split(x, 64), np.ones((1, 8192), np.float32)
    matrix = x.view(np.uint16)
    matrix &= 0x3FFF  # finite as bfloat16
    matrix = matrix.view(ml_dtypes.bfloat16).reshape(-1, 8192)
    probes: dict[str, Callable[[], object]] = {
        "maximum of float32 on all threads": lambda: run_blocks(np.max, blocks),
        "sum of int64 on all threads": lambda: run_blocks(_sum_int64, blocks),
        "sgemv of BLAS": lambda: x.reshape(-1, 8192) @ vector[0],
    }
    compiled = kernels.compiled_ops()
    if compiled is not None:
        probes["decoding's matrix-vector kernel, bfloat16"] = lambda: compiled.linear(
            vector, matrix
        )
    return {name: size / _median_seconds(probe) for name, probe in probes.items()}


def _sum_int64(block: Any) -> Any:
    return np.sum(block.view(np.int64))


def _median_seconds(function: Callable[[], object], repeat: int = 5) -> float:
    function()
    return statistics.median(seconds(function) for _ in range(repeat))


def seconds(function: Callable[[], object]) -> float:
    """Time one call."""
    start = working_seconds()
    function()
    return working_seconds() - start
