"""The index of a trace: what each value is, how it was made, and the checks of an index that is
read from a file.
"""

import platform
import re
from typing import Any

import numpy as np
import safetensors

from npllm.config.strict_json import is_int, quote
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.models.taps import NAMES, PAIRS
from npllm.tracing.graph import Node

__all__ = [
    "FORMAT",
    "check_index",
    "file_name",
    "layer_of",
    "step_name",
    "value_entry",
    "versions",
]

FORMAT = "npllm trace 1"
STATUSES = ("whole", "partial")


def step_name(node: str, step: int) -> str:
    """Name the value of a node in a step: `model.norm` in step 0, `model.norm@1` in step 1."""
    return node if step == 0 else f"{node}@{step}"


def layer_of(node: str) -> int | None:
    """Return the number of the layer that a value belongs to; None outside of the layers."""
    found = re.search(r"(?:^|\.)([0-9]{1,6})(?:\.|$)", node)
    return int(found[1]) if found else None


def file_name(step: int, node: str) -> str:
    """Name the file of a value: one for each layer of each step, one before and one after them."""
    layer = layer_of(node)
    if layer is not None:
        return f"step-{step}.layer-{layer:02d}.safetensors"
    is_last = node == "model.norm" or node.startswith("lm_head")
    return f"step-{step}.{'last' if is_last else 'first'}.safetensors"


def value_entry(node: str, step: int, x: Any, how: Node, *, is_partial: bool) -> dict[str, Any]:
    """Describe a recorded value.

    Parameters
    ----------
    node : str
        Its name without the step.
    step : int
    x : NumPy array
    how : Node
        With the names of its inputs in this run, steps included.
    is_partial : bool
        Whether positions were left out.

    Returns
    -------
    entry : dict
        As it stands in index.json.
    """
    row = re.sub(r"\.[0-9]+", ".N", node)
    axes, formula = (NAMES | PAIRS)[row]
    return {
        "file": file_name(step, node),
        "step": step,
        "node": node,
        "axes": axes_of(axes, x.ndim),
        "shape": list(x.shape),
        "dtype": x.dtype.name,
        "op": how.op,
        "inputs": list(how.inputs),
        "weights": list(how.weights),
        "formula": formula,
        "conventions": list(how.conventions),
        "status": "partial" if is_partial else "whole",
    }


def axes_of(text: str, n_axes: int) -> list[str]:
    """Split "[n_batch, n_seq]" into names; tables and masks that differ by row have n_batch too,
    and masks that differ by head n_head.
    """
    names = text.strip("[]").split(", ")
    names = names[1:] if names[0] == "..." else names
    return ["n_batch", "n_head"][: n_axes - len(names)] + names


def versions() -> dict[str, str]:
    """Return the versions of what makes a trace."""
    import npllm

    return {
        "npllm": npllm.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "safetensors": safetensors.__version__,
    }


def check_index(index: Any, where: str) -> None:
    """Raise unless a dict is an index of this format.

    Parameters
    ----------
    index : dict
        Content of an index.json.
    where : str
        Its file, for the message.

    Raises
    ------
    NpllmTypeError
        For what is no dict.
    NpllmValueError
        Names the value and the entry that cannot be right, with what it has to be.
    """
    if not isinstance(index, dict):
        raise NpllmTypeError(f"{where}: must be a dict, got {type(index).__name__}")
    _check(where, _fault(index, INDEX))
    for number, step in enumerate(index["steps"]):
        _check(f"{where}: step {number}", _fault(step, STEP))
    for name, entry in index["values"].items():
        fault = _fault(entry, ENTRY)
        if fault is None and len(entry["axes"]) != len(entry["shape"]):
            fault = f"has axes {quote(entry['axes'])}, but its shape is {quote(entry['shape'])}"
        if fault is not None:
            _check(f"{where}: {quote(name)}", fault)


def _check(where: str, fault: str | None) -> None:
    """Raise for a fault."""
    if fault is not None:
        raise NpllmValueError(f"{where}: {fault}")


def _fault(content: Any, keys: dict[str, Any]) -> str | None:
    """Say what is wrong with an object of which some keys are known; None where nothing is."""
    if not isinstance(content, dict):
        return f"must be an object, got {quote(content)}"
    for key, (fits, wanted) in keys.items():
        if not fits(content.get(key)):
            return f"{key} must be {wanted}, got {quote(content.get(key))}"
    return None


def _is_text(x: Any) -> bool:
    return isinstance(x, str)


def _are_texts(x: Any) -> bool:
    return isinstance(x, list) and all(map(_is_text, x))


def _is_count(x: Any) -> bool:
    return is_int(x) and x >= 0


def _are_sizes(x: Any) -> bool:
    return isinstance(x, list) and all(map(_is_count, x))


def _are_rows(x: Any) -> bool:
    """Rows of 32-bit integers, all of one length; None where they are not known."""
    return x is None or (
        isinstance(x, list)
        and all(isinstance(row, list) and len(row) == len(x[0]) for row in x)
        and all(is_int(number) and abs(number) < 2**31 for row in x for number in row)
    )


# Key -> the check of its value, and what the value must be.
TEXT, TEXTS = (_is_text, "a text"), (_are_texts, "a list of texts")
ROWS, COUNT = (_are_rows, "rows of 32-bit integers of one length, or null"), (_is_count, "from 0")
INDEX: dict[str, Any] = {
    "format": (lambda x: x == FORMAT, f'"{FORMAT}"'),
    "values": (lambda x: isinstance(x, dict), "an object"),
    "steps": (lambda x: isinstance(x, list), "a list"),
}
STEP: dict[str, Any] = {
    "input_ids": ROWS,
    "position_ids": ROWS,
    "attention_mask": ROWS,
    "n_past": (lambda x: x is None or _is_count(x), "from 0"),
    "cached": (lambda x: x is None or isinstance(x, bool), "true or false"),
}
ENTRY: dict[str, Any] = {
    **{key: TEXT for key in ("node", "op", "dtype", "formula")},
    **{key: TEXTS for key in ("axes", "inputs", "weights", "conventions")},
    "shape": (_are_sizes, "a list of sizes"),
    "step": COUNT,
    "status": (lambda x: x in STATUSES, " or ".join(STATUSES)),
}
