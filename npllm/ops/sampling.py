"""From logits to the next token: filters that map logits to logits, and the draw.

The filters follow Transformers: each excludes a token by giving it -inf, and softmax renormalises
what is left.  The order in which they are applied matters, and engines differ in it:
`npllm.decoding.FILTER_ORDERS`.
"""

from operator import index
from typing import Any

from npllm.arrays import (
    array_namespace,
    expect_entries,
    expect_shape,
    largest,
    to_numpy,
    widen,
)
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.finite_scores import check_scores

__all__ = [
    "greedy",
    "log_softmax",
    "min_p",
    "repetition_penalty",
    "sample",
    "softmax",
    "temperature",
    "top_k",
    "top_p",
]

Array = Any
COLD = 1e-6  # below this temperature logits are shifted first
LOWEST = -1e30  # to which they are cut there: a number of float32 whose exp is 0


def softmax(x: Array, axis: int = -1) -> Array:
    """Turn scores into a distribution.

        y[i] = exp(x[i] - m) / sum_j exp(x[j] - m),   m = max_j x[j]

    Parameters
    ----------
    x : array [..., n_vocab]
        -inf excludes an entry.
    axis : int
        The axis that sums to 1.

    Returns
    -------
    y : array [..., n_vocab]
        In the dtype of `x`.  All zeros where every entry is -inf.

    Notes
    -----
    Computes in float32 (float64 when `x` is).  Without the shift by m, which changes nothing, exp
    would overflow.

    Source: "Attention Is All You Need" (Vaswani et al. 2017), section 3.4;
    `torch.nn.functional.softmax`.
    """
    xp = array_namespace(x)
    expect_entries("x", x, axis)
    wide = widen(x)
    m = xp.max(wide, axis=axis, keepdims=True)
    e = xp.exp(wide - xp.where(m == -xp.inf, xp.zeros_like(m), m))
    total = xp.sum(e, axis=axis, keepdims=True)
    y = e / xp.where(total == 0, xp.ones_like(total), total)
    return y if y.dtype == x.dtype else xp.astype(y, x.dtype)


def log_softmax(x: Array, axis: int = -1) -> Array:
    """Turn scores into log-probabilities.

        y[i] = x[i] - m - log(sum_j exp(x[j] - m)),   m = max_j x[j]

    Parameters
    ----------
    x : array [..., n_vocab]
        -inf excludes an entry.
    axis : int
        The axis over which the probabilities sum to 1.

    Returns
    -------
    y : array [..., n_vocab]
        In the dtype of `x`.  -inf where `x` is; all of it where every entry is.

    Notes
    -----
    Computes in float32 (float64 when `x` is).  The logarithm of `softmax` would be -inf where the
    probability is below the smallest float.

    Source: `torch.nn.functional.log_softmax`.
    """
    xp = array_namespace(x)
    expect_entries("x", x, axis)
    wide = widen(x)
    m = xp.max(wide, axis=axis, keepdims=True)
    shifted = wide - xp.where(m == -xp.inf, xp.zeros_like(m), m)
    total = xp.sum(xp.exp(shifted), axis=axis, keepdims=True)
    y = shifted - xp.log(xp.where(total == 0, xp.ones_like(total), total))
    return y if y.dtype == x.dtype else xp.astype(y, x.dtype)


def repetition_penalty(logits: Array, seen: Array, penalty: float) -> Array:
    """Make tokens that were seen already less likely.

        y[i] = logits[i] / penalty where logits[i] > 0, else logits[i] * penalty,   for seen i only

    Parameters
    ----------
    logits : array [..., n_vocab]
    seen : bool array [..., n_vocab]
        True for each token of the prompt and of the answer so far.
    penalty : float
        Above 0; 1 changes nothing, above 1 discourages.

    Returns
    -------
    y : array [..., n_vocab]

    Raises
    ------
    NpllmValueError
        When `penalty` is not above 0.
    NpllmTypeError
        When `seen` is not bool.

    Notes
    -----
    Source: "CTRL" (Keskar et al. 2019), section 4.1; `RepetitionPenaltyLogitsProcessor` in
    Transformers.
    """
    xp = array_namespace(logits, seen)
    if seen.dtype != xp.bool:
        raise NpllmTypeError(f"seen must be a bool array (True = seen), got dtype {seen.dtype}")
    axes = zip(seen.shape[::-1], logits.shape[::-1], strict=False)
    if any(1 not in (mine, theirs) and mine != theirs for mine, theirs in axes):
        raise NpllmValueError(
            f"seen must have the shape {list(logits.shape)} of the logits, got {list(seen.shape)}"
        )
    penalty = float(penalty)  # a NumPy scalar would widen the result
    if not penalty > 0:
        raise NpllmValueError(
            f"repetition_penalty must be above 0 (1 changes nothing), got {penalty}"
        )
    return xp.where(seen, xp.where(logits < 0, logits * penalty, logits / penalty), logits)


