"""Causal rules and windows: every key, every earlier key, the last w keys, a prefix."""

from dataclasses import dataclass
from numbers import Integral
from typing import Any

from npllm.arrays import host_range
from npllm.errors import NpllmValueError
from npllm.ops.mask.rule import ALL, FAR, NONE, SOME, Band, DerivedRule, Rule

__all__ = [
    "at_least",
    "bidirectional",
    "causal",
    "check_slots",
    "lookback",
    "prefix_lm",
    "sliding_window",
]

Array = Any


def bidirectional() -> Rule:
    """Let every query see every key.

        visible(i, j) = True

    Returns
    -------
    rule : Rule

    Notes
    -----
    Source: "BERT" (Devlin et al. 2018), section 3.
    """
    return Bidirectional()


@dataclass(frozen=True, eq=False, repr=False)
class Bidirectional(Rule):
    """The rule of `bidirectional`."""

    band = (-FAR, FAR)

    def visible(self, i: Array, j: Array) -> Array:
        """Evaluate the rule on slots."""
        return (i == i) & (j == j)

    def bound(self, *_: int) -> int:
        """Say what holds for a whole block."""
        return ALL


def causal() -> Rule:
    """Let a query see its own slot and every earlier one.

        visible(i, j) = j <= i

    Returns
    -------
    rule : Rule

    Notes
    -----
    Source: "Attention Is All You Need" (Vaswani et al. 2017), section 3.2.3.
    """
    return Causal()


@dataclass(frozen=True, eq=False, repr=False)
class Causal(Rule):
    """The rule of `causal`."""

    band = (0, FAR)

    def visible(self, i: Array, j: Array) -> Array:
        """Evaluate the rule on slots."""
        return j <= i

    def bound(self, i_low: int, i_high: int, j_low: int, j_high: int) -> int:
        """Say what holds for a whole block."""
        return ALL if j_high <= i_low else NONE if j_low > i_high else SOME


def sliding_window(w: int) -> Rule:
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
    return SlidingWindow(int(w))


@dataclass(frozen=True, eq=False, repr=False)
class SlidingWindow(DerivedRule):
    """The rule of `sliding_window`."""

    w: int

    def definition(self) -> Rule:
        """Return the rules that define this one, combined."""
        return causal() & CloserThan(self.w)


@dataclass(frozen=True, eq=False, repr=False)
class CloserThan(Rule):
    """Let a query see the keys fewer than `w` slots before it, and all that come later."""

    w: int

    @property
    def band(self) -> Band:
        """The band of distances that the rule is."""
        return (-FAR, self.w)

    def visible(self, i: Array, j: Array) -> Array:
        """Evaluate the rule on slots."""
        return j > i - self.w

    def bound(self, i_low: int, i_high: int, j_low: int, j_high: int) -> int:
        """Say what holds for a whole block."""
        if j_low > i_high - self.w:
            return ALL
        return NONE if j_high <= i_low - self.w else SOME


def lookback(w: int) -> Rule:
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


def prefix_lm(n_prefix: int) -> Rule:
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
    return PrefixLm(int(n_prefix))


@dataclass(frozen=True, eq=False, repr=False)
class PrefixLm(DerivedRule):
    """The rule of `prefix_lm`."""

    n_prefix: int

    def definition(self) -> Rule:
        """Return the rules that define this one, combined."""
        return causal() | Prefix(self.n_prefix)


@dataclass(frozen=True, eq=False, repr=False)
class Prefix(Rule):
    """Let every query see the first `n_prefix` keys."""

    n_prefix: int

    def visible(self, i: Array, j: Array) -> Array:
        """Evaluate the rule on slots."""
        return (j < self.n_prefix) & (i == i)

    def bound(self, _: int, __: int, j_low: int, j_high: int) -> int:
        """Say what holds for a whole block."""
        if j_high < self.n_prefix:
            return ALL
        return NONE if j_low >= self.n_prefix else SOME


def at_least(name: str, value: Any, least: int) -> None:
    """Raise unless a parameter of a rule is an integer of at least `least`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise NpllmValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_slots(slots: Array, n: int) -> None:
    """Raise for slots on the host beyond the n that a rule knows: they would be read from the other
    end, or from another row.
    """
    lowest_highest = host_range(slots)
    if lowest_highest and not (lowest_highest[0] >= 0 and lowest_highest[1] < n):
        raise NpllmValueError(
            f"slots must lie in 0 ... {n - 1}, all that this mask rule was made for, "
            f"got {lowest_highest[0]} ... {lowest_highest[1]}"
        )
