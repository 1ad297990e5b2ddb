"""What errors of the inputs of an operation do to its output, to first order.

A value that was not recorded is computed anew from those before it.  The implementation has rounded
it, we have not: the difference is within its budget, and enters the next operation as an error of
its input.  Errors e of the entries of one input are taken as independent, those of two inputs as
equal in the worst way, since both may come from one value (the residual stream and what is added to
it).  With the derivatives J of each input

    |dy| ~ sum over inputs of sqrt(J**2 e**2)

This is a standard deviation, or five of them, and no bound: |J| e would be one, and is larger by
the root of d_model at every matrix product, so that nothing could be said after a layer.  What
stands for a bound of a chain is `CERTAIN` times as much.

Source: Higham, "Accuracy and Stability of Numerical Algorithms" (2nd ed. 2002), section 3.3,
running error analysis.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from npllm.testing.inputs import f64, visible_keys, widened_weight
from npllm.tracing.comparison.operations import Call, linear_blocks

__all__ = ["CERTAIN", "carried"]

Array = Any
Errors = Mapping[str, Any]
Parts = Iterator[Array]  # squares, one for each input

CERTAIN = 8.0


def carried(call: Call, errors: Errors) -> Array:
    """Estimate how far errors of the inputs move the output.

    Parameters
    ----------
    call : Call
    errors : dict of float64 array
        By the names of `call.inputs`, each in the shape of its input; None where it is exact.

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
            zeros = {name: np.zeros_like(call.arguments[name]) for name in call.inputs}
            return call.arrange(*(zeros | given).values())
        parts = RULES[call.op](call.arguments, {name: e * e for name, e in given.items()})
        return sum(np.sqrt(part) for part in parts)


def _linear(a: Errors, e: Errors) -> Parts:
    blocks = linear_blocks(Call("linear", dict(a), ("x",)))
    weights = (widened_weight(block.arguments["weight"])[0] for block in blocks)
    yield np.concatenate([e["x"] @ (w * w).T for w in weights], axis=-1)


def _rms_norm(a: Errors, e: Errors) -> Parts:
    """Move y_i by w_i / r (e_i - x_i sum_j x_j e_j / (n r**2)), r**2 = mean x**2 + eps."""
    x, w = a["x"], a["weight"]
    square = np.mean(x * x, axis=-1, keepdims=True) + a["eps"]
    along = np.sum(x * x * e["x"], axis=-1, keepdims=True)
    along = along * (x / (x.shape[-1] * square)) ** 2
    yield w * w / square * (e["x"] + along)


def _rope(a: Errors, e: Errors) -> Parts:
    x, half = a["x"], a["cos"].shape[-1] // 2
    cos, sin = (a[name][..., None, :, :half] ** 2 for name in ("cos", "sin"))
    first, second = x[..., :half] ** 2, x[..., half : 2 * half] ** 2
    rest = np.zeros_like(x[..., 2 * half :])
    if "x" in e:
        u, v = e["x"][..., :half], e["x"][..., half : 2 * half]
        turned = [u * cos + v * sin, v * cos + u * sin, e["x"][..., 2 * half :]]
        yield np.concatenate(turned, axis=-1)
    for name, parts in (("cos", (first, second)), ("sin", (second, first))):
        if name in e:
            table = e[name][..., None, :, :half]
            yield np.concatenate([parts[0] * table, parts[1] * table, rest], axis=-1)


def _swiglu(a: Errors, e: Errors) -> Parts:
    gate, up = a["gate"], a["up"]
    logistic = 1 / (1 + np.exp(-gate))
    if "gate" in e:
        yield (logistic * (1 + gate * (1 - logistic)) * up) ** 2 * e["gate"]
    if "up" in e:
        yield (gate * logistic) ** 2 * e["up"]


def _add(_: Errors, e: Errors) -> Parts:
    yield from e.values()


def _attention(a: Errors, e: Errors) -> Parts:
    """Move y by sum_j p_j ds_j (v_j - y) + p_j dv_j, ds_j = scale (q . dk_j + dq . k_j)."""
    q, k, v = (np.nan_to_num(f64(a[name])) for name in "qkv")
    group = q.shape[1] // k.shape[1]
    seen = visible_keys((q.shape[2], k.shape[2]), False, None, None, a["mask"])
    seen = np.broadcast_to(seen, (*q.shape[:3], k.shape[2]))
    parts = {name: np.zeros((*q.shape[:3], v.shape[3])) for name in e}
    for b, h in np.ndindex(q.shape[:2]):
        own, shared = (b, h), (b, h // group)
        errors = {n: x[own if n == "q" else shared] for n, x in e.items()}
        for name, part in _head(q[own], k[shared], v[shared], seen[own], errors).items():
            parts[name][own] = part
    yield from parts.values()


def _head(q: Array, k: Array, v: Array, seen: Array, e: Errors) -> dict[str, Array]:
    """Errors of keys are independent; that of the query moves all scores of its row together."""
    scale = q.shape[-1] ** -0.5
    s = np.where(seen, scale * (q @ k.T), -np.inf)
    p = np.exp(s - np.maximum(np.max(s, axis=-1, keepdims=True), -1e300))
    p = p / np.maximum(np.sum(p, axis=-1, keepdims=True), 1e-300)
    y, found = p @ v, {}
    if "v" in e:
        found["v"] = p * p @ e["v"]
    if "k" in e:
        found["k"] = _spread(p * p * scale**2 * (q * q @ e["k"].T), v, y)
    if "q" in e:
        found["q"] = _spread(p * scale**2 * (e["q"] @ (k * k).T), v, y)
    return found


def _spread(weight: Array, v: Array, y: Array) -> Array:
    """Sum w_j (v_j - y)**2 over j, without the table of all differences."""
    total = np.sum(weight, axis=-1, keepdims=True)
    around = weight @ (v * v) - 2 * (weight @ v) * y + total * y * y
    return np.maximum(around, 0.0)


RULES: dict[str, Callable[[Errors, Errors], Parts]] = {
    "linear": _linear,
    "rms_norm": _rms_norm,
    "rope": _rope,
    "swiglu": _swiglu,
    "add": _add,
    "attention": _attention,
}
