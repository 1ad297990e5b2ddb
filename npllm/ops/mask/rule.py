"""What a mask rule is, and how rules combine.

A rule is a function of two *slots*, the places of a query and of a key in the sequence: `rule(i,
j)` is True where the query in slot i sees the key in slot j.  Rules combine with `&`, `|` and `~`.
Attention asks a rule only about the block that it is working on, so no n x n array exists; and it
asks the rule's `bound` first, to skip a block of which nothing is visible and to drop the mask
where everything is.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np

from npllm.arguments import check_integer, check_mask
from npllm.arrays import array_namespace, is_array, to_numpy
from npllm.errors import NpllmTypeError

__all__ = ["ALL", "FAR", "NONE", "SOME", "DerivedRule", "Rule"]

Array = Any
Band = tuple[int, int]
LeftBand = tuple[int, int, Any]

NONE, SOME, ALL = 0, 1, 2
"""What a rule may say of a whole block: no pair is visible; some may be; every pair is."""

FAR = 2**40
"""Farther apart than any two slots are: the end of a band that has none."""


def _unknown(*_: int) -> int:
    """The bound of a rule that has none."""
    return SOME


class Rule:
    """Which key slot is visible from which query slot.

    `Rule(visible, bound, band, left_band)` makes a rule of a function.  The rules of
    `npllm.ops.mask` are subclasses: frozen dataclasses of their parameters.

    Parameters
    ----------
    visible : function (i, j) -> bool array
        `i` and `j` are integer arrays of slots that broadcast against each other, usually [n_seq,
        1] and [1, n_ctx].  The result may have further axes in front: [n_batch, 1, n_seq, n_ctx]
        for a rule that differs by sequence.
    bound : function (i_low, i_high, j_low, j_high) -> NONE, SOME or ALL
        What holds for every query slot in i_low ... i_high and key slot in j_low ... j_high, both
        ends included.  SOME is always a correct answer, NONE and ALL are promises.
    band : tuple (low, high), optional
        What a kernel may evaluate instead: the rule is exactly low <= i - j < high.  None: it is no
        such band.
    left_band : tuple (low, high, start), optional
        The same for rows that are padded on the left: the rule is exactly low <= i - j < high and j
        >= start[batch].  `start` is an integer array [n_batch], or None where nothing is padded,
        which is what a `band` implies.

    Notes
    -----
    Two rules are equal where they are made in the same way of equal parameters; that `a & b` and
    `b & a` show the same is not looked into.  Arrays are equal where library, dtype, shape and
    content are; functions where they are the same object.  Equal rules have equal hashes.

    A rule pickles as its parameters; a rule of a function as far as the function does.
    """

    def __new__(cls, *_: Any, **__: Any) -> "Rule":  # noqa: D102 - numpydoc has it in the class
        return super().__new__(FunctionRule if cls is Rule else cls)

    def visible(self, i: Array, j: Array) -> Array:
        """Evaluate the rule on slots."""
        raise NotImplementedError

    def bound(self, i_low: int, i_high: int, j_low: int, j_high: int) -> int:  # noqa: ARG002
        """Say what holds for a whole block: NONE, SOME or ALL."""
        return SOME

    @property
    def band(self) -> Band | None:
        """The band of distances that the rule is; None: it is none."""
        return None

    @property
    def left_band(self) -> LeftBand | None:
        """The band of distances behind left padding that the rule is; None: it is none."""
        return None if self.band is None else (*self.band, None)

    def __call__(self, i: Array, j: Array) -> Array:
        """Evaluate the rule on slots."""
        return self.visible(i, j)

    def dense(self, n: int) -> Array:
        """Write the rule out as a table of n queries and n keys: bool [n, n], True where visible;
        further axes n_batch, 1 in front for a rule that differs by sequence.  NumPy.

        `npllm.ops.mask.to_bool` has other numbers of queries and keys, and slots.
        """
        slots = np.arange(check_integer("n", n, 0, 2**31))
        visible = self(slots[:, None], slots[None, :])
        shape = (*visible.shape[:-2], len(slots), len(slots))
        return array_namespace(visible).broadcast_to(visible, shape)

    def __and__(self, other: "Rule") -> "Rule":
        return And(self, _rule(other))

    def __rand__(self, other: Any) -> "Rule":
        return And(_rule(other), self)

    def __or__(self, other: "Rule") -> "Rule":
        return Or(self, _rule(other))

    def __ror__(self, other: Any) -> "Rule":
        return Or(_rule(other), self)

    def __invert__(self) -> "Rule":
        return Not(self)

    def _parameters(self) -> dict[str, Any]:
        """What the rule is made of, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.compare}  # type: ignore[arg-type]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rule) or type(self) is not type(other):
            return NotImplemented
        pairs = zip(self._parameters().values(), other._parameters().values(), strict=True)
        return all(_equal(mine, theirs) for mine, theirs in pairs)

    def __hash__(self) -> int:
        return hash((type(self), *map(_hashable, self._parameters().values())))

    def __repr__(self) -> str:
        name = "".join(f"_{c.lower()}" if c.isupper() else c for c in type(self).__name__)
        return f"{name[1:]}({', '.join(map(_shown, self._parameters().values()))})"

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]


