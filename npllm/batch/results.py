"""Answers on disk: kept as they come, so that a run that was killed goes on where it stood."""

import contextlib
import os
import re
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from npllm.batch.files import (
    Answer,
    cut_half_a_line,
    foreign,
    is_same,
    line_of,
    lock,
    objects,
    output_answers,
    to_json,
    whole_answers,
    write_atomically,
)
from npllm.batch.rows import Row
from npllm.config.strict_json import quote
from npllm.errors import NpllmError, NpllmOSError, NpllmRuntimeError, NpllmValueError

__all__ = ["Results"]

JOURNAL = "journal.jsonl"
OWN_NAME = re.compile(
    r"journal\.jsonl|shard-[0-9a-f]{32}\.jsonl|\.shard-[0-9a-f]{32}\.jsonl\.[0-9a-f]{32}"
)
"""Files of OUT.parts: the journal, shards, and shards that a killed process did not complete."""
N_TRIES = 100  # to open a journal while other runs end


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
    is no answer.  Files that `npllm batch` did not write are never changed or removed.
    """

    def __init__(self, out: Path):
        self.out, self.parts = out, Path(f"{out}.parts")
        self.errors = out.with_name(f"{out.stem}.errors{out.suffix}")
        self.found: dict[str, Answer] = {}
        self._journal: Any = None

    def require_other(self, source: Path) -> None:
        """Raise unless an input is another file than those that a run writes and removes.

        Raises
        ------
        NpllmValueError
            When it is the output or the file of errors, or lies in the folder of parts.
        """
        for what, file in (("output", self.out), ("file of errors", self.errors)):
            if is_same(source, file):
                raise NpllmValueError(
                    f"{source}: the input must be another file than the {what}, {file}; name "
                    "another output"
                )
        if any(is_same(folder, self.parts) for folder in Path(os.path.realpath(source)).parents):
            raise NpllmValueError(
                f"{source}: the input lies in {self.parts}, which is removed at the end; move it"
            )

    def open(self) -> "Results":
        """Take over what earlier runs left, and let no other run write here.

        Raises
        ------
        NpllmOSError, NpllmValueError, NpllmRuntimeError
            When files cannot be read or written, when one that would be overwritten or removed was
            not written by `npllm batch`, or when another run is at work.
        """
        try:
            self._journal = self._open_journal()
            self._require_own_files()
            self.found.update(output_answers(self.out))
            for name in self._names():
                if not name.startswith("."):
                    self.found.update(whole_answers(self.parts / name))
            cut_half_a_line(self.parts / JOURNAL)
        except OSError as error:
            self.close()
            raise NpllmOSError(
                f"{error.filename or self.parts}: cannot be used ({error.strerror})"
            ) from None
        except NpllmError:
            self.close()
            raise
        return self

    def add(self, pairs: Iterable[tuple[str, Answer]]) -> None:
        """Append answers to the journal."""
        new = dict(pairs)
        self._journal.write("".join(map(line_of, new.items())).encode())
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self.found.update(new)

    def add_shard(self, pairs: Iterable[tuple[str, Answer]]) -> None:
        """Write answers to a file of their own, which appears when it is complete."""
        text = "".join(map(line_of, pairs))
        write_atomically(self.parts / f"shard-{uuid.uuid4().hex}.jsonl", text)

    def read_shards(self) -> None:
        """Take over what other processes wrote."""
        for file in self.parts.glob("shard-*.jsonl"):
            self.found.update(whole_answers(file))

    def close(self) -> None:
        """Let other runs write here; leave no empty journal."""
        if self._journal is None:
            return
        if os.fstat(self._journal.fileno()).st_size == 0:
            self._forget([JOURNAL])
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
            to_json(row.data | {"result": self.found[key], "hash": key}) + "\n" for key, row in rows
        )
        bad = (
            to_json({"line": row.line, "error": message, "row": row.read}) + "\n"
            for row, message in failures
        )
        if failures:
            write_atomically(self.errors, "".join(bad))
        else:
            self.errors.unlink(missing_ok=True)
        write_atomically(self.out, "".join(lines))
        self._forget(self._names())
        self._journal.close()
        self._journal = None

    def _open_journal(self) -> Any:
        """Open the journal under the lock of a run."""
        for _ in range(N_TRIES):
            self.parts.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # a run that ends has removed the folder
                journal = open(self.parts / JOURNAL, "ab")
                if lock(journal, self.parts):
                    return journal
                journal.close()
        raise NpllmRuntimeError(f"{self.parts}: other runs of npllm batch are at work here")

    def _require_own_files(self) -> None:
        """Raise where a file that would be overwritten or removed is something else."""
        others = [name for name in os.listdir(self.parts) if not OWN_NAME.fullmatch(name)]
        if others:
            raise NpllmValueError(
                f"{self.parts}: holds {quote(min(others))}, which npllm batch did not write; move "
                "it, or name another output"
            )
        if os.path.lexists(self.errors):
            names = [set(data) for data in objects(self.errors)]
            if names.count({"line", "error", "row"}) < max(1, len(names)):
                raise foreign(self.errors)

    def _names(self) -> list[str]:
        """The names of this program's files in the folder of parts."""
        return sorted(filter(OWN_NAME.fullmatch, os.listdir(self.parts)))

    def _forget(self, names: list[str]) -> None:
        """Remove files of the folder of parts, and the folder where it is empty then.

        The lock is still held: a run that begins meanwhile finds that its journal is gone, and
        opens a new one.
        """
        if os.name == "nt":  # Windows removes no file that is open
            self._journal.close()
        with contextlib.suppress(OSError):
            for name in names:
                (self.parts / name).unlink(missing_ok=True)
            self.parts.rmdir()
