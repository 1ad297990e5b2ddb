"""Compile the CUDA sources for the CPU with g++ and tests/cuda_shim.h, and launch them."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import guard
import numpy as np
import pytest

from npllm.kernels import cuda
from npllm.kernels.cuda import launching

HERE = Path(__file__).parent
ENTRY = """
extern "C" void shim_launch(unsigned n_blocks, unsigned n_threads, void** arguments) {{
    shim::launch({}, n_blocks, n_threads, arguments);
}}
"""
SCALARS = {
    np.int64: ctypes.c_int64,
    np.uint64: ctypes.c_uint64,
    np.uint32: ctypes.c_uint32,
    np.float32: ctypes.c_float,
}

LAUNCHES = []  # names of the kernels that ran
needs_gxx = pytest.mark.skipif(
    shutil.which("g++") is None, reason="runs CUDA sources on the CPU, and g++ is not installed"
)


def installed(monkeypatch):
    """Put the stand-in in the place of CuPy, and the processor in the place of the device."""
    guard.installed(monkeypatch)
    monkeypatch.setattr(launching, "launch", launch)


@functools.cache
def compiled(kernel, definitions, text=None):
    """One variant as a function (n_blocks, n_threads, pointers to the arguments)."""
    folder = Path(tempfile.mkdtemp(prefix="npllm-shim-"))
    text = '#include "cuda_shim.h"\n' + (text or launching.source(kernel)) + ENTRY.format(kernel)
    (folder / "kernel.cpp").write_text(text, encoding="utf-8")
    # -U: a fiber is left by longjmp; -fno-gnu-unique: no variant sees the shared memory of another
    command = [
        "g++",
        "-std=c++20",
        "-O1",
        "-U_FORTIFY_SOURCE",
        "-fno-gnu-unique",
        "-w",
        "-shared",
        "-fPIC",
        f"-I{HERE}",
        *(f"-D{name}={value}" for name, value in definitions),
        str(folder / "kernel.cpp"),
        "-o",
        str(folder / "kernel.so"),
    ]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "kernel.so")).shim_launch


def launch(kernel, definitions, n_blocks, n_threads, *arguments, text=None):
    """Launch on arrays of tests/guard.py.  text: in the place of the kernel's source."""
    assert text or definitions in cuda.VARIANTS[kernel], (
        "a variant that is not compiled by the tests"
    )
    LAUNCHES.append(kernel)
    guard.operation(kernel)
    held = [_argument(x) for x in arguments]
    pointers = (ctypes.c_void_p * len(held))(*(ctypes.addressof(x) for x in held))
    compiled(kernel, definitions, text)(n_blocks, n_threads, pointers)


def ran(function, *kernels):
    """Call a function; see that exactly these kernels were launched."""
    LAUNCHES.clear()
    result = function()
    assert tuple(LAUNCHES) == kernels
    return result


def _argument(x):
    return (
        ctypes.c_void_p(x._x.ctypes.data) if type(x) is guard.Array else SCALARS[type(x)](x.item())
    )
