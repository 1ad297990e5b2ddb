"""`merge`: a checkpoint folder with LoRA adapters in its weights, which needs no adapter to run."""

import json
import re
import shutil
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from npllm.arguments import check_flag, check_path, check_paths
from npllm.checkpoints.adapters.merged_checkpoint import MergedCheckpoint
from npllm.checkpoints.adapters.settings import CONFIG as ADAPTER_CONFIG
from npllm.checkpoints.disk import checkpoint_beside, require_space_for
from npllm.checkpoints.gguf.reader import is_gguf
from npllm.checkpoints.phi3_layout import check_entries
from npllm.checkpoints.safetensors import read_entries
from npllm.checkpoints.tensor_writer import write_tensors
from npllm.config.config import Config
from npllm.config.strict_json import read_json
from npllm.errors import NpllmOSError, NpllmValueError
from npllm.loading import checkpoint_folder
from npllm.progress import progress_bar

__all__ = ["merge"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
COPIED = re.compile(r".*\.(?:json|jinja|txt|model|py)|LICENSE.*|NOTICE.*")
"""Files that are taken over; weights in other forms and reports of a training are not."""
OWN = ("config.json", INDEX, ADAPTER_CONFIG)


def merge(
    path: str | Path | None,
    adapters: str | PathLike[str] | Sequence[str | PathLike[str]],
    output: str | PathLike[str],
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write a checkpoint folder whose weights have LoRA adapters added.

        W' = W + sum over the adapters of scale * B A,   rounded once, to the stored dtype of W

    Parameters
    ----------
    path : str, Path or None
        As in `npllm.load`: a folder with safetensors, or the name of a fetched checkpoint.  None:
        the default checkpoint.
    adapters : path or sequence of paths
        Folders that PEFT saved.
    output : str or Path
        A folder; the one that it is in exists.
    overwrite : bool
        Replace a checkpoint that is there.
    progress : bool
        Show a bar on stderr.

    Returns
    -------
    output : Path
        Complete: it did not exist under this name before that.  The files and tensors of the
        checkpoint under their names, config.json and the files of the tokenizer with them.

    Raises
    ------
    NpllmValueError
        When an adapter does not fit the model, as `Model.load_adapter`; when there is none, or the
        checkpoint is a GGUF file; when one adapter replaces a weight that another one changes;
        when a sum is larger than its dtype holds.
    NpllmOSError
        When a file cannot be read, or the folder not be written, or when it exists.

    Notes
    -----
    One tensor at a time is in memory.  Where an adapter changes one of two tied tables, both are
    written, and config.json says tie_word_embeddings: false; PEFT would change both.

    Source: `peft_model.merge_and_unload().save_pretrained(output)` in PEFT.
    """
    folders, target = check_paths("adapters", adapters), check_path("output", output).absolute()
    _check_output(target, check_flag("overwrite", overwrite))
    folder = checkpoint_folder(path)
    if is_gguf(folder) or not folders:
        got = "no adapter" if not folders else f"the GGUF file {folder}"
        raise NpllmValueError(
            f"merge needs adapters and a folder with safetensors to add them to, got {got}"
        )
    merged = MergedCheckpoint(folder, Config.from_json(folder), folders)
    try:
        _write(merged, target, progress)
    except OSError as error:
        if isinstance(error, NpllmOSError):
            raise
        reason = error.strerror or str(error)
        raise NpllmOSError(
            f"{target}: cannot be written ({reason}): make room or name another place"
        ) from error
    return target


def _check_output(output: Path, overwrite: bool) -> None:
    """Raise unless a checkpoint can be written under this name."""
    if not output.parent.is_dir():
        raise NpllmOSError(f"{output.parent}: no such folder")
    if output.exists() and not output.is_dir():
        raise NpllmOSError(f"{output}: is a file; name a folder")
    held = sorted(output.iterdir()) if output.exists() else []
    if not held:
        return
    is_checkpoint = (output / "config.json").is_file() and not (output / ADAPTER_CONFIG).exists()
    if not is_checkpoint:
        raise NpllmOSError(
            f"{output}: holds {held[0].name} and is no checkpoint; name another folder"
        )
    if not overwrite:
        raise NpllmOSError(f"{output}: exists; overwrite=True, or --force, replaces it")


def _write(merged: MergedCheckpoint, output: Path, progress: bool) -> None:
    """Write all files to a folder beside, check that they load, and give it its name."""
    require_space_for(output, sum(x.stop - x.start for x in merged.entries.values()))
    with checkpoint_beside(output) as folder:
        _write_weights(merged, folder, progress)
        _write_rest(merged, folder)
        check_entries(folder, read_entries(folder), Config.from_json(folder))


def _write_weights(merged: MergedCheckpoint, folder: Path, progress: bool) -> None:
    """Write the files of the weights, and the index where there are several."""
    entries = merged.entries
    ordered = sorted(entries, key=lambda name: (entries[name].file.name, entries[name].start))
    files: dict[str, list[str]] = {}
    for name in ordered:
        files.setdefault(entries[name].file.name, []).append(name)
    sizes = {name: entries[name].stop - entries[name].start for name in ordered}
    with progress_bar(sum(sizes.values()), "merging", wanted=progress) as advance:

        def read(name: str) -> Any:
            x = merged.read(name)
            advance(sizes[name], name)
            return x

        for file, names in files.items():
            layout = {name: (entries[name].dtype, entries[name].shape) for name in names}
            write_tensors(folder / file, layout, read, merged.release)
    if list(files) != [SINGLE]:
        weight_map = {name: file for file, names in files.items() for name in names}
        total = {"total_size": sum(sizes.values())}
        _write_json(folder / INDEX, {"metadata": total, "weight_map": weight_map})


def _write_rest(merged: MergedCheckpoint, folder: Path) -> None:
    """Copy the files beside the weights; config.json says whether two tables are still tied."""
    for file in merged.folder.iterdir():
        if COPIED.fullmatch(file.name) and file.name not in OWN and file.is_file():
            shutil.copyfile(file, folder / file.name)
    content = read_json(merged.folder / "config.json")
    if content.get("tie_word_embeddings"):
        content["tie_word_embeddings"] = merged.config.tie_word_embeddings
    _write_json(folder / "config.json", content)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
