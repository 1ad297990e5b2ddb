"""Attention with its forks: masks, scale, operands, cache rows, empty rows.

y = softmax(softcap * tanh(scale * q k^T / softcap) + bias, over the visible keys) v
"""

from typing import Any

import numpy as np

from npllm.testing.forms.common import Answer, Array, Choice, NotApplicableError, Work, gamma

__all__ = ["attention", "attention_lse", "operands", "visible_keys"]

FILLS = {"-1e9": -1e9, "-1e4": -1e4}
FRONTIER = {"one key late": 1, "one key early": -1}
SCALES = {
    "twice": lambda scale, _: scale * scale,
    "1 / d_head": lambda _, d: 1 / d,
    "omitted": lambda *_: 1.0,
    "constant 1/8": lambda *_: 0.125,
}


def attention(inputs: dict, choice: Choice, work: Work) -> Answer:
    """Evaluate attention under the options of `choice`.

        y[b, h, i] = sum_j p[b, h, i, j] v[b, h // group, j]
        slack = sum_j p_j delta_j |v_j - y| + 2 gamma_(n+2) sum_j p_j |v_j|
        delta_j = gamma_(d+1) scale |q||k_j| + u (2 |s_j| + |s_j - m| + 2)

    Returns
    -------
    answer : Answer
        Arrays [n_batch, n_head, n_rows, d_value].
    """
    table = _table(inputs, choice, work)
    p, v, n_ctx = table["p"], table["v"], table["p"].shape[-1]
    y = p @ v
    empty = table["empty"]
    if choice.get("C11") == "NaN":
        y = np.where(empty, np.nan, y)
    if choice.get("C11") == "mean of V":
        y = np.where(empty, v.mean(axis=-2, keepdims=True), y)
    if choice.get("C31") == "output position-major":
        y = _exchanged(_whole(y, work))
    if work.dtype != np.float64:
        return Answer(y, None)
    slack = _spread(p * table["delta"], v, y if choice.get("C31") is None else p @ v)
    slack = slack + 2 * gamma(n_ctx + 2, work.unit) * (p @ np.abs(v))
    slack = slack + np.where(empty, gamma(n_ctx, work.unit) * np.abs(v).mean(-2, keepdims=True), 0)
    return Answer(y, _exchanged(slack) if choice.get("C31") == "output position-major" else slack)


def attention_lse(inputs: dict, choice: Choice, work: Work) -> Answer:
    """Evaluate the log-sum-exp of each row of scores under the options of `choice`.

        lse = m + log sum_j exp(s_j - m);   slack = sum_j p_j delta_j + gamma_(n+2) + 3 u |lse|

    Returns
    -------
    answer : Answer
        Arrays [n_batch, n_head, n_rows].
    """
    table = _table(inputs, choice, work)
    with np.errstate(divide="ignore"):
        log_total = np.log(table["total"][..., 0])
    m = np.where(table["empty"][..., 0], 0.0, table["m"][..., 0])
    lse = log_total if choice.get("C24") == "without the maximum" else m + log_total
    unit = np.log(2) if choice.get("C24") == "base 2" else 1.0
    if work.dtype != np.float64:
        return Answer((lse / unit).astype(work.dtype), None)
    slack = (table["p"] * table["delta"]).sum(-1) + gamma(table["p"].shape[-1] + 2, work.unit)
    size = np.abs(np.where(np.isfinite(lse), lse, 0.0)) + np.abs(m)
    return Answer(lse / unit, (slack + 3 * work.unit * size) / unit)


