"""The text that llama.cpp's `llama-eval-callback` prints, as a trace.

Of each tensor it prints three entries at each end of an axis, and the sum.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from npllm.config.regular_file import read_text
from npllm.config.strict_json import config_data, quote
from npllm.errors import NpllmValueError
from npllm.tracing.readers.name_maps import NameMap, name_map
from npllm.tracing.readers.placing import Value, placed, trace_of
from npllm.tracing.trace import Trace

__all__ = ["read_eval_callback"]

Array = Any
Lines = list[tuple[int, str]]  # numbers and texts

LARGEST_TEXT = 2**28  # bytes
HEADER = re.compile(
    r"(?:ggml_debug|common_debug_cb_eval):\s+(?P<name>\S.*?) = (?:\((?P<dtype>\w+)\)\s*)?"
    r"(?P<op>\w+)\(.*\) = \{(?P<sizes>[\d, ]+)\}\s*$"
)
SUM = re.compile(r"\s*sum = (\S+)\s*$")
TOKEN = re.compile(r"[\[\]]|\.\.\.|[^\s,\[\]]+")
DECIMALS = re.compile(r"\d+\.(\d+)|$").findall
COUNT = re.compile(r"number of input tokens = (\d+)")


class Printed(NamedTuple):
    """A tensor as it was printed."""

    name: str
    op: str
    shape: tuple[int, ...]  # in C order
    body: Lines
    total: float | None


def read_eval_callback(path: Any, *, names: Any = "gguf", config: Any = None) -> Trace:
    """Read the output of `llama-eval-callback`, of releases from 2024 on.

        llama-eval-callback -m model.gguf -p "The capital of France is" > values.txt 2>&1

    Parameters
    ----------
    path : str or Path
        The text; other lines may stand between.
    names : str, Path or NameMap
        As `npllm.tracing.readers.name_maps.name_map` takes them.
    config : dict, str or Path, optional
        The config.json of the model, for the index.

    Returns
    -------
    trace : Trace
        float64 arrays of the entries that were printed.  Their status in the index is "partial",
        "kept" has their indices along each axis, "full shape" and "sum" are of the whole value,
        "rounded to" is the unit of the last decimal.  Where a tensor is printed again, the second
        time is step 1.

    Raises
    ------
    NpllmOSError
        When the file cannot be read.
    NpllmValueError
        When there is no such tensor in the text, or one is cut off or not as its header says;
        names the file and the line.

    Notes
    -----
    Releases before August 2025 sum only the entries that they print.

    Source: `common_debug_print_tensor` in llama.cpp's common/debug.cpp.
    """
    path = Path(path)
    text = read_text(path, LARGEST_TEXT)
    printed = list(_printed(text, path))
    values, ignored = _placed(printed, name_map(names), path)
    if not values:
        raise NpllmValueError(
            f"{path}: holds no tensor of llama-eval-callback that the map knows; found "
            f"{len(printed)} others, such as {', '.join(quote(name) for name in ignored[:4])}"
        )
    content = None if config is None else config_data(config)[0]
    about = {"made by": "llama-eval-callback", "config": content, "ignored": ignored}
    return trace_of(values, about | {"dtype": None}, _steps(text))


def _printed(text: str, path: Path) -> Iterator[Printed]:
    """Every tensor of the text: its header and the lines up to its sum."""
    lines = list(enumerate(text.splitlines(), 1))
    heads = [(at, match) for at, (_, line) in enumerate(lines) if (match := HEADER.search(line))]
    stops = [*(at for at, _ in heads), len(lines)][1:]
    for (at, match), stop in zip(heads, stops, strict=True):
        sizes = [int(size) for size in match["sizes"].split(",") if size.strip()]
        if len(sizes) != 4:
            raise NpllmValueError(f"{path}:{lines[at][0]}: must have four sizes, got {sizes}")
        body, total = _body(lines[at + 1 : stop], f"{path}:{lines[at][0]}")
        yield Printed(match["name"].strip(), match["op"], tuple(sizes[::-1]), body, total)


def _body(lines: Lines, where: str) -> tuple[Lines, float | None]:
    """The lines of brackets below a header, and the sum."""
    body: Lines = []
    total, depth = None, 0
    for number, line in lines:
        found = SUM.match(line)
        if found:
            total = _number(found[1], f"{where.rpartition(':')[0]}:{number}")
        elif depth > 0 or line.strip().startswith("["):
            depth += line.count("[") - line.count("]")
            body.append((number, line))
        elif line.strip():
            break
    return body, total


def _placed(
    printed: list[Printed], mapping: NameMap, path: Path
) -> tuple[dict[tuple[int, str], Value], list[str]]:
    """The tensors that the map knows, in our axes; and the names of the others."""
    present = {tensor.name for tensor in printed}
    values: dict[tuple[int, str], Value] = {}
    times: dict[tuple[str, str], int] = {}
    ignored: dict[str, None] = {}
    n_seq = 0
    for tensor in printed:
        found = mapping.find(tensor.name, op=tensor.op, names=present)
        axes = () if found is None else found[1]
        if found is None or not tensor.body or set(tensor.shape[: 4 - len(axes)]) - {1}:
            ignored[tensor.name] = None
            continue
        step = times.get((tensor.name, tensor.op), 0)
        times[tensor.name, tensor.op] = step + 1
        value = _value(tensor, len(axes), path)
        if found[0] == "model.embed_tokens":
            n_seq = tensor.shape[2]
        values.setdefault((step, found[0]), placed(_at_end(value, axes, n_seq), axes, found[0], {}))
    return values, list(ignored)


def _value(tensor: Printed, n_axes: int, path: Path) -> Value:
    """Parse the brackets of a tensor, and check them against its sizes."""
    where = f"{path}:{tensor.body[0][0]}"
    nested = _nested(tensor.body, path)
    kept: list[Array] = []
    level: list[Any] = [nested]
    for size in tensor.shape:
        indices = [_indices(items, size, where) for items in level]
        if any(not np.array_equal(x, indices[0]) for x in indices):
            raise NpllmValueError(f"{where}: rows of {tensor.name} have different lengths")
        kept.append(indices[0])
        level = [item for items in level for item in items if item is not ...]
    if any(isinstance(item, list) for item in level):
        raise NpllmValueError(f"{where}: {tensor.name} has more than four levels of brackets")
    x = np.array(level, dtype=np.float64).reshape([len(indices) for indices in kept])
    skip = 4 - n_axes
    x = x.reshape(x.shape[skip:])
    unit = 10.0 ** -max(len(decimals) for _, line in tensor.body for decimals in DECIMALS(line))
    return Value(x, tuple(kept[skip:]), tensor.shape[skip:], tensor.total, unit)


def _nested(body: Lines, path: Path) -> list[Any]:
    """The brackets as nested lists, with ... where entries are left out.

    The outermost brackets are repeated for each entry of the slowest axis; a list holds them.
    """
    stack: list[list[Any]] = [[]]
    for number, line in body:
        for token in TOKEN.findall(line):
            if token == "[":
                stack.append([])
            elif token == "]":
                if len(stack) == 1:
                    raise NpllmValueError(f"{path}:{number}: a bracket closes that none opened")
                done = stack.pop()
                stack[-1].append(done)
            else:
                entry = ... if token == "..." else _number(token, f"{path}:{number}")
                stack[-1].append(entry)
    if len(stack) != 1:
        raise NpllmValueError(
            f"{path}:{body[-1][0]}: {len(stack) - 1} brackets are open at the end of a tensor; "
            "is the text complete?"
        )
    return stack[0]


def _indices(items: Any, size: int, where: str) -> Array:
    """Which entries of an axis are printed."""
    if not isinstance(items, list):
        raise NpllmValueError(f"{where}: an axis of {size} entries has no brackets")
    if ... not in items:
        first, last = len(items), 0
        fits = first == size
    else:
        first = items.index(...)
        last = len(items) - first - 1
        fits = first + last < size and items.count(...) == 1
    if not fits:
        raise NpllmValueError(
            f"{where}: an axis must have {size} entries as its header says, got {first + last}"
        )
    return np.array([*range(first), *range(size - last, size)])


def _at_end(value: Value, axes: tuple[str, ...], n_seq: int) -> Value:
    """The rows of the last layer are the last ones, where only some are computed."""
    if value.kept is None or value.shape is None or "n_seq" not in axes:
        return value
    at = axes.index("n_seq")
    before = n_seq - value.shape[at]
    if before <= 0:
        return value
    kept = (*value.kept[:at], value.kept[at] + before, *value.kept[at + 1 :])
    return value._replace(
        kept=kept, shape=(*value.shape[:at], n_seq, *value.shape[at + 1 :]), total=None
    )


def _number(token: str, where: str) -> float:
    try:
        return float(token)
    except ValueError:
        raise NpllmValueError(f"{where}: must be a number, got {quote(token)}") from None


def _steps(text: str) -> list[dict[str, Any]]:
    """The tokens, where the program prints them: a number of tokens, then one a line."""
    found = COUNT.search(text)
    if found is None:
        return []
    lines = text[found.end() :].splitlines()[1 : int(found[1]) + 1]
    ids = [line.split()[-1] for line in lines if line.split()]
    if len(ids) != int(found[1]) or not all(x.isdigit() for x in ids):
        return []
    step = {"input_ids": [[int(x) for x in ids]], "attention_mask": None, "position_ids": None}
    return [step | {"n_past": 0, "cached": False}]
