"""Files of a run: JSON lines that are checked when they are read, locks, complete files."""

import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from npllm.config.strict_json import parse_json
from npllm.errors import NpllmOSError, NpllmRuntimeError, NpllmValueError

__all__ = [
    "Answer",
    "cut_half_a_line",
    "foreign",
    "is_same",
    "line_of",
    "lock",
    "objects",
    "output_answers",
    "to_json",
    "whole_answers",
    "write_atomically",
]

Answer = dict[str, Any]


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths name one file, which need not exist."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    return one.exists() and other.exists() and one.samefile(other)


def foreign(file: Path) -> NpllmValueError:
    """The error for a file that would be overwritten and was not written by npllm batch."""
    return NpllmValueError(
        f"{file}: exists and was not written by npllm batch; move it, or name another output"
    )


def objects(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of the lines of a file; raise for what is none."""
    for line in file.read_bytes().splitlines():
        try:
            yield parse_json(line.decode(), file, finite=True)
        except ValueError:
            raise foreign(file) from None


def output_answers(out: Path) -> Iterator[tuple[str, Answer]]:
    """The answers of a complete output; raise for a file that is something else."""
    if not out.exists():
        return
    for data in objects(out):
        key, answer = data.get("hash"), data.get("result")
        if not isinstance(key, str) or not isinstance(answer, dict):
            raise foreign(out)
        yield key, answer


def cut_half_a_line(journal: Path) -> None:
    """Remove what a killed run left of its last line, so that the next line is whole."""
    content = journal.read_bytes()
    whole = content.rfind(b"\n") + 1
    if not b'["'.startswith(content[whole : whole + 2]):
        raise _damaged(journal)
    if whole < len(content):
        os.truncate(journal, whole)


def write_atomically(path: Path, text: str) -> None:
    """Write a file that appears when it is complete.

    Raises
    ------
    NpllmOSError
        When it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise NpllmOSError(f"{path}: cannot be written ({error.strerror})") from None


def whole_answers(file: Path) -> Iterator[tuple[str, Answer]]:
    """The answers of a file; a line without its newline is none."""
    for line in file.read_bytes().split(b"\n")[:-1]:
        try:
            key, answer = parse_json(line.decode(), file, list, finite=True)
        except ValueError:
            raise _damaged(file) from None
        if not isinstance(key, str) or not isinstance(answer, dict):
            raise _damaged(file)
        yield key, answer


def _damaged(file: Path) -> NpllmValueError:
    return NpllmValueError(
        f"{file}: must hold lines [hash, result] of npllm batch and is damaged; move it"
    )


def line_of(pair: tuple[str, Answer]) -> str:
    """A line of a journal or a shard."""
    return to_json(list(pair)) + "\n"


def to_json(data: Any) -> str:
    """JSON in one line, of ASCII characters."""
    return json.dumps(data, ensure_ascii=True, allow_nan=False)


def lock(journal: Any, parts: Path) -> bool:
    """Lock the journal of a run; the system frees the lock when the process ends.

    Returns
    -------
    is_there : bool
        False: the run that held the lock before has removed the journal.

    Raises
    ------
    NpllmRuntimeError
        When another run holds the lock.

    Notes
    -----
    Not `npllm.checkpoints.disk.folder_lock`: that waits for the other process, locks a file beside
    the folder and needs the package filelock.  A run is refused instead; its lock file is the
    journal, which goes with the folder; and `npllm batch` needs no further package.
    """
    try:
        import fcntl
    except ImportError:  # Windows: another run is not kept out
        return True
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        journal.close()
        raise NpllmRuntimeError(f"{parts}: another run of npllm batch is at work here") from None
    try:
        return os.path.samestat(os.fstat(journal.fileno()), os.stat(journal.name))
    except FileNotFoundError:
        return False
