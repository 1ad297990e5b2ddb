"""How many threads a kernel runs on while other programs want the cores.

Threads of a kernel wait for each other after every product.  Beside a busy program one of them is
descheduled for a time slice, several milliseconds, and the others wait: two threads are then slower
than one.  `Controller` measures, over launches that take WINDOW seconds together,

    share = CPU seconds of the process / (threads * seconds)

which is near 1 on idle cores, since threads that wait spin.  A share below LOW together with an
involuntary context switch, in WINDOWS windows in succession, means contention, and a quarter of the
threads, at least one, is given up.  Measured on two cores, decoding: 0.72 to 1.03 on idle ones, at
most 0.52 beside one, two and four busy processes.

Threads are taken back when the system reports idle cores; where it reports nothing, a third more is
tried.  The pause before an attempt doubles with each that failed, and halves with each that held.
"""

import os
import time
from contextlib import suppress
from typing import Any, NamedTuple

resource: Any
try:
    import resource
except ImportError:  # Windows counts no involuntary context switches
    resource = None

__all__ = ["Controller", "IdleCores", "Usage", "can_measure", "read_usage"]

WINDOW = 0.02  # seconds of launches, at least, that a share is of
WINDOWS = 2  # in succession with contention: one alone may be a short task of the system
LOW = 0.65  # share below which threads wait for one that is descheduled
SPARE = 0.6  # idle cores from which on one more thread is tried
PAUSE, LONGEST_PAUSE = 0.05, 2.0  # seconds from giving up threads to an attempt to take them back
LOOK = 0.2  # seconds between looks at the idle cores, where there were none
FAILED = 50  # windows: threads that are given up again within so many were an attempt that failed


class Usage(NamedTuple):
    """What the process has used since it began: seconds, CPU seconds, involuntary switches."""

    seconds: float
    cpu: float
    switches: int


def can_measure() -> bool:
    """Tell whether the system counts what the controller needs."""
    return resource is not None


def read_usage() -> Usage:
    """Read the clock, the CPU time of all threads and their involuntary context switches."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return Usage(time.perf_counter(), used.ru_utime + used.ru_stime, used.ru_nivcsw)


def idle_seconds() -> tuple[float, float]:
    """Idle seconds, and all seconds, of the cores of this process since the system began.

    Raises
    ------
    OSError, ValueError, AttributeError
        Where the system does not say.
    """
    cores = {f"cpu{n}" for n in os.sched_getaffinity(0)}
    idle = total = 0
    with open("/proc/stat", encoding="ascii") as file:
        for line in file:
            name, *fields = line.split()
            if not name.startswith("cpu"):
                break
            if name in cores:
                ticks = [int(x) for x in fields[:8]]  # guests' time is part of the user's
                idle, total = idle + ticks[3] + ticks[4], total + sum(ticks)
    per_second = os.sysconf("SC_CLK_TCK")
    return idle / per_second, total / per_second


class IdleCores:
    """A meter: how many cores of this process were idle since the last reading."""

    def __init__(self) -> None:
        self.last: tuple[float, float] | None = None

    def read(self) -> float | None:
        """Return a number of cores; None where the system does not say, and at first."""
        now = None
        with suppress(OSError, ValueError, AttributeError):
            now = idle_seconds()
        last, self.last = self.last, now
        if now is None or last is None or now[1] <= last[1]:
            return None
        return (now[0] - last[0]) / (now[1] - last[1]) * len(os.sched_getaffinity(0))


class Controller:
    """Chooses the number of threads of each launch.

    Parameters
    ----------
    full : int
        Threads on idle cores.
    meter : object with `read`
        As `IdleCores`.
    """

    def __init__(self, full: int, meter: IdleCores | None = None) -> None:
        self.full = self.count = full
        self.meter = meter or IdleCores()
        self.pause = PAUSE
        self.contended = 0  # windows in succession
        self.since_raised = FAILED  # windows
        self.held = False  # whether the last attempt was not given up
        self.next_attempt = 0.0  # of the clock of `Usage`
        self.clear()

    def clear(self) -> None:
        """Begin a new window."""
        self.seconds = self.cpu = 0.0
        self.switches = 0

    def choose(self, now: float) -> int:
        """Return the number of threads for a launch at this time."""
        if self.count < self.full and now >= self.next_attempt:
            self.next_attempt = now + max(LOOK, self.pause)
            self.take_back(self.meter.read())
        return self.count

    def take_back(self, idle: float | None) -> None:
        """Use more threads where cores are idle, or where nothing is known of them."""
        if idle is not None and idle < SPARE:
            return
        if self.held:
            self.pause = max(PAUSE, self.pause / 2)
        self.held = True
        more = self.count / 3 if idle is None else idle
        self.count = min(self.full, self.count + max(1, round(more)))
        self.since_raised = 0
        self.contended = 0
        self.clear()

    def record(self, count: int, before: Usage, after: Usage) -> None:
        """Take note of a launch on `count` threads."""
        if count != self.count or count == 1:
            return
        self.seconds += after.seconds - before.seconds
        self.cpu += after.cpu - before.cpu
        self.switches += after.switches - before.switches
        if self.seconds >= WINDOW:
            self.since_raised += 1
            is_low = self.cpu < LOW * count * self.seconds
            self.contended = self.contended + 1 if is_low and self.switches else 0
            if self.contended == WINDOWS:
                self.give_up(after.seconds)
            self.clear()

    def give_up(self, now: float) -> None:
        """Use a quarter fewer threads, and look for idle cores after a pause."""
        failed = self.since_raised < FAILED
        self.pause = min(2 * self.pause, LONGEST_PAUSE) if failed else PAUSE
        self.count = max(1, self.count - max(1, self.count // 4))
        self.contended, self.held = 0, False
        self.next_attempt = now + self.pause
        self.meter.read()
