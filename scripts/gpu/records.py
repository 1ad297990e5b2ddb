"""What a stage found, one JSON object a line, on disk at once: a stage that is killed keeps it."""

import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STATUSES = ("passed", "failed", "skipped", "not run")  # how a record may end
STARTED = "started"
UNUSABLE = 3  # exit code of a worker whose device answers no more: what is left needs a new process
MOST_WORKERS = 30


class Records:
    """The records of one stage in the file FOLDER/NAME.jsonl.

    Parameters
    ----------
    folder : str or Path
    name : str
    """

    def __init__(self, folder: str | Path, name: str) -> None:
        self.path = Path(folder) / f"{name}.jsonl"

    def add(self, name: str, status: str, **facts: Any) -> None:
        """Append one record, and see that it is on disk."""
        line = json.dumps(in_json({"name": name, "status": status, **facts}), default=str)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def latest(self) -> dict[str, dict[str, Any]]:
        """Read the last record of every name; a line that was cut off is left out."""
        found: dict[str, dict[str, Any]] = {}
        if not self.path.exists():
            return found
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            found[record["name"]] = record
        return found

    def done(self) -> set[str]:
        """Names that need not run again."""
        return {name for name, record in self.latest().items() if record["status"] != STARTED}

    def close_started(self, why: str) -> list[str]:
        """Mark what began and did not end as failed; return the names."""
        begun = [name for name, record in self.latest().items() if record["status"] == STARTED]
        for name in begun:
            self.add(name, "failed", why=why)
        return begun


def in_json(value: Any) -> Any:
    """The same value with NaN and infinities as texts: JSON has no numbers for them."""
    if isinstance(value, dict):
        return {str(key): in_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [in_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def run_recorded(records: Records, name: str, work: Callable[[], dict[str, Any]]) -> bool:
    """Run one piece of work between two records; return whether it passed.

    `work` returns the facts of its record.  An exception, or a fact `status`, says that it did
    not pass.
    """
    records.add(name, STARTED)
    start = time.perf_counter()
    try:
        facts = {"status": "passed"} | work()
    except Exception as error:  # whatever it is, the next piece must have its turn
        facts = {"status": "failed", "why": f"{type(error).__name__}: {str(error)[:2000]}"}
    facts["total_seconds"] = time.perf_counter() - start
    records.add(name, **facts)
    return facts["status"] == "passed"


def supervise(records: Records, command: list[str]) -> int:
    """Run a worker again after every record in which it died; return its last exit code."""
    code = 1
    for _ in range(MOST_WORKERS):
        code = subprocess.run(command, check=False, cwd=ROOT).returncode
        ended = f"the process ended with {ending(code)}"
        if not records.close_started(ended) and code != UNUSABLE:
            break
    return code


def ending(code: int) -> str:
    """Say how a process ended: by an exit code, or by a signal."""
    if code in (124, 128 + signal.SIGKILL):
        return f"exit code {code}: timed out, or killed"
    return f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"


def plant(place: str) -> None:
    """Fail on purpose where NPLLM_PLANT says so: "die@kernels/2,hang@timings/1".

    `die` kills the process, `kill` the whole stage; `hang` waits for the time limit; any other word
    raises.
    """
    for entry in os.environ.get("NPLLM_PLANT", "").split(","):
        how, _, where = entry.partition("@")
        if where != place:
            continue
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "kill":  # the whole stage: the group of `timeout`
            os.killpg(0, signal.SIGKILL)
        if how == "hang":
            time.sleep(3600)
        raise RuntimeError(f"planted at {place}")


def selected(stage: str, names: Iterable[str]) -> list[str]:
    """Those of a stage's names that hold one of the words in NPLLM_ONLY_stage; all without it."""
    words = os.environ.get(f"NPLLM_ONLY_{stage}", "").split()
    return [name for name in names if not words or any(word in name for word in words)]


def stage_seconds() -> float:
    """The seconds that this stage has left, less some for its last record."""
    started = float(os.environ.get("NPLLM_STAGE_STARTED", time.time()))
    limit = float(os.environ.get("NPLLM_STAGE_SECONDS", "inf"))
    return limit - 5 - (time.time() - started)


def rehearsing() -> bool:
    """Whether the stand-in takes CuPy's place, and sizes are small."""
    return os.environ.get("NPLLM_REHEARSE") == "1"
