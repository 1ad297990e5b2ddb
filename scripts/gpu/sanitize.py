"""Stage `sanitize`: the kernels under compute-sanitizer, one record for each of its tools."""

import subprocess
import sys
from typing import Any

from gpu.cases import needs_tensor_cores, variants
from gpu.kernels import compared
from gpu.records import ROOT, Records, run_recorded, stage_seconds
from npllm.kernels.cuda import launching

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


def main(folder: str) -> int:
    """Run each tool over the first variant of every kernel; return 0 where none found anything."""
    records = Records(folder, "sanitize")
    return int(not all([run_recorded(records, tool, lambda t=tool: run(t)) for tool in TOOLS]))


def run(tool: str) -> dict[str, Any]:
    """Run one tool; what it printed where it found something."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "7"]
    command += [sys.executable, "-m", "gpu.sanitize", "--worker"]
    limit = stage_seconds() if tool == TOOLS[-1] else stage_seconds() / 2
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=max(limit, 1)
    )
    if ended.returncode:
        return {"status": "failed", "why": (ended.stdout + ended.stderr)[-2000:]}
    return {"kernels": len(first_variants())}


def first_variants() -> dict[str, dict[str, Any]]:
    """The first variant of every kernel that the device has instructions for."""
    found: dict[str, dict[str, Any]] = {}
    for kernel, definitions in variants(common=True):
        if launching.has_tensor_cores() or not needs_tensor_cores(kernel):
            found.setdefault(kernel, definitions)
    return found


def worker() -> int:
    """Run them in this process."""
    results = [compared(kernel, definitions) for kernel, definitions in first_variants().items()]
    return int(any(facts.get("status") == "failed" for facts in results))


if __name__ == "__main__":
    sys.exit(worker() if sys.argv[1] == "--worker" else main(sys.argv[1]))
