"""Strict reading of JSON files: bounded size, unique keys, checked types, and safe error messages.

Every JSON file of a checkpoint folder is read here.
"""

import json
import math
import os.path
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any

from npllm.config.regular_file import read_text
from npllm.errors import NpllmTypeError, NpllmValueError

__all__ = [
    "LARGEST_SIZE",
    "config_data",
    "is_int",
    "is_token",
    "no_duplicates",
    "parse_json",
    "printable",
    "quote",
    "read_json",
    "require",
]

LARGEST_SIZE = 2**24  # of any axis; the vocabularies of published models are below 2**20
LARGEST_TOKEN = 2**31 - 1
LARGEST_JSON = 2**25  # bytes of a JSON file; published checkpoints have indices of up to 10 MB


def config_data(path_or_dict: Any) -> tuple[dict[str, Any], str]:
    """Read the content of a config.json.

    Parameters
    ----------
    path_or_dict : str, Path or dict
        The file, the folder that holds it, or its parsed content.

    Returns
    -------
    data : dict
    where : str
        Name of the source, for error messages.

    Raises
    ------
    NpllmTypeError
        When `path_or_dict` is neither a path nor a dict.
    NpllmOSError, NpllmValueError
        As `read_json`.
    """
    if isinstance(path_or_dict, dict):
        return path_or_dict, "config"
    try:
        path = Path(path_or_dict)
    except TypeError:
        raise NpllmTypeError(
            f"path_or_dict must be a path or a dict, got {type(path_or_dict).__name__}"
        ) from None
    path = path / "config.json" if os.path.isdir(path) else path
    return read_json(path), str(path)


def read_json(path: str | os.PathLike[str], kind: type[dict] | type[list] = dict) -> Any:
    """Read a JSON object from a UTF-8 file, or a list where `kind` is list.

    Parameters
    ----------
    path : str or Path
    kind : type
        dict or list.

    Returns
    -------
    data : dict or list

    Raises
    ------
    NpllmOSError
        When the file is missing, cannot be read, or is no regular file.
    NpllmValueError
        When it is too large, not UTF-8, not JSON, nested too deeply, has duplicate keys, or is not
        of that kind.
    """
    return parse_json(read_text(path, LARGEST_JSON), path, kind)


def parse_json(
    text: str,
    where: str | os.PathLike[str],
    kind: type[dict] | type[list] = dict,
    *,
    finite: bool = False,
) -> Any:
    """Parse the text of a JSON object, or of a list; `where` names its source in messages.

    Parameters
    ----------
    text : str
    where : str or Path
    kind : type
        dict or list.
    finite : bool
        Refuse NaN, Infinity, and numbers beyond the range of float64: what cannot be written as
        JSON again.

    Raises
    ------
    NpllmValueError
        As `read_json`.
    """
    hooks: Any = {"parse_constant": _finite, "parse_float": _finite} if finite else {}
    try:
        data = json.loads(text, object_pairs_hook=no_duplicates, **hooks)
    except RecursionError:
        raise NpllmValueError(f"{where}: is nested too deeply to be a configuration") from None
    except ValueError as error:
        raise NpllmValueError(f"{where}: is not valid JSON ({error})") from None
    if not isinstance(data, kind):
        wanted = "list [...]" if kind is list else "object {...}"
        raise NpllmValueError(f"{where}: must hold a JSON {wanted}, got {type(data).__name__}")
    return data


def _finite(text: str) -> float:
    """The number that a text of JSON names; raise where it is not finite."""
    x = float(text)
    if not math.isfinite(x):
        raise ValueError(f"numbers must be finite and in the range of float64, got {quote(text)}")
    return x


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of the pairs of a JSON object; an `object_pairs_hook` for the json module.

    Duplicate keys are ambiguous and rejected.

    Raises
    ------
    ValueError
        As the json module does for invalid text.
    """
    data = dict(pairs)
    if len(data) != len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it names {quote(name)} twice")
    return data


def quote(value: Any) -> str:
    """Format a value for an error message: bounded length and depth, printable characters only."""
    try:
        return _SHORT.repr(value)
    except (RecursionError, ValueError):  # an integer of too many digits
        return f"a {type(value).__name__} too large to show"


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = 100
_SHORT.maxother = 100


def printable(text: str) -> str:
    """Escape a name from a file where it holds characters that would control a terminal."""
    return text if text.isprintable() else repr(text)[1:-1]


def require(where: str, holds: bool, message: str) -> None:
    """Raise `NpllmValueError` with the source and the message unless a condition holds."""
    if not holds:
        raise NpllmValueError(f"{where}: {message}")


def is_int(value: Any) -> bool:
    """Return whether a value is an integer and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_token(value: Any) -> bool:
    """Return whether a value can be a token id."""
    return is_int(value) and 0 <= value <= LARGEST_TOKEN
