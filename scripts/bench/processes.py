"""A contender in a process of its own, and the facts of the machine."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

ENTRY = Path(__file__).parents[1] / "bench.py"  # its hidden commands are what the processes run
MODEL_OPTION = click.option(
    "-m", "--model", "path", help="Checkpoint folder. [the default checkpoint]"
)


def command(*arguments: Any) -> list[str]:
    """The command line of a command of bench.py."""
    return [sys.executable, str(ENTRY), *map(str, arguments)]


def environment() -> dict[str, str]:
    """The environment of a child: OpenBLAS chooses its kernels."""
    return {key: value for key, value in os.environ.items() if key != "OPENBLAS_CORETYPE"}


def pinned(threads: int) -> dict[str, str]:
    """The environment of a child: as many threads as asked for, and BLAS free to choose its
    kernels.
    """
    kept = environment()
    kept.pop("OPENBLAS_L2_SIZE", None)
    return kept | dict.fromkeys(
        ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads)
    )


def json_of(arguments: list[str], env: dict[str, str]) -> Any:
    """Run a command to its end; return the JSON of its last line."""
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


class Child:
    """A process that answers one JSON line with another; the first line names its version."""

    def __init__(
        self, arguments: list[str], env: dict[str, str], stderr: int | None = None
    ) -> None:
        self.process = subprocess.Popen(
            arguments,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=env,
        )
        self.version = self.answer()["version"]

    def ask(self, task: Any) -> None:
        """Send a task as one JSON line."""
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """Wait for the next line, and return its JSON."""
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a contender ended early, with exit code {self.process.wait()}")
        return json.loads(line)

    def measure(self, **task: Any) -> Any:
        """Send a task, and return its answer."""
        self.ask(task)
        return self.answer()


def serve(version: str, work: Callable[[Any], Any]) -> None:
    """Answer every task of standard input with `work(task)`, a JSON line each."""
    print(json.dumps({"version": version}), flush=True)
    for line in sys.stdin:
        print(json.dumps(work(json.loads(line))), flush=True)


def timed(function: Callable[..., Any], *arguments: Any) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def machine() -> dict[str, Any]:
    """Facts of the machine, as the children see them."""
    dropped = os.environ.pop("OPENBLAS_CORETYPE", None)
    doctor = [sys.executable, "-m", "npllm", "doctor", "--json"]
    facts = json.loads(subprocess.run(doctor, capture_output=True, text=True, check=True).stdout)
    for place in ("weights_folder", "default_checkpoint"):  # say nothing about the figures
        facts.pop(place)
    return facts | {
        "cpu": cpu_name(),
        "removed from the environment": {"OPENBLAS_CORETYPE": dropped} if dropped else {},
    }


def cpu_name() -> str:
    """The name of the processor, as Linux gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(
                line.split(":")[1].strip() for line in file if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return "unknown"


def write_json(path: str | None, result: Any) -> None:
    """Write every number into a file, if one was named."""
    if path:
        Path(path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
