"""Writing checkpoint folders: lock, free space, hashes, and one rename when all is complete."""

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from npllm.checkpoints.extras import import_extra
from npllm.errors import NpllmError, NpllmOSError
from npllm.progress import report

__all__ = [
    "check_hash",
    "checkpoint_beside",
    "exchange_folders",
    "folder_lock",
    "is_checkpoint",
    "os_errors",
    "publish",
    "publish_into",
    "publish_over",
    "remove_checkpoint",
    "remove_leftovers",
    "require_space",
    "require_space_for",
    "sha256",
]

ADVICE = {
    errno.ENOSPC: "the disk is full: make room, or name another folder with NPLLM_WEIGHTS",
    errno.EACCES: "not allowed to write there: name another folder with NPLLM_WEIGHTS",
    errno.EROFS: "the disk is read-only: name another folder with NPLLM_WEIGHTS",
}
CURRENT_FOLDER, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of <fcntl.h>, <linux/fs.h>
LOADED = re.compile(r".*\.(?:safetensors|json|jinja)")  # files of a checkpoint that are read
OTHER_ADVICE = "name another folder with NPLLM_WEIGHTS if this one cannot be used"


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder, under its final name, holds a checkpoint: config.json, or GGUF."""
    return (folder / "config.json").is_file() or any(folder.glob("*.gguf"))


@contextlib.contextmanager
def os_errors(folder: Path) -> Iterator[None]:
    """Turn an error of the operating system into one that says what to do.

    Raises
    ------
    NpllmOSError
        In place of an OSError; an `NpllmError` is raised as it is.
    """
    try:
        yield
    except NpllmError:
        raise
    except OSError as error:
        advice = ADVICE.get(error.errno or 0, OTHER_ADVICE)
        place, reason = error.filename or folder, error.strerror or error
        raise NpllmOSError(f"cannot write {place} ({reason}): {advice}") from error


@contextlib.contextmanager
def folder_lock(folder: Path, progress: bool) -> Iterator[None]:
    """Hold the lock of a checkpoint folder, so that one process at a time writes it.

    The operating system releases the lock of a killed process.

    Parameters
    ----------
    folder : Path
        Need not exist; the lock file is beside it.
    progress : bool
        Report on stderr that another process holds the lock.

    Raises
    ------
    MissingExtraError
        When the package `filelock` is not installed.
    """
    filelock = import_extra("filelock")
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if progress:
            report(f"another process is fetching {folder.name}: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def require_space(folder: Path, needed: int) -> None:
    """Raise `NpllmOSError` unless the disk of a folder has that many bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NpllmOSError(
            f"{folder} needs {_format_bytes(needed)} free, but has {_format_bytes(free)}: "
            "make room, or name another folder with NPLLM_WEIGHTS"
        )


def require_space_for(output: Path, n_bytes: int) -> None:
    """Raise `NpllmOSError` unless the disk of a file or folder to write has that many bytes free.

    For outputs that the caller names, which may be elsewhere.
    """
    free = shutil.disk_usage(output.parent).free
    if free < n_bytes:
        raise NpllmOSError(
            f"{output} needs {n_bytes / 1e6:,.0f} MB, but its disk has {free / 1e6:,.0f} MB free: "
            "make room or name another place"
        )


def _format_bytes(n: int) -> str:
    """Format a number of bytes: `1,234 MB`, or `1,234 bytes` below 10 MB."""
    return f"{n / 1e6:,.0f} MB" if n >= 10_000_000 else f"{n:,} bytes"


def remove_leftovers(folder: Path, keep: Path | None = None) -> None:
    """Remove the partial folders of interrupted downloads of this folder, except `keep`."""
    for leftover in folder.parent.glob(f"{folder.name}.partial-*"):
        if leftover != keep:
            shutil.rmtree(leftover, ignore_errors=True)


