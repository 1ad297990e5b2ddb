"""Stage `machine`: device, driver, versions, commit, room; what is missing, and what that costs."""

import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
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
    """Write machine.json; return 0 where there is a device."""
    device = fact(device_facts)
    facts = {
        "rehearsal": rehearsing(),
        "commit": commit(),
        "device": device,
        "driver": driver(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in PACKAGES},
        "room": fact(room),
        "missing": {name: cost for name, cost in COSTS.items() if not importable(name)},
        "npllm": fact(npllm_facts),
    }
    (folder / "machine.json").write_text(
        json.dumps(facts, indent=1, default=str) + "\n", encoding="utf-8"
    )
    print(json.dumps(facts, indent=1, default=str))
    return 0 if device.get("found") else 1


def fact(read: Any) -> dict[str, Any]:
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


def npllm_facts() -> dict[str, Any]:
    """What `npllm doctor` says, but for the folders."""
    from npllm import report

    facts = report.machine_facts()
    return {key: facts[key] for key in ("npllm", "blas", "kernels", "environment", "packages")}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
