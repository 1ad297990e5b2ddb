"""Reading of files that may be something else: pipes, devices, files without end.

Every file of a checkpoint folder that is read whole is read here.
"""

import errno
import io
import os
import stat
from pathlib import Path
from typing import BinaryIO

from npllm.errors import NpllmOSError, NpllmValueError

__all__ = ["is_present", "open_regular", "read_regular", "read_text"]

ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
# Without it, to open a pipe waits for its writer.  Windows has neither flag nor named pipes.
NO_WAIT = getattr(os, "O_NONBLOCK", 0)


def is_present(path: str | os.PathLike[str]) -> bool:
    """Return whether an optional file of a folder is there.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    present : bool
        True for a regular file or a link to one; False where there is nothing, or a link to
        nothing.

    Raises
    ------
    NpllmOSError
        When it is there and no regular file (a folder, a pipe, a device), or cannot be examined.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError:  # a null character in the name
        return False
    except OSError as error:
        if error.errno in ABSENT:
            return False
        raise NpllmOSError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not stat.S_ISREG(mode):
        raise _not_regular(path)
    return True


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading; never wait for a pipe.

    Raises
    ------
    OSError
        When it cannot be opened.
    NpllmOSError
        When it is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | NO_WAIT | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(path)
    return os.fdopen(descriptor, "rb")


def read_regular(path: str | os.PathLike[str], largest: int) -> bytes:
    """Read a whole file.

    Parameters
    ----------
    path : str or Path
    largest : int
        Most bytes that are read.

    Returns
    -------
    data : bytes

    Raises
    ------
    NpllmOSError
        When it cannot be read or is no regular file.
    NpllmValueError
        When it is larger.
    """
    try:
        with open_regular(path) as file:
            n_bytes = os.fstat(file.fileno()).st_size
            data = b"" if n_bytes > largest else file.read(n_bytes + 1)  # `read` reserves as much
            if len(data) > n_bytes:  # it has grown
                data += file.read(largest + 1 - len(data))
    except NpllmOSError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise NpllmOSError(f"{path}: cannot be read ({reason})") from None
    if max(n_bytes, len(data)) > largest:
        raise NpllmValueError(
            f"{path}: has {max(n_bytes, len(data))} bytes; more than {largest} are refused"
        )
    return data


def read_text(path: str | os.PathLike[str], largest: int, encoding: str = "utf-8-sig") -> str:
    """Read a UTF-8 file with any ends of lines; errors as `read_regular`."""
    data = io.BytesIO(read_regular(path, largest))
    try:
        return io.TextIOWrapper(data, encoding).read()
    except UnicodeDecodeError as error:
        raise NpllmValueError(
            f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None


def _not_regular(path: str | os.PathLike[str]) -> NpllmOSError:
    """Make the error for a file that is none."""
    kind = "it is a folder" if Path(path).is_dir() else "it is a pipe, a device or a socket"
    return NpllmOSError(f"{path}: must be a regular file or a link to one, but {kind}")
