"""ModelBase: what `Model` and `Encoder` share: weights, operations, copying, pickling."""

import copy
from typing import Any

from npllm.arguments import native_weights
from npllm.arrays import array_namespace, backend_name
from npllm.kernels import SETS, choose_ops, ops_for
from npllm.ops.opset import Ops
from npllm.quantized.activations import check_applies

__all__ = ["ModelBase"]

DERIVED = ("_xp", "_rotations", "_rules")  # set by `_set_up`


class ModelBase:
    """What a model and an encoder have in common: config, weights, operations, origin.

    Pickled, it is its settings and, in place of the weights, their origin: the folder, from which
    the other process reads them again.  A model that was built from arrays takes them along.  A
    named set of operations goes by its name, so that each machine runs its own fastest one;
    operations that were replaced are pickled, so they must be functions of a module.

    A copy shares the weights, which are immutable; a deep copy has arrays of its own where they
    came from no folder.
    """

    config: Any
    params: Any
    ops: Ops
    origin: Any = None

    def _set_up(self, ops: Ops | str | None) -> None:
        """Derive what depends on the weights: their library, and the set of operations for it."""
        self.params = native_weights(self.params)
        self._xp = array_namespace(self._an_array())
        self.ops = ops_for(self.params, ops, backend_name(self._xp))
        check_applies(self.params, self.ops.activations)

    def _an_array(self) -> Any:
        """Any one of the weights."""
        return next(x for x in self.params if not isinstance(x, tuple) and x is not None)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in DERIVED}
        state["ops"], state["activations"] = _picklable_ops(self.ops, backend_name(self._xp))
        if self.origin is not None:
            del state["params"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        ops, activations = state.pop("ops"), state.pop("activations")
        self.__dict__.update(state)
        if self.origin is not None:
            self.params = self.origin.read(self.config)
        xp = array_namespace(self._an_array())
        self._set_up(choose_ops(ops, backend_name(xp), activations))

    def __copy__(self) -> Any:
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        shared = {*DERIVED, "ops", "config", "mask"} | ({"params"} if self.origin else set())
        new = object.__new__(type(self))
        memo[id(self)] = new
        for name, value in self.__dict__.items():
            new.__dict__[name] = value if name in shared else copy.deepcopy(value, memo)
        return new


def _picklable_ops(ops: Ops, backend: str) -> tuple[Ops | str, str | None]:
    """The name of a set that has one and its activations, else the set itself."""
    kind = ops.activations
    names = [name for name in SETS if name != "cuda" or backend != "numpy"]
    found = next((name for name in names if choose_ops(name, backend, kind) is ops), None)
    return (ops, None) if found is None else (found, kind)
