"""What a tokenizer.json claims, checked before the tokenizers library acts on it.

The library allocates what the file claims, and multiplies texts as often as the file says.

Notes
-----
Regular expressions are run by Oniguruma, which gives up a match after 10 million steps, about 0.2
seconds; `Tokenizer.encode` then raises NpllmValueError.  The limit is for each position of the
text, so a hostile pattern can take up to 0.2 seconds for each character.  Encode texts with
tokenizers that you do not trust in a process that can be stopped.
"""

import base64
import binascii
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from npllm.config.regular_file import read_regular
from npllm.config.strict_json import no_duplicates, quote
from npllm.errors import NpllmValueError

__all__ = ["check_added_tokens", "check_tokenizer", "read_tokenizer_json"]

LARGEST_FILE = 2**27  # bytes; published files have up to 35 MB
LARGEST_ADDED = 1024  # bytes of one added token
LARGEST_ADDED_SUM = 2**21  # bytes of all
LARGEST_TEXT = 2**14  # characters of any other text: a pattern, a replacement, a prefix
LARGEST_GROWTH = 2**10  # times that all steps of encoding, or of decoding, may lengthen a text
LARGEST_WORD = 2**12  # characters; WordPiece takes the square of them
ADDED_IDS = 64  # special tokens around a text that count as one
DEEPEST = 64  # levels of components inside components

Component = dict[str, Any]


def read_tokenizer_json(file: Path) -> str:
    """Read a tokenizer.json and check its claims.

    Parameters
    ----------
    file : Path

    Returns
    -------
    text : str
        To be parsed by the tokenizers library.

    Raises
    ------
    NpllmOSError
        When the file cannot be read or is no regular file.
    NpllmValueError
        When it is too large, not JSON, or claims what would exhaust memory or time.
    """
    raw = read_regular(file, LARGEST_FILE)
    try:
        text = raw.decode("utf-8")
        data = json.loads(text, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise NpllmValueError(
            f"{file}: is not a tokenizer that the tokenizers library can read ({error})"
        ) from None
    if isinstance(data, dict):  # the library refuses anything else
        check_tokenizer(data, file)
    return text


def check_tokenizer(data: Component, file: Path) -> None:
    """Check the content of a tokenizer.json.

    Parameters
    ----------
    data : dict
    file : Path
        For the message.

    Raises
    ------
    NpllmValueError
        Names the component and both numbers.
    """
    added = data.get("added_tokens")
    tokens = added if isinstance(added, list) else []
    check_added_tokens([t.get("content") for t in tokens if isinstance(t, dict)], file)
    for parts in (("normalizer", "pre_tokenizer", "post_processor"), ("decoder",)):
        growth = 1.0
        for part in parts:
            for component in _components(data.get(part), file):
                _check_texts(component, file)
                growth *= _growth(component, file)
                _require(growth, LARGEST_GROWTH, f"times that {part} lengthens a text", file)
    model = data.get("model")
    if isinstance(model, dict):
        _check_texts(model, file)
        longest = model.get("max_input_chars_per_word")
        if isinstance(longest, int | float):
            _require(longest, LARGEST_WORD, "max_input_chars_per_word", file)


def check_added_tokens(contents: list[Any], file: Path) -> None:
    """Check the lengths of added tokens, of which the library builds a search automaton.

    Raises
    ------
    NpllmValueError
        When one of them, or all together, are too long.
    """
    sizes = [len(x.encode("utf-8", "replace")) for x in contents if isinstance(x, str)]
    _require(max(sizes, default=0), LARGEST_ADDED, "bytes of an added token", file)
    _require(sum(sizes), LARGEST_ADDED_SUM, "bytes of all added tokens", file)


def _components(part: Any, file: Path, depth: int = 0) -> Iterator[Component]:
    """Yield every component of a part, in any list or entry of another one."""
    if depth > DEEPEST:
        raise NpllmValueError(f"{file}: components are nested in more than {DEEPEST} levels")
    if isinstance(part, dict):
        yield part
        for value in part.values():
            yield from _components(value, file, depth + 1)
    elif isinstance(part, list):
        for value in part:
            yield from _components(value, file, depth + 1)


def _check_texts(component: Component, file: Path) -> None:
    """Check the lengths of all texts of a component except its normalization table."""
    for key, value in component.items():
        if isinstance(value, str) and key != "precompiled_charsmap":
            _require(len(value), LARGEST_TEXT, f"characters of {quote(key)}", file)


def _growth(component: Component, file: Path) -> float:
    """Return how many times longer a component makes a text, at most."""
    kind = component.get("type")
    if kind == "Replace":
        return _replacement_growth(component)
    if kind == "Precompiled":
        return _table_growth(component, file)
    if kind == "TemplateProcessing":
        return _template_growth(component)
    return 1.0


def _table_growth(component: Component, file: Path) -> float:
    """Check the table of a Precompiled normalizer, and return its longest replacement in bytes.

    The table holds the size of a trie in 4 bytes, the trie, and replacements that end with a zero
    byte each.
    """
    encoded = component.get("precompiled_charsmap")
    if not isinstance(encoded, str):  # null: no table
        return 1.0
    try:
        table = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise NpllmValueError(f"{file}: precompiled_charsmap is no base64 text ({error})") from None
    n_trie = int.from_bytes(table[:4], "little")
    _require(n_trie, max(0, len(table) - 4), "bytes of the trie in precompiled_charsmap", file)
    return max(1.0, *map(len, table[4 + n_trie :].split(b"\0")))


def _replacement_growth(component: Component) -> float:
    """Return how many times longer a Replace component makes a text, at most.

    A regular expression, or an empty text, may match between any two characters.
    """
    pattern, content = component.get("pattern"), component.get("content")
    n_content = len(content.encode("utf-8", "replace")) if isinstance(content, str) else 0
    text = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(text, str) and text:
        return max(1.0, n_content / len(text.encode("utf-8", "replace")))
    return 1.0 + n_content


def _template_growth(component: Component) -> float:
    """Return how many ids a TemplateProcessing component makes of one id, at most.

    Special tokens are added once, so they count only where there are very many.
    """
    pieces, special = component.get("single"), component.get("special_tokens")
    pieces = pieces if isinstance(pieces, list | str) else []
    is_sequence = [isinstance(piece, dict) and "Sequence" in piece for piece in pieces]
    tokens = special.values() if isinstance(special, dict) else []
    ids = [token.get("ids") for token in tokens if isinstance(token, dict)]
    longest = max((len(x) for x in ids if isinstance(x, list)), default=1)
    return max(1.0, sum(is_sequence), len(pieces) * longest / ADDED_IDS)


def _require(n: float, largest: int, what: str, file: Path) -> None:
    """Raise unless a number is at most the largest allowed."""
    if n > largest:
        shown = f"{n:.16g}" if isinstance(n, float) else quote(n)
        raise NpllmValueError(f"{file}: {what} must be at most {largest}, got {shown}")
