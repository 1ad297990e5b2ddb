"""Compile the CUDA sources for the CPU with g++ and tests/cuda_shim.h, and launch them.

Inside `checking(seed)` every access to memory is checked (tests/cuda_checks.cpp): a race, an access
out of bounds, a read of what nobody wrote raise `KernelFault`, which names the lines and threads.

What runs the threads is compiled once, and linked to each kernel.  Every library is kept under the
hash of what it is made of, and made by one process while others that need it wait.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import guard
import ml_dtypes
import numpy as np
import pytest

from npllm.kernels import cuda
from npllm.kernels.cuda import gemm, launching

HERE = Path(__file__).parent
# libraries by the hash of what they are made of
KEPT = Path(os.environ.get("NPLLM_SHIM_CACHE", HERE / "__pycache__" / "shim"))
# -U: a fiber is left by longjmp; -fno-gnu-unique: no variant sees the shared memory of another
COMMAND = (
    "g++",
    "-std=c++20",
    "-U_FORTIFY_SOURCE",
    "-fno-gnu-unique",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-w",
    "-fPIC",
)
ENTRY = """
static void shim_call(void** arguments) {{ shim::call({}, arguments); }}
extern "C" __attribute__((visibility("default"))) const char*
shim_launch(unsigned n_blocks, unsigned n_threads, void** arguments, unsigned long long seed) {{
    return shim::launch(shim_call, n_blocks, n_threads, arguments, seed);
}}
"""
# -fsanitize=thread calls a function before each access; -nodefaultlibs leaves out its library
CHECKED = (
    "-g1",
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fno-tree-loop-distribute-patterns",
)
LIBRARIES = ("-nodefaultlibs", "-lstdc++", "-lm", "-lc", "-lgcc_s")
CHECKED_ENTRY = (
    ENTRY
    + """
extern "C" __attribute__((visibility("default"))) void
shim_check(const checks::Given* given, unsigned n) {{ checks::begin(given, n); }}
"""
)
SHARED = re.compile(r"(alignas\(16\) )?__shared__ (\w+) ([^;]+);")
SCALARS = {
    np.int64: ctypes.c_int64,
    np.uint64: ctypes.c_uint64,
    np.uint32: ctypes.c_uint32,
    np.float32: ctypes.c_float,
}


def _fused():
    """The option for multiply-adds in one instruction, where the processor has it: no call of
    `fmaf`, whose result is the same.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return ()
    return ("-mfma",) if "fma" in flags else ()


FUSED = _fused()
LAUNCHES = []  # names of the kernels that ran
needs_gxx = pytest.mark.skipif(
    shutil.which("g++") is None, reason="runs CUDA sources on the CPU, and g++ is not installed"
)


def installed(monkeypatch):
    """Put the stand-in in the place of CuPy, and the processor in the place of the device."""
    guard.installed(monkeypatch)
    monkeypatch.setattr(launching, "launch", launch)
    monkeypatch.setattr(gemm, "library", lambda: (Cublas, lambda: "handle"))


class Cublas:
    """`cupy_backends.cuda.libs.cublas` with the one function that is called, on any pointers.

    C = alpha * op(A) @ op(B) + beta * C,   matrices column by column, sums in float64
    """

    @staticmethod
    def gemmEx(
        handle, ta, tb, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta, c, c_type, ldc, *how
    ):
        """As cuBLAS documents cublasGemmEx."""
        guard.operation("gemm")
        assert handle == "handle" and how == (68, -1)
        alpha, beta = (ctypes.c_float.from_address(x).value for x in (alpha, beta))
        left = _matrix(a, a_type, lda, k if ta else m, m if ta else k)
        right = _matrix(b, b_type, ldb, n if tb else k, k if tb else n)
        result = _matrix(c, c_type, ldc, m, n)
        total = alpha * ((left.T if ta else left).astype(np.float64) @ (right.T if tb else right))
        with np.errstate(all="ignore"):
            result[...] = total if beta == 0 else total + beta * result


