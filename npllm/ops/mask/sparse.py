"""Sparse patterns: rules that leave most of the score table out."""

import numpy as np

from npllm.arrays import array_namespace
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.ops.mask.dense import at_least, causal, check_slots
from npllm.ops.mask.rule import ALL, NONE, SOME, Rule

__all__ = [
    "band",
    "block_local",
    "dilated_window",
    "fixed",
    "global_tokens",
    "longformer_window",
    "random_blocks",
    "strided",
]


def band(before, after):
    """Let a query see a band around its own slot.

        visible(i, j) = -after <= i - j <= before

    Parameters
    ----------
    before, after : int
        Number of slots before and after the query's own.

    Returns
    -------
    rule : Rule

    Notes
    -----
    Source: "Generating Long Sequences with Sparse Transformers" (Child et al. 2019), section 4;
    local attention.
    """
    at_least("before", before, 0)
    at_least("after", after, 0)

    def bound(i_low, i_high, j_low, j_high):
        farthest, nearest = i_high - j_low, i_low - j_high  # the range of i - j in the block
        return (
            NONE
            if farthest < -after or nearest > before
            else ALL
            if farthest <= before and nearest >= -after
            else SOME
        )

    return Rule(lambda i, j: (i - j <= before) & (i - j >= -after), bound)


