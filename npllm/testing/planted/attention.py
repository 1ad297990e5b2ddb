"""Attention with one convention chosen otherwise: heads, scale, fills, layout, cache."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from npllm import ops
from npllm.testing.planted.bug import Array, plant
from npllm.testing.planted.masks import visible, without_slots

__all__: list[str] = []

C = "attention"

# ------------------------------------------------------------------ heads, operands, scale


@plant(C, "tile", "C8")
def _tile(q: Array, k: Array, v: Array, **options: Any) -> Array:
    """Query head h reads key/value head h mod n_kv_head."""
    head = np.arange(q.shape[-3]) % k.shape[-3]
    return ops.attention(q, k[..., head, :, :], v[..., head, :, :], **options)


@plant(C, "k and v swapped", "C22")
def _swap_kv(q: Array, k: Array, v: Array, **options: Any) -> Array:
    """Keys and values are exchanged."""
    return (
        ops.attention(q, v, k, **options)
        if k.shape == v.shape
        else ops.attention(q, k, v, **options)
    )


@plant(C, "q and k swapped", "C22")
def _swap_qk(q: Array, k: Array, v: Array, **options: Any) -> Array:
    """Queries and keys are exchanged."""
    return (
        ops.attention(k, q, v, **options)
        if q.shape == k.shape
        else ops.attention(q, k, v, **options)
    )


def _scaled(name: str, says: str, scale: Callable[[float, int], float]) -> None:
    def fn(q: Array, k: Array, v: Array, *, scale: float | None = None, **options: Any) -> Array:
        given = q.shape[-1] ** -0.5 if scale is None else scale
        return ops.attention(q, k, v, scale=other(given, q.shape[-1]), **options)

    other = scale
    fn.__doc__ = says
    plant(C, name, "C21")(fn)


_scaled(
    "rotated part", "The scale is that of 3/4 of the head.", lambda _, d: float(3 * d // 4) ** -0.5
)
_scaled("1 / d_head", "The root of the scale is missing.", lambda _, d: 1 / d)
_scaled("constant 1/8", "The scale is a hard-coded 1/8.", lambda *_: 0.125)
_scaled("twice", "The scale is applied twice.", lambda scale, _: scale * scale)
_scaled("omitted", "The scores are not scaled.", lambda *_: 1.0)


# ------------------------------------------------------------------ empty rows and fills


def _nothing(mask: Any, q: Array, k: Array) -> Array:
    return ~visible(mask, q, k).any(axis=-1, keepdims=True)


@plant(C, "NaN", "C11")
def _nan(q: Array, k: Array, v: Array, *, mask: Any = None, **options: Any) -> Array:
    """A row that sees no key gives NaN."""
    y = ops.attention(q, k, v, mask=mask, **options)
    return np.where(_nothing(mask, q, k), np.float32(np.nan), y)


@plant(C, "mean of V", "C11")
def _mean(q: Array, k: Array, v: Array, *, mask: Any = None, **options: Any) -> Array:
    """A row that sees no key gives the mean of all values."""
    values = np.repeat(v, q.shape[-3] // v.shape[-3], axis=-3)
    y = ops.attention(q, k, v, mask=mask, **options)
    return np.where(_nothing(mask, q, k), values.mean(axis=-2, keepdims=True), y)


def _filled(name: str, fill: float, says: str) -> None:
    def fn(q: Array, k: Array, v: Array, *, mask: Any = None, **options: Any) -> Array:
        hidden = np.where(visible(mask, q, k), np.float32(0), np.float32(fill))
        bias = options.pop("bias", None)
        return ops.attention(
            q, k, v, bias=hidden if bias is None else bias + hidden, **without_slots(options)
        )

    fn.__doc__ = says
    plant(C, name, "C12")(fn)


_filled(
    "finfo.min",
    float(np.finfo(np.float32).min),
    "The lowest finite number is added where a key is hidden.",
)
_filled("-1e9", -1e9, "-1e9 is added where a key is hidden.")
_filled("-1e4", -1e4, "-1e4 is added where a key is hidden.")


def _tail(n_tile: int) -> None:
    def fn(q: Array, k: Array, v: Array, *, mask: Any = None, **options: Any) -> Array:
        n = -k.shape[-2] % n_tile
        widths = [(0, 0)] * (k.ndim - 2) + [(0, n), (0, 0)]
        seen = visible(mask, q, k)
        seen = np.concatenate([seen, np.ones((*seen.shape[:-1], n), dtype=bool)], axis=-1)
        if options.get("bias") is not None:
            bias = np.broadcast_to(options["bias"], (*q.shape[:-1], k.shape[-2]))
            options["bias"] = np.concatenate(
                [bias, np.zeros((*bias.shape[:-1], n), bias.dtype)], axis=-1
            )
        return ops.attention(
            q, np.pad(k, widths), np.pad(v, widths), mask=seen, **without_slots(options)
        )

    fn.__doc__ = f"Zeros fill the last tile of {n_tile} keys and enter the sum."
    plant(C, f"zero tail to {n_tile}", "C23")(fn)


for _n in (16, 32, 64, 128):
    _tail(_n)


# ------------------------------------------------------------------ log-sum-exp, layout, cache


@plant(C, "base 2", "C24")
def _base_2(q: Array, k: Array, v: Array, *, return_lse: bool = False, **options: Any) -> Any:
    """The log-sum-exp is that of base 2."""
    y, lse = ops.attention(q, k, v, return_lse=True, **options)
    return (y, lse / np.float32(np.log(2))) if return_lse else y


@plant(C, "without the maximum", "C24")
def _no_maximum(
    q: Array, k: Array, v: Array, *, mask: Any = None, return_lse: bool = False, **options: Any
) -> Any:
    """The maximum is not added back to the log-sum-exp."""
    y, lse = ops.attention(q, k, v, mask=mask, return_lse=True, **options)
    weights = ops.attention_weights(q, k, mask=mask, **options)
    largest = weights.max(axis=-1)
    with np.errstate(divide="ignore"):
        return (y, np.where(largest > 0, -np.log(largest), lse)) if return_lse else y


def _reread(x: Array) -> Array:
    """Read a buffer [n, heads, d] as [heads, n, d]."""
    return np.ascontiguousarray(np.swapaxes(x, -3, -2)).reshape(x.shape)


@plant(C, "inputs position-major", "C31")
def _reread_inputs(q: Array, k: Array, v: Array, **options: Any) -> Array:
    """Buffers [n_seq, n_head, d] are read as [n_head, n_seq, d]."""
    return ops.attention(_reread(q), _reread(k), _reread(v), **options)


@plant(C, "output position-major", "C31")
def _reread_output(q: Array, k: Array, v: Array, **options: Any) -> Array:
    """The output is written [n_seq, n_head, d]."""
    return _reread(ops.attention(q, k, v, **options))


def _cached(name: str, says: str, spoil: Callable[[Array, int], Array]) -> None:
    def fn(q: Array, k: Array, v: Array, **options: Any) -> Array:
        n_old = k.shape[-2] - q.shape[-2]
        return ops.attention(q, spoil(k.copy(), n_old), spoil(v.copy(), n_old), **options)

    fn.__doc__ = says
    plant(C, name, "C32")(fn)


def _other_request(x: Array, n_old: int) -> Array:
    if x.ndim > 3:
        x[..., :n_old, :] = np.roll(x[..., :n_old, :], 1, axis=0)
    return x


def _not_written(x: Array, n_old: int) -> Array:
    x[..., n_old:, :] = 0
    return x


def _slot_early(x: Array, n_old: int) -> Array:
    first = max(n_old, 1)
    x[..., first - 1 : -1, :] = x[..., first:, :].copy()
    x[..., -1, :] = 0
    return x


_cached("another request's rows", "The cached rows are those of another request.", _other_request)
_cached("new row not written", "The rows of this call are still zero.", _not_written)
_cached("one slot early", "The new rows overwrite the last cached one.", _slot_early)


# ------------------------------------------------------------------ rounding


def _bfloat16(x: Array) -> Array:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


@plant(C, "softmax in the model dtype", "C14")
def _narrow_softmax(q: Array, k: Array, v: Array, **options: Any) -> Array:
    """The probabilities are bfloat16."""
    options.pop("return_lse", None)
    weights = _bfloat16(ops.attention_weights(q, k, **options))
    return weights @ np.repeat(v, q.shape[-3] // v.shape[-3], axis=-3)


@plant(C, "scale on q", "C14")
def _scale_on_q(
    q: Array, k: Array, v: Array, *, scale: float | None = None, **options: Any
) -> Array:
    """The query is scaled and rounded to bfloat16 before the product."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return ops.attention(_bfloat16(q * np.float32(scale)), k, v, scale=1.0, **options)
