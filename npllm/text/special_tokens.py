"""Special tokens in files beside tokenizer.json: their names, and the order of their ids.

Newer and older folders store them differently.  Newer ones list every added token in
`added_tokens_decoder` of tokenizer_config.json.  Where that entry is missing,
special_tokens_map.json and added_tokens.json are read as well.
"""

from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from npllm.config.regular_file import is_present
from npllm.config.strict_json import is_token, printable, quote, read_json
from npllm.errors import NpllmValueError
from npllm.text.tokenizer_checks import check_added_tokens

__all__ = ["SpecialTokens", "add_tokens", "read_special_tokens"]

# In the order of new ids.
NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# The library prints others to stdout.
FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
EXTRA = "extra_special_tokens"
OLD_EXTRA = "additional_special_tokens"
LISTED = "added_tokens_decoder"


class SpecialTokens(NamedTuple):
    """What a folder says of added tokens beyond tokenizer.json."""

    named: dict[str, str]  # text of bos_token, ..., and of the model's own, such as image_token
    unlisted: list[AddedToken]  # the named ones, then those without a name
    listed: list[AddedToken]  # in the order of the ids that they are said to have


def read_special_tokens(folder: Path, settings: dict[str, Any], backend: Backend) -> SpecialTokens:
    """Read the special tokens of a folder.

    Parameters
    ----------
    folder : Path
    settings : dict
        Content of tokenizer_config.json.
    backend : tokenizers.Tokenizer
        From tokenizer.json, its padding as it stands there.

    Returns
    -------
    tokens : SpecialTokens

    Raises
    ------
    NpllmValueError
        When an entry is no token; names the file and the entry.

    Notes
    -----
    Source: `PreTrainedTokenizerBase._from_pretrained` and `TokenizersBackend.__init__` in
    Transformers 5.23.
    """
    file, is_new = folder / "tokenizer_config.json", settings.get(LISTED) is not None
    entries, own = _entries(folder, settings, is_new)
    if backend.padding:
        entries.setdefault("pad_token", backend.padding["pad_token"])
    extra = _checked(entries.get(EXTRA, entries.get(OLD_EXTRA)) or [], list, file, EXTRA)
    given = {key: entries[key] for key in NAMES if entries.get(key) is not None} | own
    named = {key: _token(entry, file, key) for key, entry in given.items()}
    unnamed = [_token(entry, file, EXTRA) for entry in extra]
    pairs = [*zip(named.values(), given.values(), strict=True), *zip(unnamed, extra, strict=True)]
    unlisted = [*{(repr(token), isinstance(entry, str)): token for token, entry in pairs}.values()]
    texts = {key: token.content for key, token in named.items()}
    if is_new:
        return SpecialTokens(texts, unlisted, _listed(settings[LISTED], file))
    counted = [(named[key], given[key]) for key in NAMES if key in given]
    counted += zip(unnamed, extra, strict=True) if EXTRA in entries else []
    special = {token.content for token, entry in counted if not isinstance(entry, dict)}
    listed = _old_listed(folder / "added_tokens.json", special, backend.get_added_tokens_decoder())
    return SpecialTokens(texts, unlisted, listed)


