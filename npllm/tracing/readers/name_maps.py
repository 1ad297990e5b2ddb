"""Name maps: what other programs call the values of a forward pass, as data files.

A file of `npllm/tracing/readers/names` has a row for each value: their name, ours, and their axes.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from npllm.config.strict_json import quote, read_json, require
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.models.taps import NAMES

__all__ = ["FOLDER", "NameMap", "Row", "name_map", "node_key"]

FOLDER = Path(__file__).parent / "names"
FORMAT = "npllm names 1"
LAYER = r"(?<![A-Za-z])N(?![A-Za-z])"  # where a name has the number of the layer
TEXTS = ("theirs", "ours", "beside", "without")


class Row(NamedTuple):
    """How another program names a value.

    Parameters
    ----------
    theirs, ours : str
        N is the number of the layer.
    axes : tuple of str
        Of their array; "n_head*d_head" is one axis with both.
    op : tuple of str
        Operations that the row is for, where a name stands for several values; else empty.
    beside, without : str
        The row holds where this other name of theirs is there, or is not there.
    """

    theirs: str
    ours: str
    axes: tuple[str, ...]
    op: tuple[str, ...] = ()
    beside: str = ""
    without: str = ""


class NameMap(NamedTuple):
    """The names of another program.

    Parameters
    ----------
    about : str
        Which program, and where the names come from.
    notes : tuple of str
        What a reader of values should know.
    rows : tuple of Row
    """

    about: str
    notes: tuple[str, ...]
    rows: tuple[Row, ...]

    def find(
        self, theirs: str, *, op: str | None = None, names: Collection[str] = ()
    ) -> tuple[str, tuple[str, ...]] | None:
        """Look a name up.

        Parameters
        ----------
        theirs : str
            With the number of the layer.
        op : str, optional
            Their operation that made the value, where it is known.
        names : collection of str
            Their other names, on which some rows depend.

        Returns
        -------
        found : tuple of our name and their axes, or None
        """
        for row in self.rows:
            match = re.fullmatch(_pattern(row.theirs), theirs)
            if match is None or (row.op and op is not None and op not in row.op):
                continue
            number = match[1] if match.groups() else ""
            if row.beside and _numbered(row.beside, number) not in names:
                continue
            if not row.without or _numbered(row.without, number) not in names:
                return _numbered(row.ours, number), row.axes
        return None


def name_map(source: Any = "transformers") -> NameMap:
    """Read a name map.

    Parameters
    ----------
    source : str or Path
        "transformers", "gguf", "mlx_lm" or "transformer_lens", or a JSON file of your own like
        those in npllm/tracing/readers/names.

    Returns
    -------
    names : NameMap

    Raises
    ------
    NpllmTypeError
        For what is no path.
    NpllmOSError
        When the file cannot be read.
    NpllmValueError
        When it is no name map; names the row.
    """
    if isinstance(source, NameMap):
        return source
    if not isinstance(source, str | Path):
        raise NpllmTypeError(f"names must be a name or a path, got {type(source).__name__}")
    ours = sorted(path.stem for path in FOLDER.glob("*.json"))
    path = FOLDER / f"{source}.json" if str(source) in ours else Path(source)
    if path.suffix != ".json":
        raise NpllmValueError(
            f"names must be {', '.join(ours)} or the path of a .json file, got {quote(str(source))}"
        )
    content = read_json(path)
    found, rows = content.get("format"), content.get("values")
    require(str(path), found == FORMAT, f'format must be "{FORMAT}", got {quote(found)}')
    require(str(path), isinstance(rows, list), f"values must be a list, got {quote(rows)}")
    notes = tuple(str(note) for note in content.get("notes", []))
    made = tuple(_row(row, f"{path}: row {number}") for number, row in enumerate(rows, 1))
    return NameMap(str(content.get("about", "")), notes, made)


def node_key(node: str) -> str:
    """Name the row of `npllm.models.taps.NAMES` that a value belongs to: its layer is N."""
    return ".".join("N" if part.isdigit() else part for part in node.split("."))


def _row(content: Any, where: str) -> Row:
    """Check a row of the file."""
    require(where, isinstance(content, dict), f"must be an object, got {quote(content)}")
    unknown = sorted(content.keys() - set(Row._fields))
    require(where, not unknown, f"has unknown keys {quote(unknown)}; keys are {Row._fields}")
    for key in TEXTS:
        text = content.get(key, "")
        require(where, isinstance(text, str), f"{key} must be a text, got {quote(text)}")
    for key in ("axes", "op"):
        items = content.get(key, [])
        is_list = isinstance(items, list) and all(isinstance(item, str) for item in items)
        require(where, is_list, f"{key} must be a list of texts, got {quote(items)}")
    axes, op = (tuple(content.get(key, ())) for key in ("axes", "op"))
    theirs, ours, beside, without = (content.get(key, "") for key in TEXTS)
    row = Row(theirs, ours, axes, op, beside, without)
    require(where, row.ours in NAMES, f"ours must be a value of npllm, got {quote(row.ours)}")
    one = len(re.findall(LAYER, row.theirs)) == row.ours.count(".N")
    require(where, one, f"theirs and ours must both have the layer N or neither, got {row.theirs}")
    return row


def _pattern(theirs: str) -> str:
    """A pattern of their names of all layers."""
    return r"(\d+)".join(map(re.escape, re.split(LAYER, theirs)))


def _numbered(name: str, number: str) -> str:
    return re.sub(LAYER, number, name)
