"""Hugging Face repositories: which files make a checkpoint, and their download.

The download is our own: `huggingface_hub.snapshot_download` deletes an incomplete file when the
connection ends, so that an interrupted download starts again at zero.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from npllm.checkpoints.disk import check_hash, publish, remove_leftovers, require_space, sha256
from npllm.checkpoints.extras import import_extra
from npllm.errors import NpllmOSError, NpllmValueError
from npllm.progress import progress_bar

__all__ = ["fetch_repository"]

# consolidated*.safetensors repeat the weights under other names.
WANTED = re.compile(r"(?:\d+_\w+/)?(?!consolidated)[\w.-]+\.(?:safetensors|json|jinja)", re.ASCII)
TRIES = 5  # without any new byte
TIMEOUT = 30.0  # seconds without a byte
CHUNK = 2**20  # bytes
BUSY = (408, 429)  # HTTP statuses that a later try may not have, as those from 500 on

Advance = Callable[..., None]


class RemoteFile(NamedTuple):
    """A file of a repository, as the hub describes it."""

    name: str
    size: int
    sha256: str | None  # of large files
    blob_id: str | None  # of small ones: git's hash


def fetch_repository(
    name: str, revision: str | None, token: str | None, folder: Path, progress: bool
) -> None:
    """Download the checkpoint files of a repository; continue an interrupted download.

    Parameters
    ----------
    name : str
        OWNER/NAME.
    revision, token : str, optional
        As in `npllm.checkpoints.fetch.fetch`.
    folder : Path
        Of the checkpoint; appears when it is complete.
    progress : bool
        Show a bar on stderr.

    Raises
    ------
    NpllmValueError
        When the repository holds no checkpoint that npllm can read.
    NpllmOSError
        When the network, the hub or the disk fails, or a hash differs.
    """
    hub = import_extra("huggingface_hub")
    endpoint = os.environ.get("HF_ENDPOINT") or None
    with _hub_errors(name, revision, token):
        api = hub.HfApi(endpoint=endpoint, token=token)
        info = api.model_info(name, revision=revision, files_metadata=True)
        files = _wanted_files(name, info.siblings)
        partial = folder.parent / f"{folder.name}.partial-{info.sha[:12]}"
        remove_leftovers(folder, keep=partial)
        n_bytes = sum(file.size for file in files)
        require_space(folder.parent, n_bytes - _count_present(files, partial))
        headers = import_extra("huggingface_hub.utils").build_hf_headers(token=token)
        headers["Accept-Encoding"] = "identity"
        with progress_bar(
            n_bytes, name, wanted=progress, only_terminal=False, leave=True
        ) as advance:
            for file in files:
                url = hub.hf_hub_url(name, file.name, revision=info.sha, endpoint=endpoint)
                _download(url, headers, file, partial / file.name, advance)
    publish(partial, folder)


def _wanted_files(name: str, siblings: list[Any]) -> list[RemoteFile]:
    """Return the files of a checkpoint: safetensors, json and templates, no code, no pickles.

    Small files first, so that a mistake in the repository shows early.
    """
    files = [
        RemoteFile(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None, s.blob_id)
        for s in siblings
        if WANTED.fullmatch(s.rfilename)
    ]
    names = [file.name for file in files]
    if "config.json" not in names or not any(n.endswith(".safetensors") for n in names):
        found = ", ".join(sorted(s.rfilename for s in siblings)[:8])
        raise NpllmValueError(
            f"{name} must have config.json and *.safetensors, but has {found or 'no files'}; "
            "npllm reads no pickles (.bin, .pt)"
        )
    return sorted(files, key=lambda file: (file.size, file.name))


def _part_of(target: Path) -> Path:
    """Return the name of a file during its download."""
    return target.with_name(target.name + ".part")


def _file_bytes(path: Path) -> int:
    """Return the size of a file, 0 if it does not exist."""
    return path.stat().st_size if path.is_file() else 0


def _count_present(files: list[RemoteFile], partial: Path) -> int:
    """Count the bytes that an earlier, interrupted download has left."""
    targets = [partial / file.name for file in files]
    return sum(_file_bytes(target) + _file_bytes(_part_of(target)) for target in targets)


def _download(
    url: str, headers: dict[str, str], file: RemoteFile, target: Path, advance: Advance
) -> None:
    """Download one file, from where an earlier try ended; it gets its name after the hash check."""
    if target.is_file() and _file_bytes(target) == file.size:
        advance(file.size)
        return
    part = _part_of(target)
    part.parent.mkdir(parents=True, exist_ok=True)
    if not part.is_file() or _file_bytes(part) > file.size:
        part.write_bytes(b"")
    advance(_file_bytes(part))
    _receive_all(url, headers, file, part, advance)
    if file.sha256:
        check_hash(part, file.sha256, sha256(part))
    elif file.blob_id:
        check_hash(part, file.blob_id, _git_blob_id(part))
    os.replace(part, target)


def _receive_all(
    url: str, headers: dict[str, str], file: RemoteFile, part: Path, advance: Advance
) -> None:
    """Append to a file until it is complete; give up after `TRIES` tries without a new byte."""
    most, tries = _file_bytes(part), 0
    while _file_bytes(part) < file.size:
        reason = _receive(url, headers, part, advance)
        size = _file_bytes(part)
        most, tries = (size, 0) if size > most else (most, tries + 1)
        if tries >= TRIES:
            raise NpllmOSError(
                f"{file.name}: {size:,} of {file.size:,} bytes arrived, then {TRIES} tries brought "
                f"no more ({reason}). Check the network and fetch again: it continues from there"
            )
        time.sleep(tries)


def _receive(url: str, headers: dict[str, str], part: Path, advance: Advance) -> str:
    """Append what one connection sends; return how it ended."""
    errors = import_extra("huggingface_hub.errors")
    utils = import_extra("huggingface_hub.utils")
    start = _file_bytes(part)
    if start:
        headers = headers | {"Range": f"bytes={start}-"}
    try:
        with utils.get_session().stream(
            "GET", url, headers=headers, timeout=TIMEOUT, follow_redirects=True
        ) as response:
            if response.status_code in BUSY or response.status_code >= 500:
                return f"HTTP status {response.status_code}"
            utils.hf_raise_for_status(response)
            if response.status_code != 206 and start:  # the server sends the whole file again
                advance(-start)
                start = 0
            _append(response, part, start, advance)
        return "the connection was closed"
    except errors.HfHubHTTPError:
        raise
    except errors.HTTPError as error:
        return f"{type(error).__name__}: {error}"


def _append(response: Any, part: Path, start: int, advance: Advance) -> None:
    """Write the body of a response to a file, from byte `start` on."""
    with open(part, "rb+") as handle:
        handle.truncate(start)
        handle.seek(start)
        for block in response.iter_bytes():  # as they arrive: a fixed chunk size would delay some
            handle.write(block)
            advance(len(block))


def _git_blob_id(path: Path) -> str:
    """Return git's hash of a file: the SHA-1 of its length and content."""
    header = f"blob {path.stat().st_size}\0".encode()
    digest = hashlib.sha1(header, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _hub_errors(name: str, revision: str | None, token: str | None) -> Iterator[None]:
    """Turn an error of huggingface_hub into one that says what to do."""
    errors = import_extra("huggingface_hub.errors")
    try:
        yield
    except (
        errors.HfHubHTTPError,
        errors.HTTPError,
        errors.OfflineModeIsEnabled,
        json.JSONDecodeError,
    ) as error:
        raise NpllmOSError(_explain(error, errors, name, revision, token)) from error


def _explain(
    error: Exception, errors: Any, name: str, revision: str | None, token: str | None
) -> str:
    """Write the message for an error of huggingface_hub; subclasses come before their base."""
    access = "pass token=, set HF_TOKEN or run `hf auth login`"
    if token:
        access = "the token given has no access"
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated: accept its terms on its page on the hub; {access}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{name} is not on the hub, or is private: check the name; if private, {access}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {revision!r}: name a branch, tag or commit of it"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        advice = access if status in (401, 403) else "try again later"
        return f"{name}: the hub answered with HTTP status {status}: {advice}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{name} is not here, and HF_HUB_OFFLINE forbids to fetch it: unset it"
    if isinstance(error, json.JSONDecodeError):
        return f"{name}: what answered is not the hub: is there a proxy or a login page between?"
    return f"{name}: the hub cannot be reached ({error}): check the network and fetch again"
