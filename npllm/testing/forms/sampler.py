"""The distribution that a sampler draws from, with its forks."""

import numpy as np

from npllm.testing.forms.common import U32, Answer, Array, Choice, Work

__all__ = ["sampler"]

ORDERS = {
    None: ("temperature", "top_k", "top_p", "min_p"),
    "temperature last": ("top_k", "top_p", "min_p", "temperature"),
    "top-p before top-k": ("temperature", "top_p", "top_k", "min_p"),
    "min-p first": ("temperature", "min_p", "top_k", "top_p"),
}


def sampler(inputs: dict, choice: Choice, work: Work) -> Answer:
    """Filter logits and return probabilities under the options of `choice`.

        ours: repetition penalty, temperature, top-k, top-p, min-p, softmax
        slack = y u (4 + n + 4 max |logit|), infinity in a row where rounding decides what is kept

    Returns
    -------
    answer : Answer
        Arrays [n_row, n_vocab]; y is 0 exactly where a token cannot be drawn.
    """
    logits = inputs["logits"].reshape(-1, inputs["logits"].shape[-1]).astype(np.float64)
    seen = inputs["seen"]
    seen = (
        None
        if seen is None
        else np.broadcast_to(seen, inputs["logits"].shape).reshape(logits.shape)
    )
    rows = [
        _row(row, inputs, None if seen is None else seen[n], choice) for n, row in enumerate(logits)
    ]
    y = np.stack([row for row, _ in rows])
    finite = np.where(np.isfinite(logits), np.abs(logits), 0).max(axis=-1, keepdims=True)
    sharpness = max(1.0, 1 / (inputs["temperature"] or 1.0))
    slack = y * work.unit * (4 + logits.shape[-1] + 4 * finite * sharpness)
    slack = np.where(np.array([[unsure] for _, unsure in rows]), np.inf, slack)
    return Answer(y.astype(work.dtype), slack if work.dtype == np.float64 else None)


def _row(z: Array, inputs: dict, seen: Array, choice: Choice) -> tuple[Array, bool]:
    """Probabilities of one row, and whether rounding in float32 could change what is kept."""
    penalty = inputs["repetition_penalty"]
    if penalty is not None and seen is not None:
        z = np.where(seen, np.where(z < 0, z * penalty, z / penalty), z)
    unfiltered, unsure = z, False
    for name in ORDERS[choice.get("C15")]:
        value = inputs[name]
        if value is None:
            continue
        if name == "temperature":
            z, unfiltered = z / value, unfiltered / value
            continue
        weights = _probabilities(unfiltered if choice.get("C17") == "filters see the whole" else z)
        weights = np.where(z > -np.inf, weights, 0)
        keep, close = FILTERS[name](z, weights, value, choice.get("C16"))
        z, unsure = np.where(keep, z, -np.inf), unsure or close
    if choice.get("C17") == "not renormalised":
        return np.where(z > -np.inf, _probabilities(unfiltered), 0), unsure
    return _probabilities(z), unsure


def _probabilities(z: Array) -> Array:
    e = np.exp(z - z.max())
    return e / e.sum()


def _top_k(z: Array, _: Array, k: int, option: str | None) -> tuple[Array, bool]:
    order = np.argsort(-z, kind="stable")
    k = min(int(k), len(z))
    if k < 1:
        return z > -np.inf, False
    border = z[order[k - 1]]
    keep = z >= border
    if option == "ties in top-k cut":
        keep = np.zeros(len(z), dtype=bool)
        keep[order[:k]] = True
    gap = np.abs(z[np.isfinite(z)] - border)
    return keep, bool(((gap > 0) & (gap < 8 * U32 * abs(border))).any())


def _top_p(z: Array, weights: Array, p: float, option: str | None) -> tuple[Array, bool]:
    order = np.argsort(-z, kind="stable")
    after = np.cumsum(weights[order])
    before = after - weights[order]
    kept = before < p
    if option == "at most p":
        kept = after <= p
    if option == "more than p":
        kept = before <= p
    kept[0] = True
    keep = np.zeros(len(z), dtype=bool)
    keep[order] = kept & (z[order] > -np.inf)
    edge = np.abs((after if option == "at most p" else before) - p)
    close = (edge > 0) & (edge < (len(z) + 8) * U32) & (z[order] > -np.inf)
    return keep | (p >= 1) & (z > -np.inf), bool(close.any() and p < 1)


def _min_p(z: Array, weights: Array, p: float, _: str | None) -> tuple[Array, bool]:
    largest = weights.max()
    edge = np.abs(weights - p * largest)
    unsure = (edge > 0) & (edge < 32 * U32 * p * largest)
    return (weights >= p * largest) & (z > -np.inf), bool(unsure.any())


FILTERS = {"top_k": _top_k, "top_p": _top_p, "min_p": _min_p}
