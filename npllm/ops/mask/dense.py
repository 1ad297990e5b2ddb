"""Rules of the dense models: everything, everything before, the last w, a prefix."""

from numbers import Integral

from npllm.arrays import host_range
from npllm.errors import NpllmValueError
from npllm.ops.mask.rule import ALL, FAR, NONE, SOME, Rule

__all__ = [
    "at_least",
    "bidirectional",
    "causal",
    "check_slots",
    "lookback",
    "prefix_lm",
    "sliding_window",
]


def bidirectional():
    """Let every query see every key.

        visible(i, j) = True

    Returns
    -------
    rule : Rule

    Notes
    -----
    Source: "BERT" (Devlin et al. 2018), section 3.
    """
    return Rule(lambda i, j: (i == i) & (j == j), lambda *_: ALL, (-FAR, FAR))


def causal():
    """Let a query see its own slot and every earlier one.

        visible(i, j) = j <= i

    Returns
    -------
    rule : Rule

    Notes
    -----
    Source: "Attention Is All You Need" (Vaswani et al. 2017), section 3.2.3.
    """

    def bound(i_low, i_high, j_low, j_high):
        return ALL if j_high <= i_low else NONE if j_low > i_high else SOME

    return Rule(lambda i, j: j <= i, bound, (0, FAR))


def sliding_window(w):
    """Let a query see the last `w` slots, its own included.

        visible(i, j) = i - w < j <= i

    Parameters
    ----------
    w : int
        Number of visible keys, `sliding_window` in config.json.

    Returns
    -------
    rule : Rule

    Raises
    ------
    NpllmValueError
        When `w` is below 1.

    Notes
    -----
    Exactly w keys: the meaning of Transformers' `sliding_window` and llama.cpp's `n_swa`.
    `lookback` is the other meaning.

    Source: "Longformer" (Beltagy et al. 2020), section 3.1, one-sided; `sliding_window_overlay` in
    Transformers.
    """
    at_least("w", w, 1)

    def bound(i_low, i_high, j_low, j_high):
        return ALL if j_low > i_high - w else NONE if j_high <= i_low - w else SOME

    return causal() & Rule(lambda i, j: j > i - w, bound, (-FAR, w))


def lookback(w):
    """Let a query see its own slot and the `w` before it: w + 1 keys.

        visible(i, j) = i - w <= j <= i

    Parameters
    ----------
    w : int
        Largest distance, `window_size=(w, 0)` of FlashAttention.

    Returns
    -------
    rule : Rule

    Notes
    -----
    Engines that hand a checkpoint's `sliding_window` to FlashAttention unchanged see one key more
    than the checkpoint says.

    Source: `flash_attn_func`, argument `window_size`.
    """
    at_least("w", w, 0)
    return sliding_window(w + 1)


def prefix_lm(n_prefix):
    """Let every query see the whole prefix, and beyond it only what came before.

        visible(i, j) = j < n_prefix or j <= i

    Parameters
    ----------
    n_prefix : int

    Returns
    -------
    rule : Rule

    Notes
    -----
    Source: "Exploring the Limits of Transfer Learning" (Raffel et al. 2019, T5), section 3.2.1,
    prefix LM.
    """
    at_least("n_prefix", n_prefix, 0)

    def bound(_, __, j_low, j_high):
        return ALL if j_high < n_prefix else NONE if j_low >= n_prefix else SOME

    return causal() | Rule(lambda i, j: (j < n_prefix) & (i == i), bound)


def at_least(name, value, least):
    """Raise unless a parameter of a rule is an integer of at least `least`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise NpllmValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_slots(slots, n):
    """Raise for slots on the host beyond the n that a rule knows: they would be read from the other
    end, or from another row.
    """
    lowest_highest = host_range(slots)
    if lowest_highest and not (lowest_highest[0] >= 0 and lowest_highest[1] < n):
        raise NpllmValueError(
            f"slots must lie in 0 ... {n - 1}, all that this mask rule was made for, got {lowest_highest[0]} ... "
            f"{lowest_highest[1]}"
        )
