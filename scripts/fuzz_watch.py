"""Run numbered cases in a child process, and watch its time and memory from outside.

A case fails when anything but an expected outcome comes out of it, when the process dies, when it
takes longer than the limit, or when the resident memory of the process exceeds the limit.  In the
last two cases the child is killed, and a new one goes on with the next case.  A case that took too
long is run once more first: on a busy machine a process may get no processor for seconds.
"""

import collections
import contextlib
import multiprocessing
import os
import resource
import signal
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

POLL_SECONDS = 0.02
REPORT_CASES = 200  # between messages of the child
LATE = "still runs after"
CHILD_CASES = 10_000  # then a fresh child
ADDRESS_SPACE = 3 << 30  # beyond what is mapped at the start: an allocation above it fails


class Summary(NamedTuple):
    """What came out of a run."""

    n_cases: int
    seconds: float
    outcomes: collections.Counter[str]
    failures: list[tuple[int, str]]
    slowest: tuple[float, int]  # seconds, number
    most: tuple[int, int]  # bytes above the baseline, number
    late: list[int]  # numbers that took too long once, and ended when they were run again


def resident_bytes(pid: int | str = "self") -> int:
    """Return the resident memory of a process, or 0 where it has ended."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()
    return 0


def work(
    mode: Any, seed: int, numbers: range, stop_at: float, shared: Any, pipe: Any, scratch: str
) -> None:
    """Run cases in this process, until a time of the monotonic clock; send what came out."""
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # the tokenizers library writes its panics there
    cases = mode(seed, Path(scratch))
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESS_SPACE, resource.RLIM_INFINITY))
    outcomes, failures, slowest = collections.Counter(), [], (0.0, -1)
    shared["baseline"].value = resident_bytes()
    for number in numbers:
        start = time.monotonic()
        shared["started"].value, shared["number"].value = start, number
        try:
            outcomes[cases.run(number)] += 1
        except BaseException as error:
            failures.append((number, f"{type(error).__name__}: {error}"[:300]))
        slowest = max(slowest, (time.monotonic() - start, number))
        is_last = number == numbers[-1] or time.monotonic() > stop_at
        if failures or (number + 1) % REPORT_CASES == 0 or is_last:
            pipe.send((number + 1, outcomes, failures, slowest))
            outcomes, failures = collections.Counter(), []
        if is_last:
            break
    pipe.close()
    os._exit(0)  # threads of a case's server must not hold the process


def watch(
    mode: Any,
    n: int,
    seed: int,
    limit_seconds: float,
    limit_bytes: int,
    minutes: float = float("inf"),
) -> Summary:
    """Run n cases of a mode, one process at a time.

    Parameters
    ----------
    mode : class
        Called in the child with (seed, scratch folder); `run(number)` returns the outcome's name.
    n, seed : int
    limit_seconds : float
        Of one case.
    limit_bytes : int
        Of resident memory above that before the first case.
    minutes : float
        After which no further case begins.
    """
    context, start = multiprocessing.get_context("fork"), time.monotonic()
    outcomes: collections.Counter[str] = collections.Counter()
    failures: list[tuple[int, str]] = []
    slowest, most, first = (0.0, -1), (0, -1), 0
    late: list[int] = []
    disk = "/dev/shm" if Path("/dev/shm").is_dir() else None
    stop_at = start + 60 * minutes
    while first < n and time.monotonic() < stop_at:
        numbers = range(first, min(n, first + CHILD_CASES))
        with tempfile.TemporaryDirectory(dir=disk) as scratch:
            child = _Child(context, mode, seed, numbers, stop_at, scratch)
            reports, failure, peak = child.follow(limit_seconds, limit_bytes)
        for _, counts, failed, slow in reports:
            outcomes += counts
            failures += failed
            slowest = max(slowest, slow)
        most = max(most, peak)
        if failure is None:
            first = reports[-1][0]
        elif failure[1].startswith(LATE) and failure[0] not in late:
            late.append(failure[0])
            first = failure[0]
        else:
            failures.append(failure)
            first = failure[0] + 1
    late = [number for number in late if number not in dict(failures)]
    return Summary(first, time.monotonic() - start, outcomes, failures, slowest, most, late)


class _Child:
    """A process that runs cases, and its watch."""

    def __init__(
        self, context: Any, mode: Any, seed: int, numbers: range, stop_at: float, scratch: str
    ) -> None:
        self.shared = {
            "number": context.Value("q", numbers.start),
            "started": context.Value("d", time.monotonic() + 60),  # of the first case: see `work`
            "baseline": context.Value("q", 0),
        }
        self.pipe, sender = context.Pipe(duplex=False)
        arguments = (mode, seed, numbers, stop_at, self.shared, sender, scratch)
        self.process = context.Process(target=work, args=arguments)
        self.process.start()
        sender.close()

    def follow(
        self, limit_seconds: float, limit_bytes: int
    ) -> tuple[list[Any], tuple[int, str] | None, tuple[int, int]]:
        """Wait for the end; return the reports, what ended it early, and the peak of memory."""
        reports, peak, problem = [], (0, -1), None
        while problem is None:
            if self.pipe.poll(POLL_SECONDS):
                try:
                    reports.append(self.pipe.recv())
                except EOFError:  # the child has ended
                    break
            number, baseline = self.shared["number"].value, self.shared["baseline"].value
            seconds = time.monotonic() - self.shared["started"].value
            grown = resident_bytes(self.process.pid) - baseline if baseline else 0
            peak = max(peak, (grown, number))
            if grown > limit_bytes:
                problem = number, f"holds {grown >> 20} MiB more than before"
            elif seconds > limit_seconds:
                problem = number, f"{LATE} {seconds:.1f} s"
        if problem is not None:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()
        if problem is None and self.process.exitcode:
            code = self.process.exitcode
            problem = self.shared["number"].value, f"the process died with exit code {code}"
        return reports, problem, peak


def write_summary(name: str, summary: Summary, seed: int) -> None:
    """Print the figures of a run."""
    n, seconds = summary.n_cases, summary.seconds
    print(f"{name}: {n} cases of seed {seed} in {seconds:.0f} s, {len(summary.failures)} escapes")
    print(
        f"slowest case {summary.slowest[0]:.2f} s (number {summary.slowest[1]}); most memory "
        f"{summary.most[0] / 2**20:.0f} MiB above the start (at number {summary.most[1]})"
    )
    if summary.late:
        print(f"took too long once, and not when run again: {summary.late}")
    print(f"{len(summary.outcomes)} kinds of outcome, the most frequent:")
    for outcome, count in summary.outcomes.most_common(25):
        print(f"  {count:7d} {outcome.encode('ascii', 'backslashreplace').decode()}")
    for number, problem in sorted(summary.failures)[:30]:
        print(f"ESCAPE at number {number}: {problem!a}")
