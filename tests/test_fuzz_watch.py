"""scripts/fuzz_watch.py sees what a case must not do; the modes of scripts/fuzz_files.py run."""

import collections
import importlib
import os
import signal
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="watches /proc"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def scripts():
    """The modules of scripts/."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        watch = importlib.import_module("fuzz_watch")
        yield watch, importlib.import_module("fuzz_files")
    finally:
        sys.path.remove(str(SCRIPTS))


def misbehave(number):
    """Case 3 raises, 5 hangs, 7 takes memory, 9 dies; the others do nothing."""
    if number == 3:
        raise KeyError("x")
    if number == 5:
        time.sleep(60)
    if number == 7:
        held = bytearray(200 << 20)
        held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
        time.sleep(60)
    if number == 9:
        os.kill(os.getpid(), signal.SIGKILL)


class Cases:
    def __init__(self, seed, scratch):
        assert seed == 4 and scratch.is_dir()

    def run(self, number):
        misbehave(number)
        return "fine"


@pytest.mark.slow
def test_the_watch_sees_errors_hangs_memory_and_death_and_goes_on(scripts):
    watch, _ = scripts
    summary = watch.watch(Cases, 500, 4, limit_seconds=3, limit_bytes=100 << 20)
    problems = dict(summary.failures)
    assert sorted(problems) == [3, 5, 7, 9]
    assert problems[3] == "KeyError: 'x'"
    assert problems[5].startswith("still runs after ")
    assert problems[7].startswith("holds ")
    assert problems[9] == "the process died with exit code -9"
    assert summary.outcomes["fine"] == 493


def test_a_case_that_is_late_only_once_is_no_escape(scripts, tmp_path):
    class LateOnce(Cases):
        def run(self, number):
            if number == 5 and not (tmp_path / "ran").exists():
                (tmp_path / "ran").touch()
                time.sleep(60)
            return "fine"

    watch, _ = scripts
    summary = watch.watch(LateOnce, 20, 4, limit_seconds=2, limit_bytes=100 << 20)
    assert summary.failures == []
    assert summary.late == [5]
    assert summary.outcomes == collections.Counter(
        fine=15
    )  # of the first child nothing is reported


def test_an_error_is_an_escape_with_its_number(scripts):
    class Raising(Cases):
        def run(self, number):
            return misbehave(number % 4) or "fine"

    watch, _ = scripts
    summary = watch.watch(Raising, 20, 4, limit_seconds=20, limit_bytes=100 << 20)
    assert summary.failures == [(n, "KeyError: 'x'") for n in (3, 7, 11, 15, 19)]
    assert summary.outcomes == collections.Counter(fine=15)


def test_no_case_begins_after_the_time_is_over(scripts):
    class Slow(Cases):
        def run(self, _):
            time.sleep(0.02)
            return "fine"

    watch, _ = scripts
    summary = watch.watch(
        Slow, 10_000, 4, limit_seconds=20, limit_bytes=100 << 20, minutes=0.5 / 60
    )
    assert 1 <= summary.n_cases < 1000 and summary.failures == []
    assert summary.outcomes["fine"] == summary.n_cases


@pytest.mark.parametrize(
    ("name", "packages"),
    [
        ("gguf", ["gguf"]),
        pytest.param("hub", ["huggingface_hub", "filelock"], marks=pytest.mark.slow),
        pytest.param("tokenizer", [], marks=pytest.mark.slow),
    ],
)
def test_a_mode_runs_without_escapes_and_reaches_both_sides(scripts, name, packages):
    for package in packages:
        pytest.importorskip(package)
    watch, files = scripts
    summary = watch.watch(files.MODES[name], 120, 20, *files.LIMITS[name])
    assert summary.failures == []
    good = summary.outcomes["loads and runs"]
    assert 5 < good < 100 and sum(summary.outcomes.values()) == 120
