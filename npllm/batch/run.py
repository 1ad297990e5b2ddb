"""From an input file to an output file."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from npllm.arguments import check_path
from npllm.batch.answers import answers
from npllm.batch.results import Results
from npllm.batch.rows import Row, digest, read_rows
from npllm.batch.tasks import Item, Task, make_task
from npllm.errors import NpllmError, NpllmValueError
from npllm.progress import progress_bar

__all__ = ["Report", "batch"]

SECONDS = 1.0  # answers are written so often
Runner = Callable[[Task, list[Item], Results, Callable[..., None]], None]


class Report(NamedTuple):
    """What a run did."""

    n_rows: int
    n_answered: int  # in this run
    n_reused: int  # rows whose answer an earlier run, or an equal row, had
    n_failed: int
    errors: Path | None  # the file that names what failed
    n_dropped: int  # earlier answers of other rows or settings, which the output no longer has


def batch(
    model: Any,
    source: Any,
    out: Any,
    *,
    task: str = "generate",
    keep_order: bool = True,
    progress: bool = False,
    runner: Runner | None = None,
    **options: Any,
) -> Report:
    """Answer every row of a JSONL file.

    Parameters
    ----------
    model : Model or Encoder
    source, out : str or Path
        Each line of the output is its row with "result" and "hash".
    task : str
        "generate": of each row "prompt"; "chat": "messages"; "score" and "embed": "text".
    keep_order : bool
        False: rows in the order in which they were answered.
    progress : bool
        Show a bar on stderr.
    runner : function, optional
        Who answers; default: this process.  See `npllm.batch.ray_engine`.
    **options
        Of `generate`, for all rows; none of beams, caches, masks, tools and details.

    Returns
    -------
    report : Report

    Raises
    ------
    NpllmError
        Before any row is answered, where files, task or options are wrong.

    Notes
    -----
    A run that was killed at any moment goes on where it stood: answers are found again by a hash of
    row and settings.  Each answer is the one that the row gets alone.
    """
    asked = make_task(task, model, **options)
    path, target = check_path("source", source), check_path("out", out)
    results = Results(target)
    results.require_other(path)
    rows = read_rows(path)
    results.open()
    try:
        return _run(asked, rows, results, keep_order, progress, runner or run_here)
    finally:
        results.close()


def _run(
    task: Task, rows: list[Row], results: Results, keep_order: bool, progress: bool, runner: Runner
) -> Report:
    keyed, failures = _keyed(task, rows)
    earlier = {key for key, answer in results.found.items() if not _failed(answer)}
    n_dropped = len(earlier - {key for key, _ in keyed})
    todo, unfit = _items(task, {key: row for key, row in keyed if key not in results.found})
    with progress_bar(len(todo), "answering", unit="row", wanted=progress) as advance:
        runner(task, todo, results, advance)
    failures += [(row, unfit[key]) for key, row in keyed if key in unfit]
    failures += [
        (row, results.found[key]["error"]) for key, row in keyed if _failed(results.found.get(key))
    ]
    good = {key for key, answer in results.found.items() if not _failed(answer)}
    ordered = [pair for pair in keyed if pair[0] in good]
    if not keep_order:
        place = {key: n for n, key in enumerate(results.found)}
        ordered.sort(key=lambda pair: place[pair[0]])
    failures.sort(key=lambda pair: pair[0].line)
    results.finish(ordered, failures)
    n_new = len({item.key for item in todo} & good)
    errors = results.errors if failures else None
    return Report(len(rows), n_new, len(ordered) - n_new, len(failures), errors, n_dropped)


def _failed(answer: Any) -> bool:
    return answer is not None and "error" in answer


def _keyed(task: Task, rows: list[Row]) -> tuple[list[tuple[str, Row]], list[tuple[Row, str]]]:
    """Rows with the hash of their content and the settings; and those that are none."""
    settings, keyed, failures = task.settings, [], []
    for row in rows:
        try:
            if row.problem is not None:
                raise NpllmValueError(row.problem)
            keyed.append((digest(settings, task.content(row.data)), row))
        except NpllmError as error:
            failures.append((row, str(error)))
    return keyed, failures


def _items(task: Task, rows: dict[str, Row]) -> tuple[list[Item], dict[str, str]]:
    """The token ids of rows, by their hash; and what is wrong with those that have none."""
    items, unfit = [], {}
    for key, row in rows.items():
        try:
            items.append(Item(key, task.ids(task.content(row.data))))
        except NpllmError as error:
            unfit[key] = str(error)
    return items, unfit


def run_here(
    task: Task, items: Iterable[Item], results: Results, advance: Callable[..., None]
) -> None:
    """Answer in this process; keep answers as they come."""
    new: dict[str, Any] = {}
    written = time.monotonic()
    failed: dict[str, Any] = {}
    try:
        for key, answer in answers(task, items):
            (failed if "error" in answer else new)[key] = answer
            advance(1)
            if time.monotonic() - written >= SECONDS:
                results.add(new.items())
                new, written = {}, time.monotonic()
    finally:
        results.add(new.items())
    results.found.update(failed)  # not kept: the next run tries again
