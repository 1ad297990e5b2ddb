"""Adapters: a function of any array library as an operation with npllm's signature."""

import inspect
import re
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np

import npllm.ops as _ops
from npllm.arrays import DTYPES, to_numpy
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.ops.checked import expected_result
from npllm.testing.layouts import Layout
from npllm.testing.libraries import LIBRARIES, from_numpy, to_host

__all__ = ["MASKS", "adapt"]

Array = Any

MASKS = ("bool", "inverted", "additive", "none")
ALIASES = {"mask": ("mask", "attn_mask", "attention_mask"), "scale": ("scale", "sm_scale", "softmax_scale"),
           "softcap": ("softcap", "logits_soft_cap"), "bias": ("bias",)}
"""What other libraries call the options of attention."""


def adapt(fn: Callable, op: str, *, library: str, layout: str = "b h n d", dtype: str | None = None, mask: str = "bool",
          allow_nan: bool = False) -> Callable:
    """Make an operation of npllm's signature of a function of another library.

    Parameters
    ----------
    fn : callable
        Takes the arguments of `npllm.ops.<op>` in the same order, as arrays of `library`.  Of attention's options it is given
        those that its signature names: mask (or attn_mask), scale, bias, softcap.
    op : str
        "attention", "linear", "rms_norm", "layer_norm", "apply_rope", "swiglu", "gelu", "silu", "softmax", "embed" or "add".
    library : str
        "numpy", "torch", "jax", "cupy", "dlpack" or "array_api_strict".
    layout : str
        Of q, k, v and the result of attention, and of x of apply_rope: like an einops pattern of b, h, n, d.
    dtype : str, optional
        To which float inputs are rounded before, and in which the result must come.  None: as the inputs are.
    mask : str
        What attention's function takes: "bool" (True = visible), "inverted" (True = hidden), "additive" (0 or -inf, in the
        inputs' dtype, a bias added to it) or "none" (it makes its own).
    allow_nan : bool
        Do not raise for NaN in the result where no input holds any.

    Returns
    -------
    op : callable
        NumPy arrays in, NumPy arrays out; the result in the dtype of the first input.

    Raises
    ------
    NpllmValueError, NpllmTypeError, MissingExtraError
        For an unknown operation, library, layout, dtype or kind of mask.  When called: for an option that the function does not
        take, and for a result of another library, dtype or shape, or with NaN.

    Notes
    -----
    bfloat16 goes to torch by its bits.  JAX gets contiguous copies, torch gets views unless they are read-only.
    """
    if library not in LIBRARIES:
        raise NpllmValueError(f"library must be one of {', '.join(LIBRARIES)}, got {library!r}")
    if mask not in MASKS:
        raise NpllmValueError(f"mask must be one of {', '.join(MASKS)}, got {mask!r}")
    if dtype is not None and dtype not in DTYPES:
        raise NpllmValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if op not in ADAPTERS:
        raise NpllmValueError(f"op must be one of {', '.join(ADAPTERS)}, got {op!r}")
    call = _Call(fn, op, library, Layout(layout), dtype, mask, allow_nan)
    definition = _ops.attention if op == "attention" else getattr(_ops, op)
    return wraps(definition)(ADAPTERS[op](call))


