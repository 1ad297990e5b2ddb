"""Stages `tests` and `rest`: pytest, with each outcome on disk at once.

A process that dies is followed by another, which continues after that test.
"""

import os
import shlex
import sys
from pathlib import Path

from gpu.records import ROOT, Records, supervise

MARKS = {
    "tests": "gpu and not weights and not live",
    "rest": "not gpu and not weights and not live",
}

OPTIONS = shlex.split(
    "-p gpu.outcomes -p no:cacheprovider -q --no-header --continue-on-collection-errors "
    "-W default"  # packages of other versions warn of other things
)


def main(folder: str, stage: str) -> int:
    """Run the tests of a stage; return 0 where at least one passed and none failed."""
    records = Records(folder, stage)
    os.environ |= {"NPLLM_RECORDS": str(records.path), "NPLLM_STAGE": stage}
    os.environ["NPLLM_GPU_FIGURES"] = str(Path(folder) / "figures.json")
    os.environ.setdefault("NPLLM_EXAMPLES", "10")
    files = files_on_gpu() if stage == "tests" else []
    extra = shlex.split(os.environ.get(f"NPLLM_PYTEST_{stage}", ""))
    command = [sys.executable, "-m", "pytest", *OPTIONS, "-m", MARKS[stage]]
    code = supervise(records, [*command, *files, *extra])
    statuses = [
        record["status"] for name, record in records.latest().items() if name != "collected"
    ]
    if "passed" not in statuses:
        print("no test passed")
    return int("passed" not in statuses or "failed" in statuses or code not in (0, 1, 5))


def files_on_gpu() -> list[str]:
    """Test files that use the marker `gpu`: a fault in another file does not concern them."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path) for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]


if __name__ == "__main__":
    sys.exit(main(str(Path(sys.argv[1]).resolve()), sys.argv[2]))
