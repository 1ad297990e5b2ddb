"""Regular expressions of an adapter's settings, matched in a process that is ended at a limit.

An expression comes from a stranger, and Python's `re` may try exponentially many ways, as with
"(a+)+b".  Nothing can interrupt it from within, so all but plain names are matched in a process of
their own.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from npllm.config.strict_json import quote
from npllm.errors import NpllmOSError, NpllmValueError

__all__ = ["matching_names"]

DEADLINE = 10.0  # seconds for all expressions; usual ones take milliseconds
MOST_CHARACTERS = 2**20
PLAIN = re.compile(r"(?:\w|\.|\\\.|-)*")  # no choice to make: linear time

PROGRAM = """
import json, re, sys
asked, found = json.load(sys.stdin), {"matched": {}}
for text in asked["patterns"]:
    try:
        matches = re.compile(text).fullmatch
    except (re.error, OverflowError, RecursionError) as error:
        found = {"pattern": text, "error": str(error)}
        break
    parts = asked["parts"].items()
    found["matched"][text] = [name for name, own in parts if any(map(matches, own))]
json.dump(found, sys.stdout)
"""


def matching_names(
    file: Path, patterns: Iterable[str], names: Iterable[str], *, ends: bool = False
) -> dict[str, frozenset[str]]:
    """Find the names that each expression matches.

    Parameters
    ----------
    file : Path
        Where the expressions stand, for errors.
    patterns, names : iterable of str
    ends : bool
        An expression may also match the end of a name, behind a dot.

    Returns
    -------
    matched : dict
        Expression -> names.

    Raises
    ------
    NpllmValueError
        For an expression that does not compile; for expressions that take too long.
    NpllmOSError
        When no process can be started.
    """
    parts = {name: _ends(name) if ends else [name] for name in names}
    patterns = list(dict.fromkeys(patterns))
    matched = {}
    for text in filter(PLAIN.fullmatch, patterns):
        matches = re.compile(text).fullmatch
        matched[text] = frozenset(name for name, own in parts.items() if any(map(matches, own)))
    rest = [text for text in patterns if text not in matched]
    return matched | (_matched_elsewhere(file, rest, parts) if rest else {})


def _ends(name: str) -> list[str]:
    """A name, and what stands behind each of its dots."""
    words = name.split(".")
    return [".".join(words[n:]) for n in range(len(words))]


def _matched_elsewhere(
    file: Path, patterns: list[str], parts: dict[str, list[str]]
) -> dict[str, frozenset[str]]:
    """Match in a process of its own."""
    asked = json.dumps({"patterns": patterns, "parts": parts})
    shown = quote(max(patterns, key=len))
    if len(asked) > MOST_CHARACTERS:
        raise NpllmValueError(
            f"{file}: its {len(patterns)} regular expressions are too long, such as {shown}; "
            "list the names of modules instead"
        )
    command = [sys.executable, "-I", "-S", "-c", PROGRAM]
    try:
        done = subprocess.run(
            command, input=asked.encode(), capture_output=True, timeout=DEADLINE, check=False
        )
        found = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise NpllmValueError(
            f"{file}: matching its regular expressions, such as {shown}, takes more than "
            f"{DEADLINE:g} s; list the names of modules instead"
        ) from None
    except (OSError, ValueError) as error:
        raise NpllmOSError(
            f"{file}: no process could match its regular expressions ({error})"
        ) from None
    if "error" in found:
        raise NpllmValueError(
            f"{file}: {quote(found['pattern'])} is no regular expression ({found['error']}); "
            "list the names of modules instead"
        )
    return {text: frozenset(chosen) for text, chosen in found["matched"].items()}
