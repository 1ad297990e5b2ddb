"""Strict reading of JSON files: bounded size, unique keys, checked types, and safe error messages.

Every JSON file of a checkpoint folder is read here.
"""

import json
import os.path
import reprlib
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

from npllm.config.regular_file import read_text
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.progress import warn

__all__ = [
    "LARGEST_SIZE",
    "Reader",
    "config_data",
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
LARGEST_NUMBER = 1e300


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
    text: str, where: str | os.PathLike[str], kind: type[dict] | type[list] = dict
) -> Any:
    """Parse the text of a JSON object, or of a list; `where` names its source in messages.

    Raises
    ------
    NpllmValueError
        As `read_json`.
    """
    try:
        data = json.loads(text, object_pairs_hook=no_duplicates)
    except RecursionError:
        raise NpllmValueError(f"{where}: is nested too deeply to be a configuration") from None
    except ValueError as error:
        raise NpllmValueError(f"{where}: is not valid JSON ({error})") from None
    if not isinstance(data, kind):
        wanted = "list [...]" if kind is list else "object {...}"
        raise NpllmValueError(f"{where}: must hold a JSON {wanted}, got {type(data).__name__}")
    return data


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


class Reader:
    """Reads keys of a JSON object one by one, checks their types, and records which were read.

    Parameters
    ----------
    data : dict
    where : str or Path
        Name of the source, for error messages.
    """

    def __init__(self, data: dict[str, Any], where: str | os.PathLike[str]) -> None:
        self.data = data
        self.where = where
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """Read a value of any type; null counts as absent."""
        self.asked.add(key)
        value = self.data.get(key)
        return default if value is None else value

    def _fail(self, key: str, wanted: str, value: Any) -> NoReturn:
        raise NpllmValueError(f"{self.where}: {key} must be {wanted}, got {quote(value)}")

    def size(self, key: str, default: int | None = None, *, largest: int = LARGEST_SIZE) -> int:
        """Read an integer in 1 ... largest; without a default the key must be present."""
        value = self.get(key, default)
        if not _is_int(value) or not 1 <= value <= largest:
            self._fail(key, f"an integer in 1 ... {largest}", value)
        return int(value)

    def optional_size(self, key: str) -> int | None:
        """Read an integer in 1 ... LARGEST_SIZE, or None where the key is absent."""
        return None if self.get(key) is None else self.size(key)

    def number(self, key: str, default: float | None = None) -> float:
        """Read a finite number; without a default the key must be present."""
        return self._number(key, self.get(key, default))

    def optional_number(self, key: str) -> float | None:
        """Read a finite number, or None where the key is absent."""
        return None if self.get(key) is None else self.number(key)

    def optional_numbers(self, key: str) -> tuple[float, ...] | None:
        """Read a list of finite numbers, or None where the key is absent."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list):
            self._fail(key, "a list of numbers", value)
        return tuple(self._number(key, x) for x in value)

    def _number(self, key: str, value: Any) -> float:
        """Check that a value is a finite number."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not -LARGEST_NUMBER < value < LARGEST_NUMBER:
            self._fail(key, "a finite number", value)
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """Read a string; without a default the key must be present."""
        value = self.get(key, default)
        if not isinstance(value, str):
            self._fail(key, "a string", value)
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Read true or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            self._fail(key, "true or false", value)
        return value

    def token(self, key: str) -> int | None:
        """Read a token id or null."""
        value = self.get(key)
        if value is not None and not is_token(value):
            self._fail(key, "a token id or null", value)
        return value

    def padding_token(self, key: str) -> int | None:
        """Read a token id, or null or -1 for none."""
        return None if self.get(key) == -1 else self.token(key)

    def tokens(self, key: str) -> tuple[int, ...]:
        """Read a token id, a list of them or null."""
        value = self.get(key, [])
        value = value if isinstance(value, list) else [value]
        if not all(map(is_token, value)):
            self._fail(key, "a token id, a list of them or null", value)
        return tuple(value)

    def finish(self, only: Mapping[str, tuple[Any, ...]], without_effect: Collection[str]) -> None:
        """Raise for values that are not implemented; warn of keys that are neither read nor known.

        Parameters
        ----------
        only : dict of str to tuple
            Key -> the values that change nothing.
        without_effect : collection of str
            Keys that may have any value.
        """
        for key, allowed in only.items():
            if self.get(key) not in allowed:
                wanted = " or ".join(map(repr, allowed))
                self._fail(key, f"{wanted} (anything else is not implemented)", self.data[key])
        unknown = sorted(set(self.data) - self.asked - set(without_effect))
        if unknown:
            names = ", ".join(map(printable, unknown))
            warn(f"{self.where}: unknown keys are ignored: {names}"[:500], stacklevel=5)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_token(value: Any) -> bool:
    """Return whether a value can be a token id."""
    return _is_int(value) and 0 <= value <= LARGEST_TOKEN