def _entries(
    folder: Path, settings: dict[str, Any], is_new: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the files say of tokens that every model has, and of those that this one alone has.

    Objects give way to special_tokens_map.json; strings under names of the model's own do not.
    """
    entries = {key: settings[key] for key in (*NAMES, EXTRA, OLD_EXTRA) if key in settings}
    if OLD_EXTRA in entries and not entries.get(EXTRA):
        entries[EXTRA] = entries.pop(OLD_EXTRA)
    names = {key: value for key, value in settings.items() if _is_name(key, value)}
    own = {key: value for key, value in names.items() if isinstance(value, dict)}
    strings = {
        key: value for key, value in names.items() if isinstance(value, str)
    } | _popped_names(entries)
    if not is_new:
        own |= _read_map(folder / "special_tokens_map.json", entries)
        strings |= _popped_names(entries)
    own |= strings
    return entries, {
        key: value for key, value in own.items() if key not in NAMES and value is not None
    }


def add_tokens(backend: Backend, tokens: SpecialTokens, file: Path) -> None:
    """Add to a tokenizer what tokenizer.json does not list.

    Where both list a token, its flags are those of `tokens.listed`.

    Parameters
    ----------
    backend : tokenizers.Tokenizer
        Is changed.  New tokens get the next ids: those listed first, then the named ones, then the
        others.
    tokens : SpecialTokens
    file : Path
        For the message.

    Raises
    ------
    NpllmValueError
        When the library refuses a token.
    """
    known = backend.get_added_tokens_decoder().values()
    flags, texts = {repr(token) for token in known}, {token.content for token in known}
    new = [token for token in tokens.listed if repr(token) not in flags]
    texts |= {token.content for token in new}
    new += [token for token in tokens.unlisted if token.content not in texts]
    for token in new:
        token.special = token.special or token.content in tokens.named.values()
    check_added_tokens([token.content for token in new], file)
    try:
        backend.add_tokens(new)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise NpllmValueError(
            f"{file}: its added tokens do not fit tokenizer.json ({printable(str(error)[:300])})"
        ) from None


def _is_name(key: str, value: Any) -> bool:
    """Whether an entry names a token of this model alone: `image_token`, but not add_bos_token."""
    is_token = isinstance(value, str | AddedToken) or (
        isinstance(value, dict) and "content" in value
    )
    return key.endswith("_token") and key not in NAMES and is_token


def _popped_names(entries: dict[str, Any]) -> dict[str, Any]:
    """Take tokens with names of their own out of the entry that may be a list instead."""
    return entries.pop(EXTRA) if isinstance(entries.get(EXTRA), dict) else {}


def _read_map(file: Path, entries: dict[str, Any]) -> dict[str, Any]:
    """Change entries as special_tokens_map.json says, null included; return its other names."""
    content = read_json(file) if is_present(file) else {}
    content = {
        key: value if key == EXTRA and isinstance(value, dict) else _as_special(value, file, key)
        for key, value in content.items()
    }
    before, after = entries.get(EXTRA) or [], content.get(EXTRA)
    if isinstance(before, list) and isinstance(after, list):
        content[EXTRA] = before + [token for token in after if token not in before]
    entries |= {key: content[key] for key in (*NAMES, EXTRA, OLD_EXTRA) if key in content}
    return {key: value for key, value in content.items() if value is None or _is_name(key, value)}


def _as_special(entry: Any, file: Path, key: str) -> Any:
    """An entry of special_tokens_map.json: its objects are special, though they do not say so."""
    if isinstance(entry, list):
        return [_as_special(token, file, key) for token in entry]
    if isinstance(entry, dict):
        return _token(entry | {"special": True}, file, key)
    return entry


def _token(entry: Any, file: Path, key: str) -> AddedToken:
    """A token that is written as a string, and then special, or as an object with its flags."""
    if isinstance(entry, AddedToken):
        return entry
    if isinstance(entry, str):
        entry = {"content": entry, "special": True}
    content = _checked(entry, dict, file, key).get("content")
    if not isinstance(content, str):
        raise NpllmValueError(
            f"{file}: {key} must be a text or {{content, lstrip, ...}}, got {quote(entry)}"
        )
    return _added(entry, file, key)


def _added(entry: dict[str, Any], file: Path, key: str) -> AddedToken:
    """The library's own object for a token, from the flags that it knows."""
    try:
        return AddedToken(**{name: entry[name] for name in FLAGS if name in entry})
    except (TypeError, ValueError) as error:
        raise NpllmValueError(
            f"{file}: {key} must hold a text and flags of true or false, got {quote(entry)} "
            f"({printable(str(error)[:300])})"
        ) from None


def _listed(entries: Any, file: Path) -> list[AddedToken]:
    """Tokens of `added_tokens_decoder`, {id: {content, lstrip, ...}}, in the order of their ids."""
    entries = _checked(entries, dict, file, LISTED)
    try:
        ids = sorted(entries, key=int)
    except ValueError as error:
        reason = printable(str(error)[:300])
        wanted = "{id: {content, ...}}"
        raise NpllmValueError(f"{file}: {LISTED} must be {wanted} ({reason})") from None
    return [_added(_checked(entries[i], dict, file, LISTED), file, LISTED) for i in ids]


def _old_listed(file: Path, special: set[str], known: dict[int, AddedToken]) -> list[AddedToken]:
    """Tokens of added_tokens.json, {text: id}, in the order of their ids, without known ids."""
    entries = read_json(file) if is_present(file) else {}
    if not all(map(is_token, entries.values())):
        raise NpllmValueError(f"{file}: must be {{text: id}}, got {quote(entries)}")
    texts = sorted((text for text, i in entries.items() if i not in known), key=entries.__getitem__)
    return [
        _added({"content": t, "special": t in special, "normalized": t not in special}, file, t)
        for t in texts
    ]


def _checked(value: Any, kind: type, file: Path, key: str) -> Any:
    """A value of the kind that an entry must have."""
    if not isinstance(value, kind):
        wanted = "an object" if kind is dict else "a list of tokens, or an object of named ones"
        raise NpllmValueError(f"{file}: {key} must be {wanted}, got {quote(value)}")
    return value
