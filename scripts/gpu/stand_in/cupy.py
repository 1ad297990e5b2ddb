"""CuPy in a rehearsal without a GPU: arrays of tests/guard.py, kernels by tests/kernel_shim.py.

This folder is on PYTHONPATH in a rehearsal only: every process of scripts/check_gpu.sh runs
unchanged.
"""

import functools
import importlib.machinery
import sys

import guard
from gpu.records import plant

BYTES = 8 * 2**30


@functools.cache
def shim():
    """tests/kernel_shim.py, which keeps what g++ made for other processes."""
    import kernel_shim

    return kernel_shim


class RawKernel:
    """One variant of a kernel, as `cupy.RawKernel`."""

    local_size_bytes = shared_size_bytes = 0  # a CPU has none of these
    num_regs = property(lambda self: 0 * bool(self.compile()))  # to ask for it compiles

    def __init__(self, name, definitions, text):
        self.name, self.definitions, self.text = name, definitions, text

    def compile(self):
        return shim().compiled(self.name, self.definitions, self.text)

    def __call__(self, grid, block, args, **_):
        plant(f"kernel/{self.name}")
        guard.launched(self.name, lambda: self.compile().run(grid[0], block[0], args))


class RawModule:
    """Source text and options, as `cupy.RawModule`: only the `-D` options matter here."""

    def __init__(self, *, code, options=(), **_):
        pairs = (option[2:].split("=", 1) for option in options if option.startswith("-D"))
        self.code, self.definitions = code, tuple(sorted(map(tuple, pairs)))

    def get_function(self, name):
        return RawKernel(name, self.definitions, self.code)


class Runtime(guard.Runtime):
    """`cupy.cuda.runtime` of a device that is this machine's processor."""

    @staticmethod
    def getDeviceProperties(_):
        return {
            "name": b"stand-in for CuPy",
            "totalGlobalMem": BYTES,
            "major": 0,
            "minor": 0,
            "multiProcessorCount": 1,
        }

    @staticmethod
    def memGetInfo():
        return BYTES, BYTES

    @staticmethod
    def runtimeGetVersion():
        return 0

    driverGetVersion = runtimeGetVersion


guard.xp.RawModule = RawModule
guard.xp.cuda.runtime = Runtime
guard.xp.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
sys.modules["cupy"] = guard.xp
sys.modules["cupy_backends"] = None  # CuPy itself may be installed: its parts do not fit here
