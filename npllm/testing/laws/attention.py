"""Attention: arrays of a case, and the trials that its laws need."""

from typing import Any

import numpy as np

from npllm.arrays import DTYPES
from npllm.ops import mask as rules
from npllm.testing.forms import evaluate, prepare
from npllm.testing.laws.arrays import Array, laid_out, normal, tiny_scale
from npllm.testing.laws.broken import Finding
from npllm.testing.laws.trial import HIDDEN, Trial, by_verdict
from npllm.testing.search import distance

__all__ = ["FEATURES", "PARAMETERS", "attention_trials"]

FEATURES = (
    "gqa",
    "window",
    "bias",
    "softcap",
    "slots",
    "padding",
    "cache",
    "scale",
    "empty rows",
    "poison",
    "lse",
)
"""What can be switched off, one by one."""

PARAMETERS = {
    "bias": ("bias",),
    "softcap": ("softcap",),
    "slots": ("q_slots", "k_slots"),
    "scale": ("scale",),
    "lse": ("return_lse",),
}
"""Which parameters a function must have for a feature."""

LSE = "The log-sum-exp of a row is that of its visible scores, and -inf where there is none."


def attention_trials(case: dict[str, Any], features: frozenset[str], **arithmetic: Any) -> list:
    """Make the trials of a case: the whole, then one row whose hidden keys hold poison."""
    q, k, v = draw_operands(case)
    seen = _visible(case)
    k, v = _hidden(case, k, v, seen.any(axis=(1, 2)))
    options = _options(case)
    asked = _asked(case, q, k, v, seen, options)
    ignored = None if "empty rows" in features else ~seen.any(axis=-1)
    trial = _trial(case, (q, k, v), options, asked, ignored, arithmetic)
    return [trial, _poisoned(case, (q, k, v), seen, options, arithmetic)]


# ------------------------------------------------------------------ arrays


def draw_operands(case: dict[str, Any]) -> tuple[Array, Array, Array]:
    """q, k, v of a case; the values keep the sign of their channel, so that no sum cancels."""
    rng, dtype, d = np.random.default_rng(case["seed"]), case["dtype"], case["d_head"]
    heads = (case["n_batch"], case["n_kv_head"])
    q = normal(rng, (case["n_batch"], case["n_head"], case["n_seq"], d), dtype)
    k, v = (normal(rng, (*heads, case["n_ctx"], d), dtype) for _ in range(2))
    sign = np.where(rng.random(d) < 0.5, -1.0, 1.0)
    wide = (0.5 + rng.random(v.shape)) * sign
    size = case["size"]
    if size == "huge":
        q = (q.astype(np.float64) * 200).astype(q.dtype)
    if size == "equal":
        k = np.broadcast_to(k[..., :1, :], k.shape).copy()
    if size == "cancelling":
        k = (k.astype(np.float64) + 30 * rng.standard_normal(d)).astype(k.dtype)
        wide = v.astype(np.float64)
    if size == "subnormal":
        wide = wide * tiny_scale(dtype)
    return q, k, wide.astype(DTYPES[dtype])


