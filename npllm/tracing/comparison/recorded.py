"""What was recorded of a run: a trace, a mapping with an index, a folder or a golden bundle."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from npllm.arrays import DTYPES
from npllm.config.strict_json import is_int, printable, read_json
from npllm.errors import NpllmOSError, NpllmTypeError, NpllmValueError
from npllm.models.taps import NAMES, PAIRS
from npllm.testing.libraries import on_host
from npllm.tracing.comparison.steps import Step, steps_of
from npllm.tracing.readers.name_maps import name_map

__all__ = ["Recorded", "recorded"]

Array = Any

LARGEST_UNIT = 1e30  # that partial values can be rounded to


class Recorded:
    """The values of a run under npllm's names.

    Parameters
    ----------
    values : mapping of str to array
        Read one at a time, when they are asked for.
    index : dict
        As a trace has it.
    where : str
        For messages.
    folder : Path, optional
        A checkpoint that lies beside the values.
    """

    def __init__(
        self, values: Mapping[str, Any], index: Mapping[str, Any], where: str, folder: Any = None
    ) -> None:
        self.values, self.index, self.where, self.folder = values, index, where, folder
        self.steps: list[Step] = steps_of(index, where)
        about = index.get("values")
        self.about: Mapping[str, Any] = about if isinstance(about, Mapping) else {}
        self.names = [str(name) for name in values]
        self._known = set(self.names)
        self._whole = {name for name in self.names if self._status(name) == "whole"}

    @property
    def config(self) -> Any:
        """The content of config.json; None where the index has none."""
        return self.index.get("config")

    def has(self, name: str) -> bool:
        """Tell whether the whole value was recorded."""
        return name in self._whole

    def is_partial(self, name: str) -> bool:
        """Tell whether only a part of the value was recorded."""
        return name in self._known and name not in self._whole

    def kept(self, name: str) -> tuple[Array, ...] | None:
        """The indices along each axis of the entries of a partial value; None where not said.

        Raises
        ------
        NpllmValueError
            For indices that do not fit the array.
        """
        found = self.about[name].get("kept")
        if found is None:
            return None
        shape = self.array(name).shape
        rows = found if isinstance(found, list) else []
        fits = all(isinstance(axis, list) and all(map(is_int, axis)) for axis in rows)
        fits = fits and all(0 <= place < 2**31 for axis in rows for place in axis)
        axes = [np.asarray(axis, np.int64) for axis in rows] if fits else []
        if tuple(axis.size for axis in axes) != shape:
            raise NpllmValueError(
                f"{self.where}: kept of {printable(name[:200])} must be a list of indices for each "
                f"axis of {list(shape)}"
            )
        return tuple(axes)

    def rounded_to(self, name: str) -> float:
        """The unit that the entries of a partial value were rounded to; 0: not at all."""
        unit = self.about[name].get("rounded to")
        is_unit = isinstance(unit, int | float) and 0 <= unit < LARGEST_UNIT
        return float(unit) if is_unit else 0.0

    def array(self, name: str) -> Array:
        """Return a value as a NumPy array of a float type.

        Raises
        ------
        NpllmTypeError
            For what is no array of floats.
        """
        x = on_host(self.values[name])
        if str(getattr(x, "dtype", "")) not in DTYPES:
            raise NpllmTypeError(
                f"{self.where}: {printable(name[:200])} must be an array of {', '.join(DTYPES)}, "
                f"got {getattr(x, 'dtype', type(x).__name__)}"
            )
        return x

    def _status(self, name: str) -> str:
        about = self.about.get(name)
        return str(about.get("status", "whole")) if isinstance(about, Mapping) else "whole"


def recorded(
    source: Any, where: str, like: Recorded | None = None, names: Any = "transformers"
) -> Recorded:
    """Open what `compare` takes.

    Parameters
    ----------
    source : Trace, mapping, golden bundle, str or Path
        A mapping may have an `index`; without one, or without steps, it has those of `like`.
    where : str
        "mine" or "gold", for messages.
    like : Recorded, optional
    names : str or Path
        What the values are called, where they are no trace.

    Raises
    ------
    NpllmOSError, NpllmValueError, NpllmTypeError
    """
    config = like.config if like else None
    name_map(names)  # a name that is none is an error, wherever it would be needed
    if isinstance(source, str | Path):
        return _from_path(Path(source), like, names, config)
    if not isinstance(source, Mapping):
        if hasattr(source, "values") and isinstance(getattr(source, "folder", None), Path):
            return _from_bundle(source.folder, source.values, source.index)
        raise NpllmTypeError(
            f"{where} must be a trace, a mapping from names to arrays, a folder or a golden "
            f"bundle, got {type(source).__name__}"
        )
    index = getattr(source, "index", None)
    if isinstance(index, Mapping):
        return _with_steps(source, index, where, like)
    if names == "transformers" and all(_is_ours(name) for name in source):
        return _with_steps(source, {}, where, like)
    from npllm.tracing.readers import rename_arrays

    trace = rename_arrays(source, names=names, config=config)
    return _with_steps(trace, trace.index, where, like)


def _is_ours(name: Any) -> bool:
    """Tell whether a name is npllm's."""
    parts = str(name).partition("@")[0].split(".")
    general = ".".join("N" if part.isdigit() else part for part in parts)
    return general in NAMES or general in PAIRS


