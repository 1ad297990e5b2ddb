"""Progress, lines and warnings on stderr.  None of them raises because of stderr itself, which may
be None, closed, without `isatty` or `flush`, or fail to write.
"""

import inspect
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

__all__ = ["progress_bar", "report", "stderr_is_terminal", "warn", "working", "write_line"]

SECONDS_BETWEEN_LINES = 10.0
"""Where stderr is no terminal, or tqdm is not installed, a line says so often how far work is."""

PACKAGE = str(Path(__file__).parent)
STREAM_ERRORS = (AttributeError, OSError, ValueError)
"""What writing to a missing, closed, incomplete or broken stream raises."""


@contextmanager
def progress_bar(
    total: int,
    description: str,
    *,
    unit: str = "B",
    wanted: bool = True,
    only_terminal: bool = True,
    leave: bool = False,
) -> Iterator[Callable[..., None]]:
    """Show a bar while the body runs; where none can be drawn, write a line every ten seconds.

    Parameters
    ----------
    total : int
        Number of units; the bar is full when they are done.
    description : str
        Written in front of the bar.
    unit : str
        "B" counts bytes, in kB, MB or GB.
    wanted : bool
        False: no bar.
    only_terminal : bool
        Lines in place of a bar where stderr is not a terminal.
    leave : bool
        Keep the bar on the screen at the end.

    Yields
    ------
    advance : function (n, label="")
        Moves the bar by n units, which may be negative; the label is written behind it.  Does
        nothing where none is wanted, or stderr is None.
    """
    if not wanted or sys.stderr is None:
        yield _ignore
        return
    tqdm = _import_tqdm() if stderr_is_terminal() or not only_terminal else None
    if tqdm is None:
        with _lines(total, description, unit) as count:
            yield count
        return
    is_bytes = unit == "B"
    try:
        bar = tqdm(total=total, desc=description, unit=unit, unit_scale=is_bytes, leave=leave)
    except STREAM_ERRORS:
        yield _ignore
        return

    def advance(n: int, label: str = "") -> None:
        with suppress(*STREAM_ERRORS):
            bar.set_postfix_str(label, refresh=False)
            bar.update(n)

    try:
        yield advance
    finally:
        with suppress(*STREAM_ERRORS):
            bar.close()


@contextmanager
def _lines(total: int, description: str, unit: str) -> Iterator[Callable[..., None]]:
    """Write a line now and then that says how far work is; yields `advance` as `progress_bar`."""
    done = 0

    def advance(n: int, label: str = "") -> None:  # noqa: ARG001 - the signature of a bar's
        nonlocal done
        done += n

    def share() -> str:
        if unit == "B":
            return f": {done / 1e6:,.0f} of {total / 1e6:,.0f} MB"
        return f": {done} of {total} {unit}s"

    with working(description, more=share):
        yield advance


@contextmanager
def working(
    description: str, *, wanted: bool = True, more: Callable[[], str] = str
) -> Iterator[None]:
    """Write a line every ten seconds while the body runs, which shows that it has not hung.

    Parameters
    ----------
    description : str
        What is going on, such as "downloading".
    wanted : bool
        False: write nothing.
    more : function () -> str
        Called for each line: how far the work is.

    Notes
    -----
    Writes from a thread of its own.  Nothing is written by work that takes less than that.
    """
    if not wanted:
        yield
        return
    ended, start = Event(), time.monotonic()

    def write_lines() -> None:
        while not ended.wait(SECONDS_BETWEEN_LINES):
            report(f"{description}{more()}, {time.monotonic() - start:.0f} s so far")

    writer = Thread(target=write_lines, daemon=True, name="npllm progress")
    writer.start()
    try:
        yield
    finally:
        ended.set()
        writer.join()


def _import_tqdm() -> Any:
    """Return the class `tqdm`, or None where the package is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm


def _ignore(n: int, label: str = "") -> None:
    """Stand in for `advance` where there is no bar."""


def stderr_is_terminal() -> bool:
    """Return whether stderr is a terminal; False where it is None, closed or has no `isatty`."""
    try:
        return sys.stderr.isatty()
    except STREAM_ERRORS:
        return False


def write_line(text: str) -> None:
    """Write a line to stderr, where that is possible."""
    with suppress(*STREAM_ERRORS):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def report(text: str) -> None:
    """Write a line of npllm's own to stderr, where that is possible."""
    write_line(f"npllm: {text}")


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning that points at the caller of npllm: the first frame outside the package.

    A filter that turns warnings into errors raises, as it does without this function.
    """
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
        level, frame = level + 1, frame.f_back
    with suppress(*STREAM_ERRORS):
        warnings.warn(text, category, stacklevel=level if frame is not None else 2)
