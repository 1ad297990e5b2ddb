"""What the hub says of a repository: asked for, validated like a file, and its refusals explained.

Whatever answers under HF_ENDPOINT is not trusted: a mirror, a proxy, a login page.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple
from urllib.parse import quote as url_quote

from npllm.checkpoints.extras import import_extra
from npllm.config.reader import Reader
from npllm.config.strict_json import LARGEST_JSON, parse_json, printable, quote
from npllm.errors import NpllmOSError, NpllmValueError

__all__ = ["RemoteFile", "Repository", "ask_hub", "check_status", "hub_errors"]

# consolidated*.safetensors repeat the weights under other names.
WANTED = re.compile(r"(?:\d+_\w+/)?(?!consolidated)[\w.-]+\.(?:safetensors|json|jinja)", re.ASCII)
GGUF = re.compile(r"[\w.-]+\.gguf", re.ASCII)  # of the top folder, only where asked for
SPLIT = re.compile(r".*-\d{5}-of-\d{5}\.gguf", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
BLOB_ID = re.compile(r"[0-9a-f]{40}", re.ASCII)
LARGEST_FILE = 2**45  # bytes
TIMEOUT = 30.0  # seconds without a byte


class RemoteFile(NamedTuple):
    """A file of a repository, as the hub describes it."""

    name: str
    size: int
    sha256: str | None  # of large files
    blob_id: str | None  # of small ones: git's hash


class Repository(NamedTuple):
    """A repository at one commit, and how it is reached."""

    name: str
    revision: str | None
    token: str | None
    endpoint: str
    headers: dict[str, str]
    commit: str = ""
    files: tuple[RemoteFile, ...] = ()


def ask_hub(
    name: str, revision: str | None, token: str | None, include: Sequence[str] = ()
) -> Repository:
    """Ask the hub for the files that make a checkpoint.

    Parameters
    ----------
    name : str
        OWNER/NAME.
    revision, token, include
        As in `npllm.checkpoints.fetch.fetch`.

    Returns
    -------
    repository : Repository
        Its files are safetensors, json and templates: no code, no pickles.  Small files first, so
        that a mistake in the repository shows early.

    Raises
    ------
    NpllmOSError
        When the hub cannot be reached or refuses, or when the answer is not that of a hub.
    NpllmValueError
        When the repository holds no checkpoint that npllm can read.
    """
    hub = import_extra("huggingface_hub")
    endpoint = _check_endpoint(os.environ.get("HF_ENDPOINT") or hub.constants.ENDPOINT)
    headers = import_extra("huggingface_hub.utils").build_hf_headers(token=_check_token(token))
    headers["Accept-Encoding"] = "identity"
    repository = Repository(name, revision, token, endpoint, headers)
    where = f"{name}: what answered is not the hub (is there a proxy or a login page between?)"
    try:
        read = Reader(parse_json(_receive_listing(repository), where), where)
        commit = _hash(read, "sha", COMMIT)
        files = _wanted_files(name, read, include)
    except NpllmValueError as error:
        if not str(error).startswith(where):
            raise
        raise NpllmOSError(printable(str(error))) from None
    return repository._replace(commit=commit, files=files)


def _check_endpoint(endpoint: str) -> str:
    """Return the address of the hub or of a mirror, without a slash at its end."""
    if not re.fullmatch(r"https?://[\w.\-:@\[\]]+(?:/[!-~]*)?", endpoint, re.ASCII):
        raise NpllmValueError(
            f"HF_ENDPOINT must be an address such as https://huggingface.co, got {quote(endpoint)}"
        )
    return endpoint.rstrip("/")


def _check_token(token: str | None) -> str | None:
    """Return a token that can be sent in a header; the message does not show it."""
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise NpllmValueError(
            "token must consist of visible ASCII characters, got other characters or none"
        )
    return token


def _receive_listing(repository: Repository) -> str:
    """Receive what the hub says of a repository; at most `LARGEST_JSON` bytes."""
    revision = repository.revision
    at = "" if revision is None else f"/revision/{url_quote(revision, safe='')}"
    url = f"{repository.endpoint}/api/models/{repository.name}{at}?blobs=true"
    session, body = import_extra("huggingface_hub.utils").get_session(), b""
    with session.stream(
        "GET", url, headers=repository.headers, timeout=TIMEOUT, follow_redirects=True
    ) as response:
        check_status(response, repository)
        for block in response.iter_bytes():
            body += block
            if len(body) > LARGEST_JSON:
                raise NpllmOSError(
                    f"{repository.name}: the hub's answer has more than {LARGEST_JSON} bytes"
                )
    return body.decode("utf-8", "replace")


def _hash(read: Reader, key: str, pattern: re.Pattern[str]) -> str:
    """Read a hash in hexadecimal."""
    value = read.text(key)
    if not pattern.fullmatch(value):
        raise NpllmValueError(f"{read.where}: {key} must be a hash, got {quote(value)}")
    return value


def _wanted_files(name: str, read: Reader, include: Sequence[str]) -> tuple[RemoteFile, ...]:
    """Return the files of a checkpoint, or those that are asked for."""
    siblings = read.get("siblings")
    if not isinstance(siblings, list) or not all(isinstance(entry, dict) for entry in siblings):
        raise NpllmValueError(
            f"{read.where}: siblings must be a list of files, got {quote(siblings)}"
        )
    entries = [Reader(entry, f"{read.where}: siblings") for entry in siblings]
    names = [entry.text("rfilename") for entry in entries]
    files = [
        _remote_file(file, entry)
        for file, entry in zip(names, entries, strict=True)
        if _is_wanted(file, include)
    ]
    wanted = [file.name for file in files]
    if len(set(map(str.casefold, wanted))) < len(wanted):
        raise NpllmValueError(f"{read.where}: siblings names a file twice")
    if include:
        _check_included(name, names, wanted, include)
    elif "config.json" not in wanted or not any(n.endswith(".safetensors") for n in wanted):
        found = printable(", ".join(sorted(names)[:8])[:500])
        advice = "npllm reads no pickles (.bin, .pt)"
        if any(map(GGUF.fullmatch, names)):
            advice = 'of its GGUF files, `--include "*Q4_K_M*"` fetches those that match'
        raise NpllmValueError(
            f"{name} must have config.json and *.safetensors, but has {found or 'no files'}; "
            f"{advice}"
        )
    return tuple(sorted(files, key=lambda file: (file.size, file.name)))


def _is_wanted(file: str, include: Sequence[str]) -> bool:
    """Tell whether a file is fetched; without patterns no GGUF file is."""
    if not include:
        return WANTED.fullmatch(file) is not None
    is_known = WANTED.fullmatch(file) or GGUF.fullmatch(file)
    return bool(is_known) and any(fnmatchcase(file, pattern) for pattern in include)


def _check_included(name: str, names: list[str], wanted: list[str], include: Sequence[str]) -> None:
    """Raise unless patterns match a file, and GGUF files that are whole."""
    if not wanted:
        ours = [file for file in names if GGUF.fullmatch(file) or WANTED.fullmatch(file)]
        found = printable(", ".join(sorted(ours)[:12])[:500])
        raise NpllmValueError(
            f"{name} has no file that matches {' or '.join(map(quote, include))}; "
            f"it has {found or 'none that npllm reads'}"
        )
    split = [file for file in wanted if SPLIT.fullmatch(file)]
    if split:
        raise NpllmValueError(
            f"{name}: {split[0]} is a part of a split GGUF file, which npllm does not read"
        )


def _remote_file(name: str, read: Reader) -> RemoteFile:
    """Read size and hash of a file; without a hash it could not be checked."""
    size = 0 if read.data.get("size") == 0 else read.size("size", largest=LARGEST_FILE)
    lfs = read.get("lfs")
    if lfs is None:
        return RemoteFile(name, size, None, _hash(read, "blobId", BLOB_ID))
    if not isinstance(lfs, dict):
        raise NpllmValueError(f"{read.where}: lfs must be an object, got {quote(lfs)}")
    return RemoteFile(name, size, _hash(Reader(lfs, read.where), "sha256", SHA256), None)


def check_status(response: Any, repository: Repository) -> None:
    """Raise for an HTTP status from 400 on; the body is not read.

    Raises
    ------
    NpllmOSError
        Says what to do.
    """
    status, code = response.status_code, response.headers.get("X-Error-Code")
    if status < 400:
        return
    name, revision = repository.name, repository.revision
    access = "pass token=, set HF_TOKEN or run `hf auth login`"
    if repository.token:
        access = "the token given has no access"
    if code == "GatedRepo":
        reason = f"{name} is gated: accept its terms on its page on the hub; {access}"
    elif code == "RevisionNotFound":
        reason = f"{name} has no revision {revision!r}: name a branch, tag or commit of it"
    elif code == "RepoNotFound" or status == 401:
        reason = f"{name} is not on the hub, or is private: check the name; if private, {access}"
    else:
        advice = access if status == 403 else "try again later"
        reason = f"{name}: the hub answered with HTTP status {status}: {advice}"
    raise NpllmOSError(reason)


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn an error of the connection into one that says what to do."""
    errors = import_extra("huggingface_hub.errors")
    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise NpllmOSError(
            f"{name} is not here, and HF_HUB_OFFLINE forbids to fetch it: unset it"
        ) from None
    except errors.HTTPError as error:
        reason = printable(str(error)[:300])
        raise NpllmOSError(
            f"{name}: the hub cannot be reached ({reason}): check the network and fetch again"
        ) from error
