"""From values to rows: what each operation introduces, what comes in with its inputs."""

from typing import Any

import numpy as np

from npllm.testing.arithmetic import UNITS
from npllm.testing.inputs import f64
from npllm.testing.location import where
from npllm.tracing.comparison.graft import NotRecordedError, Run, real_entries, without_padding
from npllm.tracing.comparison.nodes import Exact, Judged, share_of
from npllm.tracing.comparison.partial_values import compare_partial
from npllm.tracing.comparison.recorded import Recorded
from npllm.tracing.comparison.relabelling import orders
from npllm.tracing.comparison.rotation_check import after_rotation, settle_tables
from npllm.tracing.comparison.self_check import agrees, cache_keys, flow
from npllm.tracing.comparison.steps import key_of
from npllm.tracing.comparison.walking_row import Row, layer_of

__all__ = ["Walk"]

Array = Any

EXPLAINED = 4  # wrong values of one name, in several layers, that are diagnosed
AMPLIFIED = 30.0  # gain from which an error counts as amplified
MAY_AMPLIFY = ("attention", "rms_norm", "swiglu", "linear")  # a sum is only in another unit


class Walk:
    """Makes the rows of a comparison.

    Parameters
    ----------
    run : Run
    gold : Recorded
    explain : function (run, name, t, exact, x) -> str
        Names what is wrong.
    """

    def __init__(self, run: Run, gold: Recorded, explain: Any) -> None:
        self.run, self.gold, self.explain = run, gold, explain
        self.rows: dict[str, Row] = {}
        self.tainted: set[str] = set()
        self.units: dict[str, Array] = {}
        self.table_votes: list[bool] = []
        self.n_explained: dict[str, int] = {}

    def all_rows(self) -> list[Row]:
        """Walk through all values in the order of execution."""
        layer = None
        for name, t, _ in self.run.nodes():
            if layer_of(name) != layer:
                layer = layer_of(name)
                self.run.forget(-1 if layer is None else layer)
                self.units = {key: x for key, x in self.units.items() if layer_of(key) is None}
            if self.run.has(name, t):
                self.visit(name, t)
                after_rotation(self, name, t)
            elif self.run.mine.is_partial(key_of(name, t)):
                self._visit_part(name, t)
        settle_tables(self)
        return [*self.rows.values()]

    # -------------------------------------------------------------- one value

    def visit(self, name: str, t: int) -> None:
        """Make the row of a value that was recorded whole."""
        row = self._row(name, t)
        try:
            exact = self.run.exact(name, t)
        except NotRecordedError as error:
            row.status, row.note = "not decidable", str(error)
            return
        x, one, order = self.run.ordered(name, t, exact)
        row.note = order.says
        if one is None:
            self._misshapen(row, name, t, x, exact)
            return
        row.arithmetic = str(one.level)
        self._measure(row, name, t, x, exact, one)
        row.status = one.status
        if one.status == "wrong" and self._is_of_keys(row, name, t):
            return
        if one.status == "wrong":
            self._accuse(row, name, t, x, exact, one)
        elif one.status == "within":
            self._inherit(row, name, t)

    def _row(self, name: str, t: int) -> Row:
        key, layer = key_of(name, t), layer_of(name)
        op = name.split(".", 3)[-1] if layer is not None else name
        op = "output" if name == f"model.layers.{layer}" else op
        row = self.rows[key] = Row(key, op, layer, t)
        return row

    def _visit_part(self, name: str, t: int) -> None:
        """Compare a part of a value; only the first wrong one is accused."""
        row = self._row(name, t)
        compare_partial(row, self.run, self.gold, name, t)
        if row.status == "wrong":
            if self._is_behind_a_wrong_one(name, t):
                row.status = "inherited"
            self.tainted.add(row.name)

    def _is_behind_a_wrong_one(self, name: str, t: int) -> bool:
        """Tell whether one of the values before it, whole or partial, is wrong."""
        return any(key_of(one, t) in self.tainted for one in self._before(name, t))

    def _is_of_keys(self, row: Row, name: str, t: int) -> bool:
        """Tell whether a cache holds the keys that were computed, and not what it held before."""
        is_cache = self.run.graphs[t][name].op == "cache"
        if not is_cache or not agrees(self.run, name, t, cache_keys(name, t)):
            return False
        row.status, row.introduced = "within", 0.0
        row.note = f"not what the cache held in step {t - 1}, but the rows that were computed"
        return True

    def _misshapen(self, row: Row, name: str, t: int, x: Array, exact: Exact) -> None:
        """Leave out a value that has another shape, and ask those that read it."""
        shape = list(exact.value.shape)
        row.note = f"shape {list(x.shape)} for {shape}"
        row.introduced = float("inf")
        self.run.replace(name, t)
        row.status = flow(self.run, name, t, np.inf, is_readable=False)
        if row.status == "wrong":
            self.tainted.add(row.name)

    def _accuse(self, row: Row, name: str, t: int, x: Array, exact: Exact, one: Judged) -> None:
        row.status = flow(self.run, name, t, one.share)
        row.note = "; ".join(text for text in (row.note, not_finite(x)) if text)
        leaf = name.rsplit(".", 1)[-1]
        self.n_explained[leaf] = self.n_explained.get(leaf, 0) + 1
        if self.n_explained[leaf] <= EXPLAINED:
            row.diagnosis = self.explain(self.run, name, t, exact, x)
        if not row.diagnosis and not not_finite(x):
            row.note = "; ".join(text for text in (row.note, place_of(x, exact, one)) if text)
        if row.status == "wrong capture":
            self.run.replace(name, t)
        elif row.status == "wrong":
            self.tainted.add(row.name)

    def _inherit(self, row: Row, name: str, t: int) -> None:
        """Say of a right operation whether its inputs were wrong, or made worse."""
        is_tainted = bool(self.tainted.intersection(self._sources(name, t)))
        if is_tainted:
            self.tainted.add(row.name)
        inherited, gain = row.inherited, row.gain
        if inherited is None or inherited <= 1:
            return
        is_amplified = gain is not None and gain >= AMPLIFIED
        is_amplified = is_amplified and self.run.graphs[t][name].op in MAY_AMPLIFY
        if is_amplified and inherited >= AMPLIFIED:
            row.status = "amplified"
        elif is_tainted:
            row.status = "inherited"

    def _measure(self, row: Row, name: str, t: int, x: Array, exact: Exact, one: Judged) -> None:
        """Fill in the numbers."""
        step = self.run.settings[t].step
        unit = self._unit(name, t, exact, one)
        y, wide = (without_padding(name, part, step) for part in (exact.value, f64(x)))
        row.introduced = one.share
        if np.isinf(one.share) and exact.call.arrange is not None:
            row.introduced = share_of(np.abs(wide - y), unit)
        gold = self._gold(name, t, exact)
        if gold is None:
            return
        real = real_entries(name, y.shape, step)
        floor = np.mean(unit, axis=-1, keepdims=True)
        unit = np.maximum(unit, floor)
        unit = unit if real is None else np.where(real, unit, 1.0)
        row.total = share_of(np.abs(wide - gold), unit)
        row.inherited = share_of(np.abs(y - gold), unit)
        if one.status == "wrong" and np.isfinite(one.share):
            row.introduced = max(share_of(np.abs(wide - y), unit), min(one.share, 2.0))
        before = [self.rows[key] for key in self._sources(name, t) if key in self.rows]
        if any(one.arithmetic != row.arithmetic and one.arithmetic for one in before):
            before = []  # other units
        largest = max((one.total for one in before if one.total is not None), default=0.0)
        row.gain = row.inherited / largest if largest > 0 else None

    def _unit(self, name: str, t: int, exact: Exact, one: Judged) -> Array:
        """The budget that errors are counted in; of a view that of what it shows."""
        unit = exact.error(one.level)
        if exact.call.op == "embed" and not np.any(unit):
            unit = UNITS[one.level.dtype] * np.abs(exact.value)
        if exact.call.arrange is not None and not np.any(unit):
            inputs = [key_of(n, t) for n in self.run.graphs[t][name].inputs]
            if all(key in self.units for key in inputs) and len(inputs) == len(exact.call.inputs):
                unit = exact.call.arrange(*(self.units[key] for key in inputs))
        self.units[key_of(name, t)] = unit
        return unit

    def _gold(self, name: str, t: int, exact: Exact) -> Array:
        """The gold's value in the shape of the answer; None where it has none."""
        key = key_of(name, t)
        if not self.gold.has(key):
            return None
        x = f64(self.gold.array(key))
        for order in orders(name, x, exact.value, self.run.config):
            return without_padding(name, order.undo(x), self.run.settings[t].step)
        return None

    def _sources(self, name: str, t: int) -> list[str]:
        """The nearest recorded values that a value is made from."""
        names = self._before(name, t)
        found = [key_of(one, t) for one in names if self.run.has(one, t)]
        computed = [name, *(one for one in names if not self.run.has(one, t))]
        for one in computed if t else ():
            if self.run.graphs[t][one].op == "cache":
                past = one if one in self.run.graphs[t - 1] else one.replace(".cached_", ".")
                found += [key_of(past, t - 1)] if self.run.has(past, t - 1) else []
        return found

    def _before(self, name: str, t: int) -> list[str]:
        """The values that a value is made from, up to those that were recorded whole: each once,
        since there are 2**n paths through n layers.
        """
        left: list[str] = [name]
        found: dict[str, None] = {}
        while left:
            for other in self.run.graphs[t][left.pop()].inputs:
                if other not in found and not self.run.has(other, t):
                    left.append(other)
                found[other] = None
        return list(found)


def place_of(x: Array, exact: Exact, one: Judged) -> str:
    """Say where the entries over budget are, unless they are everywhere."""
    over = ~(np.abs(f64(x) - exact.value) <= exact.error(one.level))
    text = where(over, "rope" if x.ndim == 4 else "linear")
    return "" if text in ("nowhere", "everywhere") else text


def not_finite(x: Array) -> str:
    """Say how many NaN and infinities an array holds, and where the first is."""
    wide, found = f64(x), []
    for what, bad in (("NaN", np.isnan(wide)), ("infinite", np.isinf(wide))):
        if bad.any():
            first = [int(n) for n in np.argwhere(bad)[0]]
            found.append(f"{np.count_nonzero(bad)} of {bad.size} entries {what}, first at {first}")
    return "; ".join(found)
