"""AdaptableLM: a language model that LoRA adapters can be loaded into, switched and merged."""

from collections.abc import Mapping
from os import PathLike
from typing import Any, NamedTuple, Self

from npllm.arrays import is_packed
from npllm.checkpoints.adapters.base import checked_base
from npllm.checkpoints.adapters.reader import Adapter, read_adapter
from npllm.errors import NpllmKeyError, NpllmTypeError, NpllmValueError
from npllm.forward_pass import CausalLM
from npllm.models.params import LayerParams, Params
from npllm.quantized.adapted import AdaptedWeight, rounded

__all__ = ["AdaptableLM", "adapted_params", "merged_params"]


class _Loaded(NamedTuple):
    """An adapter, and the weights of the model under it."""

    adapter: Adapter
    params: Params


class AdaptableLM(CausalLM):
    """A causal language model with LoRA adapters: at most one of them is active.

    The base weights stay as they are; an adapter adds two thin matrices to each weight that it
    names (`npllm.ops.lora_linear`).  Switching takes no time and no memory.

    Attributes
    ----------
    adapter : str or None
        Name of the active adapter.
    """

    adapter: str | None = None
    _adapters: Mapping[str, _Loaded] = {}

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return tuple(self._adapters)

    @property
    def base_params(self) -> Params:
        """The weights without any adapter."""
        return self.params if self.adapter is None else self._base

    def load_adapter(self, folder: str | PathLike[str], *, name: str | None = None) -> str:
        """Read a LoRA adapter that PEFT saved, and switch to it.

        Parameters
        ----------
        folder : str or Path
            adapter_config.json and adapter_model.safetensors.
        name : str, optional
            To switch by.  Default: the name of the folder.

        Returns
        -------
        name : str

        Raises
        ------
        NpllmOSError, NpllmValueError
            As `npllm.checkpoints.adapters.reader.read_adapter`; for a name that is taken.
        """
        base = self.base_params
        adapter = read_adapter(folder, self.config, self._xp)
        adapter = checked_base(adapter, lambda field: getattr(base, field))
        name = adapter.folder.resolve().name if name is None else name
        if not isinstance(name, str) or not name:
            raise NpllmTypeError(f"name must be a text, got {name!r:.40}")
        if name in self._adapters:
            raise NpllmValueError(
                f"name must be new, but an adapter {name!r} is loaded already, from "
                f"{self._adapters[name].adapter.folder}; give another name"
            )
        loaded = _Loaded(adapter, adapted_params(base, adapter))
        self._adapters = {**self._adapters, name: loaded}
        self.set_adapter(name)
        return name

    def set_adapter(self, name: str | None) -> None:
        """Switch to a loaded adapter, or to the base model.

        A cache belongs to the adapter under which it was filled; after the switch back it can be
        continued.

        Parameters
        ----------
        name : str or None
            None: the base model.

        Raises
        ------
        NpllmKeyError
            For a name that was not loaded.
        """
        base = self.base_params
        if name is not None and name not in self._adapters:
            loaded = ", ".join(self._adapters) or "none"
            raise NpllmKeyError(
                f"no adapter is called {name!r:.60}; loaded: {loaded}; model.load_adapter(folder) "
                "loads one"
            )
        self._base, self.adapter = base, name
        self.params = base if name is None else self._adapters[name].params

    def merge_adapter(self) -> Self:
        """Return a new model whose weights have the active adapter added: as fast as the base.

            W' = W + scale * B A,   rounded to the dtype of W

        Returns
        -------
        model : Model
            Without adapters.  Weights that the adapter does not touch are shared.

        Raises
        ------
        NpllmValueError
            When no adapter is active; when a weight to be changed is stored in int8 or in blocks,
            or a sum is larger than its dtype holds.

        Notes
        -----
        A weight in 16 bits keeps 8 (bfloat16) or 11 (float16) significant bits, so that merging
        rounds away updates that are smaller; the unmerged model adds them in float32.

        Source: `LoraModel.merge_and_unload` in PEFT.
        """
        if self.adapter is None:
            raise NpllmValueError(
                "merge_adapter needs an active adapter, got none; model.load_adapter(folder) "
                "loads one, model.set_adapter(name) switches to one"
            )
        return self._on_params(merged_params(self.params, self.base_params))

    def _on_params(self, params: Params) -> Self:
        """The same settings on other weights, which come from no file."""
        raise NotImplementedError

    def _adapter_state(self) -> dict[str, Any]:
        """The adapters as a copy of the model on other settings takes them."""
        return {"_adapters": self._adapters, "_base": self.base_params, "adapter": self.adapter}

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_base", None)
        state["_adapters"] = {name: x.adapter for name, x in self._adapters.items()}
        if "params" in state:
            state["params"] = self.base_params
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        adapters, active = state.pop("_adapters", {}), state.pop("adapter", None)
        super().__setstate__(state)
        self._adapters = {
            name: _Loaded(adapter, adapted_params(self.params, adapter))
            for name, adapter in adapters.items()
        }
        self.set_adapter(active)


def adapted_params(params: Params, adapter: Adapter) -> Params:
    """Return weights with those that an adapter names in an `AdaptedWeight`, or replaced."""
    return params._replace(
        layers=tuple(_adapted(layer, adapter, n) for n, layer in enumerate(params.layers)),
        **_changes(params, adapter, None),
    )


def _adapted(layer: LayerParams, adapter: Adapter, number: int) -> LayerParams:
    return layer._replace(**_changes(layer, adapter, number))


def _changes(fields: Any, adapter: Adapter, number: int | None) -> dict[str, Any]:
    """The weights of a layer, or outside of them, that an adapter changes."""
    changed = {name: x for (layer, name), x in adapter.weights.items() if layer == number}
    for (layer, name), updates in adapter.updates.items():
        if layer == number:
            changed[name] = AdaptedWeight(getattr(fields, name), updates)
    return changed


def merged_params(params: Params, base: Params) -> Params:
    """Return weights in which every `AdaptedWeight` is one matrix, in the dtypes of the base."""
    layers = tuple(map(_merged_fields, params.layers, base.layers))
    return _merged_fields(params._replace(layers=layers), base._replace(layers=layers))


def _merged_fields(fields: Any, base: Any) -> Any:
    """A layer, or what is outside of them, with merged weights."""
    pairs = zip(fields._asdict().items(), base, strict=True)
    return fields._replace(**{name: _merged(name, x, old) for (name, x), old in pairs})


def _merged(name: str, weight: Any, base: Any) -> Any:
    """One weight with its updates added; a replaced one in the dtype of what it replaces."""
    try:
        if isinstance(weight, AdaptedWeight):
            return weight.merged()
        is_replaced = weight is not base and not is_packed(base)
        return rounded(weight, base.dtype) if is_replaced else weight
    except NpllmValueError as error:
        raise NpllmValueError(f"{name}: {error}") from None