class _Call:
    """One adapted function: how its arguments go in and its result comes out."""

    def __init__(self, fn: Callable, op: str, library: str, layout: Layout, dtype: str | None, mask: str, allow_nan: bool) -> None:
        self.fn, self.op, self.library, self.layout, self.mask = fn, op, library, layout, mask
        self.dtype = None if dtype is None else DTYPES[dtype]
        self.allow_nan = allow_nan
        self.name = f"{op} ({getattr(fn, '__name__', type(fn).__name__)}, {library})"
        self.names = _parameters(fn)

    def rounded(self, x: Array) -> Array:
        """The array on the host, a float one in the dtype of the function."""
        x = to_numpy(x)
        if self.dtype is None or str(x.dtype) not in DTYPES or x.dtype == self.dtype:
            return x
        with np.errstate(over="ignore"):  # to infinity, as the type says
            return x.astype(self.dtype)

    def give(self, x: Any) -> Any:
        """An argument for the function: arrays in its library, numbers as they are."""
        return from_numpy(self.rounded(x), self.library) if hasattr(x, "shape") and x.shape is not None else x

    def accepts(self, option: str) -> str | None:
        """The name under which the function takes an option; None where it does not."""
        return next((name for name in ALIASES[option] if self.names is None or name in self.names), None)

    def take(self, result: Any, like: Array, shape: tuple[int, ...], layout: Layout | None, clean: bool) -> Array:
        """The checked result on the host, in the dtype of `like`."""
        y = to_host(result, self.library, self.name)
        wanted = like.dtype if self.dtype is None else self.dtype
        if y.dtype != wanted:
            raise NpllmTypeError(f"{self.name} must return {wanted}, the dtype it was given, got {y.dtype}")
        if layout is not None:
            y = layout.unpack(y, shape, self.name)
        elif tuple(y.shape) != shape:
            raise NpllmValueError(f"{self.name} must return the shape {list(shape)}, got {list(y.shape)}")
        wrong = np.isnan(y.astype(np.float64))
        if clean and wrong.any() and not self.allow_nan:
            first = [int(n) for n in np.argwhere(wrong)[0]]
            raise NpllmValueError(f"{self.name} returned NaN in {np.count_nonzero(wrong)} of {wrong.size} entries, first at {first}; "
                                  "no input holds NaN")
        return y if y.dtype == like.dtype else y.astype(like.dtype)