def _with_steps(
    values: Mapping[str, Any], index: Mapping[str, Any], where: str, like: Recorded | None
) -> Recorded:
    """Take the steps of the other side where there are none."""
    if index.get("steps") or (index and like is None):
        return Recorded(values, index, where)
    if like is None:
        raise NpllmTypeError(
            f"{where} has no index that says its steps and config; use what npllm.trace or "
            "npllm.Trace.load returns"
        )
    return Recorded(values, {**index, "steps": like.index["steps"]}, where)


def _from_path(path: Path, like: Recorded | None, names: Any, config: Any) -> Recorded:
    """Open a trace, a golden bundle, files of arrays, or what llama-eval-callback printed."""
    if (path / "index.json").is_file():
        return _from_folder(path)
    if like is None:
        raise NpllmOSError(f"{path}: holds no index.json; `npllm trace` and Trace.save write one")
    if any(path.glob("step-*.safetensors")):
        raise NpllmOSError(
            f"{path}: holds the values of a trace and no index.json: it is incomplete; record it "
            "again"
        )
    from npllm.tracing import readers

    if path.is_dir() or path.suffix in (".npz", ".npy", ".safetensors"):
        trace = readers.read_arrays(path, names=names, config=config)
    else:
        names = "gguf" if names == "transformers" else names
        trace = readers.read_eval_callback(path, names=names, config=config)
    return _with_steps(trace, trace.index, str(path), like)


def _from_folder(folder: Path) -> Recorded:
    """Open a trace, or a golden bundle, that lies in a folder."""
    if "format" not in read_json(folder / "index.json"):
        from npllm.testing.golden_bundles import Golden

        bundle = Golden(folder.name, folder)
        return _from_bundle(folder, bundle.values, bundle.index)
    from npllm.tracing.trace import Trace

    trace = Trace.load(folder)
    return Recorded(trace, trace.index, str(folder))


def _from_bundle(folder: Path, values: Mapping[str, Array], about: Mapping[str, Any]) -> Recorded:
    """Make the index of a golden bundle from its files."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") == "bert" or "input_ids" not in values:
        raise NpllmValueError(
            f"{folder}: only decoders are compared; this bundle is of model_type "
            f"{config.get('model_type')}"
        )
    ids = np.asarray(values["input_ids"])
    step = {"input_ids": ids.tolist(), "attention_mask": None, "n_past": 0, "cached": False}
    index = {"config": config, "dtype": "float64", "steps": [step], "model": str(folder)}
    index["values"] = about.get("values", {})
    kept = {name: x for name, x in values.items() if name.startswith(("model.", "lm_head"))}
    return Recorded(kept, index, str(folder), folder)
