"""Compile the CUDA sources for the CPU with g++ and tests/cuda_shim.h, and launch them."""

import ctypes
import functools
import hashlib
import os
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
# libraries by the hash of what they are made of
KEPT = Path(os.environ.get("NPLLM_SHIM_CACHE", HERE / "__pycache__" / "shim"))
# -U: a fiber is left by longjmp; -fno-gnu-unique: no variant sees the shared memory of another
COMMAND = (
    "g++",
    "-std=c++20",
    "-O1",
    "-U_FORTIFY_SOURCE",
    "-fno-gnu-unique",
    "-w",
    "-fPIC",
)
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
    macros = "".join(f"#define {name} {value}\n" for name, value in definitions)
    text = '#include "cuda_shim.h"\n' + macros + (text or launching.source(kernel))
    library = made((text + ENTRY.format(kernel)).encode(), "kernel.cpp", "kernel.so", "-shared")
    return ctypes.CDLL(str(library)).shim_launch


@functools.cache
def header():
    """The folder of tests/cuda_shim.h, compiled: reading it takes most of a kernel's compilation."""
    text = (HERE / "cuda_shim.h").read_bytes()
    return made(text, "cuda_shim.h", "cuda_shim.h.gch", "-xc++-header").parent


@functools.cache
def version():
    """What g++ says of itself."""
    return subprocess.run(["g++", "--version"], check=True, capture_output=True).stdout


def made(text, source, target, *options):
    """The file that g++ makes of a text, kept for other processes and later runs."""
    if source != "cuda_shim.h":
        options = f"-I{header()}", *options
    key = hashlib.sha256(repr((version(), COMMAND, options, text)).encode()).hexdigest()[:24]
    folder = KEPT / key
    if not folder.is_dir():
        KEPT.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=KEPT))
        (new / source).write_bytes(text)
        subprocess.run([*COMMAND, *options, source, "-o", target], check=True, cwd=new)
        try:
            new.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(new)
    return folder / target


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
