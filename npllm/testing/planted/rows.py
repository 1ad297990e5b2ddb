"""Norm, gated product, linear maps and embedding with one fault each."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from npllm import ops
from npllm.testing.planted.bug import Array, plant, right_qkv

__all__: list[str] = []

# ------------------------------------------------------------------ rms_norm


def _gain(name: str, says: str, change: Callable[[Array], Array]) -> None:
    def fn(x: Array, weight: Array, eps: float) -> Array:
        return ops.rms_norm(x, change(weight), eps)

    fn.__doc__ = says
    plant("rms_norm", name, "C28")(fn)


_gain("1 + w", "The gain is 1 + w.", lambda w: 1 + w)
_gain("twice", "The gain is applied twice.", lambda w: w * w)
_gain("omitted", "There is no gain.", np.ones_like)


def _eps(name: str, says: str, value: float) -> None:
    def fn(x: Array, weight: Array, eps: float) -> Array:  # noqa: ARG001
        return ops.rms_norm(x, weight, value)

    fn.__doc__ = says
    plant("rms_norm", name, "C29")(fn)


_eps("eps 1e-6", "eps is a hard-coded 1e-6.", 1e-6)
_eps("eps 1e-5", "eps is a hard-coded 1e-5.", 1e-5)
_eps("eps omitted", "There is no eps.", 0.0)


@plant("rms_norm", "sum of squares", "C29")
def _sum(x: Array, weight: Array, eps: float) -> Array:
    """The sum of squares is not divided by d_model."""
    return weight * (x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + np.float32(eps)))


@plant("rms_norm", "centred", "C29")
def _centred(x: Array, weight: Array, eps: float) -> Array:
    """The mean is subtracted first."""
    return ops.layer_norm(x, weight, np.zeros_like(weight), eps)


@plant("rms_norm", "eps outside the root", "C29")
def _outside(x: Array, weight: Array, eps: float) -> Array:
    """The root of the mean is taken before eps is added."""
    return weight * (x / (np.sqrt(np.mean(x * x, axis=-1, keepdims=True)) + np.float32(eps)))


def _narrow_sums(name: str, dtype: Any) -> None:
    def norm(x: Array, weight: Array, eps: float) -> Array:
        total = np.zeros(x.shape[:-1], dtype=dtype)
        for column in range(x.shape[-1]):
            total = (total.astype(np.float32) + x[..., column].astype(np.float32) ** 2).astype(
                dtype
            )
        mean = total.astype(np.float32)[..., None] / np.float32(x.shape[-1])
        return (weight * (x / np.sqrt(mean + np.float32(eps)))).astype(x.dtype)

    def product(x: Array, weight: Array, bias: Array = None) -> Array:
        total = np.zeros((*x.shape[:-1], len(weight)), dtype=dtype)
        for column in range(x.shape[-1]):
            term = x[..., column, None].astype(np.float32) * weight[:, column].astype(np.float32)
            total = (total.astype(np.float32) + term).astype(dtype)
        return (total.astype(np.float32) + (0 if bias is None else bias)).astype(x.dtype)

    norm.__doc__ = product.__doc__ = f"Sums are {name.removesuffix(' accumulator')}."
    plant("rms_norm", name, "C30")(norm)
    plant("linear", name, "C30")(product)


_narrow_sums("bfloat16 accumulator", ml_dtypes.bfloat16)
_narrow_sums("float16 accumulator", np.float16)


@plant("rms_norm", "largest instead of root mean square")
def _largest(x: Array, weight: Array, eps: float) -> Array:
    """Rows are divided by their largest magnitude."""
    return weight * (x / np.sqrt(np.max(x * x, axis=-1, keepdims=True) + np.float32(eps)))


@plant("rms_norm", "n - 1")
def _bessel(x: Array, weight: Array, eps: float) -> Array:
    """The sum of squares is divided by d_model - 1."""
    n = np.float32(max(x.shape[-1] - 1, 1))
    return weight * (x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) / n + np.float32(eps)))


@plant("rms_norm", "tail not summed")
def _tail(x: Array, weight: Array, eps: float) -> Array:
    """Channels behind the last multiple of 16 do not enter the mean."""
    n = max(x.shape[-1] // 16 * 16, 1)
    square = np.sum(x[..., :n] ** 2, axis=-1, keepdims=True) / np.float32(x.shape[-1])
    return weight * (x / np.sqrt(square + np.float32(eps)))


@plant("rms_norm", "input mutated")
def _in_place(x: Array, weight: Array, eps: float) -> Array:
    """The row is normalised in place."""
    y = ops.rms_norm(x, weight, eps)
    x[...] = y
    return y


# ------------------------------------------------------------------ swiglu


@plant("swiglu", "up first", "C7")
def _up_first(gate: Array, up: Array) -> Array:
    """The second half is the gate."""
    return ops.swiglu(up, gate)


@plant("swiglu", "interleaved", "C7")
def _alternating(gate: Array, up: Array) -> Array:
    """Gate and up alternate."""
    rows = np.concatenate([gate, up], axis=-1)
    return ops.swiglu(rows[..., 0::2], rows[..., 1::2])


@plant("swiglu", "GELU")
def _gelu(gate: Array, up: Array) -> Array:
    """The gate is GELU."""
    return ops.gelu(gate, approximate="tanh") * up


@plant("swiglu", "ReLU")
def _relu(gate: Array, up: Array) -> Array:
    """The gate is ReLU."""
    return ops.relu(gate) * up


@plant("swiglu", "sigmoid")
def _sigmoid(gate: Array, up: Array) -> Array:
    """The gate is the sigmoid alone."""
    return up / (1 + np.exp(-gate))


@plant("swiglu", "zeros")
def _zeros(gate: Array, up: Array) -> Array:
    """The output is zero."""
    return np.zeros_like(gate * up)


# ------------------------------------------------------------------ linear maps


@plant("linear", "weight [d_in, d_out]", "C31")
def _transposed(x: Array, weight: Array, bias: Array = None) -> Array:
    """The weight's buffer is read as [d_in, d_out]."""
    other = np.ascontiguousarray(weight).reshape(weight.shape[::-1]).T
    return ops.linear(x, other, bias)


