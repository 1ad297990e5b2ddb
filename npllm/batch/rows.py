"""The rows of an input file: one JSON object a line."""

import codecs
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from npllm.arguments import check_path
from npllm.config.strict_json import parse_json, quote
from npllm.decoding.keywords import GenerateArguments
from npllm.errors import NpllmError, NpllmOSError, NpllmValueError

__all__ = ["RESERVED", "Row", "digest", "read_rows"]

RESERVED = ("result", "hash")
"""What the output adds to a row."""
OPTIONS = frozenset(GenerateArguments.__annotations__) | {"max_tokens"}
LARGEST_DEPTH = 100  # of lists and objects in a row


@dataclass(frozen=True)
class Row:
    """A line of the input.

    Attributes
    ----------
    line : int
        From 1.
    data : dict
        Its object; empty where there is a problem.
    read : dict or str
        What was read: the object, or the text where it is none.
    problem : str or None
        What is wrong with it.
    """

    line: int
    data: dict[str, Any]
    read: Any
    problem: str | None = None


def read_rows(path: Any) -> list[Row]:
    """Read a JSONL file in UTF-8, with a byte order mark or without; blank lines are left out.

    Raises
    ------
    NpllmOSError
        When it cannot be read.
    """
    file = check_path("path", path)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise NpllmOSError(f"{file}: cannot be read ({error.strerror})") from None
    return list(_rows(content.removeprefix(codecs.BOM_UTF8).split(b"\n")))


def _rows(lines: list[bytes]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _row(number, line)


def _row(number: int, line: bytes) -> Row:
    """A row; with a problem where it is no object, or one that could not be written again."""
    where = f"line {number}"
    try:
        data = parse_json(line.decode("utf-8"), where, finite=True)
        _check_depth(data, where)
    except (NpllmError, UnicodeDecodeError) as error:
        return Row(number, {}, line.decode("utf-8", "backslashreplace"), str(error))
    try:
        _check_names(data, where)
    except NpllmError as error:
        return Row(number, {}, data, str(error))
    return Row(number, data, data)


def _check_depth(data: Any, where: str) -> None:
    """Raise where lists and objects are nested so deeply that they may not be written again."""
    level = [data]
    for _ in range(LARGEST_DEPTH):
        inside = (x.values() if isinstance(x, dict) else x for x in level)
        level = [y for x in inside for y in x if isinstance(y, dict | list)]
        if not level:
            return
    raise NpllmValueError(f"{where}: must be nested at most {LARGEST_DEPTH} levels deep, got more")


def _check_names(data: dict[str, Any], where: str) -> None:
    """Raise for names that would be overwritten or ignored."""
    for name in data:
        if name in RESERVED:
            raise NpllmValueError(f"{where}: {quote(name)} is a name of the output; rename it")
        if name in OPTIONS:
            raise NpllmValueError(
                f"{where}: {quote(name)} in a row would be ignored; give it to the command, for "
                "all rows"
            )


def digest(settings: dict[str, Any], content: Any) -> str:
    """Hash what an answer depends on: sha256 of the settings and of the row's content."""
    text = json.dumps([settings, content], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