def _matrix(address, kind, ld, n_rows, n_columns):
    """A view of memory as a matrix whose columns are `ld` entries apart."""
    dtype = np.dtype({14: ml_dtypes.bfloat16, 0: np.float32}[kind])
    assert ld >= n_rows
    n = ((n_columns - 1) * ld + n_rows) * dtype.itemsize
    flat = np.ctypeslib.as_array((ctypes.c_uint8 * n).from_address(address)).view(dtype)
    strides = dtype.itemsize, ld * dtype.itemsize
    return np.lib.stride_tricks.as_strided(flat, (n_rows, n_columns), strides)


class KernelFault(AssertionError):
    """What a kernel did wrong: a race, an access out of bounds, a barrier that not all reach."""


class Given(ctypes.Structure):
    """`checks::Given` of tests/cuda_checks.cpp."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("first", ctypes.c_void_p),
        ("n_bytes", ctypes.c_size_t),
        ("unit", ctypes.c_uint),
        ("states", ctypes.c_void_p),
    ]


class Library:
    """One variant of a kernel, compiled: `run(n_blocks, n_threads, arguments)`."""

    def __init__(self, path, text):
        self.path, self.text, self.loaded = path, text, ctypes.CDLL(str(path))

    def run(self, n_blocks, n_threads, arguments, seed=None):
        """Launch; with a seed on the checked build, in an order that the seed draws."""
        held = [_argument(x) for x in arguments]
        pointers = (ctypes.c_void_p * len(held))(*(ctypes.addressof(x) for x in held))
        if seed is not None:
            given = _regions(arguments)
            self.loaded.shim_check((Given * len(given))(*(one for one, _ in given)), len(given))
        call = self.loaded.shim_launch
        call.restype = ctypes.c_char_p
        fault = call(n_blocks, n_threads, pointers, ctypes.c_ulonglong(seed or 0)).decode()
        if fault:
            where = "" if seed is None else f" (seed {seed})"
            raise KernelFault(self._with_lines(fault) + where)

    def _with_lines(self, fault):
        """The message with lines of the source in place of numbers and addresses."""
        lines = self.text.splitlines()

        def line(match):
            return f"`{lines[int(match[1]) - 1].strip()}`"

        def place(match):
            command = ["addr2line", "-e", str(self.path), match[1]]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            number = re.search(r"kernel\.cpp:(\d+)", found)
            return f"`{lines[int(number[1]) - 1].strip()}`" if number else match[0]

        return re.sub(r"{\+(0x\w+)}", place, re.sub(r"{line (\d+)}", line, fault))


@functools.cache
def compiled(kernel, definitions, text=None, checked=False):
    """One variant as a `Library`; `checked`: one that checks its accesses to memory."""
    macros = "".join(f"#define {name} {value}\n" for name, value in definitions)
    text, entry = text or launching.source(kernel), ENTRY
    if checked:
        text, entry = SHARED.sub(_boxed, text), CHECKED_ENTRY
    text = '#include "cuda_shim.h"\n' + macros + text + entry.format(kernel)
    options = "-O1", *FUSED, "-shared", *(CHECKED if checked else ()), str(runner(checked))
    after = LIBRARIES if checked else ()
    path = made(text.encode(), "kernel.cpp", "kernel.so", *options, after=after)
    return Library(path, text)


def _boxed(match):
    """A declaration of shared arrays as arrays between red zones, of the same names and types."""
    _, dtype, names = match.groups()
    boxes = []
    for one in re.split(r",\s*(?=\w+\[)", names):
        name, size = re.match(r"(\w+)\s*(.*)", one, re.DOTALL).groups()
        boxes.append(f"static checks::Shared<{dtype}{size}> {name}_box;")
        boxes.append(f'auto& {name} = {name}_box.named("{name}");')
    return " ".join(boxes)


def _regions(arguments):
    """What the arrays of a launch hold: a `Given` for each, and the states that it points to."""
    views = [(x._x, f"argument {n}") for n, x in enumerate(arguments) if type(x) is guard.Array]
    spans = []  # [first, stop, unit, names, views]
    for view, name in sorted(views, key=lambda one: np.lib.array_utils.byte_bounds(one[0])[0]):
        first, stop = np.lib.array_utils.byte_bounds(view)
        if spans and first < spans[-1][1]:  # another view of the same memory
            last = spans[-1]
            spans[-1] = [last[0], max(stop, last[1]), last[2], last[3] + [name], last[4] + [view]]
        elif view.size:
            spans.append([first, stop, min(view.dtype.itemsize, 4), [name], [view]])
    return [_given(*span) for span in spans]


def _given(first, stop, unit, names, views):
    states = np.zeros((stop - first) // unit, np.uint8)
    for view in views:
        offsets = np.zeros(view.shape, np.int64) + (view.ctypes.data - first)
        for axis, (n, stride) in enumerate(zip(view.shape, view.strides, strict=True)):
            shape = [-1 if i == axis else 1 for i in range(view.ndim)]
            offsets += np.reshape(np.arange(n) * stride, shape)
        per_entry = np.arange(0, view.dtype.itemsize, unit)
        states[(offsets.reshape(-1, 1) + per_entry) // unit] = 2
    if unit > 1:
        words = np.ctypeslib.as_array((ctypes.c_char * (stop - first)).from_address(first))
        empty = words.view(f"u{unit}") == guard.UNWRITTEN[unit]
        states[(states > 0) & empty] = 1
    name = " and ".join(names).encode()
    return Given(name, first, stop - first, unit, states.ctypes.data), (states, name)


SEEDS = []  # of the checks that go on


@contextlib.contextmanager
def checking(seed):
    """Check what kernels do with memory meanwhile; `seed` draws the order of threads."""
    SEEDS.append(seed)
    try:
        yield
    finally:
        SEEDS.pop()


@functools.cache
def runner(checked=False):
    """What runs the threads of a block, compiled; `checked`: with the checker of memory."""
    names = ("cuda_shim", "cuda_checks") if checked else ("cuda_shim",)
    text = "".join((HERE / f"{name}.cpp").read_text(encoding="utf-8") for name in names)
    return made(text.encode(), "runner.cpp", "runner.o", "-O2", "-c")


@functools.cache
def version():
    """What g++ says of itself."""
    return subprocess.run(["g++", "--version"], check=True, capture_output=True).stdout


def made(text, source, target, *options, after=()):
    """The file that g++ makes of a text, kept for other processes and later runs."""
    import fcntl  # POSIX only, as the fibers of the shim are

    header = (HERE / "cuda_shim.h").read_bytes()
    made_of = (version(), COMMAND, options, after, header, text)
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:24]
    folder = KEPT / key
    KEPT.mkdir(parents=True, exist_ok=True)
    with open(KEPT / f"{key}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes second waits, and finds the folder
        if not folder.is_dir():
            new = Path(tempfile.mkdtemp(dir=KEPT))
            (new / source).write_bytes(text)
            command = [*COMMAND, f"-I{HERE}", *options, source, "-o", target, *after]
            subprocess.run(command, check=True, cwd=new)
            new.rename(folder)
    return folder / target


def launch(kernel, definitions, n_blocks, n_threads, *arguments, text=None):
    """Launch on arrays of tests/guard.py.  text: in the place of the kernel's source."""
    assert text or definitions in cuda.VARIANTS[kernel], (
        "a variant that is not compiled by the tests"
    )
    seed = SEEDS[-1] if SEEDS else None
    library = compiled(kernel, definitions, text, seed is not None)

    def run():
        LAUNCHES.append(kernel)
        library.run(n_blocks, n_threads, arguments, seed)

    guard.launched(kernel, run)


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