def temperature(logits: Array, t: float) -> Array:
    """Flatten (t > 1) or sharpen (t < 1) the distribution.

        y = logits / t
        t < 1e-6:  y = max((logits - m) / t, -1e30),   m = max_i logits[..., i]

    Parameters
    ----------
    logits : array [..., n_vocab]
    t : float
        Above 0.  Towards 0 the draw becomes `greedy`.

    Returns
    -------
    y : array [..., n_vocab]
        In the dtype of `logits`.  -inf where `logits` is.

    Raises
    ------
    NpllmValueError
        When `t` is not above 0.

    Notes
    -----
    The shift by m changes no distribution, and makes logits / t finite for every t.  It computes in
    float64, since in float32 a t below 1e-45 is 0.

    Source: "Distilling the Knowledge in a Neural Network" (Hinton et al. 2015), equation 1;
    `TemperatureLogitsWarper`.
    """
    xp, t = array_namespace(logits), float(t)
    expect_entries("logits", logits)
    if not t > 0:
        raise NpllmValueError(f"temperature must be above 0, got {t}; use greedy for 0")
    if t >= COLD:
        return logits / t
    wide = widen(logits, xp.float64)
    below = wide - xp.max(wide, axis=-1, keepdims=True)
    cut = xp.where(below < LOWEST * t, xp.asarray(LOWEST * t, dtype=xp.float64), below) / t
    return _keep(xp, xp.astype(cut, logits.dtype), below > -xp.inf)


def top_k(logits: Array, k: int) -> Array:
    """Keep the k largest logits, and exclude the others.

        y[i] = logits[i] where logits[i] >= the k-th largest, else -inf

    Parameters
    ----------
    logits : array [..., n_vocab]
    k : int
        At least 1; more than n_vocab keeps all.

    Returns
    -------
    y : array [..., n_vocab]

    Raises
    ------
    NpllmValueError
        When `k` is below 1.

    Notes
    -----
    Ties with the k-th largest are kept, so that more than k may remain.

    Source: "Hierarchical Neural Story Generation" (Fan et al. 2018), section 5.4;
    `TopKLogitsWarper` in Transformers.
    """
    xp, k = array_namespace(logits), index(k)
    expect_entries("logits", logits)
    if k < 1:
        raise NpllmValueError(f"top_k must be at least 1, got {k}")
    k = min(k, logits.shape[-1])
    kth_largest = xp.sort(logits, axis=-1)[..., -k, None]
    return _keep(xp, logits, logits >= kth_largest)


def top_p(logits: Array, p: float) -> Array:
    """Keep the nucleus: the smallest set of most likely tokens whose probabilities sum to >= p.

        y[i] = logits[i] where the sum of all probabilities that rank before i is below p, else -inf

    Parameters
    ----------
    logits : array [..., n_vocab]
    p : float
        0 <= p <= 1; at 0 the most likely token remains, at 1 all do.

    Returns
    -------
    y : array [..., n_vocab]

    Raises
    ------
    NpllmValueError
        When `p` lies outside 0 ... 1.

    Notes
    -----
    The token that crosses p is kept.  Equal logits rank by their id, lower first.  Probabilities
    are summed in float64.  Looks at one number on the host: how many tokens are not excluded yet.
    Only those are sorted, so that `top_k` in front of it saves the sort of the vocabulary.

    Source: "The Curious Case of Neural Text Degeneration" (Holtzman et al. 2019), section 3.1;
    `TopPLogitsWarper`.
    """
    xp, p = array_namespace(logits), float(p)
    expect_entries("logits", logits)
    if not 0 <= p <= 1:
        raise NpllmValueError(f"top_p must lie in 0 ... 1, got {p}")
    if p == 1:
        return logits
    n_left = xp.sum(xp.astype(logits != -xp.inf, xp.int64), axis=-1)
    n = int(to_numpy(xp.max(n_left))) if logits.size else 0
    order = largest(widen(logits), max(n, 1), xp)  # no other token has a probability
    ranked = xp.take_along_axis(softmax(widen(logits, xp.float64)), order, axis=-1)
    before = xp.cumulative_sum(ranked[..., :-1], axis=-1)  # of what ranks before the second, ...
    last = xp.sum(xp.astype(before < p, xp.int64), axis=-1, keepdims=True)  # the last rank kept
    last_id = xp.take_along_axis(order, last, axis=-1)
    least = xp.take_along_axis(logits, last_id, axis=-1)
    ids = xp.arange(logits.shape[-1])
    return _keep(xp, logits, (logits > least) | ((logits == least) & (ids <= last_id)))


