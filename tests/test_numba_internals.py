"""What npllm uses of Numba without a public name, and its disk cache: damaged, read-only, full."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from npllm import kernels as sets

if sets.compiled_ops() is None:
    pytest.skip(sets.why_not_compiled(), allow_module_level=True)
from npllm.kernels.cpu import numba_internals

ROOT = Path(__file__).resolve().parents[1]
KERNELS = """
import sys
import numpy as np
from npllm.kernels.cpu.launching import kernel

@kernel()
def quadruple(x):
    for i in range(len(x)):
        x[i] *= 4

x = np.ones(5, np.float32)
quadruple(x)
assert (x == 4).all()
loaded = sum(quadruple.stats.cache_hits.values())
print("loaded" if loaded else "compiled")
"""


# Runs the kernels as often as is asked for.  Each run defines them anew, as a new process does, and
# finds the files of the one before; between two runs a file may be damaged.
RUNS = """
import json, pathlib, runpy
folder = pathlib.Path(FOLDER)
for damage in DAMAGES:
    if damage:
        suffix, change = damage
        (file,) = folder.rglob("*quadruple*" + suffix)
        data = file.read_bytes()
        if change == "missing":
            file.unlink()
        else:
            file.write_bytes(CHANGES[change](data))
    runpy.run_path(SCRIPT)
"""
CHANGES = """
CHANGES = {
    "empty": lambda _: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "another file": lambda data: b"GIF89a" + data,
}
"""
DAMAGES = ("empty", "truncated", "zeros", "another file")


@pytest.fixture
def kernels(tmp_path):
    """A function that runs the kernels in a process of its own, with a cache in `tmp_path`; once
    for each of `damages`, and returns what each run said.
    """
    script = tmp_path / "kernels_of_a_test.py"
    script.write_text(KERNELS, encoding="utf-8")
    folder = tmp_path / "cache"
    folder.mkdir()

    def run(before="", warns=False, damages=(None,)):
        start = (
            before
            + CHANGES
            + RUNS.replace("FOLDER", repr(str(folder)))
            .replace("SCRIPT", repr(str(script)))
            .replace("in DAMAGES", f"in {damages!r}")
        )
        done = subprocess.run(
            [sys.executable, *([] if warns else ["-W", "error"]), "-c", start],
            capture_output=True,
            text=True,
            timeout=600,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
            | {"NUMBA_CACHE_DIR": str(folder)},
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("cannot be kept on disk") == warns, done.stderr
        return done.stdout.split()

    return run


@pytest.mark.slow
def test_code_is_kept_for_the_next_process(kernels):
    assert [kernels(), kernels()] == [["compiled"], ["loaded"]]


@pytest.mark.slow
def test_a_damaged_or_missing_file_is_ignored_and_written_again(kernels):
    """Each damage, one after the other: the run after it compiles, the next finds a new file."""
    damages = [(".nbc", damage) for damage in (*DAMAGES, "missing")]
    damages += [(".nbi", damage) for damage in DAMAGES]
    runs = [None, *(run for damage in damages for run in (damage, None))]
    assert kernels(damages=runs) == ["compiled", *["compiled", "loaded"] * len(damages)]


NO_FOLDER = """
from numba.core import caching
def fails(self):
    raise PermissionError(13, "Permission denied")
caching._CacheLocator.ensure_cache_path = fails
"""
FULL = """
import errno
from numba.core import caching
def fails(self, filepath):
    raise OSError(errno.ENOSPC, "No space left on device")
caching.IndexDataCacheFile._open_for_write = fails
"""


@pytest.mark.slow
@pytest.mark.parametrize("before", [NO_FOLDER, FULL], ids=["read-only", "full"])
def test_without_a_disk_cache_kernels_are_compiled_with_one_warning(kernels, before):
    assert kernels(before, warns=True, damages=[None, None]) == ["compiled", "compiled"]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits of file sizes are a matter of Unix")
def test_a_limit_of_file_sizes_is_a_full_disk(kernels):
    """A real failing write: half an entry, then OSError."""
    limit = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
"""
    assert kernels(limit, warns=True) == ["compiled"]
    assert kernels(damages=[None, None]) == ["compiled", "loaded"], "what it left is no obstacle"


READ_ONLY_PACKAGE = """
import os, sys
from numba.core import caching
def from_function(cls, function, file):
    return None
for locator in caching.CacheImpl._locator_classes:
    locator.from_function = classmethod(from_function)
sys.path.insert(0, "tests")
import tiny
from npllm import kernels
m = tiny.model(ops=kernels.compiled_ops())
"""


@pytest.mark.slow
def test_a_model_loads_where_there_is_no_folder_for_the_cache():
    done = subprocess.run(
        [sys.executable, "-c", READ_ONLY_PACKAGE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0 and done.stderr.count("cannot be kept on disk") == 1, done.stderr


def test_the_internals_are_those_that_the_code_was_written_for():
    """A new version of Numba that renames one must fail here, not lose the cache in silence."""
    from numba import threading_layer, types
    from numba.core import cgutils
    from numba.core.dispatcher import Dispatcher
    from numba.core.registry import cpu_target

    from npllm.kernels.cpu import gemm_tiles

    assert isinstance(gemm_tiles.multiply, Dispatcher)
    cache = gemm_tiles.multiply._cache
    assert type(cache) is numba_internals.DiskCache
    file = cache._cache_file
    assert f"{os.getpid()}-" in file._data_name_pattern and "{number:d}" in file._data_name_pattern
    assert file._source_stamp[1:] == tuple(numba_internals.SOURCES) and file._source_stamp[0]
    assert file._data_name(7) != file._data_name(8)
    assert numba_internals.openmp_dies_in_a_fork() in (False, threading_layer() == "omp")
    make = cpu_target.target_context.make_array(types.Array(types.float32, 1, "C"))
    assert callable(make) and hasattr(cgutils, "create_struct_proxy")


def test_no_other_file_uses_internals_of_numba():
    words = ("_cache_file", "._cache", "_getvalue", "omppool.", "numba.core.caching")
    for path in (ROOT / "npllm").rglob("*.py"):
        if path.name not in ("numba_internals.py", "numba_deferred.py"):
            text = path.read_text(encoding="utf-8")
            if "numba" in text:
                assert not [word for word in words if word in text], path
