"""Reader: the keys of a JSON object, one by one, with checked types."""

import os
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from npllm.config.strict_json import LARGEST_SIZE, is_int, is_token, printable, quote
from npllm.errors import NpllmValueError
from npllm.progress import warn

__all__ = ["Reader"]

LARGEST_NUMBER = 1e300


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
        if not is_int(value) or not 1 <= value <= largest:
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
            warn(f"{self.where}: unknown keys are ignored: {names}"[:500])