def min_p(logits: Array, p: float) -> Array:
    """Keep the tokens that are at least p times as likely as the likeliest.

        y[i] = logits[i] where softmax(logits)[i] >= p * max_j softmax(logits)[j], else -inf

    Parameters
    ----------
    logits : array [..., n_vocab]
    p : float
        0 <= p <= 1; 0 keeps all.

    Returns
    -------
    y : array [..., n_vocab]

    Raises
    ------
    NpllmValueError
        When `p` lies outside 0 ... 1.

    Notes
    -----
    Source: "Turning Up the Heat: Min-p Sampling" (Nguyen et al. 2024), section 3;
    `MinPLogitsWarper` in Transformers.
    """
    xp, p = array_namespace(logits), float(p)
    expect_entries("logits", logits)
    if not 0 <= p <= 1:
        raise NpllmValueError(f"min_p must lie in 0 ... 1, got {p}")
    probabilities = softmax(logits)
    return _keep(xp, logits, probabilities >= p * xp.max(probabilities, axis=-1, keepdims=True))


def greedy(logits: Array) -> Array:
    """Choose the most likely token.

        token = argmax_i logits[i]

    Parameters
    ----------
    logits : array [..., n_vocab]

    Returns
    -------
    token : integer array [...]
        The lowest id among equals.

    Raises
    ------
    NpllmValueError
        When a row on the host holds NaN or +inf or excludes every token.

    Notes
    -----
    Logits on a device are not looked at, since that would wait for it.

    Source: `GenerationMixin._sample` in Transformers with `do_sample=False`.
    """
    xp = array_namespace(logits)
    return xp.argmax(widen(check_scores(logits, "logits")), axis=-1)


def sample(logits: Array, u: Array) -> Array:
    """Draw a token by inverting the cumulative distribution: the randomness is an argument.

        token = the first i with softmax(logits)[0] + ... + softmax(logits)[i] > u

    Parameters
    ----------
    logits : array [..., n_vocab]
        -inf excludes a token.
    u : array [...]
        Uniform random numbers, 0 <= u < 1, one for each row.

    Returns
    -------
    token : integer array [...]
        Never an excluded token.

    Raises
    ------
    NpllmValueError
        When `u` does not have the shape of the rows or lies outside 0 <= u < 1, or a row excludes
        every token or holds NaN or inf.

    Notes
    -----
    Looks at two truth values on the host.  Sums in float64.  Where rounding leaves the whole sum at
    or below `u`, the last token that is not excluded is drawn.

    Source: "Non-Uniform Random Variate Generation" (Devroye 1986), section III.2.
    """
    xp = array_namespace(logits, u)
    expect_shape("u", u, **{f"axis_{n}": size for n, size in enumerate(logits.shape[:-1])})
    if not to_numpy(xp.all((u >= 0) & (u < 1))):
        raise NpllmValueError("u must lie in 0 <= u < 1")
    probabilities = softmax(widen(check_scores(logits, "logits", wait=True), xp.float64))
    sums = xp.cumulative_sum(probabilities, axis=-1)
    possible = xp.where(probabilities > 0, xp.arange(logits.shape[-1]), -1)
    crossed = xp.sum(xp.astype(sums <= xp.expand_dims(u, axis=-1), xp.int64), axis=-1)
    return xp.minimum(crossed, xp.max(possible, axis=-1))


def _keep(xp: Any, logits: Array, kept: Array) -> Array:
    return xp.where(kept, logits, xp.asarray(-xp.inf, dtype=logits.dtype))
