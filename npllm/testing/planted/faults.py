"""Classic faults of attention kernels, which no convention describes."""

from typing import Any

import numpy as np

from npllm import ops
from npllm.testing.planted.bug import Array, plant
from npllm.testing.planted.masks import visible, without_slots

__all__: list[str] = []

C = "attention"
TILE = 8

_scratch: dict[tuple, Array] = {}


@plant(C, "zeros")
def _zeros(q: Array, k: Array, v: Array, **_: Any) -> Array:  # noqa: ARG001
    """The output is zero."""
    return np.zeros((*q.shape[:-1], v.shape[-1]), dtype=q.dtype)


@plant(C, "NaN")
def _nan(q: Array, k: Array, v: Array, **_: Any) -> Array:  # noqa: ARG001
    """The output is NaN."""
    return np.full((*q.shape[:-1], v.shape[-1]), np.nan, dtype=q.dtype)


@plant(C, "last tile skipped")
def _last_tile(q: Array, k: Array, v: Array, *, mask: Any = None, **options: Any) -> Array:
    """Keys behind the last full tile of 8 are left out."""
    n = max(k.shape[-2] // TILE * TILE, 1)
    seen = visible(mask, q, k) & (np.arange(k.shape[-2]) < n)
    return ops.attention(q, k, v, mask=seen, **without_slots(options))


@plant(C, "last rows skipped")
def _last_rows(q: Array, k: Array, v: Array, **options: Any) -> Array:
    """Queries behind the last full tile of 4 are not written."""
    y = ops.attention(q, k, v, **options).copy()
    y[..., q.shape[-2] // 4 * 4 :, :] = 0
    return y


@plant(C, "first key of a tile skipped")
def _tile_edge(q: Array, k: Array, v: Array, *, mask: Any = None, **options: Any) -> Array:
    """The first key of every tile but the first is left out."""
    j = np.arange(k.shape[-2])
    seen = visible(mask, q, k) & ((j == 0) | (j % TILE != 0))
    return ops.attention(q, k, v, mask=seen, **without_slots(options))


@plant(C, "missing rescale")
def _no_rescale(q: Array, k: Array, v: Array, *, mask: Any = None, **options: Any) -> Array:
    """The running sums are not rescaled when a later tile has a larger maximum."""
    s, values = _scores(q, k, v, mask, options)
    y, total = (
        np.zeros((*q.shape[:-1], v.shape[-1]), np.float32),
        np.zeros((*q.shape[:-1], 1), np.float32),
    )
    m = np.full_like(total, -np.inf)
    for start in range(0, k.shape[-2], TILE):
        part = s[..., start : start + TILE]
        m = np.maximum(m, part.max(axis=-1, keepdims=True))
        e = np.exp(part - np.where(m == -np.inf, 0, m))
        y, total = (
            y + e @ values[..., start : start + TILE, :],
            total + e.sum(axis=-1, keepdims=True),
        )
    return y / np.where(total == 0, 1, total)


@plant(C, "no maximum subtracted")
def _no_maximum(q: Array, k: Array, v: Array, *, mask: Any = None, **options: Any) -> Array:
    """Exponentials of large scores overflow."""
    s, values = _scores(q, k, v, mask, options)
    with np.errstate(over="ignore", invalid="ignore"):
        e = np.exp(s)
        total = e.sum(axis=-1, keepdims=True)
        return (e / np.where(total == 0, 1, total)) @ values


@plant(C, "float16 accumulation")
def _float16_sums(q: Array, k: Array, v: Array, *, mask: Any = None, **options: Any) -> Array:
    """The values are summed in float16."""
    weights = ops.attention_weights(q, k, mask=mask, **_weights_only(options)).astype(np.float16)
    values = np.repeat(v, q.shape[-3] // v.shape[-3], axis=-3).astype(np.float16)
    y = np.zeros((*q.shape[:-1], v.shape[-1]), dtype=np.float16)
    for j in range(k.shape[-2]):
        y = y + weights[..., j, None] * values[..., None, j, :]
    return y.astype(np.float32)


@plant(C, "denominator over all keys")
def _denominator(q: Array, k: Array, v: Array, *, mask: Any = None, **options: Any) -> Array:
    """The sum of the exponentials includes hidden keys."""
    weights = ops.attention_weights(q, k, **_weights_only(options))
    seen = np.broadcast_to(visible(mask, q, k), weights.shape)
    return np.where(seen, weights, 0) @ np.repeat(v, q.shape[-3] // v.shape[-3], axis=-3)


@plant(C, "first head everywhere")
def _one_head(q: Array, k: Array, v: Array, **options: Any) -> Array:
    """Every query head reads key/value head 0."""
    head = np.zeros(k.shape[-3], dtype=int)
    return ops.attention(q, k[..., head, :, :], v[..., head, :, :], **options)


@plant(C, "softmax over queries")
def _wrong_axis(q: Array, k: Array, v: Array, *, mask: Any = None, **options: Any) -> Array:
    """The softmax runs along the queries."""
    s, values = _scores(q, k, v, mask, options)
    m = s.max(axis=-2, keepdims=True)
    e = np.exp(s - np.where(m == -np.inf, 0, m))
    total = e.sum(axis=-2, keepdims=True)
    return (e / np.where(total == 0, 1, total)) @ values


@plant(C, "mask ignored")
def _no_mask(q: Array, k: Array, v: Array, **options: Any) -> Array:
    """Every key is visible."""
    return ops.attention(q, k, v, **options | {"mask": None})


@plant(C, "scale argument ignored")
def _own_scale(q: Array, k: Array, v: Array, **options: Any) -> Array:
    """The scale is d_head ** -0.5 whatever is asked for."""
    return ops.attention(q, k, v, **options | {"scale": None})


@plant(C, "stale row")
def _stale_row(q: Array, k: Array, v: Array, **options: Any) -> Array:
    """The last row of the output is that of the query before it."""
    y = ops.attention(q, k, v, **options).copy()
    y[..., -1, :] = y[..., -2, :] if y.shape[-2] > 1 else 0
    return y


@plant(C, "input mutated")
def _mutates(q: Array, k: Array, v: Array, *, scale: float | None = None, **options: Any) -> Array:
    """The query is scaled in place."""
    q *= np.asarray(q.shape[-1] ** -0.5 if scale is None else scale, dtype=q.dtype)
    return ops.attention(q, k, v, scale=1.0, **options)


@plant(C, "unsynchronised scratch")
def _shared(q: Array, k: Array, v: Array, **options: Any) -> Array:
    """The output is a buffer that the next call of the same shape writes to."""
    y = ops.attention(q, k, v, **options)
    buffer = _scratch.setdefault(y.shape, np.empty_like(y))
    buffer[...] = y
    return buffer


def _weights_only(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "return_lse"}


def _scores(
    q: Array, k: Array, v: Array, mask: Any, options: dict[str, Any]
) -> tuple[Array, Array]:
    """Masked scores in float32, and the values once a query head."""
    group, scale = q.shape[-3] // k.shape[-3], options.get("scale")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = np.float32(scale) * (q @ np.swapaxes(np.repeat(k, group, axis=-3), -1, -2))
    softcap, bias = options.get("softcap"), options.get("bias")
    s = s if softcap is None else softcap * np.tanh(s / softcap)
    s = s if bias is None else s + bias
    return np.where(visible(mask, q, k), s, np.float32(-np.inf)), np.repeat(v, group, axis=-3)
