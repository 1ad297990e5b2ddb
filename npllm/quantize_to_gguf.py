"""`quantize`: from any checkpoint to a GGUF file of a chosen type."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from npllm.arguments import check_flag, check_path, check_paths
from npllm.checkpoints.extras import import_extra
from npllm.checkpoints.gguf.sources import gguf_source
from npllm.checkpoints.gguf.tensor_types import file_type_named
from npllm.checkpoints.gguf.writer import write_gguf
from npllm.errors import NpllmOSError, NpllmValueError
from npllm.loading import checkpoint_folder

__all__ = ["quantize"]


def quantize(
    path: str | Path | None,
    output: str | Path,
    file_type: str = "q4_k_m",
    *,
    adapters: str | PathLike[str] | Sequence[str | PathLike[str]] = (),
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write a checkpoint as a GGUF file, its matrices rounded to blocks.

    Parameters
    ----------
    path : str, Path or None
        As in `npllm.load`: a folder of model_type phi3 or llama with tokenizer.json, a GGUF file,
        or the name of a fetched checkpoint.  None: the default checkpoint.
    output : str or Path
        Ends with .gguf; its folder exists.
    file_type : str
        "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k",
        "f16", "bf16" or "f32".  The type of each tensor is the one that llama.cpp chooses
        (`npllm.checkpoints.gguf.tensor_types.tensor_type`).
    adapters : path or sequence of paths
        Folders of LoRA adapters that PEFT saved, to merge into the weights first, as
        `npllm.merge` does.
    overwrite : bool
        Replace a file that exists.
    progress : bool
        Show a bar on stderr.

    Returns
    -------
    output : Path
        Complete; it did not exist under this name before that.

    Raises
    ------
    MissingExtraError
        When the package `gguf` is not installed (the extra "fetch").
    NpllmValueError
        When GGUF has no place for the model or its tokenizer, a tensor holds what its type cannot,
        or the file type is unknown.
    NpllmOSError
        When the checkpoint cannot be read or the file not be written, or when it exists.

    Notes
    -----
    One tensor at a time is in memory.  Scales and minimums are those of least squared error
    (`npllm.quantized.block_search`); llama.cpp's differ in details of its search.  A tensor that
    has its type already is copied.
    """
    wanted, target = file_type_named(file_type), check_path("output", output)
    import_extra("gguf", "writing GGUF")
    _check_output(target, check_flag("overwrite", overwrite))
    merged = check_paths("adapters", adapters)
    write_gguf(gguf_source(checkpoint_folder(path), merged), target, wanted, progress=progress)
    return target


def _check_output(output: Path, overwrite: bool) -> None:
    """Raise unless a file can be written under this name."""
    if output.suffix.lower() != ".gguf":
        raise NpllmValueError(f"output must end with .gguf, got {output}")
    if not output.parent.is_dir():
        raise NpllmOSError(f"{output.parent}: no such folder")
    if output.is_dir():
        raise NpllmOSError(f"{output}: is a folder")
    if output.exists() and not overwrite:
        raise NpllmOSError(f"{output}: exists; overwrite=True, or --force, replaces it")