def _table(inputs: dict, choice: Choice, work: Work) -> dict[str, Any]:
    """Scores, probabilities and their errors, [n_batch, n_head, n_rows, n_ctx]."""
    q, k, v = operands(inputs, choice, work.dtype)
    rows = np.arange(q.shape[-2]) if work.rows is None else np.asarray(work.rows)
    d_head = inputs["q"].shape[-1]
    scale = d_head**-0.5 if inputs["scale"] is None else inputs["scale"]
    scale = _scale(scale, d_head, inputs["d_rope"], choice)
    keep = visible_keys(inputs, choice, q, k, rows)
    q = q[:, :, rows]
    raw = (q @ np.swapaxes(k, -1, -2)) * np.asarray(scale, dtype=work.dtype)
    size = abs(scale) * (np.abs(q) @ np.swapaxes(np.abs(k), -1, -2))
    bias = _bias(inputs, k, rows, work.dtype)
    s = raw if inputs["softcap"] is None else _capped(raw, inputs["softcap"])
    s = s + np.where(keep, bias, 0) if bias is not None else s
    keep = keep if bias is None else keep & (bias > -np.inf)
    n_tail = _n_tail(choice, k.shape[-2])
    found = _softmax(s, keep, choice, n_tail, work.dtype)
    found["v"] = v
    found["delta"] = _delta(found, s, raw, size, d_head, work)
    return found


def _delta(found: dict, s: Array, raw: Array, size: Array, d_head: int, work: Work) -> Array:
    if work.dtype != np.float64:
        return None
    finite = np.where(np.isfinite(s), s, 0.0)
    gap = np.where(found["p"] > 0, np.abs(finite - np.where(found["empty"], 0, found["m"])), 0.0)
    gap = np.minimum(gap, 800.0)
    delta = gamma(d_head + 2, work.unit) * size
    return delta + work.unit * (2 * np.abs(finite) + np.abs(raw) + gap + 2)


