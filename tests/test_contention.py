"""Threads beside busy programs: when the controller gives them up, and takes them back.

The cores are simulated: a launch on n threads takes as long as its slowest thread.
"""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npllm import kernels

if kernels.compiled_ops() is None:
    pytest.skip("Numba is not installed", allow_module_level=True)

from npllm.kernels.cpu import contention
from npllm.kernels.cpu.contention import Controller, Usage

STEP = 0.008  # seconds of a launch that has all its cores


class Cores:
    """Cores, some of them wanted by busy programs, on which launches run one after another."""

    def __init__(self, full, busy=0, reports=True):
        self.full, self.busy, self.reports = full, busy, reports
        self.now, self.cpu, self.switches = 100.0, 0.0, 0
        self.controller = Controller(full, self)
        self.failed = 0

    def read(self):
        """Cores that neither busy programs nor our threads use."""
        return max(0.0, self.full - self.busy - self.controller.count) if self.reports else None

    def usage(self):
        return Usage(self.now, self.cpu, self.switches)

    def launch(self):
        before, was = self.usage(), self.controller.count
        count = self.controller.choose(self.now)
        waits = count + self.busy > self.full
        self.failed += waits and count > was
        self.now += STEP * (6 if waits else 1) * self.full / count
        self.cpu += STEP * self.full * (2 if waits else 1)
        self.switches += waits
        self.controller.record(count, before, self.usage())
        return count

    def run(self, seconds):
        until = self.now + seconds
        counts = [self.launch()]
        while self.now < until:
            counts.append(self.launch())
        return counts


@given(st.integers(1, 16), st.booleans())
def test_idle_cores_are_all_used(full, reports):
    assert set(Cores(full, 0, reports).run(3.0)) == {full}


@given(st.integers(2, 16), st.data(), st.booleans())
def test_no_more_threads_than_free_cores_beside_busy_programs(full, data, reports):
    cores = Cores(full, data.draw(st.integers(1, full - 1)), reports)
    cores.run(4.0)
    cores.failed = 0
    counts = cores.run(20.0)  # an attempt lasts two windows, here launches of up to a second
    assert counts.count(max(counts)) < len(counts) / 5 or max(counts) <= full - cores.busy
    assert cores.failed <= (3 if reports else 14)


@given(st.integers(2, 16), st.integers(1, 15), st.booleans())
def test_idle_cores_are_taken_back_within_seconds(full, busy, reports):
    cores = Cores(full, min(busy, full), reports)
    cores.run(5.0)
    cores.busy = 0
    cores.run(1.0 if reports else 15.0)
    assert cores.launch() == full


def test_low_share_without_a_switch_is_a_kernel_that_does_not_fill_its_threads():
    controller = Controller(4, Cores(4))
    for n in range(100):
        controller.record(4, Usage(n, n, 0), Usage(n + 1, n + 1, 0))
    assert controller.count == 4


def test_switches_while_every_thread_runs_are_no_contention():
    controller = Controller(4, Cores(4))
    for n in range(100):
        controller.record(4, Usage(n, 4 * n, n), Usage(n + 1, 4 * (n + 1), n + 1))
    assert controller.count == 4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
def test_the_meter_counts_the_cores_of_this_process():
    import os
    import time

    meter = contention.IdleCores()
    assert meter.read() is None
    time.sleep(0.3)
    assert 0 <= meter.read() <= len(os.sched_getaffinity(0)) + 0.01


def test_a_meter_without_a_system_that_says_reads_none(monkeypatch):
    def fails():
        raise OSError("no such file")

    monkeypatch.setattr(contention, "idle_seconds", fails)
    meter = contention.IdleCores()
    assert [meter.read(), meter.read()] == [None, None]
