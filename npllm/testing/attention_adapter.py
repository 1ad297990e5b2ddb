"""The adapter of attention: layouts, masks from rules, options, batches."""

from collections.abc import Callable
from typing import Any

import numpy as np

import npllm.ops as _ops
from npllm.arrays import DTYPES, to_numpy
from npllm.errors import NpllmTypeError
from npllm.testing.calls import ALIASES, AdaptedCall, holds_no_nan
from npllm.testing.libraries import from_numpy

__all__ = ["adapt_attention"]

Array = Any


def adapt_attention(call: AdaptedCall) -> Callable:
    """Adapt an attention: layouts, masks and batches."""

    def op(
        q: Array,
        k: Array,
        v: Array,
        *,
        mask: Any = None,
        bias: Array = None,
        scale: float | None = None,
        softcap: float | None = None,
        q_slots: Array = None,
        k_slots: Array = None,
        return_lse: bool = False,
    ) -> Array:
        if return_lse:
            raise NpllmTypeError(
                f"{call.name} was asked for return_lse=True; an adapted function does not give it"
            )
        clean = holds_no_nan(q, k, v, bias)
        host, lead = [to_numpy(x) for x in (q, k, v)], q.shape[:-3]
        q4, k4, v4 = (x.reshape(-1, *x.shape[-3:]) for x in host)
        seen = _visible(mask, (len(q4), q4.shape[1], q4.shape[2], k4.shape[2]), q_slots, k_slots)
        options = _options(call, q4, seen, bias, scale, softcap)
        shape = (*q4.shape[:-1], v4.shape[-1])
        if call.layout.batched:
            y = _attend(call, q4, k4, v4, options, shape, clean)
        else:
            y = np.stack(
                [
                    _attend(call, q4[n], k4[n], v4[n], _row(options, n), shape[1:], clean)
                    for n in range(len(q4))
                ]
            )
        return y.reshape(*lead, *shape[1:])

    return op


def _attend(
    call: AdaptedCall,
    q: Array,
    k: Array,
    v: Array,
    options: dict[str, Any],
    shape: tuple[int, ...],
    clean: bool,
) -> Array:
    """Call the function on arrays in its layout and library."""
    arrays = (from_numpy(call.layout.pack(call.rounded(x)), call.library) for x in (q, k, v))
    result = call.fn(*arrays, **{name: call.give(x) for name, x in options.items()})
    return call.take(result, q, shape, call.layout, clean)


def _row(options: dict[str, Any], n: int) -> dict[str, Any]:
    """The options of one sequence of a batch."""
    return {
        name: x[min(n, len(x) - 1)] if hasattr(x, "shape") else x for name, x in options.items()
    }


def _visible(mask: Any, shape: tuple[int, ...], q_slots: Array, k_slots: Array) -> Array:
    """The table of a mask, bool [n_batch or 1, n_head or 1, n_seq, n_ctx]."""
    n_seq, n_ctx = shape[2:]
    if mask is None:
        return np.ones((1, 1, n_seq, n_ctx), dtype=bool)
    table = (
        _ops.mask.to_bool(mask, n_seq, n_ctx, q_slots, k_slots)
        if callable(mask)
        else to_numpy(mask)
    )
    table = (
        np.broadcast_to(table, (*table.shape[:-2], n_seq, n_ctx))
        if table.ndim > 1
        else np.broadcast_to(table, (n_seq, n_ctx))
    )
    return (
        table.reshape(
            (1,) * max(0, 4 - table.ndim)
            + (-1,) * (table.ndim > 4)
            + table.shape[max(0, table.ndim - 3) :]
        )
        if table.ndim != 4
        else table
    )


def _options(
    call: AdaptedCall,
    q: Array,
    seen: Array,
    bias: Array,
    scale: float | None,
    softcap: float | None,
) -> dict[str, Any]:
    """Keyword arguments of attention's function; raises for one that is asked for and not taken."""
    options: dict[str, Any] = {}
    kind = np.float32 if str(q.dtype) not in DTYPES else (call.dtype or q.dtype)
    bias = None if bias is None else to_numpy(bias)
    if call.mask != "none":
        table = {"bool": seen, "inverted": ~seen}.get(call.mask)
        if table is None:
            table = np.where(
                seen, 0.0 if bias is None else bias.astype(np.float64), -np.inf
            ).astype(kind)
            bias = None
        options[_taken(call, "mask", seen)] = np.ascontiguousarray(table)
    default = q.shape[-1] ** -0.5
    name = call.accepts("scale")
    if name and call.names is not None:
        options[name] = default if scale is None else float(scale)
    elif scale is not None and scale != default:
        options[_taken(call, "scale", scale)] = float(scale)
    for option, value in (("bias", bias), ("softcap", softcap)):
        if value is not None:
            options[_taken(call, option, value)] = value
    return options


def _taken(call: AdaptedCall, option: str, value: Any) -> str:
    """The function's name for an option; raises where it takes none."""
    name = call.accepts(option)
    if name is None:
        shown = list(value.shape) if hasattr(value, "shape") else value
        more = '; mask="none" says that it makes its own' if option == "mask" else ""
        raise NpllmTypeError(
            f"{call.name} was asked for {option} = {shown}, but its signature names none of "
            f"{', '.join(ALIASES[option])}, only {', '.join(sorted(call.names or ()))}{more}"
        )
    return name
