"""safetensors files: headers, and their comparison with the tensors that config.json asks for.

Only headers are read here; `npllm.checkpoints.tensor_files` reads tensors.
"""

import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from npllm.config.regular_file import is_present, open_regular
from npllm.config.strict_json import no_duplicates, printable, quote, read_json
from npllm.errors import NpllmOSError, NpllmValueError
from npllm.models.params import LayerParams, Params  # noqa: F401 - importable from here as before

__all__ = [
    "INTEGER_DTYPES",
    "NUMPY_DTYPES",
    "SAFETENSORS_DTYPES",
    "TensorEntry",
    "check_file_name",
    "check_shapes",
    "read_entries",
    "read_header",
]

SAFETENSORS_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
# Of buffers that old files hold.
INTEGER_DTYPES = {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}
# safetensors' name -> NumPy's, of every type that is read.
NUMPY_DTYPES = SAFETENSORS_DTYPES | INTEGER_DTYPES | {"BOOL": "bool"}
LARGEST_HEADER = 2**25  # bytes; published files have headers of up to 1 MB
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PICKLE_DANGER = (
    "may hold Python pickles, which can run any code when they are opened and are "
    "refused; convert them to safetensors with a tool you trust"
)


class TensorEntry(NamedTuple):
    """The entry of a tensor in a safetensors header."""

    file: Path
    dtype: str  # as safetensors spells it: BF16, F16, F32, F64, I64, ...
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    stop: int


def read_entries(folder: str | PathLike[str]) -> dict[str, TensorEntry]:
    """Read the headers of a checkpoint, and nothing else.

    Parameters
    ----------
    folder : str or Path
        Holds model.safetensors, or model.safetensors.index.json and the files it names.

    Returns
    -------
    entries : dict of str to TensorEntry

    Raises
    ------
    NpllmOSError
        When a file is missing, truncated, or not safetensors.
    NpllmValueError
        When the index is no index, or names a file outside the folder.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if is_present(single):
        return read_header(single)
    if not is_present(index):
        raise NpllmOSError(
            f"{folder}: holds neither {single.name} nor {index.name}{_found_instead(folder)}"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise NpllmValueError(
            f"{index}: must have a weight_map from tensor names to files, got {quote(weight_map)}"
        )
    return _read_shards(index, weight_map)


def _read_shards(index: Path, weight_map: dict[str, Any]) -> dict[str, TensorEntry]:
    """Read the headers of the files that an index names."""
    files = sorted({check_file_name(index, file) for file in weight_map.values()})
    headers = {file: read_header(index.parent / file) for file in files}
    missing = [
        f"{name} in {file}" for name, file in weight_map.items() if name not in headers[file]
    ]
    if missing:
        raise NpllmValueError(
            f"{index}: names tensors that the files do not hold: {_listing(missing)}"
        )
    n_files = Counter(name for header in headers.values() for name in header)
    repeated = sorted(name for name, n in n_files.items() if n > 1)
    if repeated:
        raise NpllmValueError(
            f"{index}: tensors that are in more than one file: {_listing(repeated)}"
        )
    return {name: headers[file][name] for name, file in weight_map.items()}


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read one file's header: its length in 8 bytes, little-endian, then JSON.

    Parameters
    ----------
    path : Path

    Returns
    -------
    entries : dict of str to TensorEntry

    Raises
    ------
    NpllmOSError
        When the file is missing, truncated, or not safetensors.

    Notes
    -----
    The safetensors library validates the header first.
    """
    if not is_present(path):
        raise NpllmOSError(f"{path}: no such file; is the download complete?")
    try:
        with open_regular(path) as file:
            n_header = int.from_bytes(file.read(8), "little")
            n_bytes = os.fstat(file.fileno()).st_size
            if n_header > min(n_bytes - 8, LARGEST_HEADER):
                raise ValueError(
                    f"its header should have {n_header} bytes, but the file has "
                    f"{n_bytes}, and a header may have at most {LARGEST_HEADER}"
                )
            with safe_open(path, framework="np"):  # refuses offsets outside the file, or gaps
                pass
            header = json.loads(file.read(n_header), object_pairs_hook=no_duplicates)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        reason = printable(str(error)[:300])
        raise NpllmOSError(
            f"{path}: is not a readable safetensors file ({reason}); is the download complete?"
        ) from None
    header.pop("__metadata__", None)
    return {name: _entry(path, 8 + n_header, content) for name, content in header.items()}


