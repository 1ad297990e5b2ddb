"""The modules that an adapter may name, and which of them its settings choose.

Phi-3 fuses q, k and v, and gate and up; Llama has them apart.  A model takes adapters of either
naming: a split one updates its own block of rows of the fused weight.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from npllm.checkpoints.adapters.settings import AdapterSettings
from npllm.checkpoints.phi3_tensor_names import Sources, layer_sources, top_sources
from npllm.config.config import Config

__all__ = ["Module", "chosen_modules", "model_modules", "naming_of", "saved_modules"]

FUSED, SPLIT = ("qkv_proj", "gate_up_proj"), ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
OUTPUTS = ("lm_head", "score")


class Module(NamedTuple):
    """A module of a checkpoint, and where its weight lies in `Params`."""

    name: str  # model.layers.0.self_attn.q_proj
    layer: int | None  # None: outside of the layers
    field: str  # of LayerParams or Params: qkv_proj
    shape: tuple[int, ...]  # of its weight: [d_out, d_in]; [d_model] of a norm
    first: int  # its first row in the field
    is_whole: bool  # whether it is the whole field

    @property
    def is_embedding(self) -> bool:
        """Whether its weight is looked up, not multiplied by."""
        return self.field == "embed_tokens"

    @property
    def is_adaptable(self) -> bool:
        """Whether its weight is a matrix."""
        return len(self.shape) == 2


def naming_of(modules: Iterable[str], config: Config) -> str:
    """Return "fused" or "split": how the modules of an adapter are named; the model's own where
    nothing tells.
    """
    leaves = {name.rpartition(".")[2] for name in modules}
    if leaves & set(SPLIT):
        return "split"
    is_fused = config.model_type == "phi3" or bool(leaves & set(FUSED))
    return "fused" if is_fused else "split"


def model_modules(config: Config, naming: str) -> dict[str, Module]:
    """List the modules of a model, by name."""
    sources: list[tuple[int | None, Sources]] = [(None, top_sources(config))]
    sources += [
        (number, layer_sources(config, number, is_fused=naming == "fused"))
        for number in range(config.num_hidden_layers)
    ]
    modules = [
        module
        for layer, fields in sources
        for field, tensors in fields.items()
        for module in _modules_of(layer, field, tensors)
    ]
    if config.head == "lm" and config.tie_word_embeddings:
        shape = (config.vocab_size, config.hidden_size)
        modules.append(Module("lm_head", None, "lm_head", shape, 0, True))
    return {module.name: module for module in modules}


def _modules_of(layer: int | None, field: str, tensors: dict[str, tuple[int, ...]]) -> list[Module]:
    """The modules whose weights make one field."""
    modules, first = [], 0
    for tensor, shape in tensors.items():
        name, _, leaf = tensor.rpartition(".")
        if leaf == "weight":
            modules.append(Module(name, layer, field, shape, first, len(tensors) == 1))
        first += shape[0]
    return modules


def chosen_modules(settings: AdapterSettings, modules: dict[str, Module]) -> list[Module]:
    """List the modules that target_modules and its companions choose for low-rank updates.

    Notes
    -----
    Source: `check_target_module_exists` and `_maybe_include_all_linear_layers` in PEFT.
    """
    saved = {module.name for module in saved_modules(settings, modules)}
    return [
        module
        for module in modules.values()
        if module.is_adaptable
        and module.name not in saved
        and not _matches(settings, settings.exclude_modules, module)
        and _matches(settings, settings.target_modules, module)
        and _is_in_layers(settings, module)
    ]


def saved_modules(settings: AdapterSettings, modules: dict[str, Module]) -> list[Module]:
    """List the modules that modules_to_save names: their whole weights are in the adapter."""
    return [
        module
        for module in modules.values()
        if any(
            re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", module.name)
            for name in settings.modules_to_save
        )
    ]


def _matches(settings: AdapterSettings, pattern: object, module: Module) -> bool:
    """Whether names, a regular expression or "all-linear" choose a module."""
    if pattern is None:
        return False
    if isinstance(pattern, str):
        if pattern.lower() == "all-linear":
            return not module.is_embedding and module.name not in OUTPUTS
        return module.name in settings.matched[pattern]
    names: list[str] = list(pattern)  # type: ignore[call-overload]
    return any(module.name == name or module.name.endswith(f".{name}") for name in names)


def _is_in_layers(settings: AdapterSettings, module: Module) -> bool:
    """Whether layers_to_transform, where it is given, names the layer of a module."""
    layers = settings.layers_to_transform
    if layers is None or layers == [] or isinstance(settings.target_modules, str):
        return True
    numbers = layers if isinstance(layers, list) else [layers]
    is_named = not settings.layers_pattern or "layers" in settings.layers_pattern
    return is_named and module.layer in numbers
