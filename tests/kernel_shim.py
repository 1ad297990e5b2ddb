"""Compile the CUDA sources for the CPU with g++ and tests/cuda_shim.h, and launch them as CuPy would."""

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import guard
import numpy as np

from npllm.kernels import cuda

HERE = Path(__file__).parent
ENTRY = '\nextern "C" void shim_launch(unsigned n_blocks, unsigned n_threads, void** arguments) {{ shim::launch({}, n_blocks, n_threads, arguments); }}\n'


@functools.cache
def compiled(kernel, definitions):
    """One variant as a shared library: a function (n_blocks, n_threads, pointers to the arguments)."""
    text = '#include "cuda_shim.h"\n' + cuda.source(kernel) + ENTRY.format(kernel)
    command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", f"-I{HERE}", *(f"-D{name}={value}" for name, value in definitions)]
    return ctypes.CDLL(str(_library(text, command))).shim_launch


def _library(text, command):
    """Compile a source; NPLLM_SHIM_CACHE names a folder where libraries are kept for other processes."""
    said = repr((text, (HERE / "cuda_shim.h").read_text(encoding="utf-8"), command))
    name = hashlib.sha256(said.encode()).hexdigest()[:32]
    kept = os.environ.get("NPLLM_SHIM_CACHE")
    folder = Path(kept) if kept else Path(tempfile.mkdtemp(prefix="npllm-shim-"))
    library, here = folder / f"{name}.so", folder / f"{name}-{os.getpid()}"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        here.with_suffix(".cpp").write_text(text, encoding="utf-8")
        subprocess.run([*command, str(here.with_suffix(".cpp")), "-o", str(here.with_suffix(".so"))], check=True)
        here.with_suffix(".so").rename(library)
    return library


def launch(kernel, definitions, n_blocks, n_threads, *arguments):
    """What `npllm.kernels.cuda._launch` does, on arrays of tests/guard.py."""
    held = [_argument(x) for x in arguments]
    pointers = (ctypes.c_void_p * len(held))(*(ctypes.addressof(x) for x in held))
    compiled(kernel, tuple(sorted(definitions.items())))(n_blocks, n_threads, pointers)


def _argument(x):
    if type(x) is guard.Array:
        return ctypes.c_void_p(x._x.ctypes.data)
    return {np.int64: ctypes.c_int64, np.uint32: ctypes.c_uint32, np.float32: ctypes.c_float}[type(x)](x.item())
