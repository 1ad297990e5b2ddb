"""A checkpoint folder with adapters merged into it, as tensors that are read one by one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from npllm.arrays import native
from npllm.checkpoints.adapters.base import checked_base
from npllm.checkpoints.adapters.reader import Adapter, read_adapter
from npllm.checkpoints.packed_values import read_layer
from npllm.checkpoints.phi3_layout import check_entries, layers_in, top_sources_in
from npllm.checkpoints.phi3_tensor_names import EMBEDDING, OUTPUT, Sources, layer_sources
from npllm.checkpoints.safetensors import read_entries
from npllm.checkpoints.tensor_files import TensorFiles
from npllm.config.config import Config
from npllm.errors import NpllmValueError
from npllm.quantized.adapted import AdaptedWeight, LowRank, rounded

__all__ = ["MergedCheckpoint"]

Array = Any
Place = tuple[int | None, str]  # number of the layer, None outside of them; field
TABLES = (None, "embed_tokens"), (None, "lm_head")


class MergedCheckpoint:
    """The tensors of a checkpoint folder after the merge of LoRA adapters.

        W' = W + sum over the adapters of scale * B A,   rounded once, to the stored dtype of W

    Only headers and adapters are read; `read` computes one tensor.

    Parameters
    ----------
    folder : Path
    config : Config
        Of the folder.
    adapters : sequence of paths
        Folders that PEFT saved; none: the tensors as they are stored.

    Attributes
    ----------
    config : Config
        Where adapters change one of two tied tables: with tie_word_embeddings false.
    entries : dict of str to TensorEntry
        Of the tensors before the merge.  A table that is tied no more has the entry of the one
        that is stored.
    packed : dict of str to PackedLayer
        The matrices that are stored in several tensors.

    Raises
    ------
    NpllmOSError, NpllmValueError
        As `read_adapter`; where one adapter replaces a weight that another one changes.

    Notes
    -----
    Source: `LoraModel.merge_and_unload` in PEFT, which rounds after each adapter, and changes both
    of two tied tables.
    """

    def __init__(self, folder: Path, config: Config, adapters: Iterable[Any] = ()) -> None:
        self.folder, self.config, self.entries = folder, config, read_entries(folder)
        check_entries(folder, self.entries, config)
        adapters, self.packed = list(adapters), layers_in(self.entries, config)
        if adapters and config.quantization is not None:
            raise NpllmValueError(
                f"{folder}: holds weights quantised by {config.quantization.method}, which take no "
                "sum: merge adapters into the original checkpoint, or run unmerged"
            )
        self._files = TensorFiles()
        self._adapters = [self._checked(read_adapter(x, config)) for x in adapters]
        _check_apart(self._adapters)
        if any(place in x.places for x in self._adapters for place in TABLES):
            self._untie()
        self.top = top_sources_in(folder, self.entries, self.config)
        self._at = dict(self._places())

    def _checked(self, adapter: Adapter) -> Adapter:
        """An adapter that was trained on these weights."""
        return checked_base(adapter, self._table)

    def _table(self, field: str) -> Array:
        """The stored embedding or output matrix, either of which may stand for both."""
        name = EMBEDDING if field == "embed_tokens" else OUTPUT
        either = next(x for x in (name, EMBEDDING, OUTPUT) if x in self.entries)
        return self._files.read(self.entries[either])

    def _untie(self) -> None:
        """Let both tables be tensors of their own."""
        if self.config.head == "lm" and self.config.tie_word_embeddings:
            stored = self.entries.get(EMBEDDING) or self.entries[OUTPUT]
            self.entries = {EMBEDDING: stored, OUTPUT: stored, **self.entries}
            self.config = replace(self.config, tie_word_embeddings=False)

    def _places(self) -> Iterator[tuple[str, tuple[Place, slice]]]:
        """Where each tensor lies in `Params`: layer, field and rows."""
        parts: list[tuple[int | None, Sources]] = [(None, self.top)]
        parts += [(n, layer_sources(self.config, n)) for n in range(self.config.num_hidden_layers)]
        for layer, fields in parts:
            for field, tensors in fields.items():
                start = 0
                for name, shape in tensors.items():
                    yield name, ((layer, field), slice(start, start + shape[0]))
                    start += shape[0]

    def read(self, name: str) -> Array:
        """Read a tensor, in its stored dtype, with what the adapters say of it; of a matrix that
        GPTQ or compressed-tensors packed, its blocks or groups.

        Raises
        ------
        NpllmValueError
            When an entry of the sum is larger than the dtype holds.
        """
        if name in self.packed:
            return read_layer(self.packed[name], self._files)
        stored: Any = self._files.read(self.entries[name])
        if name not in self._at:
            return stored
        place, rows = self._at[name]
        weight = stored
        try:
            for adapter in self._adapters:
                if place in adapter.weights:
                    weight = rounded(native(adapter.weights[place]), native(stored).dtype)
                updates = _updates(adapter, place, rows)
                weight = AdaptedWeight(native(weight), updates) if updates else weight
            return weight.merged() if isinstance(weight, AdaptedWeight) else weight
        except NpllmValueError as error:
            raise NpllmValueError(f"{self.folder}: {name}: {error}") from None

    def reader(self, name: str) -> Callable[[], Array]:
        """Return a function that reads a tensor."""
        return lambda: self.read(name)

    def release(self, name: str) -> None:
        """Give back the memory of the pages of a tensor."""
        layer = self.packed.get(name)
        for entry in layer.entries.values() if layer else [self.entries[name]]:
            self._files.release_pages(entry)


def _updates(adapter: Adapter, place: Place, rows: slice) -> tuple[LowRank, ...]:
    """The updates of some rows of a weight, counted from the first of these rows."""
    found = (x.rows(rows.start, rows.stop) for x in adapter.updates.get(place, ()))
    return tuple(x for x in found if x is not None)


def _check_apart(adapters: Sequence[Adapter]) -> None:
    """Raise where one adapter replaces a weight that another one changes: no sum is meant."""
    for one in adapters:
        for place in one.weights:
            other = next((x for x in adapters if x is not one and place in x.places), None)
            if other is not None:
                raise NpllmValueError(
                    f"{one.folder} replaces {place[1]}, which {other.folder} changes as well: "
                    "merge one of the two"
                )
