"""The index of a trace: what each value is, how it was made, and the checks of an index that
somebody else wrote.
"""

import platform
import re
from typing import Any

import numpy as np
import safetensors

from npllm.config.strict_json import is_int, quote, require
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
    NpllmValueError
        Names the value and the entry that cannot be right, with what it has to be.
    """
    require(where, isinstance(index, dict), f"must be a dict, got {type(index).__name__}")
    found = index.get("format")
    require(where, found == FORMAT, f'format must be "{FORMAT}", got {quote(found)}')
    values, steps = index.get("values"), index.get("steps")
    require(where, isinstance(values, dict), f"values must be an object, got {quote(values)}")
    require(where, isinstance(steps, list), f"steps must be a list, got {quote(steps)}")
    for number, step in enumerate(steps):
        _check_step(step, f"{where}: step {number}")
    for name, entry in values.items():
        _check_entry(entry, f"{where}: {quote(name)}")


def _check_step(step: Any, where: str) -> None:
    """Check the tokens of a step; None where they are not known."""
    require(where, isinstance(step, dict), f"must be an object, got {quote(step)}")
    for key in ("input_ids", "position_ids", "attention_mask"):
        rows = step.get(key)
        fits = rows is None or (
            isinstance(rows, list)
            and all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows)
            and all(is_int(number) for row in rows for number in row)
        )
        require(where, fits, f"{key} must be rows of integers of one length, got {quote(rows)}")
    n_past, cached = step.get("n_past", 0), step.get("cached", False)
    require(where, is_int(n_past) and n_past >= 0, f"n_past must be from 0, got {quote(n_past)}")
    require(where, isinstance(cached, bool), f"cached must be a bool, got {quote(cached)}")


def _check_entry(entry: Any, where: str) -> None:
    """Check the entry of a value."""
    require(where, isinstance(entry, dict), f"must be an object, got {quote(entry)}")
    for key in ("node", "op", "dtype", "formula"):
        value = entry.get(key)
        require(where, isinstance(value, str), f"{key} must be a text, got {quote(value)}")
    for key in ("axes", "inputs", "weights", "conventions"):
        value = entry.get(key)
        fits = isinstance(value, list) and all(isinstance(text, str) for text in value)
        require(where, fits, f"{key} must be a list of texts, got {quote(value)}")
    shape, step = entry.get("shape"), entry.get("step")
    fits = isinstance(shape, list) and all(is_int(size) and size >= 0 for size in shape)
    require(where, fits, f"shape must be a list of sizes, got {quote(shape)}")
    n_axes = len(entry["axes"])
    require(where, n_axes == len(shape), f"has {n_axes} axes, but its shape is {quote(shape)}")
    require(where, is_int(step) and step >= 0, f"step must be from 0, got {quote(step)}")
    status = entry.get("status")
    wanted = " or ".join(STATUSES)
    require(where, status in STATUSES, f"status must be {wanted}, got {quote(status)}")
