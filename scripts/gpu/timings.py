"""Stage `timings`: CuPy beside NumPy on the same weights, the speed of every set, the peers.

Every task is a process of its own, with its own time limit and one record: a fault in one set does
not reach the others.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu.measure import NOT_RUN, TASKS
from gpu.records import Records, ending, plant, rehearsing, run_recorded, selected, stage_seconds

LEAST = 5.0  # seconds that a task needs at least


def main(folder: str) -> int:
    """Run every task that is not recorded yet; return 0 where none failed."""
    records = Records(folder, "timings")
    done, stop = records.done(), stage_seconds() + time.monotonic()
    for number, name in enumerate(selected("timings", TASKS)):
        if name not in done:
            run_recorded(records, name, lambda n=number, name=name: run(n, name, stop))
            print(records.latest()[name], flush=True)
    return int(any(record["status"] == "failed" for record in records.latest().values()))


def run(number: int, name: str, stop: float) -> dict[str, Any]:
    """Run one task in its own process; its last line is the JSON of its facts."""
    plant(f"timings/{number}")
    limit = min(TASKS[name] * (4 if rehearsing() else 1), stop - time.monotonic())
    if limit < LEAST:
        return {"status": "not run", "why": "the seconds of this stage are used up"}
    start = time.perf_counter()
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "gpu.measure", name],
            capture_output=True,
            text=True,
            check=False,
            timeout=limit,
            env=os.environ | {"NPLLM_TASK_SECONDS": str(limit - 2)},
        )
    except subprocess.TimeoutExpired:
        return {"status": "failed", "why": f"took more than {limit:g} s"}
    lines = ended.stdout.splitlines() or [""]
    if ended.returncode == NOT_RUN:
        return {"status": "not run", "why": lines[-1]}
    if ended.returncode:
        return {"status": "failed", "why": f"{ending(ended.returncode)}: {ended.stderr[-1500:]}"}
    return {"process_seconds": time.perf_counter() - start} | json.loads(lines[-1])


if __name__ == "__main__":
    sys.exit(main(str(Path(sys.argv[1]).resolve())))
