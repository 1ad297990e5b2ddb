"""Stage `machine`: device, driver, versions, commit, room; what is missing, and what that costs."""

import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu.records import ROOT, rehearsing

PACKAGES = (
    "numpy",
    "ml_dtypes",
    "safetensors",
    "tokenizers",
    "hypothesis",
    "pytest",
    "cupy",
    "numba",
    "torch",
    "transformers",
)
COSTS = {  # package -> what does not run without it
    "click": "the npllm command, bench.py and their tests",
    "jinja2": "chat templates and their tests",
    "threadpoolctl": "threads of the NumPy kernels: BLAS keeps its own",
    "gguf": "tests of reading GGUF",
    "array_api_strict": "tests on the strict array library",
    "huggingface_hub": "tests of fetching",
    "tqdm": "progress bars",
    "filelock": "fetching",
    "platformdirs": "fetching",
    "matplotlib": "tests of pictures",
    "numba": "the compiled set on the CPU",
    "torch": "PyTorch beside npllm",
    "transformers": "Transformers beside npllm",
}


def main(folder: Path) -> int:
    """Write machine.json, anew after each fact; return 0 where there is a device."""
    facts: dict[str, Any] = {"rehearsal": rehearsing()}
    for name, read in FACTS.items():
        facts[name] = fact(read)
        text = json.dumps(facts, indent=1, default=str)
        (folder / "machine.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    return int(not facts["device"].get("found"))


def fact(read: Callable[[], Any]) -> Any:
    """What a function returns, or why it could not."""
    try:
        return read()
    except Exception as error:  # no fact is worth the run
        return {"found": False, "why": f"{type(error).__name__}: {error}"}


def device_facts() -> dict[str, Any]:
    """The device as CuPy sees it."""
    from npllm.arrays import backend_namespace

    cupy = backend_namespace("cupy")
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    return {
        "found": True,
        "name": properties["name"].decode(),
        "bytes": properties["totalGlobalMem"],
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "multiprocessors": properties["multiProcessorCount"],
        "cuda_runtime": cupy.cuda.runtime.runtimeGetVersion(),
        "cuda_driver": cupy.cuda.runtime.driverGetVersion(),
    }


def driver() -> str:
    """What nvidia-smi says."""
    return said(
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit",
        "--format=csv,noheader",
    )


def commit() -> str:
    """The commit: from NPLLM_COMMIT where the tree was copied without its history."""
    return os.environ.get("NPLLM_COMMIT") or said(
        "git", "describe", "--always", "--abbrev=40", "--dirty"
    )


def said(*command: str) -> str:
    """What a command prints; why it did not run, where it did not."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"not known ({error})"


def version(name: str) -> str | None:
    """The version of a package; None where it is missing."""
    if name == "cupy":
        return getattr(sys.modules.get(name), "__version__", None)
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def importable(name: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(name) is not None


def room() -> dict[str, Any]:
    """Free bytes of the folder for weights, of memory and of the device."""
    import cupy

    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "disk": shutil.disk_usage(os.environ["NPLLM_GPU_WEIGHTS"]).free,
        "memory": pages,
        "device": cupy.cuda.runtime.memGetInfo()[0],
    }


def versions() -> dict[str, str | None]:
    """The version of every package; None for a missing one."""
    return {name: version(name) for name in PACKAGES}


def missing() -> dict[str, str]:
    """Packages that are not there, and what each costs."""
    return {name: cost for name, cost in COSTS.items() if not importable(name)}


def npllm_facts() -> dict[str, Any]:
    """Version, BLAS, and the sets that `load` picks."""
    import npllm
    from npllm import kernels, threads

    sets = {name: kernels.fastest_ops(name).name for name in ("numpy", "cupy")}
    return {"version": npllm.__version__, "blas": threads.blas_facts(), "sets": sets}


FACTS: dict[str, Callable[[], Any]] = {
    "commit": commit,
    "driver": driver,
    "python": platform.python_version,
    "platform": platform.platform,
    "cores": lambda: len(os.sched_getaffinity(0)),
    "missing": missing,
    "device": device_facts,
    "versions": versions,
    "room": room,
    "npllm": npllm_facts,
}

if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