def _scale(scale: float, d_head: int, d_rope: int | None, choice: Choice) -> float:
    option = choice.get("C21")
    if option == "rotated part":
        return float(d_rope or 3 * d_head // 4) ** -0.5
    return SCALES[option](scale, d_head) if option else scale


def _capped(s: Array, softcap: float) -> Array:
    return softcap * np.tanh(s / softcap)


def _bias(inputs: dict, k: Array, rows: Array, dtype: Any) -> Array:
    """Additive bias of the rows, [n_batch, n_head, n_rows, n_ctx]; None without."""
    if inputs["bias"] is None:
        return None
    q_shape = inputs["q"].shape
    bias = np.broadcast_to(inputs["bias"], (*q_shape[:-1], k.shape[-2]))
    bias = bias if bias.ndim == 4 else bias.reshape(-1, *bias.shape[-3:])
    return bias[:, :, rows].astype(dtype)


# ------------------------------------------------------------------ operands


def operands(inputs: dict, choice: Choice, dtype: Any) -> tuple[Array, Array, Array]:
    """Queries, keys and values [n_batch, n_head, n, d], the keys and values once a query head."""
    q, k, v = (_four(inputs[name]).astype(dtype) for name in "qkv")
    q, k, v = _swapped(q, k, v, choice.get("C22"))
    if choice.get("C31") == "inputs position-major":
        q, k, v = _exchanged(q), _exchanged(k), _exchanged(v)
    k, v = (_cached(x, q.shape[-2], choice.get("C32")) for x in (k, v))
    n_head, n_kv_head = q.shape[1], k.shape[1]
    head = np.arange(n_head)
    owner = head % n_kv_head if choice.get("C8") == "tile" else head // (n_head // n_kv_head)
    return q, k[:, owner], v[:, owner]


def _four(x: Array) -> Array:
    return x.reshape(-1, *x.shape[-3:])


def _swapped(q: Array, k: Array, v: Array, option: str | None) -> tuple[Array, Array, Array]:
    pair = {"k and v swapped": (k, v), "q and k swapped": (q, k)}.get(option or "")
    if pair and pair[0].shape != pair[1].shape:
        raise NotApplicableError(f"{option} needs two operands of one shape")
    if option == "k and v swapped":
        return q, v, k
    return (k, q, v) if option == "q and k swapped" else (q, k, v)


def _exchanged(x: Array) -> Array:
    """Read a buffer [n, heads, d] as if it were [heads, n, d]."""
    return np.swapaxes(x, 1, 2).reshape(x.shape)


def _whole(y: Array, work: Work) -> Array:
    if work.rows is not None:
        raise NotApplicableError("an exchange of output axes needs all rows")
    return y


def _cached(x: Array, n_seq: int, option: str | None) -> Array:
    """Keys or values as a faulty cache holds them; the last n_seq are of this call."""
    n_old = x.shape[-2] - n_seq
    if option is None or option == "position off by one":
        return x
    x = x.copy()
    if n_old < 1:
        raise NotApplicableError("a fault of cache rows shows where there is a cache")
    if option == "another request's rows":
        if len(x) < 2:
            raise NotApplicableError("the rows of another request need two of them")
        x[:, :, :n_old] = np.roll(x[:, :, :n_old], 1, axis=0)
    if option == "new row not written":
        x[:, :, n_old:] = 0
    if option == "one slot early":
        x[:, :, n_old - 1 : -1] = x[:, :, n_old:].copy()
        x[:, :, -1] = 0
    return x


# ------------------------------------------------------------------ what is visible


def visible_keys(inputs: dict, choice: Choice, q: Array, k: Array, rows: Array) -> Array:
    """Which keys the rows see, bool [n_batch or 1, 1, n_rows, n_ctx]."""
    n_seq, n_ctx = q.shape[-2], k.shape[-2]
    shift = 0 if choice.get("C9") == "top-left" else n_ctx - n_seq
    i, j = (rows + shift)[:, None], np.arange(n_ctx)[None, :]
    is_symmetric = inputs["window"] is not None and choice.get("C10") == "symmetric"
    keep = np.ones((len(rows), n_ctx), dtype=bool)
    if inputs["causal"] and not is_symmetric and choice.get("C9") != "not causal":
        keep &= j <= i + FRONTIER.get(choice.get("C9", ""), 0)
    if inputs["window"] is not None and choice.get("C10") != "ignored":
        keep &= j > i - inputs["window"] - (choice.get("C10") == "w + 1 keys")
    if is_symmetric:
        keep &= j < i + inputs["window"]
    keep = keep[None, None]
    if inputs["mask"] is not None:
        shape = (*inputs["q"].shape[:-1], n_ctx)
        given = np.broadcast_to(inputs["mask"].astype(bool), shape)
        keep = keep & given.reshape(-1, *shape[-3:])[:, :, rows]
    if inputs["valid"] is not None and choice.get("C23") != "padding enters":
        keep = keep & inputs["valid"].astype(bool)[:, None, None, :]
    if inputs["documents"] is not None and choice.get("C19") != "no document mask":
        labels = inputs["documents"]
        keep = keep & (labels[:, rows + n_ctx - n_seq, None] == labels[:, None, :])[:, None]
    return keep


def _n_tail(choice: Choice, n_ctx: int) -> int:
    """How many keys of zeros follow the real ones."""
    option = choice.get("C23", "")
    return -n_ctx % int(option.rsplit(" ", 1)[1]) if option.startswith("zero tail") else 0


def _softmax(s: Array, keep: Array, choice: Choice, n_tail: int, dtype: Any) -> dict[str, Array]:
    """Softmax over what is visible; a fill makes the excluded keys improbable instead."""
    keep = np.broadcast_to(keep, s.shape)
    fill = choice.get("C12")
    if fill == "finfo.min":
        nothing = ~keep.any(-1, keepdims=True)
        s, keep = np.where(nothing, 0, s), keep | nothing
    s = np.where(keep, s, _filled(s, FILLS[fill], dtype) if fill in FILLS else -np.inf)
    m = s.max(axis=-1, keepdims=True)
    m = np.maximum(m, 0) if n_tail else m
    empty = m == -np.inf
    e = np.exp(s - np.where(empty, 0, m))
    total = e.sum(axis=-1, keepdims=True)
    if n_tail:
        total = total + n_tail * np.exp(-m)
    return {"p": e / np.where(empty, 1, total), "m": m, "total": total, "empty": empty}


def _filled(s: Array, fill: float, dtype: Any) -> Array:
    """Add the fill in float32, where it swallows the score or leaves it."""
    return (s.astype(np.float32) + np.float32(fill)).astype(dtype)


def _spread(weight: Array, v: Array, y: Array) -> Array:
    """Bound sum_j w_j |v_j - y| by Cauchy and Schwarz: products instead of one table a channel."""
    total = weight.sum(axis=-1, keepdims=True)
    centre = (weight @ v) / np.where(total == 0, 1, total)
    around = np.maximum(weight @ (v * v) - total * centre**2, 0)
    return np.sqrt(total * (around + total * (y - centre) ** 2))
