"""Arrays under other names as a trace: a folder of .npz, .npy or safetensors files, a mapping."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from warnings import warn

import numpy as np

from npllm.checkpoints.safetensors import read_header
from npllm.checkpoints.tensor_files import TensorFiles
from npllm.config.regular_file import open_regular
from npllm.config.strict_json import config_data, quote
from npllm.errors import NpllmError, NpllmOSError, NpllmTypeError, NpllmValueError
from npllm.models.taps import NAMES
from npllm.testing.libraries import on_host
from npllm.tracing.readers.name_maps import NameMap, name_map, node_key
from npllm.tracing.readers.placing import Value, head_counts, placed, trace_of
from npllm.tracing.trace import Trace

__all__ = ["read_arrays", "rename_arrays"]

Array = Any

SUFFIXES = (".npz", ".npy", ".safetensors")
TOKENS = ("input_ids", "attention_mask", "position_ids")


def read_arrays(
    folder: Any, *, names: Any = "transformers", config: Any = None, input_ids: Any = None
) -> Trace:
    """Read the values that another program saved.

    Parameters
    ----------
    folder : str or Path
        Holds .npz, .npy or safetensors files, or is one of them.  The name of a value is its key
        in the file; of a .npy file it is the file's name.  A name that ends in @t is of decode
        step t.  Arrays named input_ids, attention_mask and position_ids are the tokens.
    names : str, Path or NameMap
        As `npllm.tracing.readers.name_maps.name_map` takes them.  Our own names need no map.
    config : dict, str or Path, optional
        A config.json, where queries, keys or values must be cut into heads.
    input_ids : integer array [n_batch, n_seq], optional
        Where the folder does not hold them.

    Returns
    -------
    trace : Trace
        Without steps where the tokens are not known; `compare` then takes those of the gold.
        `index["ignored"]` lists the names that no map knows.

    Raises
    ------
    NpllmOSError
        When there is no such file, or it cannot be read.
    NpllmValueError
        When no name is known, two arrays have one name, or axes do not fit; names the file.

    Warns
    -----
    UserWarning
        Where some names are not known.
    """
    found = _arrays_of(Path(folder))
    return _trace(found, names, config, input_ids)


def rename_arrays(
    values: Mapping[str, Array],
    *,
    names: Any = "transformers",
    config: Any = None,
    input_ids: Any = None,
) -> Trace:
    """Bring values that are in memory to npllm's names and axes.

    Parameters
    ----------
    values : mapping of str to array
    names, config, input_ids
        As in `read_arrays`, whose errors and warnings it has.

    Returns
    -------
    trace : Trace
    """
    other = next((name for name in values if not isinstance(name, str)), None)
    if other is not None:
        raise NpllmTypeError(f"the names of values must be str, got {quote(other)}")
    found = {name: (Path("values"), on_host(x)) for name, x in values.items()}
    return _trace(found, names, config, input_ids)


def _trace(found: dict[str, tuple[Path, Array]], names: Any, config: Any, ids: Any) -> Trace:
    """A trace of the values that the map knows."""
    tokens = {name: found.pop(name)[1] for name in TOKENS if name in found}
    if ids is not None:
        tokens["input_ids"] = ids
    mapping, heads = name_map(names), head_counts(config)
    values, ignored = _placed(found, mapping, heads)
    if not values:
        where = next((file.parent for file, _ in found.values()), "values")
        raise NpllmValueError(
            f"{where}: none of its names is in the map ({mapping.about}) nor one of npllm's: "
            f"{', '.join(quote(name) for name in ignored[:4])}"
        )
    if ignored:
        more = ", ..." if len(ignored) > 4 else ""
        known = ", ".join(quote(name) for name in ignored[:4])
        warn(f"names that no map knows: {known}{more}", stacklevel=3)
    content = None if config is None else config_data(config)[0]
    about = {"made by": "arrays", "config": content, "dtype": None, "ignored": ignored}
    return trace_of(values, about, _steps(tokens))


def _placed(
    found: Mapping[str, tuple[Path, Array]], mapping: NameMap, heads: Mapping[str, int]
) -> tuple[dict[tuple[int, str], Value], list[str]]:
    """Name the arrays as ours, in our axes; list the names that are not known."""
    values: dict[tuple[int, str], Value] = {}
    ignored: list[str] = []
    first: dict[tuple[int, str], str] = {}
    for theirs, (file, x) in found.items():
        node, _, step = theirs.partition("@")
        name, axes = _named(node, x, mapping, found)
        if not name or not (step or "0").isdigit():
            ignored.append(theirs)
            continue
        key = int(step or 0), name
        if key in values:
            raise NpllmValueError(
                f"{file}: {quote(first[key])} and {quote(theirs)} are both {name}; keep one"
            )
        first[key] = theirs
        try:
            values[key] = placed(Value(x), axes, name, heads)
        except NpllmError as error:
            raise NpllmValueError(f"{file}: {quote(theirs)}: {error}") from None
    return values, ignored


def _named(
    node: str, x: Array, mapping: NameMap, names: Mapping[str, Any]
) -> tuple[str, tuple[str, ...]]:
    """Our name and their axes: our own names where the number of axes is ours."""
    key = node_key(node)
    if key in NAMES:
        axes = tuple(NAMES[key][0].strip("[]").split(", "))
        if x.ndim == len(axes):
            return node, axes
    found = mapping.find(node, names=names)
    return found if found is not None else ("", ())


def _arrays_of(folder: Path) -> dict[str, tuple[Path, Array]]:
    """Every array of the files: name -> file, array."""
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    else:
        files = [folder] if folder.suffix in SUFFIXES else []
    if not files:
        raise NpllmOSError(f"{folder}: holds no {', '.join(SUFFIXES)} file")
    found: dict[str, tuple[Path, Array]] = {}
    for file in files:
        for name, x in _read(file).items():
            if name in found:
                raise NpllmValueError(f"{file}: {quote(name)} is in {found[name][0].name} as well")
            found[name] = (file, x)
    return found


def _read(file: Path) -> dict[str, Array]:
    """The arrays of a file.  Pickled objects are refused: they can run any code."""
    try:
        if file.suffix == ".safetensors":
            reader = TensorFiles(keeps=False)
            return {name: reader.read(entry) for name, entry in read_header(file).items()}
        with open_regular(file) as opened:
            x = np.load(opened, allow_pickle=False)
            if isinstance(x, np.ndarray):
                return {file.stem: x}
            return {name: x[name] for name in x.files}
    except NpllmError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise NpllmOSError(f"{file}: cannot be read as NumPy's {file.suffix} ({error})") from None


def _steps(tokens: Mapping[str, Array]) -> list[dict[str, Any]]:
    """The only step, where the tokens are known."""
    if "input_ids" not in tokens:
        return []
    step: dict[str, Any] = {"attention_mask": None, "position_ids": None}
    for name, x in tokens.items():
        x = np.asarray(x)
        if x.dtype.kind not in "iub" or x.ndim not in (1, 2):
            raise NpllmValueError(
                f"{name} must be integers [n_batch, n_seq], got {x.dtype} {list(x.shape)}"
            )
        step[name] = x.reshape(-1, x.shape[-1]).astype(np.int64).tolist()
    return [step | {"n_past": 0, "cached": False}]
