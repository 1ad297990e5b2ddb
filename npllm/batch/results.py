"""Answers on disk: kept as they come, so that a run that was killed goes on where it stood."""

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from npllm.batch.rows import Row
from npllm.errors import NpllmOSError, NpllmRuntimeError, NpllmValueError

__all__ = ["Results", "write_atomically"]

Answer = dict[str, Any]


class Results:
    """The answers that a run has so far, by the hash of row and settings.

    Parameters
    ----------
    out : Path
        The output file, which appears when all is done.

    Notes
    -----
    Answers lie in OUT.parts until then: a journal to which one process appends whole lines, and
    shards, which other processes write under another name and rename.  A line without its newline
    is no answer.
    """

    def __init__(self, out: Path):
        self.out, self.parts = out, Path(f"{out}.parts")
        self.errors = out.with_name(f"{out.stem}.errors{out.suffix or '.jsonl'}")
        self.found: dict[str, Answer] = {}
        self._journal: Any = None

    def open(self) -> "Results":
        """Take over what earlier runs left, and let no other run write here.

        Raises
        ------
        NpllmOSError, NpllmValueError, NpllmRuntimeError
            When files cannot be written, OUT is not of `npllm batch`, or another run is at work.
        """
        self._read_output()
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
            self._journal = open(self.parts / "journal.jsonl", "ab")
            _lock(self._journal, self.parts)
        except OSError as error:
            raise NpllmOSError(f"{self.parts}: cannot be written ({error.strerror})") from None
        except NpllmRuntimeError:
            self.close()
            raise
        self._cut_half_a_line()
        for file in sorted(self.parts.glob("*.jsonl")):
            self.found.update(_whole_answers(file))
        return self

    def add(self, pairs: Iterable[tuple[str, Answer]]) -> None:
        """Append answers to the journal."""
        new = dict(pairs)
        self._journal.write("".join(map(_line, new.items())).encode())
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self.found.update(new)

    def add_shard(self, pairs: Iterable[tuple[str, Answer]]) -> None:
        """Write answers to a file of their own, which appears when it is complete."""
        text = "".join(map(_line, pairs))
        write_atomically(self.parts / f"shard-{uuid.uuid4().hex}.jsonl", text)

    def read_shards(self) -> None:
        """Take over what other processes wrote."""
        for file in self.parts.glob("shard-*.jsonl"):
            self.found.update(_whole_answers(file))

    def close(self) -> None:
        """Let other runs write here."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def finish(self, rows: Iterable[tuple[str, Row]], failures: list[tuple[Row, str]]) -> None:
        """Write the output, and the errors where there are any; then forget the parts.

        Parameters
        ----------
        rows : iterable of (hash, Row)
            In the order of the output.
        failures : list of (Row, message)
        """
        lines = (
            _json(row.data | {"result": self.found[key], "hash": key}) + "\n" for key, row in rows
        )
        bad = (
            _json({"line": row.line, "error": message, "row": row.data or row.text}) + "\n"
            for row, message in failures
        )
        if failures:
            write_atomically(self.errors, "".join(bad))
        else:
            self.errors.unlink(missing_ok=True)
        write_atomically(self.out, "".join(lines))
        self.close()
        shutil.rmtree(self.parts, ignore_errors=True)

    def _read_output(self) -> None:
        """Take over the answers of a complete output; raise for a file that is something else."""
        if not self.out.exists():
            return
        for text in self.out.read_bytes().splitlines():
            try:
                data = json.loads(text)
                self.found[data["hash"]] = data["result"]
            except (ValueError, TypeError, KeyError):
                raise NpllmValueError(
                    f"{self.out}: exists and was not written by npllm batch; name another file"
                ) from None

    def _cut_half_a_line(self) -> None:
        """Remove what a killed run left of its last line, so that the next line is whole."""
        file = self.parts / "journal.jsonl"
        content = file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(file, whole)


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


def _whole_answers(file: Path) -> Iterator[tuple[str, Answer]]:
    """The answers of a file; a line without its newline is none."""
    for line in file.read_bytes().split(b"\n")[:-1]:
        try:
            key, answer = json.loads(line)
        except ValueError:
            raise NpllmValueError(f"{file}: is damaged; remove {file.parent}") from None
        yield key, answer


def _line(pair: tuple[str, Answer]) -> str:
    return _json(list(pair)) + "\n"


def _json(data: Any) -> str:
    return json.dumps(data, ensure_ascii=True, allow_nan=False)


def _lock(file: Any, parts: Path) -> None:
    """Take the lock of a run, which the system frees when its process ends, however it does."""
    try:
        import fcntl
    except ImportError:  # Windows: nobody is kept out
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise NpllmRuntimeError(f"{parts}: another run of npllm batch is at work here") from None
