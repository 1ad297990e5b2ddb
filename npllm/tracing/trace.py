"""Trace: the values of a run by name, with an index that says how each was made."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from npllm.config.strict_json import quote
from npllm.errors import NpllmKeyError, NpllmValueError
from npllm.tracing.folder import (
    FolderValues,
    files_of,
    folder_path,
    new_folder,
    read_index,
    write_index,
    write_values,
)
from npllm.tracing.index import check_index, file_name

__all__ = ["Trace"]

Array = Any


class Trace(Mapping[str, Array]):
    """Values of a run: a mapping from name to NumPy array, in the order of execution.

    Parameters
    ----------
    index : dict
        Content of index.json, as docs/trace.md describes it.
    values : mapping of str to NumPy array
        With the names of `index["values"]`.

    Attributes
    ----------
    index : dict
        `index["values"][name]` says how a value was made, `index["steps"]` what the tokens were.

    Raises
    ------
    NpllmValueError
        When the index is none, or lists other names than there are values.
    """

    def __init__(self, index: dict[str, Any], values: Mapping[str, Array]) -> None:
        check_index(index, "index")
        wrong = sorted(index["values"].keys() ^ values.keys())
        if wrong:
            raise NpllmValueError(
                f"the index has {len(index['values'])} names and there are {len(values)} values; "
                f"only one of the two has {', '.join(map(quote, wrong[:4]))}"
            )
        self.index, self._values = index, values

    def __getitem__(self, name: str) -> Array:
        if name not in self.index["values"]:
            near = get_close_matches(str(name), self.index["values"], 3, 0.5)
            meant = f"; there are {', '.join(near)}" if near else ""
            raise NpllmKeyError(f"the trace holds no value {quote(name)}{meant}")
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self.index["values"]

    def __iter__(self) -> Iterator[str]:
        return iter(self.index["values"])

    def __len__(self) -> int:
        return len(self.index["values"])

    def __repr__(self) -> str:
        n_steps, model = len(self.index["steps"]), self.index.get("model")
        return f"<npllm.Trace of {model}: {len(self)} values, {n_steps} step(s)>"

    def save(self, folder: Any) -> None:
        """Write index.json and the values, one file for each layer of each step.

        Parameters
        ----------
        folder : str or Path
            New, or empty.

        Raises
        ------
        NpllmValueError
            When the folder holds files.
        NpllmOSError
            When it cannot be written.
        """
        folder = new_folder(folder)
        for entry in self.index["values"].values():
            entry["file"] = file_name(entry["step"], entry["node"])
        for file, names in files_of(self.index["values"]).items():
            write_values(folder, file, {name: self[name] for name in names})
        write_index(folder, self.index)

    @classmethod
    def load(cls, folder: Any) -> "Trace":
        """Open a folder that `save` or `npllm trace` wrote.

        Parameters
        ----------
        folder : str or Path

        Returns
        -------
        trace : Trace
            Reads each value when it is asked for, as a read-only view of the mapped file.

        Raises
        ------
        NpllmOSError
            When a file is missing, truncated or not safetensors.
        NpllmValueError
            When index.json is no index of a trace, or does not fit the files; names the file and
            the tensor.
        """
        folder = folder_path(folder)
        index = read_index(folder)
        return cls(index, FolderValues(folder, index))
