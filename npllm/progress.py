"""Progress on stderr: a bar by tqdm, and single lines.  Whatever stderr is, neither raises."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

__all__ = ["progress_bar", "report", "stderr_is_terminal"]


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
    """Show a bar while the body runs.

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
        No bar where stderr is not a terminal.
    leave : bool
        Keep the bar on the screen at the end.

    Yields
    ------
    advance : function (n, label="")
        Moves the bar by n units, which may be negative; the label is written behind it.  Does
        nothing where there is no bar: not wanted, stderr is None or no terminal, no tqdm installed.
    """
    can_show = stderr_is_terminal() if only_terminal else sys.stderr is not None
    tqdm = _import_tqdm() if wanted and can_show else None
    if tqdm is None:
        yield _ignore
        return
    is_bytes = unit == "B"
    with tqdm(total=total, desc=description, unit=unit, unit_scale=is_bytes, leave=leave) as bar:

        def advance(n: int, label: str = "") -> None:
            bar.set_postfix_str(label, refresh=False)
            bar.update(n)

        yield advance


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
    except (AttributeError, ValueError):
        return False


def report(text: str) -> None:
    """Write a line to stderr, where that is possible."""
    with suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(f"npllm: {text}\n")
        sys.stderr.flush()
