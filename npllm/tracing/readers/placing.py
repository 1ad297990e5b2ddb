"""Values of another program in the axes of ours, and the index that goes with them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from npllm.config.strict_json import config_data, quote
from npllm.errors import NpllmValueError
from npllm.models.taps import NAMES
from npllm.tracing.graph import Node, graph
from npllm.tracing.index import FORMAT, step_name, value_entry, versions
from npllm.tracing.readers.name_maps import node_key
from npllm.tracing.trace import Trace

__all__ = ["Value", "head_counts", "placed", "trace_of"]

Array = Any


class Value(NamedTuple):
    """A value in our axes.

    Parameters
    ----------
    x : array
        Of the entries that are known.
    kept : tuple of arrays, optional
        The indices of the known entries along each axis: `x == whole[np.ix_(*kept)]`.
    shape : tuple of int, optional
        Of the whole value.
    total : float, optional
        The sum of its entries.
    unit : float, optional
        What the entries were rounded to multiples of, as text is.
    """

    x: Array
    kept: tuple[Array, ...] | None = None
    shape: tuple[int, ...] | None = None
    total: float | None = None
    unit: float | None = None


def head_counts(config: Any) -> dict[str, int]:
    """Read the numbers of heads from a config.json; empty without one.

    Parameters
    ----------
    config : dict, str, Path or None
        Content of a config.json, the file, or its folder.
    """
    if config is None:
        return {}
    content, where = config_data(config)
    n_head: Any = content.get("num_attention_heads")
    counts: dict[str, int] = {
        "n_head": n_head,
        "n_kv_head": content.get("num_key_value_heads", n_head),
    }
    if not all(type(n) is int and n > 0 for n in counts.values()):
        raise NpllmValueError(f"{where}: must have num_attention_heads, got {quote(n_head)}")
    return counts


def placed(value: Value, axes: tuple[str, ...], ours: str, heads: Mapping[str, int]) -> Value:
    """Order the axes of a value as ours.

    Parameters
    ----------
    value : Value
        In their axes.
    axes : tuple of str
        Names of their axes.  A value of one sequence may lack n_batch.
    ours : str
        Our name.
    heads : mapping
        n_head and n_kv_head, to cut an axis that has all heads.

    Returns
    -------
    value : Value

    Raises
    ------
    NpllmValueError
        When the axes do not fit; names both.
    """
    value, axes = _with_batch(value, axes, ours)
    target = NAMES[node_key(ours)][0].strip("[]").split(", ")
    for at, name in enumerate(axes):
        first, star, _ = name.partition("*")
        if star and name not in target:
            value = _cut(value, at, first, ours, heads)
            axes = (*axes[:at], first, "d_head", *axes[at + 1 :])
            break
    if "n_batch" in axes and "n_batch" not in target:  # a table of one row, or one for each
        if value.x.shape[0] == 1:
            value, axes = _without_batch(value), axes[1:]
        else:
            target = ["n_batch", *target]
    return _ordered(value, [axes.index(name) for name in target])


def _with_batch(value: Value, axes: tuple[str, ...], ours: str) -> tuple[Value, tuple[str, ...]]:
    """Add the axis of the sequence where there is none; check the number of axes."""
    axes = axes if axes[0] == "n_batch" else ("n_batch", *axes)
    if value.x.ndim == len(axes) - 1:
        kept = None if value.kept is None else (np.arange(1), *value.kept)
        shape = None if value.shape is None else (1, *value.shape)
        value = value._replace(x=value.x[None], kept=kept, shape=shape)
    if value.x.ndim != len(axes):
        raise NpllmValueError(
            f"the value of {ours} must have the axes [{', '.join(axes)}], n_batch may be missing; "
            f"got the shape {list(value.x.shape)}"
        )
    return value, axes


def _cut(value: Value, at: int, first: str, ours: str, heads: Mapping[str, int]) -> Value:
    """Cut an axis that has all heads side by side."""
    shape, n = list(value.x.shape), heads.get(first)
    if n is None or value.kept is not None:
        raise NpllmValueError(f"to cut {ours} into heads, give the config.json as config=")
    if shape[at] % n:
        raise NpllmValueError(f"{ours}: {shape[at]} columns cannot be cut into {first} = {n} heads")
    return value._replace(x=value.x.reshape(*shape[:at], n, shape[at] // n, *shape[at + 1 :]))


def _without_batch(value: Value) -> Value:
    kept = None if value.kept is None else value.kept[1:]
    shape = None if value.shape is None else value.shape[1:]
    return value._replace(x=value.x[0], kept=kept, shape=shape)


def _ordered(value: Value, order: list[int]) -> Value:
    kept = None if value.kept is None else tuple(value.kept[at] for at in order)
    shape = None if value.shape is None else tuple(value.shape[at] for at in order)
    return value._replace(x=value.x.transpose(order), kept=kept, shape=shape)


def trace_of(
    values: Mapping[tuple[int, str], Value], about: Mapping[str, Any], steps: list[dict[str, Any]]
) -> Trace:
    """Make a trace of values in our axes.

    Parameters
    ----------
    values : mapping of (step, our name) to Value
    about : mapping
        What the index says beside its values: "made by", "ignored", ...
    steps : list of dict
        Token ids and the like; empty where they are not known.

    Returns
    -------
    trace : Trace
    """
    layers = [int(part) for _, name in values for part in name.split(".") if part.isdigit()]
    cached = {step for step, name in values if ".cached_" in name}
    graphs = {step: graph(max(layers, default=0) + 1, cached=step in cached) for step, _ in values}
    order = {name: at for nodes in graphs.values() for at, name in enumerate(nodes)}
    arrays, entries = {}, {}
    for step, name in sorted(values, key=lambda key: (key[0], order[key[1]])):
        value, key = values[step, name], step_name(name, step)
        how = graphs[step][name]
        how = how._replace(inputs=tuple(step_name(other, step) for other in how.inputs))
        arrays[key] = value.x
        entries[key] = _entry(name, step, value, how)
    index = {"format": FORMAT, "made with": versions(), "model": None, "ops": None, **about}
    return Trace(index | {"steps": steps, "values": entries}, arrays)


def _entry(name: str, step: int, value: Value, how: Node) -> dict[str, Any]:
    """The entry of a value in the index, with what is known of it."""
    entry = value_entry(name, step, value.x, how, is_partial=value.kept is not None)
    if value.kept is not None:
        entry["kept"] = [np.asarray(indices).tolist() for indices in value.kept]
        entry["full shape"] = list(value.shape or ())
    if value.total is not None:
        entry["sum"] = value.total
    if value.unit is not None:
        entry["rounded to"] = value.unit
    return entry