def _rule(operand: Any) -> Rule:
    """Return an operand of `&` or `|` that is a rule; raise for anything else."""
    if isinstance(operand, Rule):
        return operand
    check_mask(operand, "rule")
    raise NpllmTypeError(
        "rules combine with rules: Rule(function) makes one of a function, got "
        f"{type(operand).__name__}"
    )


def _equal(a: Any, b: Any) -> bool:
    """Compare two parameters; arrays by library, dtype, shape and content."""
    if a is b:
        return True
    if not is_array(a) or not is_array(b):
        return not is_array(a) and not is_array(b) and a == b
    alike = type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape
    return alike and bool((to_numpy(a) == to_numpy(b)).all())


def _hashable(x: Any) -> Any:
    """A parameter as a hash sees it: of an array its type, since its content may change."""
    return (str(x.dtype), tuple(x.shape)) if is_array(x) else x


def _shown(x: Any) -> str:
    """A parameter as `repr` shows it: of an array its dtype and shape."""
    return f"<{x.dtype} {list(x.shape)}>" if is_array(x) else repr(x)


@dataclass(frozen=True, eq=False, repr=False)
class FunctionRule(Rule):
    """What `Rule(function)` returns; see there."""

    visible: Callable[[Array, Array], Array]  # type: ignore[assignment]
    bound: Callable[[int, int, int, int], int] = _unknown  # type: ignore[assignment]
    band: Band | None = None
    left_band: LeftBand | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.band and self.left_band is None:
            object.__setattr__(self, "left_band", (*self.band, None))

    def __repr__(self) -> str:
        return f"Rule({self.visible!r})"


@dataclass(frozen=True, eq=False, repr=False)
class And(Rule):
    """What both of two rules show."""

    one: Rule
    other: Rule

    def visible(self, i: Array, j: Array) -> Array:
        """Evaluate the rule on slots."""
        return self.one(i, j) & self.other(i, j)

    def bound(self, *block: int) -> int:
        """Say what holds for a whole block."""
        return min(self.one.bound(*block), self.other.bound(*block))

    @cached_property
    def left_band(self) -> LeftBand | None:  # type: ignore[override]
        """The intersection of two bands."""
        one, other = self.one.left_band, self.other.left_band
        return _intersection(one, other) if one and other else None

    @property
    def band(self) -> Band | None:
        """The intersection of two bands without padding."""
        both = self.one.band and self.other.band
        return self.left_band[:2] if both and self.left_band else None

    def __repr__(self) -> str:
        return f"{_operand(self.one, Or)} & {_operand(self.other, And, Or)}"


@dataclass(frozen=True, eq=False, repr=False)
class Or(Rule):
    """What at least one of two rules shows."""

    one: Rule
    other: Rule

    def visible(self, i: Array, j: Array) -> Array:
        """Evaluate the rule on slots."""
        return self.one(i, j) | self.other(i, j)

    def bound(self, *block: int) -> int:
        """Say what holds for a whole block."""
        return max(self.one.bound(*block), self.other.bound(*block))

    def __repr__(self) -> str:
        return f"{self.one!r} | {_operand(self.other, Or)}"


@dataclass(frozen=True, eq=False, repr=False)
class Not(Rule):
    """What a rule does not show."""

    rule: Rule

    def visible(self, i: Array, j: Array) -> Array:
        """Evaluate the rule on slots."""
        return ~self.rule(i, j)

    def bound(self, *block: int) -> int:
        """Say what holds for a whole block."""
        return ALL - self.rule.bound(*block)

    def __repr__(self) -> str:
        return f"~{_operand(self.rule, And, Or)}"


class DerivedRule(Rule):
    """A rule that has a name, and is defined by other rules."""

    def definition(self) -> Rule:
        """Return the rules that define this one, combined."""
        raise NotImplementedError

    @cached_property
    def _rule(self) -> Rule:
        return self.definition()

    def visible(self, i: Array, j: Array) -> Array:
        """Evaluate the rule on slots."""
        return self._rule.visible(i, j)

    def bound(self, *block: int) -> int:
        """Say what holds for a whole block."""
        return self._rule.bound(*block)

    @property
    def band(self) -> Band | None:
        """The band of the definition."""
        return self._rule.band


def _operand(rule: Rule, *weaker: type) -> str:
    """A rule as an operand: in parentheses where its own operator binds weaker."""
    return f"({rule!r})" if isinstance(rule, weaker) else repr(rule)


def _intersection(one: LeftBand, other: LeftBand) -> LeftBand:
    """Intersect two bands behind padding."""
    starts = [band[2] for band in (one, other) if band[2] is not None]
    start = array_namespace(*starts).maximum(*starts) if len(starts) == 2 else (*starts, None)[0]
    return max(one[0], other[0]), min(one[1], other[1]), start