def longformer_window(w):
    """Let a query see w // 2 slots on either side of its own.

        visible(i, j) = |i - j| <= w // 2

    Parameters
    ----------
    w : int

    Returns
    -------
    rule : Rule

    Notes
    -----
    Source: "Longformer" (Beltagy et al. 2020), section 3.1, sliding window.
    """
    at_least("w", w, 0)
    return band(w // 2, w // 2)


def dilated_window(w, dilation):
    """Let a query see w // 2 slots on either side, with gaps of `dilation` between them.

        visible(i, j) = |i - j| <= dilation * (w // 2) and (i - j) mod dilation = 0

    Parameters
    ----------
    w : int
    dilation : int

    Returns
    -------
    rule : Rule

    Notes
    -----
    Source: "Longformer" (Beltagy et al. 2020), section 3.1, dilated sliding window.
    """
    at_least("w", w, 0)
    at_least("dilation", dilation, 1)
    reach = dilation * (w // 2)
    return band(reach, reach) & _every(dilation)


def strided(stride):
    """Let a query see its last `stride` slots, and every `stride`-th slot before them.

        visible(i, j) = j <= i and (i - j <= stride or (i - j) mod stride = 0)

    Parameters
    ----------
    stride : int
        Near the square root of the length.

    Returns
    -------
    rule : Rule
        Both parts of the factorised pattern, merged into one head.

    Notes
    -----
    Source: "Generating Long Sequences with Sparse Transformers" (Child et al. 2019), section 4.2,
    strided attention.
    """
    at_least("stride", stride, 1)
    return band(stride, 0) | (causal() & _every(stride))


def fixed(stride, c):
    """Let a query see its own block so far, and the last `c` slots of every earlier block.

        visible(i, j) = j <= i and (j // stride = i // stride or j mod stride >= stride - c)

    Parameters
    ----------
    stride : int
        Slots of a block.
    c : int
        Slots at the end of a block that summarise it, 1 <= c <= stride.

    Returns
    -------
    rule : Rule
        Both parts of the factorised pattern, merged into one head.

    Notes
    -----
    Source: "Generating Long Sequences with Sparse Transformers" (Child et al. 2019), section 4.2,
    fixed attention.
    """
    at_least("stride", stride, 1)
    at_least("c", c, 1)
    if c > stride:
        raise NpllmValueError(f"c must be at most stride = {stride}, got {c}")

    def bound(_, __, j_low, j_high):
        first = (
            j_low if j_low % stride >= stride - c else j_low - j_low % stride + stride - c
        )  # the next summary slot
        inside_one = j_low % stride >= stride - c and j_low // stride == j_high // stride
        return ALL if inside_one or c == stride else NONE if first > j_high else SOME

    summary = Rule(lambda i, j: (j % stride >= stride - c) & (i == i), bound)
    return causal() & (block_local(stride) | summary)


def block_local(block):
    """Let a query see the keys of its own block.

        visible(i, j) = i // block = j // block

    Parameters
    ----------
    block : int

    Returns
    -------
    rule : Rule

    Notes
    -----
    Source: "Generating Wikipedia by Summarizing Long Sequences" (Liu et al. 2018), section 4.2.5,
    local attention.
    """
    at_least("block", block, 1)

    def bound(i_low, i_high, j_low, j_high):
        queries, keys = (i_low // block, i_high // block), (j_low // block, j_high // block)
        apart = queries[1] < keys[0] or keys[1] < queries[0]
        return NONE if apart else ALL if queries == keys and queries[0] == queries[1] else SOME

    return Rule(lambda i, j: i // block == j // block, bound)


def global_tokens(slots):
    """Let chosen slots see everything, and be seen by everything.

        visible(i, j) = i in slots or j in slots

    Parameters
    ----------
    slots : sequence of int

    Returns
    -------
    rule : Rule
        To be combined: `longformer_window(512) | global_tokens([0])`, in a causal model `causal() &
        (...)`.

    Raises
    ------
    NpllmTypeError
        When the slots are not integers.

    Notes
    -----
    Source: "Longformer" (Beltagy et al. 2020), section 3.1, global attention.
    """
    chosen = np.unique(np.asarray(slots))
    if chosen.size and chosen.dtype.kind not in "iu":
        raise NpllmTypeError(f"slots must be integers, got {slots!r}")

    def visible(i, j):
        return _is_in(i, chosen) | _is_in(j, chosen)

    def bound(i_low, i_high, j_low, j_high):
        counts = [
            (np.searchsorted(chosen, high + 1) - np.searchsorted(chosen, low), high - low + 1)
            for low, high in ((i_low, i_high), (j_low, j_high))
        ]
        return (
            ALL
            if any(n == size for n, size in counts)
            else SOME
            if any(n for n, _ in counts)
            else NONE
        )

    return Rule(visible, bound)


def random_blocks(block, n_blocks, n_random, seed):
    """Let every block of queries see a few blocks of keys drawn at random, the same on every call.

        visible(i, j) = j // block is one of the n_random blocks drawn for i // block

    Parameters
    ----------
    block : int
        Slots of a block.
    n_blocks : int
        Blocks of the longest sequence.
    n_random : int
        Blocks drawn for each block of queries, 0 <= n_random <= n_blocks.
    seed : int

    Returns
    -------
    rule : Rule
        To be combined: `longformer_window(w) | global_tokens(g) | random_blocks(...)`.

    Raises
    ------
    NpllmValueError
        For a count out of range; and when the rule is asked about a slot on the host beyond the
        n_blocks.

    Notes
    -----
    Source: "Big Bird" (Zaheer et al. 2020), section 2.
    """
    at_least("block", block, 1)
    at_least("n_blocks", n_blocks, 1)
    at_least("n_random", n_random, 0)
    at_least("seed", seed, 0)
    if n_random > n_blocks:
        raise NpllmValueError(f"n_random must be at most n_blocks = {n_blocks}, got {n_random}")
    rng = np.random.Generator(np.random.Philox(key=seed))
    drawn = (
        np.argsort(rng.random((n_blocks, n_blocks)), axis=1, kind="stable") < n_random
    )  # n_random per row

    def visible(i, j):
        xp = array_namespace(i, j)
        for slots in (i, j):
            check_slots(slots, n_blocks * block)
        flat = xp.reshape(xp.asarray(drawn), (-1,))
        pairs = (i // block) * n_blocks + j // block
        return xp.reshape(xp.take(flat, xp.reshape(pairs, (-1,))), pairs.shape)

    def bound(i_low, i_high, j_low, j_high):
        part = drawn[i_low // block : i_high // block + 1, j_low // block : j_high // block + 1]
        known = min(i_low, j_low) >= 0 and max(i_high, j_high) < n_blocks * block
        return SOME if not known else ALL if part.all() else SOME if part.any() else NONE

    return Rule(visible, bound)


def _every(step):
    """Slots at a distance that is a multiple of `step`."""
    return Rule(lambda i, j: (i - j) % step == 0, lambda *_: ALL if step == 1 else SOME)


def _is_in(slots, chosen):
    """Tell for each slot whether it is one of a few."""
    found = slots != slots
    for slot in chosen.tolist():
        found = found | (slots == slot)
    return found
