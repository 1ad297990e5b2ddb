"""The largest value of every operation, and how far it is from the end of float16."""

import math
from typing import Any, NamedTuple

import numpy as np

from npllm.arrays import widen
from npllm.models.params import LayerParams
from npllm.tracing.graph import NODES

__all__ = ["INFINITE", "Extreme", "LargestValues", "first_overflow", "worst_by_op"]

Array = Any

ENTRIES = 2**22  # of a weight, to widen at a time
INFINITE = 65520.0  # rounds to infinity in float16; the largest finite value is 65504


class Extreme(NamedTuple):
    """The largest value of one operation of one layer."""

    name: str  # as in npllm.models.taps, and `scores`, `scaled`, `....weight` beside these
    largest: float  # |value|

    @property
    def headroom(self) -> float:
        """Bits to the end of float16: log2(65520 / largest); 0 or less: it overflows."""
        return math.inf if self.largest == 0 else math.log2(INFINITE / self.largest)

    @property
    def op(self) -> str:
        """The name without the number of the layer."""
        parts = self.name.split(".")
        return ".".join("N" if part.isdecimal() else part for part in parts)

    @property
    def is_view(self) -> bool:
        """Whether it is a part of another value, or another order of it."""
        return self.op in NODES and NODES[self.op].op == "view"


class LargestValues:
    """A tap that keeps the largest |value| of every operation, in the order of execution.

    Attention scores have no name among the taps; they are computed here of q and k, hidden pairs
    included, since eager attention computes these too:

        scores = q k^T,   scaled = scores / sqrt(d_head)
    """

    def __init__(self) -> None:
        self.found: list[Extreme] = []
        self._q: Array = None

    def __call__(self, name: str, x: Array) -> Array:
        """Keep the largest |value| of x."""
        self.see(name, x)
        if name.endswith("self_attn.q"):
            self._q = x
        if name.endswith("self_attn.k"):
            largest = _largest_score(self._q, x)
            prefix = name.removesuffix("k")
            self.found.append(Extreme(f"{prefix}scores", largest))
            self.found.append(Extreme(f"{prefix}scaled", largest * x.shape[-1] ** -0.5))
        return x

    def see(self, name: str, x: Array) -> None:
        """Keep the largest |value| of an array, unless it is a view of another."""
        extreme = Extreme(name, float(np.max(np.abs(x), initial=0.0)))
        if not extreme.is_view:
            self.found.append(extreme)

    def see_layer(self, prefix: str, weights: LayerParams) -> None:
        """Keep the largest |entry| of each of a layer's weights."""
        for field, x in weights._asdict().items():
            if x is not None:
                self.see_weight(f"{prefix}.{_parameter_name(field)}", x)

    def see_weight(self, name: str, x: Any) -> None:
        """Keep the largest |entry| of a weight, widening some rows at a time."""
        n_rows = max(1, ENTRIES // x.shape[-1])
        blocks = [x[start : start + n_rows] for start in range(0, len(x), n_rows)]
        largest = [float(np.max(np.abs(widen(block)))) for block in blocks]
        self.found.append(Extreme(name, float(np.max(largest))))


def _parameter_name(field: str) -> str:
    """The name of a weight or bias within its layer, as checkpoints write it."""
    part, _, kind = field.rpartition("_")
    if kind == "layernorm":
        return f"{field}.weight"
    half = "mlp" if part in ("gate_up", "down") else "self_attn"
    return f"{half}.{part}_proj.{'bias' if kind == 'bias' else 'weight'}"


def _largest_score(q: Array, k: Array) -> float:
    """The largest |q . k|, one query head at a time: [n_batch, n_seq, n_ctx] each."""
    group = q.shape[1] // k.shape[1]
    return max(
        float(np.max(np.abs(q[:, head] @ np.swapaxes(k[:, head // group], -1, -2))))
        for head in range(q.shape[1])
    )


def first_overflow(found: list[Extreme]) -> Extreme | None:
    """The first value, in the order of execution, that float16 cannot hold."""
    return next((extreme for extreme in found if not extreme.largest < INFINITE), None)


def worst_by_op(found: list[Extreme]) -> list[Extreme]:
    """The largest value of each operation over all layers, in the order of execution."""
    worst: dict[str, Extreme] = {}
    for extreme in found:
        known = worst.get(extreme.op)
        if known is None or not extreme.largest <= known.largest:
            worst[extreme.op] = extreme
    return [*worst.values()]
