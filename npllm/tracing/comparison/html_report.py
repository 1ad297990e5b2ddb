"""A comparison as one HTML page that needs no other file."""

from html import escape
from pathlib import Path
from typing import Any

from npllm.errors import NpllmOSError
from npllm.tracing.comparison.report import MARKS, lines_of, number

__all__ = ["page_of", "write_page"]

STYLE = """
body { font: 14px sans-serif; margin: 2em; max-width: 75em; }
pre { background: #f4f4f4; padding: 1em; overflow-x: auto; }
table { border-collapse: collapse; } td, th { padding: 2px 8px; text-align: right; }
td.text, th.text { text-align: left; } tr.bad { background: #fdd; } tr.odd { background: #ffd; }
"""
COLUMNS = ("", "layer", "op", "total", "introduced", "inherited", "gain", "status", "what")
TEXTS = ("op", "status", "what")


def write_page(path: str | Path, comparison: Any) -> None:
    """Write the page.

    Raises
    ------
    NpllmOSError
        When it cannot be written.
    """
    try:
        Path(path).write_text(page_of(comparison), encoding="utf-8")
    except OSError as error:
        raise NpllmOSError(f"{path}: cannot be written ({error.strerror or error})") from None


def page_of(comparison: Any) -> str:
    """Return the page: the report as text, then every row.  What was read from files is escaped."""
    heads = "".join(_cell(name, "th", name in TEXTS) for name in COLUMNS)
    rows = "\n".join(_row(row) for row in comparison.rows)
    text = escape("\n".join(lines_of(comparison)))
    title = escape(f"{comparison.mine} against {comparison.gold}: {comparison.status}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n<pre>{text}</pre>\n"
        f"<p>Errors in budgets of each operation, in the order of execution.</p>\n"
        f"<table><tr>{heads}</tr>\n{rows}\n</table></body></html>\n"
    )


def _row(row: Any) -> str:
    mark = MARKS.get(row.status, "")
    kind = {"✗": "bad", "": "", "~": "odd", "?": "odd"}[mark]
    values = [mark, "" if row.layer is None else row.layer, f"{row.op}@{row.step}"]
    if not row.step:
        values[2] = row.op
    values += [number(x) for x in (row.total, row.introduced, row.inherited, row.gain)]
    values += [row.status, "; ".join(part for part in (row.diagnosis, row.note) if part)]
    cells = (_cell(value, "td", name in TEXTS) for value, name in zip(values, COLUMNS, strict=True))
    return f'<tr class="{kind}">{"".join(cells)}</tr>'


def _cell(value: Any, tag: str, is_text: bool) -> str:
    kind = ' class="text"' if is_text else ""
    return f"<{tag}{kind}>{escape(str(value))}</{tag}>"
