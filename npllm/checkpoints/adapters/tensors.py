"""The tensors of an adapter file: their names, and the check of their shapes."""

import re
from collections.abc import Mapping
from pathlib import Path

from npllm.checkpoints.adapters.modules import Module
from npllm.checkpoints.safetensors import SAFETENSORS_DTYPES, TensorEntry
from npllm.config.strict_json import printable
from npllm.errors import NpllmValueError

__all__ = [
    "PREFIX",
    "WEIGHTS",
    "Expected",
    "base_weights",
    "check_tensors",
    "factors_of",
    "module_of",
]

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
Expected = dict[str, dict[str, int]]  # tensor -> axis name -> size
# Ends of tensor names that PEFT writes for what is not implemented.
REFUSED = {
    "lora_magnitude_vector": "DoRA",
    "lora_A.bias": "lora_bias",
    "lora_B.bias": "lora_bias",
    "token_adapter.trainable_tokens_delta": "trainable_token_indices",
}
BASES = {"model.embed_tokens", "lm_head"}
MOST = 8  # problems that a message shows


def module_of(tensor: str) -> str:
    """Return the module that a tensor of an adapter belongs to."""
    name = tensor.removeprefix(PREFIX)
    return re.sub(
        r"\.(lora_[AB]|lora_embedding_[AB]|base_layer|weight|bias|lora_magnitude).*$", "", name
    )


def factors_of(module: Module, rank: int) -> Expected:
    """List the two factors of a module, with their sizes by axis name.

    Those of an embedding are the transposed ones of a linear map with the same weight.
    """
    name = f"{PREFIX}{module.name}."
    d_out, d_in = module.shape
    if module.is_embedding:
        return {
            f"{name}lora_embedding_A": {"d_rank": rank, "n_vocab": d_out},
            f"{name}lora_embedding_B": {"d_model": d_in, "d_rank": rank},
        }
    return {
        f"{name}lora_A.weight": {"d_rank": rank, "d_in": d_in},
        f"{name}lora_B.weight": {"d_out": d_out, "d_rank": rank},
    }


def base_weights(
    entries: Mapping[str, TensorEntry], expected: Expected, modules: Mapping[str, Module]
) -> dict[str, Module]:
    """List the embeddings and output matrices of the base model that PEFT saved as well: tensor ->
    module.

    It saves them where target_modules names them; they have to be those of the model.
    """
    return {
        name: modules[module_of(name)]
        for name in entries
        if name not in expected
        and name.startswith(PREFIX)
        and module_of(name) in BASES & modules.keys()
        and name.removeprefix(f"{PREFIX}{module_of(name)}.") in ("weight", "base_layer.weight")
    }


def check_tensors(
    file: Path,
    entries: Mapping[str, TensorEntry],
    expected: Expected,
    modules: Mapping[str, Module],
) -> None:
    """Raise one error that lists everything wrong with the tensors of an adapter.

    Raises
    ------
    NpllmValueError
        For missing and surplus tensors, wrong shapes and dtypes: with both sides.
    """
    base = base_weights(entries, expected, modules)
    problems = [
        f"{name} is missing: it must be {_sized(axes)}"
        for name, axes in expected.items()
        if name not in entries
    ]
    for name, entry in sorted(entries.items()):
        axes = expected.get(name) or _axes_of_base(name, base)
        shown = printable(name[:200])
        if axes is None:
            problems.append(f"{shown} {_why_surplus(name, modules)}")
        elif tuple(axes.values()) != entry.shape:
            problems.append(
                f"{shown} must be {_sized(axes)}, got {list(entry.shape)}{_hint(axes, entry)}"
            )
        elif entry.dtype not in SAFETENSORS_DTYPES:
            known = ", ".join(SAFETENSORS_DTYPES)
            problems.append(f"{shown} must be one of {known}, got {entry.dtype}")
    if problems:
        more = f"; and {len(problems) - MOST} more" if len(problems) > MOST else ""
        raise NpllmValueError(
            f"{file}: the tensors do not fit the model and adapter_config.json: "
            f"{'; '.join(problems[:MOST])}{more}"
        )


def _axes_of_base(name: str, base: Mapping[str, Module]) -> dict[str, int] | None:
    return (
        dict(zip(("n_vocab", "d_model"), base[name].shape, strict=True)) if name in base else None
    )


def _sized(axes: dict[str, int]) -> str:
    return f"[{', '.join(axes)}] = {list(axes.values())}"


def _hint(axes: dict[str, int], entry: TensorEntry) -> str:
    """What a wrong shape probably is."""
    if tuple(axes.values())[::-1] == entry.shape:
        return " (it is transposed)"
    if len(entry.shape) != len(axes):
        return ""
    wrong = [name for name, got in zip(axes, entry.shape, strict=True) if axes[name] != got]
    if wrong == ["d_rank"]:
        return " (r or rank_pattern of adapter_config.json says another rank)"
    if wrong == ["n_vocab"]:
        return " (the vocabulary was resized)"
    return ""


def _why_surplus(name: str, modules: Mapping[str, Module]) -> str:
    """Say why a tensor is not read."""
    module = module_of(name)
    for end, what in REFUSED.items():
        if name.endswith(end):
            return f"belongs to {what}, which is not implemented"
    if not name.startswith(PREFIX):
        return f"must begin with {PREFIX}, as PEFT writes it"
    if module not in modules:
        like = [x for x in modules if x.rpartition(".")[2] == module.rpartition(".")[2]]
        known = like[-1] if like else ", ".join(list(modules)[:3])
        return f"is of no module of the model, which has {known} ..."
    return f"is of {module}, which adapter_config.json does not choose"
