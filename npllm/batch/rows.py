"""The rows of an input file: one JSON object a line."""

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


@dataclass(frozen=True)
class Row:
    """A line of the input: its number, from 1, and its object, or what is wrong with it."""

    line: int
    data: dict[str, Any]
    text: str
    problem: str | None = None


def read_rows(path: Any) -> list[Row]:
    """Read a JSONL file; blank lines are left out.

    Raises
    ------
    NpllmOSError
        When it cannot be read.
    """
    file = check_path("path", path)
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise NpllmOSError(f"{file}: cannot be read ({error.strerror})") from None
    return list(_rows(lines))


def _rows(lines: list[bytes]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        text = line.decode("utf-8", "replace")
        try:
            yield Row(number, _checked(line.decode("utf-8"), f"line {number}"), text)
        except (NpllmError, UnicodeDecodeError) as error:
            yield Row(number, {}, text, str(error))


def _checked(text: str, where: str) -> dict[str, Any]:
    """The object of a line; raise for names that would be overwritten or ignored."""
    data = parse_json(text, where)
    for name in data:
        if name in RESERVED:
            raise NpllmValueError(f"{where}: {quote(name)} is a name of the output; rename it")
        if name in OPTIONS:
            raise NpllmValueError(
                f"{where}: {quote(name)} in a row would be ignored; give it to the command, for "
                "all rows"
            )
    return data


def digest(settings: dict[str, Any], content: Any) -> str:
    """Hash what an answer depends on: sha256 of the settings and of the row's content."""
    text = json.dumps([settings, content], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
