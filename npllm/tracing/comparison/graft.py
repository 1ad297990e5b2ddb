"""The walk: every recorded value against the float64 answer of its operation on the run's own
inputs, in the order of execution.

    y = op(their inputs)
    introduced = |theirs - y|,   inherited = |y - gold|,   total = |theirs - gold|

An input that was not recorded is computed anew from the nearest values that were.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any

import numpy as np

from npllm.errors import NpllmValueError
from npllm.models.rope import frequency_choice
from npllm.testing.inputs import f64
from npllm.tracing.comparison.levels import Level, levels_of
from npllm.tracing.comparison.nodes import Exact, Judged, Known, judged
from npllm.tracing.comparison.operations import Setting, call_of
from npllm.tracing.comparison.recorded import Recorded
from npllm.tracing.comparison.relabelling import AS_IS, Order, orders
from npllm.tracing.comparison.steps import Step, key_of
from npllm.tracing.graph import Node, graph

__all__ = ["NotRecordedError", "Run"]

Array = Any
Without = frozenset[str]

NONE: Without = frozenset()
CONTENT = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "q": "q_proj", "k": "k_proj"}
CONTENT |= {"v": "qkv_proj", "cached_k": "k", "cached_v": "v", "heads": "q", "attention": "heads"}
"""The value whose order of heads and channels another one takes over."""


class NotRecordedError(NpllmValueError):
    """A value that cannot be computed from what was recorded."""


class Run:
    """The values of a run, recorded or computed anew from those that were.

    Parameters
    ----------
    mine : Recorded
    config : Config
    settings : list of Setting
        One for each step.
    dtype : str
        In which the run computed.
    dtypes : set of str
        Of the arrays.
    """

    def __init__(
        self, mine: Recorded, config: Any, settings: list[Setting], dtype: str, dtypes: set[str]
    ) -> None:
        self.mine, self.config, self.settings, self.dtype = mine, config, settings, dtype
        n = config.num_hidden_layers
        self.graphs = [graph(n, cached=one.step.cached) for one in settings]
        self.all_levels = [level for one in dtypes for level in levels_of(one, dtype)]
        self.excluded: set[str] = set()
        self.orders: dict[str, Order] = {}  # by value, and by the last part of its name
        self._known: dict[tuple[str, Without], Known] = {}
        self._given: dict[str, Known] = {}

    def nodes(self) -> Iterator[tuple[str, int, Node]]:
        """Every value in the order of execution: name, step, node."""
        for t, nodes in enumerate(self.graphs):
            for name, node in nodes.items():
                yield name, t, node

    def has(self, name: str, t: int, without: Without = NONE) -> bool:
        """Tell whether a value was recorded, and is used."""
        key = key_of(name, t)
        return self.mine.has(key) and key not in self.excluded and key not in without

    def known(self, name: str, t: int, without: Without = NONE) -> Known:
        """Return a value: theirs where it was recorded, else computed anew.

        Parameters
        ----------
        name : str
        t : int
            The step.
        without : frozenset of str
            Values to compute anew although they were recorded.

        Raises
        ------
        NotRecordedError
        """
        key = (key_of(name, t), without)
        if key[0] in self._given:
            return self._given[key[0]]
        if key not in self._known:
            is_recorded = self.has(name, t, without)
            found = self._recorded(name, t) if is_recorded else self.exact(name, t, without)
            self._known[key] = found
        return self._known[key]

    @contextmanager
    def given(self, values: dict[str, Known]) -> Iterator[None]:
        """Take some values as given, and compute what depends on them anew."""
        kept, self._known, self._given = self._known, {}, values
        try:
            yield
        finally:
            self._known, self._given = kept, {}

    def exact(self, name: str, t: int, without: Without = NONE) -> Exact:
        """Compute a value from its inputs."""
        inputs = self._inputs(name, t, without)
        call = call_of(name, self.graphs[t][name], [x.value for x in inputs], self.settings[t])
        n_ctx = self._slots(name, t)
        if n_ctx is not None and call.arrange is not None:
            join = call.arrange
            call = call._replace(arrange=lambda *parts: join(*parts)[..., -n_ctx:, :])
        return Exact(call, name, inputs)

    def forget(self, layer: int) -> None:
        """Drop the values of the layers before the one before `layer`."""
        keep = {f"model.layers.{layer - 1}", "model.embed_tokens"}
        keep |= {"model.rotary_emb.cos", "model.rotary_emb.sin"}
        kept = {key: x for key, x in self._known.items() if key[0].partition("@")[0] in keep}
        for x in kept.values():
            if isinstance(x, Exact):
                x.seal(self.all_levels)
        self._known = kept

    def replace(self, name: str, t: int) -> None:
        """Forget a value that is not to be used any more, and all that came from it."""
        self.excluded.add(key_of(name, t))
        self._known = {}

    def raw(self, name: str, t: int) -> Array:
        """The array as it was recorded."""
        return self.mine.array(key_of(name, t))

    def with_padding(self, name: str, t: int) -> Array:
        """Return a value with what stands at its padding, where it was recorded and is finite."""
        if not self.has(name, t):
            return self.known(name, t).value
        x = f64(self.orders.get(key_of(name, t), AS_IS).undo(self.raw(name, t)))
        return x if np.isfinite(x).all() else self.known(name, t).value

    def levels(self, x: Array) -> list[Level]:
        """The levels that may explain a recorded array."""
        return levels_of(str(x.dtype), self.dtype)

    def ordered(self, name: str, t: int, exact: Exact) -> tuple[Array, Judged | None, Order]:
        """Bring a recorded value into our order, and judge it.

        Returns
        -------
        x : array
            In our order where one was found, else as it was recorded.
        judged : Judged, optional
            None where no order has the right shape.
        order : Order
        """
        x, leaf, key = self.raw(name, t), name.rsplit(".", 1)[-1], key_of(name, t)
        real, first = real_entries(name, exact.value.shape, self.settings[t].step), None
        learned = [self.orders[leaf]] if leaf in self.orders else []
        for order in chain(learned, orders(name, x, exact.value, self.config)):
            try:
                y = order.undo(x)
            except (ValueError, IndexError):
                continue
            if y.shape != exact.value.shape or not self._allowed(leaf, t, name, order):
                continue
            one = judged(y, exact, self.levels(x), real)
            if one.status != "wrong":
                self.orders[leaf] = self.orders[key] = order
                return y, one, order
            first = first or (y, one, order)
        self.orders[key] = first[2] if first else AS_IS
        return first or (x, None, AS_IS)

    # -------------------------------------------------------------- details

    def _allowed(self, leaf: str, t: int, name: str, order: Order) -> bool:
        """Tell whether a value may be ordered so: what it was made from is, or was not recorded."""
        before = CONTENT.get(leaf)
        if not order.kind or before is None:
            return True
        source = name.removesuffix(leaf) + before
        if not self.has(source, t):
            return True
        known = self.orders.get(key_of(source, t), AS_IS).kind
        return known == order.kind or known.startswith("C6")

    def _inputs(self, name: str, t: int, without: Without) -> list[Known]:
        node = self.graphs[t][name]
        inputs = [self.known(one, t, without) for one in node.inputs]
        if node.op != "cache" or self.settings[t].step.n_past == 0:
            return inputs
        return [self._past(name, t, without), *inputs]

    def _past(self, name: str, t: int, without: Without) -> Known:
        """What the cache held before step t."""
        if t == 0:
            raise NotRecordedError("the steps before the first were not recorded")
        before = self.settings[t - 1].step
        if before.n_past + before.ids.shape[1] != self.settings[t].step.n_past:
            raise NotRecordedError(f"a step between {t - 1} and {t} was not recorded")
        if self._choices(t) != self._choices(t - 1):
            raise NotRecordedError("the frequencies of RoPE change: the cache is computed anew")
        same = name if before.cached else name.replace(".cached_", ".")
        return self.known(same, t - 1, without)

    def _choices(self, t: int) -> list[int]:
        """Which frequencies of RoPE each row has in step t: by its largest position so far."""
        ends = [one.step.positions.max(axis=1) for one in self.settings[: t + 1]]
        return [frequency_choice(self.config, int(n) + 1) for n in np.max(ends, axis=0)]

    def _slots(self, name: str, t: int) -> int | None:
        """Slots of a recorded cache; a cache with a window holds fewer than there were."""
        is_cache = self.graphs[t][name].op == "cache" and self.mine.has(key_of(name, t))
        if not is_cache or self.config.sliding_window is None:
            return None
        x = self.raw(name, t)
        return x.shape[-2] if x.ndim == 4 else None

    def _recorded(self, name: str, t: int) -> Known:
        """A recorded value in our order, with zeros where it is padding."""
        x, key = self.raw(name, t), key_of(name, t)
        if key not in self.orders:  # asked for before the walk has come there
            with suppress(NotRecordedError):
                self.ordered(name, t, self.exact(name, t))
        x = self.orders.get(key, AS_IS).undo(x)
        return Known(without_padding(name, f64(x), self.settings[t].step))


def real_entries(name: str, shape: tuple, step: Step) -> Array:
    """Which entries of a value belong to tokens, in a shape that broadcasts; None: all."""
    if step.valid.all():
        return None
    if ".cached_" in name:
        return step.valid[:, step.valid.shape[1] - shape[-2] :][:, None, :, None]
    real = step.real[:, step.real.shape[1] - shape[-2] :]
    return real[:, None, :, None] if len(shape) == 4 else real[:, :, None]


def without_padding(name: str, x: Array, step: Step) -> Array:
    """Put zeros where a value is padding, so that NaN there reaches nothing."""
    real = real_entries(name, x.shape, step)
    return x if real is None else np.where(real, x, 0.0)