def _parameters(fn: Callable) -> set[str] | None:
    """Names of a function's parameters, of a compiled one those in its docstring; None where it takes any or does not tell."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        stated = re.search(r"\w+\(([^()]*)", fn.__doc__ or "")
        return {name.strip(" *").split("=")[0].split(":")[0] for name in stated[1].split(",")} if stated else None
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters) else {p.name for p in parameters}


def _clean(*arrays: Any) -> bool:
    """Tell whether no float array holds NaN."""
    return not any(str(x.dtype) in DTYPES and np.isnan(to_numpy(x).astype(np.float64)).any()
                   for x in arrays if hasattr(x, "dtype"))


def _row_op(call: _Call) -> Callable:
    """Adapt an operation that takes its arrays as they are."""
    signature = inspect.signature(getattr(_ops, call.op))

    def op(*args: Any, **kwargs: Any) -> Array:
        bound = signature.bind(*args, **kwargs)
        arguments = {name: x for name, x in bound.arguments.items() if x is not None}
        expected = expected_result(call.op, arguments)
        result = call.fn(*(call.give(x) for x in arguments.values()))
        first = arguments["weight"] if call.op == "embed" else next(iter(arguments.values()))
        shape = expected[1] if expected else tuple(first.shape)
        return call.take(result, to_numpy(first), shape, None, _clean(*arguments.values()))

    return op


def _apply_rope(call: _Call) -> Callable:
    """Adapt a rotation: x in the layout of the function, tables as they are."""

    def op(x: Array, cos: Array, sin: Array, *, interleaved: bool = False) -> Array:
        if interleaved:
            raise NpllmTypeError(f"{call.name} is called for half-split pairs; got interleaved=True, which adapt does not hand on")
        host = to_numpy(x)
        rows = host.reshape(-1, *host.shape[-3:])
        pieces = rows if not call.layout.batched else [rows]
        found = [_rotate(call, piece, cos, sin, index) for index, piece in enumerate(pieces)]
        return np.stack(found).reshape(host.shape) if not call.layout.batched else found[0].reshape(host.shape)

    return op


def _rotate(call: _Call, piece: Array, cos: Array, sin: Array, index: int) -> Array:
    """Rotate one sequence, or all at once."""
    if not call.layout.batched and cos.ndim > 2:
        cos, sin = cos[index], sin[index]
    result = call.fn(from_numpy(call.layout.pack(call.rounded(piece)), call.library), call.give(cos), call.give(sin))
    return call.take(result, piece, piece.shape, call.layout, _clean(piece, cos, sin))


def _attention(call: _Call) -> Callable:
    """Adapt an attention: layouts, masks and batches."""

    def op(q: Array, k: Array, v: Array, *, mask: Any = None, bias: Array = None, scale: float | None = None,
           softcap: float | None = None, q_slots: Array = None, k_slots: Array = None, return_lse: bool = False) -> Array:
        if return_lse:
            raise NpllmTypeError(f"{call.name} was asked for return_lse=True, which an adapted function does not give")
        clean = _clean(q, k, v, bias)
        host, lead = [to_numpy(x) for x in (q, k, v)], q.shape[:-3]
        q4, k4, v4 = (x.reshape(-1, *x.shape[-3:]) for x in host)
        seen = _visible(mask, (len(q4), q4.shape[1], q4.shape[2], k4.shape[2]), q_slots, k_slots)
        options = _options(call, q4, seen, bias, scale, softcap)
        shape = (*q4.shape[:-1], v4.shape[-1])
        if call.layout.batched:
            y = _attend(call, q4, k4, v4, options, shape, clean)
        else:
            y = np.stack([_attend(call, q4[n], k4[n], v4[n], _row(options, n), shape[1:], clean) for n in range(len(q4))])
        return y.reshape(*lead, *shape[1:])

    return op


def _attend(call: _Call, q: Array, k: Array, v: Array, options: dict[str, Any], shape: tuple[int, ...], clean: bool) -> Array:
    """Call the function on arrays in its layout and library."""
    arrays = (from_numpy(call.layout.pack(call.rounded(x)), call.library) for x in (q, k, v))
    result = call.fn(*arrays, **{name: call.give(x) for name, x in options.items()})
    return call.take(result, q, shape, call.layout, clean)


def _row(options: dict[str, Any], n: int) -> dict[str, Any]:
    """The options of one sequence of a batch."""
    return {name: x[min(n, len(x) - 1)] if hasattr(x, "shape") else x for name, x in options.items()}


def _visible(mask: Any, shape: tuple[int, ...], q_slots: Array, k_slots: Array) -> Array:
    """The table of a mask, bool [n_batch or 1, n_head or 1, n_seq, n_ctx]."""
    n_seq, n_ctx = shape[2:]
    if mask is None:
        return np.ones((1, 1, n_seq, n_ctx), dtype=bool)
    table = _ops.mask.to_bool(mask, n_seq, n_ctx, q_slots, k_slots) if callable(mask) else to_numpy(mask)
    table = np.broadcast_to(table, (*table.shape[:-2], n_seq, n_ctx)) if table.ndim > 1 else np.broadcast_to(table, (n_seq, n_ctx))
    return table.reshape((1,) * max(0, 4 - table.ndim) + (-1,) * (table.ndim > 4) + table.shape[max(0, table.ndim - 3):]) \
        if table.ndim != 4 else table


def _options(call: _Call, q: Array, seen: Array, bias: Array, scale: float | None, softcap: float | None) -> dict[str, Any]:
    """Keyword arguments of attention's function; raises for one that is asked for and not taken."""
    options: dict[str, Any] = {}
    kind = np.float32 if str(q.dtype) not in DTYPES else (call.dtype or q.dtype)
    bias = None if bias is None else to_numpy(bias)
    if call.mask != "none":
        table = {"bool": seen, "inverted": ~seen}.get(call.mask)
        if table is None:
            table = np.where(seen, 0.0 if bias is None else bias.astype(np.float64), -np.inf).astype(kind)
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


def _taken(call: _Call, option: str, value: Any) -> str:
    """The function's name for an option; raises where it takes none."""
    name = call.accepts(option)
    if name is None:
        shown = list(value.shape) if hasattr(value, "shape") else value
        more = '; mask="none" says that it makes its own' if option == "mask" else ""
        raise NpllmTypeError(f"{call.name} was asked for {option} = {shown}, but its signature names none of "
                             f"{', '.join(ALIASES[option])}, only {', '.join(sorted(call.names or ()))}{more}")
    return name


ADAPTERS: dict[str, Callable[[_Call], Callable]] = {
    "attention": _attention, "apply_rope": _apply_rope,
    **dict.fromkeys(("linear", "rms_norm", "layer_norm", "swiglu", "gelu", "silu", "softmax", "embed", "add"), _row_op),
}
"""One adapter an operation."""
