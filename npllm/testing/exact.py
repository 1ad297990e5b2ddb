"""The answer of each operation in float64 or more: naive formulas, no code of npllm.ops."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from npllm.errors import MissingExtraError, NpllmValueError, install_extra
from npllm.testing.inputs import split_qkv, visible_keys

__all__ = ["GOLD", "gold"]

Array = Any

BLOCK = 256  # rows of attention that are evaluated at a time


class _Float64:
    """Elementary functions of float64 arrays."""

    exp, tanh, sqrt, cos, sin = np.exp, np.tanh, np.sqrt, np.cos, np.sin

    @staticmethod
    def array(x: Array) -> Array:
        """Any numbers as float64."""
        x = x.get() if hasattr(x, "get") else x
        return np.asarray(x).astype(np.float64)

    @staticmethod
    def normal(x: Array) -> Array:
        """Probability that a normal variable lies below x, without cancellation."""
        import math

        return np.vectorize(lambda n: math.erfc(-n / math.sqrt(2)) / 2, otypes=[np.float64])(x)


class _Digits:
    """The same functions of arrays of mpmath numbers."""

    def __init__(self, digits: int) -> None:
        try:
            import mpmath
        except ImportError as error:
            raise MissingExtraError(
                f"more digits than float64 need mpmath ({error}); {install_extra('test')}"
            ) from error
        self.context = mpmath.mp.clone()
        self.context.dps = digits
        for name in ("exp", "tanh", "sqrt", "cos", "sin"):
            setattr(self, name, np.frompyfunc(getattr(self.context, name), 1, 1))
        self.normal = np.frompyfunc(
            lambda n: self.context.erfc(-n / self.context.sqrt(2)) / 2, 1, 1
        )

    def array(self, x: Array) -> Array:
        """Any numbers as mpmath numbers, exactly."""
        return np.frompyfunc(self.context.mpf, 1, 1)(np.asarray(_Float64.array(x), dtype=object))


def gold(op: str, inputs: Mapping[str, Any], *, digits: int | None = None) -> Array:
    """Evaluate an operation from its formula, in float64 or with more digits.

    Parameters
    ----------
    op : str
        As in `npllm.testing.budget`.
    inputs : dict
        The arguments by parameter name.
    digits : int, optional
        Decimal digits, with mpmath: where the inputs are float64, so that float64 is what is
        judged.  Slow.

    Returns
    -------
    y : float64 array
        With `digits` an array of mpmath numbers.  The heads of "qkv_projection" stand behind each
        other: q, k, v.

    Raises
    ------
    NpllmValueError
        For an unknown operation.
    MissingExtraError
        When `digits` is given and mpmath is not installed.
    """
    if op not in GOLD:
        raise NpllmValueError(f"no operation is called {op!r}; there are {', '.join(GOLD)}")
    with np.errstate(all="ignore"):  # what is not finite is reported by the verdict
        return GOLD[op](_Float64 if digits is None else _Digits(digits), **inputs)


def linear(m: Any, x: Array, weight: Array, bias: Array = None) -> Array:
    """Sum over the inputs: x @ weight.T + bias."""
    y = m.array(x) @ _matrix(m, weight).T
    return y if bias is None else y + m.array(bias)


def qkv_projection(
    m: Any, x: Array, weight: Array, n_head: int, n_kv_head: int, bias: Array = None
) -> Array:
    """Cut the product into heads: q, k and v behind each other."""
    return np.concatenate(split_qkv(linear(m, x, weight, bias), n_head, n_kv_head), axis=-3)


def rms_norm(m: Any, x: Array, weight: Array, eps: float) -> Array:
    """Divide by the root of mean square + eps."""
    x = m.array(x)
    square = np.sum(x * x, axis=-1, keepdims=True) / x.shape[-1]
    return m.array(weight) * x / m.sqrt(square + m.array(eps))


def layer_norm(m: Any, x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """Centre, then divide by the root of variance + eps."""
    x = m.array(x)
    x = x - np.sum(x, axis=-1, keepdims=True) / x.shape[-1]
    return m.array(weight) * x / m.sqrt(
        np.sum(x * x, axis=-1, keepdims=True) / x.shape[-1] + m.array(eps)
    ) + m.array(bias)


def rope(
    m: Any,
    x: Array,
    positions: Array = None,
    base: float = 10000.0,
    d_rope: int | None = None,
    magnitude: float = 1.0,
    factors: Array = None,
    inv_freq: Array = None,
    cos: Array = None,
    sin: Array = None,
) -> Array:
    """Turn the pairs (i, i + d_rope/2); exact frequencies where a base is given."""
    x = m.array(x)
    if cos is None:
        d_rope = x.shape[-1] if d_rope is None else d_rope
        if inv_freq is None:
            inv_freq = m.array(base) ** (-m.array(np.arange(0, d_rope, 2)) / d_rope)
            inv_freq = inv_freq if factors is None else inv_freq / m.array(factors)
        phase = m.array(positions)[..., None, :, None] * m.array(inv_freq)
        cos, sin = m.array(magnitude) * m.cos(phase), m.array(magnitude) * m.sin(phase)
    else:
        d_rope = cos.shape[-1]
        cos, sin = (m.array(t)[..., None, :, : d_rope // 2] for t in (cos, sin))
    a, b, rest = x[..., : d_rope // 2], x[..., d_rope // 2 : d_rope], x[..., d_rope:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def softmax(m: Any, x: Array, axis: int = -1) -> Array:
    """Exponentials over their sum."""
    x = m.array(x)
    e = m.exp(x - np.max(x, axis=axis, keepdims=True))
    return e / np.sum(e, axis=axis, keepdims=True)


def attention(
    m: Any,
    q: Array,
    k: Array,
    v: Array,
    causal: bool = True,
    window: int | None = None,
    valid: Array = None,
    scale: float | None = None,
    bias: Array = None,
    softcap: float | None = None,
    mask: Array = None,
) -> Array:
    """Mean of the visible values, head by head; zeros where nothing is visible."""
    q, k, v = m.array(q), m.array(k), m.array(v)
    seen = visible_keys((q.shape[-2], k.shape[-2]), causal, window, valid, mask)
    seen = np.broadcast_to(seen if q.ndim > 3 else seen[0], (*q.shape[:-1], k.shape[-2]))
    y = m.array(np.zeros((*q.shape[:-1], v.shape[-1])))
    scale = 1 / m.sqrt(m.array(q.shape[-1])) if scale is None else m.array(scale)
    for at in np.ndindex(q.shape[:-2]):
        head = (*at[:-1], at[-1] // (q.shape[-3] // k.shape[-3]))
        for rows in _blocks(q.shape[-2]):
            keys = _span(seen[at][rows])
            s = scale * (q[at][rows] @ k[head][keys].T)
            s = s if softcap is None else m.array(softcap) * m.tanh(s / m.array(softcap))
            if bias is not None:
                s = s + np.broadcast_to(m.array(bias), seen.shape)[at][rows, keys]
            y[at][rows] = _mean(m, s, v[head][keys], seen[at][rows, keys])
    return y


def _blocks(n: int) -> list[slice]:
    """Cut rows into blocks, so that keys that none of a block sees are left out."""
    return [slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]


def _span(seen: Array) -> slice:
    """From the first key that any row sees to the last; one key where there is none."""
    keys = np.flatnonzero(seen.any(axis=0))
    return slice(int(keys[0]), int(keys[-1]) + 1) if len(keys) else slice(0, 1)


def _mean(m: Any, s: Array, v: Array, seen: Array) -> Array:
    """Mean of the values of visible keys; hidden keys and values change nothing."""
    seen = seen & (s > -np.inf)
    s = np.where(seen, s, m.array(0))
    e = np.where(
        seen,
        m.exp(s - np.max(np.where(seen, s, m.array(-1e300)), axis=-1, keepdims=True)),
        m.array(0),
    )
    total = np.sum(e, axis=-1, keepdims=True)
    y = (e / np.where(total == 0, m.array(1), total)) @ np.where(v - v == 0, v, m.array(0))
    unknown = (
        seen.astype(np.float64) @ (v - v != 0).astype(np.float64) > 0
    )  # a visible value that is not finite
    return np.where(unknown, m.array(np.nan), y)


def swiglu(m: Any, gate_up: Array = None, gate: Array = None, up: Array = None) -> Array:
    """The gate, times its logistic function, times up."""
    if gate_up is not None:
        gate, up = np.split(gate_up, 2, axis=-1)
    g, low = m.array(gate), m.exp(-np.abs(m.array(gate)))
    return g * np.where(g >= 0, m.array(1), low) / (1 + low) * m.array(up)


def gelu(m: Any, x: Array, approximate: str = "none") -> Array:
    """The entry, times the normal distribution function, or times its approximation."""
    x = m.array(x)
    if approximate == "none":
        return x * m.normal(x)
    z = 2 * m.sqrt(m.array(2) / m.array(np.pi)) * (x + m.array(0.044715) * x**3)
    low = m.exp(-np.abs(z))
    return x * np.where(z >= 0, m.array(1), low) / (1 + low)  # (1 + tanh(z / 2)) / 2


def embed(m: Any, ids: Array, weight: Array) -> Array:
    """A row of the table for each id."""
    return _matrix(m, weight)[np.asarray(ids)]


def _matrix(m: Any, weight: Array) -> Array:
    """A weight matrix; of a quantised one, each stored integer times the scale of its group."""
    if not hasattr(weight, "scales"):
        return m.array(weight.widened() if hasattr(weight, "widened") else weight)
    scales = np.repeat(m.array(weight.scales), getattr(weight, "group", 64), axis=-1)
    return m.array(weight.values) * scales[:, : weight.values.shape[1]]


def add(m: Any, x: Array, y: Array) -> Array:
    """The sum."""
    return m.array(x) + m.array(y)


GOLD: dict[str, Callable] = {
    "linear": linear,
    "qkv_projection": qkv_projection,
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "rope": rope,
    "softmax": softmax,
    "attention": attention,
    "swiglu": swiglu,
    "gelu": gelu,
    "embed": embed,
    "add": add,
}
"""One formula an operation: (elementary functions, **inputs) -> y."""
