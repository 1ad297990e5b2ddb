"""What errors of the inputs of an operation do to its output, to first order.

A value that was not recorded is computed anew from those before it.  The implementation has rounded
it, we have not: the difference is within its budget, and enters the next operation as an error of
its input.  With errors e of the inputs x and the derivatives J = dy/dx,

    |dy| <= |J| e                    whatever the errors are (p = 1)
    |dy| ~ sqrt(J**2 e**2)           where they are independent (p = 2)

Both are (|J|**p e**p) ** (1/p).  Errors that reach a value on two ways, such as the residual stream
and what is added to it, are not independent; `SAFETY` stands for that.

Source: Higham, "Accuracy and Stability of Numerical Algorithms" (2nd ed. 2002), section 3.3,
running error analysis.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from npllm.testing.inputs import f64, visible_keys, widened_weight
from npllm.tracing.operations import Call, linear_blocks

__all__ = ["SAFETY", "carried"]

Array = Any
Errors = Mapping[str, Any]

SAFETY = 2.0


def carried(call: Call, errors: Errors, p: int) -> Array:
    """Bound how far errors of the inputs move the output.

    Parameters
    ----------
    call : Call
    errors : dict of float64 array
        By the names of `call.inputs`, each in the shape of its input; None where it is exact.
    p : int
        1: the largest error; 2: that of independent errors.

    Returns
    -------
    error : float64 array
        In the shape of the output; the number 0 where every input is exact.
    """
    given = {name: e for name, e in errors.items() if e is not None}
    if not given:
        return 0.0
    with np.errstate(all="ignore"):
        if call.arrange is not None:
            zero = (np.zeros_like(call.arguments[name]) for name in call.inputs)
            return call.arrange(*(errors[n] if n in given else z for n, z in _pair(call, zero)))
        powers = {name: e**p for name, e in given.items()}
        moved = RULES[call.op](call.arguments, powers, p) ** (1 / p)
    return SAFETY * moved if p == 2 else moved


def _pair(call: Call, zeros: Any) -> Any:
    return zip(call.inputs, zeros, strict=True)


def _linear(a: Errors, e: Errors, p: int) -> Array:
    blocks = linear_blocks(Call("linear", dict(a), ("x",)))
    weights = (widened_weight(block.arguments["weight"])[0] for block in blocks)
    return np.concatenate([e["x"] @ (np.abs(w) ** p).T for w in weights], axis=-1)


def _rms_norm(a: Errors, e: Errors, p: int) -> Array:
    """Move y_i by w_i / r (e_i - x_i sum_j x_j e_j / (n r**2)), r**2 = mean x**2 + eps."""
    x, w = a["x"], a["weight"]
    square = np.mean(x * x, axis=-1, keepdims=True) + a["eps"]
    along = np.sum(np.abs(x) ** p * e["x"], axis=-1, keepdims=True)
    along = along * (np.abs(x) / (x.shape[-1] * square)) ** p
    return (np.abs(w) / np.sqrt(square)) ** p * (e["x"] + along)


def _rope(a: Errors, e: Errors, p: int) -> Array:
    x, half = a["x"], a["cos"].shape[-1] // 2
    cos, sin = (np.abs(a[name][..., None, :, :half]) for name in ("cos", "sin"))
    e_x = e.get("x", np.zeros_like(x))
    first, second, rest = e_x[..., :half], e_x[..., half : 2 * half], e_x[..., 2 * half :]
    u, v = np.abs(x[..., :half]) ** p, np.abs(x[..., half : 2 * half]) ** p
    e_c, e_s = (
        e[name][..., None, :, :half] if name in e else np.zeros_like(cos) for name in ("cos", "sin")
    )
    top = first * cos**p + second * sin**p + u * e_c + v * e_s
    bottom = second * cos**p + first * sin**p + v * e_c + u * e_s
    return np.concatenate([top, bottom, rest], axis=-1)


def _swiglu(a: Errors, e: Errors, p: int) -> Array:
    gate, up = a["gate"], a["up"]
    logistic = 1 / (1 + np.exp(-gate))
    slope = logistic * (1 + gate * (1 - logistic)) * up
    moved = np.abs(slope) ** p * e.get("gate", 0.0)
    return moved + np.abs(gate * logistic) ** p * e.get("up", 0.0)


def _add(_: Errors, e: Errors, p: int) -> Array:  # noqa: ARG001
    return e.get("x", 0.0) + e.get("y", 0.0)


def _attention(a: Errors, e: Errors, p: int) -> Array:
    """Move y by sum_j p_j ds_j (v_j - y) + p_j dv_j, ds_j = scale (q . dk_j + dq . k_j)."""
    q, k, v = (np.nan_to_num(f64(a[name])) for name in "qkv")
    group = q.shape[1] // k.shape[1]
    seen = visible_keys((q.shape[2], k.shape[2]), False, None, None, a["mask"])
    seen = np.broadcast_to(seen, (*q.shape[:3], k.shape[2]))
    y = np.zeros((*q.shape[:3], v.shape[3]))
    for b, h in np.ndindex(q.shape[:2]):
        own, shared = (b, h), (b, h // group)
        errors = {n: x[own if n == "q" else shared] for n, x in e.items()}
        y[own] = _head(q[own], k[shared], v[shared], seen[own], errors, p)
    return y


def _head(q: Array, k: Array, v: Array, seen: Array, e: Errors, p: int) -> Array:
    scale = q.shape[-1] ** -0.5
    s = np.where(seen, scale * (q @ k.T), -np.inf)
    w = np.exp(s - np.maximum(np.max(s, axis=-1, keepdims=True), -1e300))
    w = w / np.maximum(np.sum(w, axis=-1, keepdims=True), 1e-300)
    y = w @ v
    moved = w**p @ e["v"] if "v" in e else np.zeros_like(y)
    by_key = scale**p * (np.abs(q) ** p @ e["k"].T) if "k" in e else 0.0
    by_query = scale**p * (e["q"] @ (np.abs(k) ** p).T) if "q" in e else 0.0
    if p == 2:  # errors of keys are independent, that of the query moves all scores together
        around = w * w * by_key + w * by_query
        return moved + _spread(around, v, y)
    delta = w * (by_key + by_query)
    total = np.sum(delta, axis=-1, keepdims=True)
    return moved + np.sqrt(total * _spread(delta, v, y))


def _spread(weight: Array, v: Array, y: Array) -> Array:
    """sum_j w_j (v_j - y)**2, without the table of all differences."""
    total = np.sum(weight, axis=-1, keepdims=True)
    around = weight @ (v * v) - 2 * (weight @ v) * y + total * y * y
    return np.maximum(around, 0.0)


RULES: dict[str, Callable[[Errors, Errors, int], Array]] = {
    "linear": _linear,
    "rms_norm": _rms_norm,
    "rope": _rope,
    "swiglu": _swiglu,
    "add": _add,
    "attention": _attention,
}
