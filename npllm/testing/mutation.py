"""Planted bugs in the place of the function under test: which ones do the user's tests miss?

The environment variable NPLLM_MUTANT names a planted bug.  `under_test`, `npllm.testing.adapt` and
the fixtures of the pytest plugin then hand out the bug instead of the function.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from npllm.errors import NpllmValueError

__all__ = ["LOG", "MUTANT", "Missed", "baseline", "missed_bug", "survives", "under_test"]

MUTANT = "NPLLM_MUTANT"
LOG = "NPLLM_MUTANT_LOG"

SEED = 18


def under_test(fn: Callable, op: str) -> Callable:
    """Return the function, or a planted bug where NPLLM_MUTANT names one of its operation.

    Parameters
    ----------
    fn : callable
        With the signature of `npllm.ops.<op>`.
    op : str
        As in `npllm.testing.check`.

    Returns
    -------
    fn : callable

    Raises
    ------
    NpllmValueError
        When NPLLM_MUTANT names no planted bug.
    """
    log, name = os.environ.get(LOG), os.environ.get(MUTANT)
    if log:
        with Path(log).open("a", encoding="utf-8") as file:
            file.write(f"{op}\n")
    if not name:
        return fn
    from npllm.testing.planted import bugs

    if name not in bugs:
        raise NpllmValueError(f"{MUTANT} must name a planted bug, got {name!r}")
    return bugs[name].fn if bugs[name].op == op else fn


class Missed(NamedTuple):
    """A planted bug that the user's tests did not notice.

    Parameters
    ----------
    name : str
    says : str
        What is wrong.
    used : float, optional
        Its error on `case`, in units of the error budget.
    law : str
        That it breaks.
    case : str
        The smallest case that would have shown it.
    """

    name: str
    says: str
    used: float | None
    law: str
    case: str


def command_of(text: str) -> list[str]:
    """Split a command; `pytest` and `python` are those of this interpreter.

    Raises
    ------
    NpllmValueError
        For an empty command, or one whose quotes do not close.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise NpllmValueError(f"the command {text!r} cannot be split: {error}") from error
    if not words:
        raise NpllmValueError("the command must not be empty; it runs your tests")
    own = {"pytest": [sys.executable, "-m", "pytest"], "python": [sys.executable]}
    return [*own.get(words[0], [words[0]]), *words[1:]]


def baseline(command: list[str]) -> list[str]:
    """Run the tests without a bug; return the operations that they put to the test.

    Raises
    ------
    NpllmValueError
        When the tests fail without a bug, or put no operation to the test.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ops"
        done = _run(command, {LOG: str(log)})
        if done.returncode != 0:
            raise NpllmValueError(
                f"the tests must pass without a bug, got exit code {done.returncode}:\n"
                + "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            )
        ops = log.read_text(encoding="utf-8").split() if log.exists() else []
    if not ops:
        raise NpllmValueError(
            "the tests put no operation to the test: get yours through npllm.testing.adapt, "
            "npllm.testing.under_test(fn, op) or the fixture npllm_op"
        )
    return sorted(set(ops))


def survives(command: list[str], name: str) -> bool:
    """Tell whether the tests pass with a planted bug in the place of the function."""
    return _run(command, {MUTANT: name}).returncode == 0


def _run(command: list[str], extra: dict[str, str]) -> subprocess.CompletedProcess:
    environment = {key: x for key, x in os.environ.items() if key not in (MUTANT, LOG)} | extra
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NpllmValueError(f"{command[0]} cannot be run: {error}") from error


def missed_bug(name: str) -> Missed:
    """Say how large the error of a bug is, and the smallest case that shows it."""
    from npllm.testing.laws import LawBroken, check
    from npllm.testing.laws.broken import case_text
    from npllm.testing.planted import bugs

    bug = bugs[name]
    try:
        check(bug.op, bug.fn, seed=SEED)
    except LawBroken as error:
        return Missed(name, bug.says, error.used, error.law, case_text(error.case))
    return Missed(name, bug.says, None, "none within 200 examples", "")


def named_bugs(ops: list[str], only: str | None) -> Iterator[str]:
    """Yield the names of the planted bugs of some operations that contain a text."""
    from npllm.testing.planted import bugs

    for name, bug in bugs.items():
        if bug.op in ops and (only is None or only in name):
            yield name


def facts_of(missed: Missed) -> dict[str, Any]:
    """Return a missed bug as a dict of what JSON holds."""
    return missed._asdict()
