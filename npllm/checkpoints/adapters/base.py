"""The base weights that an adapter file holds as well: those of the model have to equal them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from npllm.arrays import is_packed, to_numpy
from npllm.checkpoints.adapters.reader import Adapter
from npllm.checkpoints.unused import same_values
from npllm.errors import NpllmValueError

__all__ = ["checked_base"]


def checked_base(adapter: Adapter, weight_of: Callable[[str], Any]) -> Adapter:
    """Return an adapter without the base weights beside it, which have to be those of the model.

    Parameters
    ----------
    adapter : Adapter
    weight_of : function (field) -> array or PackedMatrix
        The model's.

    Raises
    ------
    NpllmValueError
        When they differ.  Weights in int8 or in blocks, which are rounded, are not compared.
    """
    for (_, field), stored in adapter.base.items():
        mine = weight_of(field)
        if not is_packed(mine) and not same_values(to_numpy(mine), to_numpy(stored)):
            raise NpllmValueError(
                f"{adapter.folder}: was trained on a model with another {field}: the file holds "
                "that of its base model, whose numbers are not those of this model"
            )
    return replace(adapter, base={})
