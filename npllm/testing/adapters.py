"""Adapters: a function of any array library as an operation with npllm's signature."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np

import npllm.ops as _ops
from npllm.arrays import DTYPES, to_numpy
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.ops.checked import expected_result
from npllm.testing.attention_adapter import adapt_attention
from npllm.testing.calls import AdaptedCall, holds_no_nan
from npllm.testing.layouts import Layout
from npllm.testing.libraries import LIBRARIES, from_numpy
from npllm.testing.mutation import under_test

__all__ = ["MASKS", "adapt"]

Array = Any

MASKS = ("bool", "inverted", "additive", "none")


def adapt(
    fn: Callable,
    op: str,
    *,
    library: str,
    layout: str = "b h n d",
    dtype: str | None = None,
    mask: str = "bool",
    allow_nan: bool = False,
) -> Callable:
    """Make an operation of npllm's signature of a function of another library.

    Parameters
    ----------
    fn : callable
        Takes the arguments of `npllm.ops.<op>` in the same order, as arrays of `library`.  Of
        attention's options it is given those that its signature names: mask (or attn_mask), scale,
        bias, softcap.
    op : str
        "attention", "linear", "rms_norm", "layer_norm", "apply_rope", "swiglu", "gelu", "silu",
        "softmax", "embed" or "add".
    library : str
        "numpy", "torch", "jax", "cupy", "dlpack" or "array_api_strict".
    layout : str
        Of q, k, v and the result of attention, and of x of apply_rope: like an einops pattern of b,
        h, n, d.
    dtype : str, optional
        To which float inputs are rounded before, and in which the result must come.  None: as the
        inputs are.
    mask : str
        What attention's function takes: "bool" (True = visible), "inverted" (True = hidden),
        "additive" (0 or -inf, in the inputs' dtype, a bias added to it) or "none" (it makes its
        own).
    allow_nan : bool
        Do not raise for NaN in the result where no input holds any.

    Returns
    -------
    op : callable
        NumPy arrays in, NumPy arrays out; the result in the dtype of the first input.

    Raises
    ------
    NpllmValueError, NpllmTypeError, MissingExtraError
        For an unknown operation, library, layout, dtype or kind of mask.  When called: for an
        option that the function does not take, and for a result of another library, dtype or shape,
        or with NaN.

    Notes
    -----
    bfloat16 goes to torch by its bits.  JAX gets contiguous copies, torch gets views unless they
    are read-only.  Where the environment variable NPLLM_MUTANT names a planted bug of the
    operation, the bug is returned (`npllm mutants`).
    """
    if library not in LIBRARIES:
        raise NpllmValueError(f"library must be one of {', '.join(LIBRARIES)}, got {library!r}")
    if mask not in MASKS:
        raise NpllmValueError(f"mask must be one of {', '.join(MASKS)}, got {mask!r}")
    if dtype is not None and dtype not in DTYPES:
        raise NpllmValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if op not in ADAPTERS:
        raise NpllmValueError(f"op must be one of {', '.join(ADAPTERS)}, got {op!r}")
    call = AdaptedCall(fn, op, library, Layout(layout), dtype, mask, allow_nan)
    definition = _ops.attention if op == "attention" else getattr(_ops, op)
    adapted = under_test(wraps(definition)(ADAPTERS[op](call)), op)
    if adapted.__dict__.get("__wrapped__") is definition:  # no planted bug in its place
        adapted.npllm_features = _features(call)  # type: ignore[attr-defined]  # for `check`
    return adapted


def _features(call: AdaptedCall) -> frozenset[str]:
    """Name the features of a check that an adapted function can take."""
    if call.op != "attention":
        from npllm.testing.laws.subjects import SUBJECTS

        return frozenset(SUBJECTS[call.op].features if call.op in SUBJECTS else ())
    features = {"gqa", "cache", "empty rows"}
    if call.mask != "none":
        features |= {"window", "padding", "slots"}
    features |= {name for name in ("scale", "softcap") if call.accepts(name)}
    if call.mask == "additive" or call.accepts("bias"):
        features.add("bias")
    return frozenset(features)


def _row_op(call: AdaptedCall) -> Callable:
    """Adapt an operation that takes its arrays as they are."""
    signature = inspect.signature(getattr(_ops, call.op))

    def op(*args: Any, **kwargs: Any) -> Array:
        bound = signature.bind(*args, **kwargs)
        arguments = {name: x for name, x in bound.arguments.items() if x is not None}
        expected = expected_result(call.op, arguments)
        result = call.fn(*(call.give(x) for x in arguments.values()))
        first = arguments["weight"] if call.op == "embed" else next(iter(arguments.values()))
        shape = expected[1] if expected else tuple(first.shape)
        return call.take(result, to_numpy(first), shape, None, holds_no_nan(*arguments.values()))

    return op


def _apply_rope(call: AdaptedCall) -> Callable:
    """Adapt a rotation: x in the layout of the function, tables as they are."""

    def op(x: Array, cos: Array, sin: Array, *, interleaved: bool = False) -> Array:
        if interleaved:
            raise NpllmTypeError(
                f"{call.name} is called for half-split pairs, got interleaved=True; "
                "adapt does not hand it on"
            )
        host = to_numpy(x)
        rows = host.reshape(-1, *host.shape[-3:])
        pieces = rows if not call.layout.batched else [rows]
        found = [_rotate(call, piece, cos, sin, index) for index, piece in enumerate(pieces)]
        return (
            np.stack(found).reshape(host.shape)
            if not call.layout.batched
            else found[0].reshape(host.shape)
        )

    return op


def _rotate(call: AdaptedCall, piece: Array, cos: Array, sin: Array, index: int) -> Array:
    """Rotate one sequence, or all at once."""
    if not call.layout.batched and cos.ndim > 2:
        cos, sin = cos[index], sin[index]
    result = call.fn(
        from_numpy(call.layout.pack(call.rounded(piece)), call.library),
        call.give(cos),
        call.give(sin),
    )
    return call.take(result, piece, piece.shape, call.layout, holds_no_nan(piece, cos, sin))


ADAPTERS: dict[str, Callable[[AdaptedCall], Callable]] = {
    "attention": adapt_attention,
    "apply_rope": _apply_rope,
    **dict.fromkeys(
        ("linear", "rms_norm", "layer_norm", "swiglu", "gelu", "silu", "softmax", "embed", "add"),
        _row_op,
    ),
}
"""One adapter an operation."""
