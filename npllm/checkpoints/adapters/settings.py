"""adapter_config.json of a PEFT adapter: what is read, and what is refused."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from npllm.checkpoints.adapters.patterns import matching_names
from npllm.config.regular_file import is_present
from npllm.config.strict_json import is_int, quote, read_json
from npllm.errors import NpllmOSError, NpllmValueError

__all__ = ["CONFIG", "AdapterSettings", "read_settings"]

CONFIG = "adapter_config.json"
Matched = dict[str, frozenset[str]]
LARGEST = 1e9  # of lora_alpha
# Keys that change no number when the adapter runs: they tell of training, and of the base model.
IGNORED = frozenset(
    "auto_mapping base_model_name_or_path eva_config inference_mode lora_dropout megatron_core "
    "peft_version qalora_group_size revision runtime_config task_type".split()
)
READ = {"peft_type", "bias", "init_lora_weights"}  # by read_settings itself
# Initialisations that leave the base weights as they are; the others subtract from them.
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterSettings:
    """What adapter_config.json says of a LoRA adapter, under its own keys.

    Parameters
    ----------
    r : int
        Rank.
    lora_alpha : float
    use_rslora : bool
    target_modules : list of str, str or None
        Names, each a whole name of a module or its end; or a regular expression; or "all-linear".
    exclude_modules, modules_to_save, layers_to_transform, layers_pattern
        As in PEFT.
    rank_pattern, alpha_pattern : dict
        Regular expression for the end of a module's name -> rank, alpha.
    matched, matched_ends : dict
        Regular expression -> names of modules, whole or by their ends; see `matched_with`.
    """

    file: Path
    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    target_modules: Any = None
    exclude_modules: Any = None
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: Any = None
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    matched: Matched = field(default_factory=dict, repr=False)
    matched_ends: Matched = field(default_factory=dict, repr=False)

    def rank(self, module: str) -> int:
        """Return the rank of a module."""
        return self.rank_pattern.get(self._pattern_of(self.rank_pattern, module), self.r)

    def scale(self, module: str) -> float:
        """Return what the low-rank product of a module is multiplied by.

            alpha / rank;  alpha / sqrt(rank) where use_rslora

        Notes
        -----
        Source: "LoRA" (Hu et al. 2021), section 4.1; "A Rank Stabilization Scaling Factor for
        Fine-Tuning with LoRA" (Kalajdzievski 2023); `LoraLayer.update_layer` in PEFT.
        """
        alpha = self.alpha_pattern.get(
            self._pattern_of(self.alpha_pattern, module), self.lora_alpha
        )
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _pattern_of(self, patterns: dict[str, Any], module: str) -> str:
        """The first pattern that matches the end of a module's name; "" for none."""
        return next((x for x in patterns if module in self.matched_ends[x]), "")

    def matched_with(self, names: Iterable[str]) -> "AdapterSettings":
        """Match every regular expression with the names of a model's modules.

        Raises
        ------
        NpllmValueError
            For an expression that does not compile, or takes too long.
        """
        whole = [x for x in (self.target_modules, self.exclude_modules) if isinstance(x, str)]
        patterns = [*self.rank_pattern, *self.alpha_pattern]
        return replace(
            self,
            matched=matching_names(self.file, whole, names),
            matched_ends=matching_names(self.file, patterns, names, ends=True),
        )


def read_settings(folder: Path) -> AdapterSettings:
    """Read adapter_config.json; refuse by name what would change numbers and is not implemented.

    Raises
    ------
    NpllmOSError
        When there is no such file.
    NpllmValueError
        For another kind of adapter than LoRA, DoRA and other variants, trained biases, and values
        that cannot be right.
    """
    file = folder / CONFIG
    if not is_present(file):
        raise NpllmOSError(f"{folder}: holds no {CONFIG}: an adapter is a folder that PEFT saved")
    content = read_json(file)
    kind = content.get("peft_type")
    _require(file, kind == "LORA", "peft_type", 'must be "LORA"', kind)
    start = content.get("init_lora_weights")
    words = "was trained on changed base weights, which the base model does not have: convert it"
    advice = f"{words} with PEFT (path_initial_model_for_weight_conversion)"
    _require(file, start in PLAIN_STARTS, "init_lora_weights", advice, start)
    bias = content.get("bias", "none")
    _require(file, bias == "none", "bias", 'must be "none": trained biases are not read', bias)
    for key in sorted(content.keys() - CHECKS.keys() - IGNORED - READ):
        is_off = content[key] in (None, False, "", [], {})
        _require(file, is_off, key, "is not implemented and must be absent or off", content[key])
    for key, (fits, wanted) in CHECKS.items():
        if content.get(key) is not None:
            _require(file, fits(content[key]), key, f"must be {wanted}", content[key])
    return AdapterSettings(file, **{key: _plain(key, content[key]) for key in _given(content)})


def _given(content: dict[str, Any]) -> list[str]:
    """The keys of the settings that a file states."""
    return [key for key in CHECKS if content.get(key) is not None]


def _plain(key: str, value: Any) -> Any:
    """A value in the form that the settings have it in."""
    if key == "layers_pattern" and isinstance(value, str):
        return (value,) if value else ()
    return tuple(value) if key in ("modules_to_save", "layers_pattern") else value


def _require(file: Path, holds: bool, key: str, wanted: str, value: Any) -> None:
    if not holds:
        raise NpllmValueError(f"{file}: {key} {wanted}, got {quote(value)}")


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= LARGEST


def _is_rank(x: Any) -> bool:
    return is_int(x) and x >= 1


def _are_texts(x: Any) -> bool:
    return isinstance(x, list) and all(isinstance(name, str) for name in x)


def _are_layers(x: Any) -> bool:
    return is_int(x) or (isinstance(x, list) and all(map(is_int, x)))


def _maps_to(fits: Any) -> Any:
    return lambda x: isinstance(x, dict) and all(map(fits, x.values()))


NAMES = (lambda x: isinstance(x, str) or _are_texts(x), "names of modules or a regular expression")
# Key -> the check of its value, and what the value must be.
CHECKS: dict[str, Any] = {
    "r": (_is_rank, "an integer of at least 1"),
    "lora_alpha": (_is_number, f"a number in -{LARGEST:g} ... {LARGEST:g}"),
    "use_rslora": (lambda x: isinstance(x, bool), "true or false"),
    "target_modules": NAMES,
    "exclude_modules": NAMES,
    "modules_to_save": (_are_texts, "a list of names of modules"),
    "layers_to_transform": (_are_layers, "numbers of layers"),
    "layers_pattern": (lambda x: isinstance(x, str) or _are_texts(x), "names"),
    "rank_pattern": (_maps_to(_is_rank), "ranks by module, integers of at least 1"),
    "alpha_pattern": (_maps_to(_is_number), f"numbers in -{LARGEST:g} ... {LARGEST:g} by module"),
}
