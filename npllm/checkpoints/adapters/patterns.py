"""Regular expressions of an adapter's settings: those that could take unbounded time are refused.

A file that somebody else wrote may hold an expression such as "(a+)+b", which Python's `re` tries
in exponentially many ways.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from npllm.config.strict_json import quote
from npllm.errors import NpllmValueError

__all__ = ["check_patterns", "matches_end", "matches_whole"]

MOST_PATTERNS = 2000
MOST_CHARACTERS = 4000
MOST_REPEATS = 5  # of *, + and {}: a name has about 40 characters, so few ways are tried
MOST_IN_ALL = 20
MOST_OPTIONS = 16  # of ?


def check_patterns(file: Path, texts: Iterable[str]) -> None:
    """Raise unless every expression compiles and takes bounded time.

    Raises
    ------
    NpllmValueError
        For an expression that does not compile, repeats a group, or repeats too often.
    """
    texts = list(texts)
    if len(texts) > MOST_PATTERNS:
        raise NpllmValueError(
            f"{file}: holds {len(texts)} regular expressions, more than {MOST_PATTERNS}"
        )
    n_repeat = sum(map(_count_repeats, texts))
    if n_repeat > MOST_IN_ALL:
        raise NpllmValueError(
            f"{file}: its regular expressions hold {n_repeat} repetitions, more than "
            f"{MOST_IN_ALL}; list the names of modules instead"
        )
    for text in texts:
        problem = _problem(text)
        if problem:
            raise NpllmValueError(
                f"{file}: {quote(text)} {problem}; list the names of modules instead"
            )


def _problem(text: str) -> str:
    """Say what is wrong with an expression; empty where nothing is."""
    if len(text) > MOST_CHARACTERS:
        return f"is longer than {MOST_CHARACTERS} characters"
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        return f"is no regular expression ({error})"
    plain = _plain(text)
    if re.search(r"\)[*+{]", plain):
        return "repeats a group, which may take unbounded time"
    n_repeat, n_option = _count_repeats(text), len(re.findall(r"(?<!\()\?", plain))
    if n_repeat > MOST_REPEATS or n_option > MOST_OPTIONS:
        return (
            f"holds {n_repeat} repetitions and {n_option} options, more than {MOST_REPEATS} and "
            f"{MOST_OPTIONS}"
        )
    return ""


def _plain(text: str) -> str:
    """An expression with a letter for each escape and each set of characters."""
    unescaped = re.sub(r"\\.", "x", text, flags=re.DOTALL)
    return re.sub(r"\[\^?\]?[^\]]*\]", "x", unescaped)


def _count_repeats(text: str) -> int:
    return len(re.findall(r"[*+{]", _plain(text)))


def matches_whole(pattern: str, name: str) -> bool:
    """Tell whether an expression matches the whole name of a module."""
    return re.fullmatch(pattern, name) is not None


def matches_end(pattern: str, name: str) -> bool:
    """Tell whether an expression matches the name of a module, or its end behind a dot."""
    return _end_of_name(pattern).match(name) is not None


@lru_cache(MOST_PATTERNS)
def _end_of_name(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")
