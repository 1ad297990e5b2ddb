"""A PEFT adapter folder as an `Adapter`: which weights of a model it updates or replaces."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from npllm.arguments import check_path
from npllm.arrays import DTYPES, asarray, native, widen
from npllm.checkpoints.adapters.modules import (
    Module,
    chosen_modules,
    model_modules,
    naming_of,
    saved_modules,
)
from npllm.checkpoints.adapters.settings import CONFIG, AdapterSettings, read_settings
from npllm.checkpoints.adapters.tensors import (
    PREFIX,
    WEIGHTS,
    Expected,
    base_weights,
    check_tensors,
    factors_of,
    module_of,
)
from npllm.checkpoints.safetensors import PICKLE_DANGER, TensorEntry, read_header
from npllm.checkpoints.tensor_files import TensorFiles
from npllm.config.config import Config
from npllm.config.regular_file import is_present
from npllm.errors import NpllmOSError, NpllmValueError
from npllm.quantized.adapted import LowRank

__all__ = ["Adapter", "read_adapter"]

Array = Any
Place = tuple[int | None, str]  # number of the layer, None outside of them; field


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter of one model.

    Parameters
    ----------
    folder : Path
    settings : AdapterSettings
    updates : dict of (layer or None, field) to tuple of LowRank
        Layer None: a field of `Params`.
    weights : dict of (layer or None, field) to array
        Whole weights that take the place of the model's (modules_to_save).
    base : dict of (layer or None, field) to array
        Base weights that the file holds as well: those of the model have to equal them.
    """

    folder: Path
    settings: AdapterSettings
    updates: dict[Place, tuple[LowRank, ...]]
    weights: dict[Place, Array]
    base: dict[Place, Array]

    @property
    def n_parameters(self) -> int:
        """Entries of all factors and whole weights."""
        factors = [x for many in self.updates.values() for u in many for x in (u.a, u.b)]
        return sum(int(np.prod(x.shape)) for x in [*factors, *self.weights.values()])

    @property
    def places(self) -> frozenset[Place]:
        """Layer and field of the weights that it changes."""
        return frozenset((*self.updates, *self.weights))

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the weights that it changes, each once."""
        return tuple(dict.fromkeys(field for _, field in (*self.updates, *self.weights)))

    def __repr__(self) -> str:
        return f"<LoRA {self.folder.name}, rank {self.settings.r}, {', '.join(self.fields)}>"


def read_adapter(folder: str | PathLike[str], config: Config, xp: Any = np) -> Adapter:
    """Read a PEFT adapter folder for a model.

    Parameters
    ----------
    folder : str or Path
        Holds adapter_config.json and adapter_model.safetensors.
    config : Config
        Of the model.
    xp : module
        The array library of its weights.

    Returns
    -------
    adapter : Adapter
        Its arrays as they are stored, but for float64, which becomes float32.  Factors B of zeros,
        which change nothing, are left out.

    Raises
    ------
    NpllmOSError
        When a file is missing, unreadable, or a Python pickle.
    NpllmValueError
        When the settings are not implemented; when tensors are missing, misshapen, transposed or
        of no module of the model; when one holds NaN or infinity.

    Notes
    -----
    Source: `PeftModel.from_pretrained` and `set_peft_model_state_dict` in PEFT.
    """
    folder = check_path("adapter", folder)
    settings, file = read_settings(folder), _weights_file(folder)
    entries = read_header(file)
    modules = model_modules(config, naming_of(map(module_of, entries), config))
    settings = settings.matched_with(modules)
    expected = _expected(settings, modules)
    check_tensors(file, entries, expected, modules)
    read = _Reader(file, entries, xp)
    updates: dict[Place, list[LowRank]] = {}
    for module in chosen_modules(settings, modules):
        place = module.layer, module.field
        update = read.update(module, settings.scale(module.name))
        if np.any(update.b):
            updates.setdefault(place, []).append(update)
    weights = {
        (module.layer, module.field): read.tensor(f"{PREFIX}{module.name}.weight")
        for module in saved_modules(settings, modules)
    }
    base = {
        (module.layer, module.field): read.tensor(name)
        for name, module in base_weights(entries, expected, modules).items()
    }
    several = {place: tuple(many) for place, many in updates.items()}
    return Adapter(folder, settings, several, weights, base)


def _weights_file(folder: Path) -> Path:
    file, pickle = folder / WEIGHTS, folder / "adapter_model.bin"
    if is_present(file):
        return file
    if is_present(pickle):
        raise NpllmOSError(f"{pickle}: {PICKLE_DANGER}")
    raise NpllmOSError(f"{folder}: holds {CONFIG}, but no {WEIGHTS}")


def _expected(settings: AdapterSettings, modules: dict[str, Module]) -> Expected:
    """List the tensors that the settings ask for: name -> sizes by axis name."""
    chosen, saved = chosen_modules(settings, modules), saved_modules(settings, modules)
    for module in saved:
        if not module.is_whole:
            raise NpllmValueError(
                f"{settings.file}: modules_to_save names {module.name}, which is a block of rows "
                f"of {module.field} in this model and cannot be replaced by itself"
            )
    if not chosen and not saved:
        raise NpllmValueError(
            f"{settings.file}: target_modules = {settings.target_modules!r:.200} chooses no module "
            f"of the model, which has {', '.join(list(modules)[:6])} ..."
        )
    expected: Expected = {}
    for module in chosen:
        expected |= factors_of(module, settings.rank(module.name))
    for module in saved:
        axes = ("d_out", "d_in") if module.is_adaptable else ("d_model",)
        sizes = dict(zip(axes, module.shape, strict=True))
        expected[f"{PREFIX}{module.name}.weight"] = sizes
    return expected


class _Reader:
    """Reads tensors of an adapter, and checks that they are finite."""

    def __init__(self, file: Path, entries: dict[str, TensorEntry], xp: Any) -> None:
        self._file, self._entries, self._xp = file, entries, xp
        self._files = TensorFiles(is_mapped=False)

    def tensor(self, name: str) -> Array:
        """Read a tensor."""
        return asarray(self._stored(name), self._xp)

    def update(self, module: Module, scale: float) -> LowRank:
        """Read the two factors of a module."""
        first, second = (self._stored(name) for name in factors_of(module, 1))
        a, b = (second.T, first.T) if module.is_embedding else (first, second)
        a, b = (a, b) if module.is_embedding else _with_even_rank(a, b)
        return LowRank(asarray(a, self._xp), asarray(b, self._xp), scale, module.first)

    def _stored(self, name: str) -> np.ndarray:
        x = native(self._files.read(self._entries[name]))
        x = x.astype(np.float32) if x.dtype == DTYPES["float64"] else x
        bad = x.size - int(np.count_nonzero(np.isfinite(widen(x))))
        if bad:
            raise NpllmValueError(
                f"{self._file}: {name} must be finite, but {bad} of its {x.size} entries are NaN "
                "or infinity"
            )
        return x


def _with_even_rank(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The factors with a row and a column of zeros more where the rank is odd, which changes no
    product: the compiled kernels take even widths.
    """
    if len(a) % 2 == 0:
        return a, b
    return np.pad(a, ((0, 1), (0, 0))), np.pad(b, ((0, 0), (0, 1)))
