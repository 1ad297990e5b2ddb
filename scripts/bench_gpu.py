"""Measure decoding and prefill on a GPU, in the shape of Phi-3-mini with random bfloat16 weights.

    python3 scripts/bench_gpu.py FOLDER       under 8 minutes; also: scripts/check_gpu.sh --all

Every result is a record in FOLDER/bench.jsonl as soon as it is known, and FOLDER/bench.json holds
all of them with the predictions of docs/gpu/predictions.json: a run that is cut off keeps what it
has, and the next one goes on after it.  Each group is a process of its own with a time limit.

    copy            bandwidth of a large copy on the device
    kernels         each kernel of a decode step in a graph: seconds, GB/s, share of the copy
    npllm           load; decode by context; prefill; KV cache on and off; peak memory
    long            the same weights under longrope: decode behind 16k tokens
    transformers    eager, and compiled with a static cache, on the same weights
    vllm            where it is installed
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from gpu.bench_groups import GROUPS, MODEL  # noqa: E402
from gpu.measure import MissingPackageError  # noqa: E402
from gpu.records import Records, ending, plant, rehearsing, run_recorded, selected  # noqa: E402
from gpu.weights import make, model_folder  # noqa: E402

LIMITS = {  # seconds of each group at most; the stage has 475 for all
    "copy": 20,
    "kernels": 60,
    "npllm": 120,
    "formats": 40,
    "long": 75,
    "transformers": 240,  # to compile it took more than 70 s on an H100
    "vllm": 40,
}


def main(folder: str, group: str | None = None) -> int:
    """Run what is not recorded yet, each group in a process; return 0 where nothing failed."""
    records = Records(folder, "bench")
    if group:
        return run_group(records, group)
    if not (model_folder(MODEL) / "config.json").exists():
        run_recorded(records, "weights", lambda: make(MODEL))
    done = records.done()
    for number, name in enumerate(selected("bench", LIMITS)):
        if name not in done:
            run_recorded(records, name, lambda n=number, g=name: run_process(records, folder, n, g))
        write_json(folder, records)
    latest = records.latest().values()
    return int(any(record["status"] == "failed" for record in latest))


def run_process(records: Records, folder: str, number: int, name: str) -> dict[str, Any]:
    """Run one group; a record that it began and did not end is a failure."""
    plant(f"bench/{number}")
    limit = LIMITS[name] * (4 if rehearsing() else 1)
    left = float(os.environ.get("NPLLM_STAGE_SECONDS", "inf")) - 5
    limit = min(
        limit, left + float(os.environ.get("NPLLM_STAGE_STARTED", time.time())) - time.time()
    )
    if limit < 5:
        return {"status": "not run", "why": "the seconds of this stage are used up"}
    command = [sys.executable, str(Path(__file__).resolve()), folder, name]
    try:
        code = subprocess.run(command, timeout=limit, check=False).returncode
        why = f"the process ended with {ending(code)}" if code else ""
    except subprocess.TimeoutExpired:
        why = f"took more than {limit:.0f} s"
    for task, record in records.latest().items():
        if task.startswith(f"{name}/") and record["status"] == "started":
            records.add(task, "failed", why=why)
    return {"status": "failed", "why": why} if why else {}


def run_group(records: Records, group: str) -> int:
    """Run the tasks of a group in this process, one record each."""
    done = records.done()

    def record(name: str, work: Callable[[], dict[str, Any]]) -> None:
        def facts() -> dict[str, Any]:
            try:
                return work()
            except MissingPackageError as error:
                return {"status": "not run", "why": str(error)}

        if f"{group}/{name}" not in done:
            run_recorded(records, f"{group}/{name}", facts)
            print(records.latest()[f"{group}/{name}"], flush=True)

    GROUPS[group](record)
    return 0


def write_json(folder: str, records: Records) -> None:
    """Everything that is known, beside the predictions, in FOLDER/bench.json."""
    predictions = json.loads((ROOT / "docs/gpu/predictions.json").read_text(encoding="utf-8"))
    found = {"predicted": predictions["predictions"], "records": list(records.latest().values())}
    partial_file = Path(folder) / "bench.json.partial"
    partial_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    partial_file.rename(Path(folder) / "bench.json")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