def _entry(path: Path, data_start: int, content: dict[str, Any]) -> TensorEntry:
    """Turn an entry of the header, whose offsets count from `data_start`, into a TensorEntry."""
    start, stop = content["data_offsets"]
    shape = tuple(content["shape"])
    return TensorEntry(path, content["dtype"], shape, data_start + start, data_start + stop)


def check_file_name(index: Path, name: Any) -> str:
    """Check a file name in an index: the file, or a link to it, must be in the same folder.

    Parameters
    ----------
    index : Path
        For the message.
    name : str

    Returns
    -------
    name : str

    Raises
    ------
    NpllmValueError
        For a path, a name that no terminal can show, and a file that may hold Python pickles.
    """
    is_name = isinstance(name, str) and name == Path(name).name and name not in ("", ".", "..")
    if not is_name or "\\" in name or not name.isprintable():
        raise NpllmValueError(f"{index}: may only name files of its own folder, got {quote(name)}")
    if name.endswith(PICKLES):
        raise NpllmValueError(f"{index}: {quote(name)} {PICKLE_DANGER}")
    return name


def _found_instead(folder: Path) -> str:
    """Name the weights of a folder that has no safetensors."""
    if not folder.is_dir():
        return " (there is no such folder)"
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    return f"; {_listing(pickles)} {PICKLE_DANGER}" if pickles else ""


def check_shapes(
    folder: str | PathLike[str],
    entries: Mapping[str, TensorEntry],
    expected: Mapping[str, tuple[int, ...]],
    ignored: Collection[str] = (),
    advice: Iterable[str] = (),
    dtypes: Mapping[str, Collection[str]] | None = None,
) -> None:
    """Raise one error that lists every missing, unknown and misshapen tensor and unusable dtype.

    Parameters
    ----------
    folder : str or Path
        For the message.
    entries : dict of str to TensorEntry
    expected : dict of str to tuple of int
        Tensor name -> shape.
    ignored : collection of str
        Names that may be present without being expected.
    advice : iterable of str
        Further sentences of the message.
    dtypes : dict of str to collection of str, optional
        Tensor name -> the types that it may have, as safetensors spells them; default: floats.

    Raises
    ------
    NpllmValueError
    """
    found = {name: entry for name, entry in entries.items() if name in expected}
    misshapen = [
        f"{name} must be {list(expected[name])}, got {list(entry.shape)}"
        for name, entry in found.items()
        if entry.shape != expected[name]
    ]
    dtypes = dtypes or {}
    unusable = [
        f"{name} is {entry.dtype}"
        for name, entry in found.items()
        if name not in dtypes and entry.dtype not in SAFETENSORS_DTYPES
    ]
    other = [
        f"{name} must be {' or '.join(dtypes[name])}, got {entry.dtype}"
        for name, entry in found.items()
        if name in dtypes and entry.dtype not in dtypes[name]
    ]
    lists = {
        "missing": expected.keys() - entries.keys(),
        "unknown": entries.keys() - expected.keys() - set(ignored),
        "wrong shape": misshapen,
        f"dtype not one of {', '.join(SAFETENSORS_DTYPES)}": unusable,
        "wrong dtype": other,
    }
    problems = [f"{what}: {_listing(sorted(names))}" for what, names in lists.items() if names]
    problems += advice
    if problems:
        raise NpllmValueError(
            f"{folder}: the tensors do not fit config.json; " + "; ".join(problems)
        )


def _listing(names: list[str], most: int = 8) -> str:
    """Join names for a message, the first `most` of them."""
    shown = ", ".join(printable(name[:200]) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
