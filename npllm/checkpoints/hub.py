"""Hugging Face repositories: the download of the files that make a checkpoint.

The download is our own: `huggingface_hub.snapshot_download` (2.4) deletes an incomplete file when
it gives up, so that an interrupted download starts again at zero; and it compares sizes only after
all that a server sends has been written.
"""

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from npllm.checkpoints.disk import (
    check_hash,
    publish,
    publish_into,
    remove_leftovers,
    require_space,
    sha256,
)
from npllm.checkpoints.extras import import_extra
from npllm.checkpoints.hub_listing import (
    TIMEOUT,
    RemoteFile,
    Repository,
    ask_hub,
    check_status,
    hub_errors,
)
from npllm.config.strict_json import printable
from npllm.errors import NpllmOSError
from npllm.progress import progress_bar

__all__ = ["fetch_repository"]

TRIES = 5  # without any new byte
CHUNK = 2**20  # bytes
BUSY = (408, 429)  # HTTP statuses that a later try may not have, as those from 500 on

Advance = Callable[..., None]


def fetch_repository(
    name: str,
    revision: str | None,
    token: str | None,
    folder: Path,
    progress: bool,
    include: Sequence[str] = (),
) -> list[str]:
    """Download the checkpoint files of a repository; continue an interrupted download.

    Parameters
    ----------
    name : str
        OWNER/NAME.
    revision, token, include
        As in `npllm.checkpoints.fetch.fetch`.
    folder : Path
        Of the checkpoint; appears when it is complete.  Files are added to one that is there.
    progress : bool
        Show a bar on stderr.

    Returns
    -------
    names : list of str
        Of the files.

    Raises
    ------
    NpllmValueError
        When the repository holds no checkpoint that npllm can read.
    NpllmOSError
        When the network, the hub or the disk fails, when the hub sends what it should not, or a
        hash differs.
    """
    with hub_errors(name):
        repository = ask_hub(name, revision, token, include)
        files = repository.files
        partial = folder.parent / f"{folder.name}.partial-{repository.commit[:12]}"
        remove_leftovers(folder, keep=partial)
        n_bytes = sum(file.size for file in files)
        require_space(folder.parent, n_bytes - _count_present(files, partial))
        with progress_bar(
            n_bytes, name, wanted=progress, only_terminal=False, leave=True
        ) as advance:
            for file in files:
                _download(repository, file, partial / file.name, advance)
    if folder.exists():
        publish_into(partial, folder)
    else:
        publish(partial, folder)
    return [file.name for file in files]


def _part_of(target: Path) -> Path:
    """Return the name of a file during its download."""
    return target.with_name(target.name + ".part")


def _file_bytes(path: Path) -> int:
    """Return the size of a file, 0 if it does not exist."""
    return path.stat().st_size if path.is_file() else 0


def _count_present(files: Sequence[RemoteFile], partial: Path) -> int:
    """Count the bytes that an earlier, interrupted download has left."""
    targets = [partial / file.name for file in files]
    return sum(_file_bytes(target) + _file_bytes(_part_of(target)) for target in targets)


def _download(repository: Repository, file: RemoteFile, target: Path, advance: Advance) -> None:
    """Download one file, from where an earlier try ended; it gets its name after the hash check."""
    if target.is_file() and _file_bytes(target) == file.size:
        advance(file.size)
        return
    part = _part_of(target)
    part.parent.mkdir(parents=True, exist_ok=True)
    if not part.is_file() or _file_bytes(part) > file.size:
        part.write_bytes(b"")
    advance(_file_bytes(part))
    _receive_all(repository, file, part, advance)
    if file.sha256:
        check_hash(part, file.sha256, sha256(part))
    elif file.blob_id:
        check_hash(part, file.blob_id, _git_blob_id(part))
    os.replace(part, target)


def _receive_all(repository: Repository, file: RemoteFile, part: Path, advance: Advance) -> None:
    """Append to a file until it is complete; give up after `TRIES` tries without a new byte."""
    most, tries = _file_bytes(part), 0
    while _file_bytes(part) < file.size:
        reason = _receive(repository, file, part, advance)
        size = _file_bytes(part)
        most, tries = (size, 0) if size > most else (most, tries + 1)
        if tries >= TRIES:
            raise NpllmOSError(
                f"{file.name}: {size:,} of {file.size:,} bytes arrived, then {TRIES} tries brought "
                f"no more ({reason}). Check the network and fetch again: it continues from there"
            )
        time.sleep(tries)


def _receive(repository: Repository, file: RemoteFile, part: Path, advance: Advance) -> str:
    """Append what one connection sends; return how it ended."""
    errors = import_extra("huggingface_hub.errors")
    url = f"{repository.endpoint}/{repository.name}/resolve/{repository.commit}/{file.name}"
    start, headers = _file_bytes(part), repository.headers
    if start:
        headers = headers | {"Range": f"bytes={start}-"}
    session = import_extra("huggingface_hub.utils").get_session()
    try:
        with session.stream(
            "GET", url, headers=headers, timeout=TIMEOUT, follow_redirects=True
        ) as response:
            if response.status_code in BUSY or response.status_code >= 500:
                return f"HTTP status {response.status_code}"
            check_status(response, repository)
            if response.status_code != 206 and start:  # the server sends the whole file again
                advance(-start)
                start = 0
            _append(response, file, part, start, advance)
        return "the connection was closed"
    except errors.HTTPError as error:
        return f"{type(error).__name__}: {printable(str(error)[:300])}"


def _append(response: Any, file: RemoteFile, part: Path, start: int, advance: Advance) -> None:
    """Write the body of a response to a file, from byte `start` on; at most `file.size` bytes."""
    with open(part, "rb+") as handle:
        handle.truncate(start)
        handle.seek(start)
        for block in response.iter_bytes():  # as they arrive: a fixed chunk size would delay some
            if handle.tell() + len(block) > file.size:
                handle.truncate(0)
                raise NpllmOSError(
                    f"{file.name}: the hub sends more than the {file.size:,} bytes that it "
                    "announced; what arrived was removed, fetch again"
                )
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