def _flush_files(folder: Path) -> None:
    """Write the files of a folder to the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())


def publish(partial: Path, folder: Path) -> None:
    """Flush a complete folder to the disk, then give it its final name in one step.

    Raises
    ------
    OSError
        When the folder cannot be renamed and no other process has published it.
    """
    _flush_files(partial)
    try:
        os.rename(partial, folder)
    except OSError:
        if not is_checkpoint(folder):  # on disks without locks, another process may be first
            raise


def publish_into(partial: Path, folder: Path) -> None:
    """Flush a complete folder to the disk, then move its files to another, each in one step.

    config.json, with which a folder becomes a checkpoint, is moved last.
    """
    _flush_files(partial)
    for file in sorted(partial.rglob("*"), key=lambda file: file.name == "config.json"):
        if file.is_file():
            target = folder / file.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    shutil.rmtree(partial, ignore_errors=True)


def publish_over(complete: Path, folder: Path) -> None:
    """Give a complete checkpoint its final name, also where a checkpoint has that name.

    Of an existing checkpoint, the files that a loader reads are replaced, in one step; other files
    stay.  A folder that is no checkpoint becomes one with its config.json, which is moved last.

    Parameters
    ----------
    complete : Path
        On the same disk; does not exist afterwards, or holds the replaced files.
    folder : Path
        Need not exist.

    Raises
    ------
    OSError
        When the folder cannot be replaced; it is as it was before.
    """
    if not folder.exists():
        publish(complete, folder)
        return
    _flush_files(complete)
    if (folder / "config.json").is_file():
        exchange_folders(complete, folder)
        for other in complete.iterdir():
            if not LOADED.fullmatch(other.name) and not (folder / other.name).exists():
                os.rename(other, folder / other.name)
        return
    for file in sorted(complete.iterdir(), key=lambda file: file.name == "config.json"):
        shutil.move(file, folder / file.name)


@contextlib.contextmanager
def checkpoint_beside(folder: Path) -> Iterator[Path]:
    """Yield a new folder that takes the place of a checkpoint when the body ends without an error.

    Parameters
    ----------
    folder : Path
        As in `publish_over`.

    Yields
    ------
    complete : Path
        Empty, on the same disk.  After an error nothing of it is left.
    """
    staging = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    complete = staging / "checkpoint"
    try:
        complete.mkdir()
        yield complete
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    try:
        publish_over(complete, folder)
    finally:
        remove_checkpoint(complete)
        with contextlib.suppress(OSError):  # it holds what could not be moved back
            staging.rmdir()


def remove_checkpoint(folder: Path) -> None:
    """Remove the files that a loader reads, and the folder if it holds nothing else."""
    with contextlib.suppress(OSError):
        for file in folder.iterdir():
            if file.is_file() and LOADED.fullmatch(file.name):
                file.unlink()
        folder.rmdir()


def exchange_folders(one: Path, other: Path) -> None:
    """Exchange the names of two folders on one disk.

    On Linux it is one step of the operating system.  Elsewhere, and on file systems without it,
    `other` is missing for an instant between two renames; where the process dies then, it is beside
    under the name `NAME.replaced`.

    Raises
    ------
    OSError
        When they cannot be exchanged; they are as they were before.
    """
    if exchange_by_renameat2(one, other):
        return
    replaced = other.with_name(f"{other.name}.replaced")
    os.rename(other, replaced)
    try:
        os.rename(one, other)
    except OSError:
        os.rename(replaced, other)
        raise
    os.rename(replaced, one)


def exchange_by_renameat2(one: Path, other: Path) -> bool:
    """Exchange two names by `renameat2`; return False where that is not possible."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # another C library or operating system
        return False
    names = os.fsencode(one), os.fsencode(other)
    return renameat2(CURRENT_FOLDER, names[0], CURRENT_FOLDER, names[1], EXCHANGE) == 0


def check_hash(path: Path, wanted: str, got: str) -> None:
    """Remove a file and raise `NpllmOSError` unless its hash is the published one."""
    if got != wanted:
        path.unlink(missing_ok=True)
        raise NpllmOSError(
            f"{path.name} is not the published file: its hash must be {wanted}, got {got}. "
            "It was removed; try again. If the hash differs again, a proxy or the network "
            "changes downloads"
        )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