def _slots(case: dict[str, Any]) -> tuple[Array, Array]:
    """Slots of queries and keys: a ring of cache rows, or rows that are not used yet."""
    n_seq, n_ctx = case["n_seq"], case["n_ctx"]
    q_slots, k_slots = np.arange(n_ctx - n_seq, n_ctx), np.arange(n_ctx)
    if case["slots"] == "ring":
        k_slots = np.roll(k_slots, n_ctx // 2)
    if case["slots"] == "unused rows":
        q_slots = q_slots - n_unused(n_seq, n_ctx)
    return q_slots, k_slots


def n_unused(n_seq: int, n_ctx: int) -> int:
    """Count the last cache rows that are not used yet: a quarter, and at least one query's keys."""
    return min(1 + n_ctx // 4, n_ctx - n_seq)


def _valid(case: dict[str, Any]) -> Array | None:
    """Which keys are real, bool [n_batch, n_ctx], by slot; padding is on the left."""
    if not any(case["padding"]):
        return None
    return np.arange(case["n_ctx"]) >= np.array(case["padding"])[:, None]


def _visible(case: dict[str, Any]) -> Array:
    """Which keys are visible, bool [n_batch, 1, n_seq, n_ctx]: naive, no code of `ops.mask`."""
    q_slots, k_slots = _slots(case)
    distance_back = q_slots[:, None] - k_slots[None, :]
    seen = distance_back >= 0
    if case["window"] is not None:
        seen = seen & (distance_back < case["window"])
    start = np.array(case["padding"])[:, None, None]
    return (seen[None] & (k_slots[None, None, :] >= start))[:, None]


def _hidden(case: dict[str, Any], k: Array, v: Array, used: Array) -> tuple[Array, Array]:
    """Fill the keys that no query sees."""
    fill = {"same": None, "large": 1e4, "NaN": np.nan}[case["hidden"]]
    if fill is None:
        return k, v
    nobody = ~used[:, None, :, None]
    value = np.asarray(fill, k.dtype)
    return np.where(nobody, value, k), np.where(nobody, value, v)


def _options(case: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a case: only those whose feature is on."""
    rule = rules.causal() if case["window"] is None else rules.sliding_window(case["window"])
    valid = _valid(case)
    options: dict[str, Any] = {"mask": rule if valid is None else rule & rules.padding(valid)}
    if case["bias"]:
        rng = np.random.default_rng(case["seed"] + 1)
        shape = (case["n_head"], case["n_seq"], case["n_ctx"])
        options["bias"] = normal(rng, shape, case["dtype"])
    for name in ("scale", "softcap"):
        if case[name] is not None:
            options[name] = case[name]
    if case["slots"]:
        options["q_slots"], options["k_slots"] = _slots(case)
    if case["lse"]:
        options["return_lse"] = True
    return options


# ------------------------------------------------------------------ trials


def _asked(case: dict, q: Array, k: Array, v: Array, seen: Array, options: dict) -> dict[str, Any]:
    """Inputs of `verdict` and `diagnose`: the conventions where they say it all, else a table."""
    inputs = {"q": q, "k": k, "v": v}
    inputs |= {name: options[name] for name in ("bias", "scale", "softcap") if name in options}
    if case["slots"]:
        return inputs | {"causal": False, "mask": seen}
    return inputs | {"causal": True, "window": case["window"], "valid": _valid(case)}


def _trial(
    case: dict,
    operands: tuple,
    options: dict,
    asked: dict,
    ignored: Array | None,
    arithmetic: dict,
) -> Trial:
    by_value = by_verdict(
        "attention", asked, ("attention", asked), dtype=case["dtype"], **arithmetic
    )

    def judge(output: Any) -> tuple[Finding | None, float]:
        y, lse = output if case["lse"] and isinstance(output, tuple) else (output, None)
        found = by_value(_without(y, ignored))
        if found[0] is None and case["lse"]:
            return _judge_lse(asked, lse, found[1])
        return found

    arguments = tuple(laid_out(x, case["layout"]) for x in operands)
    shape = (*operands[0].shape[:-1], operands[2].shape[-1])
    return Trial(arguments, options, judge, shape, case["dtype"])


def _without(y: Any, ignored: Array | None) -> Any:
    """Put 0 where the output is not defined."""
    if ignored is None or getattr(y, "ndim", 0) != 4:
        return y
    return np.where(ignored[..., None], np.zeros((), y.dtype), y)


def _judge_lse(asked: dict, lse: Any, used: float) -> tuple[Finding | None, float]:
    """Hold the log-sum-exp against its bound."""
    prepared = prepare("attention_lse", asked)
    answer = evaluate("attention_lse", prepared)
    shape = asked["q"].shape[:-1]
    if getattr(lse, "shape", None) != shape:
        return Finding(LSE, f"lse must be an array {list(shape)}, got {type(lse).__name__}"), used
    got = lse.astype(np.float64).reshape(answer.y.shape)
    share = distance(got, answer, "float32")
    if share <= 1:
        return None, used
    says = f"the log-sum-exp is {share:.3g} of its bound away"
    return Finding(LSE, says, "attention_lse", asked, lse, share), used


def _poisoned(case: dict, operands: tuple, seen: Array, options: dict, arithmetic: dict) -> Trial:
    """One row is judged; every key that it does not see is NaN, or large without poison."""
    q, k, v = operands
    row = case["seed"] % case["n_seq"]
    fill = np.nan if case["poison"] else 1e4
    hidden = ~seen[:, :, row, :, None]
    k, v = (np.where(hidden, np.asarray(fill, x.dtype), x) for x in (k, v))
    at = np.s_[:, :, row : row + 1]
    inputs = {"q": q[at], "k": k, "v": v, "causal": False, "mask": seen[at]}
    inputs |= {name: options[name] for name in ("scale", "softcap") if name in options}
    if "bias" in options:
        inputs["bias"] = options["bias"][:, row : row + 1]
    judge_row = by_verdict("attention", inputs, None, HIDDEN, dtype=case["dtype"], **arithmetic)
    ignored = ~seen[:, :, row].any(axis=-1)[..., None]

    def judge(output: Any) -> tuple[Finding | None, float]:
        y = output[0] if isinstance(output, tuple) else output
        fits = getattr(y, "shape", None) == (*q.shape[:-1], v.shape[-1])
        if not fits or ignored.all():
            return None, float("nan")
        return judge_row(_without(y[at], ignored))

    shape = (*q.shape[:-1], v.shape[-1])
    return Trial((q, k, v), options, judge, shape, case["dtype"])
