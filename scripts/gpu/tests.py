"""Stages `tests` and `rest`: pytest, with each outcome on disk at once.

A process that dies is followed by another, which continues after that test.
"""

import os
import shlex
import sys
from pathlib import Path

from gpu.records import Records, supervise

MARKS = {
    "tests": "gpu and not weights and not live",
    "rest": "not gpu and not weights and not live",
}


def main(folder: str, stage: str) -> int:
    """Run the tests of a stage; return 0 where at least one passed and none failed."""
    records = Records(folder, stage)
    os.environ |= {"NPLLM_RECORDS": str(records.path), "NPLLM_STAGE": stage}
    os.environ.setdefault("NPLLM_EXAMPLES", "10")
    extra = shlex.split(os.environ.get(f"NPLLM_PYTEST_{stage}", ""))
    code = supervise(
        records,
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "gpu.outcomes",
            "-m",
            MARKS[stage],
            "-q",
            "--no-header",
            "-p",
            "no:cacheprovider",
            "--continue-on-collection-errors",
            "-W",
            "default",  # other versions of packages warn of other things
            *extra,
        ],
    )
    statuses = [
        record["status"] for name, record in records.latest().items() if name != "collected"
    ]
    if "passed" not in statuses:
        print("no test passed")
    return int("passed" not in statuses or "failed" in statuses or code not in (0, 1, 5))


if __name__ == "__main__":
    sys.exit(main(str(Path(sys.argv[1]).resolve()), sys.argv[2]))