@plant("linear", "bias ignored")
def _no_bias(x: Array, weight: Array, bias: Array = None) -> Array:  # noqa: ARG001
    """The bias is left out."""
    return ops.linear(x, weight)


@plant("linear", "tail not summed")
def _short_sum(x: Array, weight: Array, bias: Array = None) -> Array:
    """Columns behind the last multiple of 8 are left out."""
    n = max((x.shape[-1] - 1) // 8 * 8, 1)
    return ops.linear(x[..., :n], weight[:, :n], bias)


@plant("linear", "last outputs not written")
def _short_rows(x: Array, weight: Array, bias: Array = None) -> Array:
    """Outputs behind the last multiple of 8 are zero."""
    y = ops.linear(x, weight, bias).copy()
    y[..., len(weight) // 8 * 8 :] = 0
    return y


@plant("linear", "inputs rounded to bfloat16")
def _rounded_inputs(x: Array, weight: Array, bias: Array = None) -> Array:
    """Rows are rounded to bfloat16 before the product."""
    return ops.linear(x.astype(ml_dtypes.bfloat16).astype(x.dtype), weight, bias)


@plant("linear", "last row repeated")
def _stale(x: Array, weight: Array, bias: Array = None) -> Array:
    """The first row of the output is that of the last."""
    y = ops.linear(x, weight, bias).copy()
    flat = y.reshape(-1, y.shape[-1])
    flat[0] = flat[-1]
    return flat.reshape(y.shape)


@plant("qkv_projection", "per-head interleave", "C6")
def _interleaved(x: Array, weight: Array, n_head: int, n_kv_head: int, bias: Array = None) -> tuple:
    """The rows are cut as query, key and value rows of each key/value head."""
    group = n_head // n_kv_head
    y = np.concatenate(right_qkv(x, weight, n_head, n_kv_head, bias), axis=-3)
    cut = y.reshape(*y.shape[:-3], n_kv_head, group + 2, *y.shape[-2:])
    q = cut[..., :group, :, :].reshape(*y.shape[:-3], n_head, *y.shape[-2:])
    return q, cut[..., group, :, :], cut[..., group + 1, :, :]


@plant("qkv_projection", "k and v swapped", "C22")
def _swap_kv(x: Array, weight: Array, n_head: int, n_kv_head: int, bias: Array = None) -> tuple:
    """Key rows are read as values, and value rows as keys."""
    q, k, v = right_qkv(x, weight, n_head, n_kv_head, bias)
    return q, v, k


@plant("qkv_projection", "q and k swapped", "C22")
def _swap_qk(x: Array, weight: Array, n_head: int, n_kv_head: int, bias: Array = None) -> tuple:
    """The rows are read as keys, queries, values."""
    y = np.concatenate(right_qkv(x, weight, n_head, n_kv_head, bias), axis=-3)
    return (
        y[..., n_kv_head : n_kv_head + n_head, :, :],
        y[..., :n_kv_head, :, :],
        y[..., n_kv_head + n_head :, :, :],
    )


@plant("qkv_projection", "weight [d_in, d_out]", "C31")
def _transposed_qkv(
    x: Array, weight: Array, n_head: int, n_kv_head: int, bias: Array = None
) -> tuple:
    """The weight's buffer is read as [d_in, d_out]."""
    other = np.ascontiguousarray(weight).reshape(weight.shape[::-1]).T
    return right_qkv(x, np.ascontiguousarray(other), n_head, n_kv_head, bias)


@plant("qkv_projection", "heads not moved", "C31")
def _not_moved(x: Array, weight: Array, n_head: int, n_kv_head: int, bias: Array = None) -> tuple:
    """[n_seq, n_head, d_head] is read as [n_head, n_seq, d_head]."""
    heads = right_qkv(x, weight, n_head, n_kv_head, bias)
    return tuple(np.ascontiguousarray(np.swapaxes(y, -3, -2)).reshape(y.shape) for y in heads)


@plant("embed", "times sqrt(d_model)", "C33")
def _scaled(ids: Array, weight: Array) -> Array:
    """Embeddings are multiplied by sqrt(d_model)."""
    return ops.embed(ids, weight) * np.float32(weight.shape[-1] ** 0.5)


@plant("embed", "ids off by one")
def _shifted(ids: Array, weight: Array) -> Array:
    """Each id reads the row before its own."""
    return ops.embed(np.maximum(ids - 1, 0), weight)


@plant("lm_head", "tied", "C33")
def _tied(hidden: Array, weight: Array, embedding: Array = None) -> Array:
    """The embedding table serves as head."""
    return ops.linear(hidden, weight if embedding is None else embedding)
