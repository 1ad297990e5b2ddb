"""The weights that a comparison computes with, a matrix at a time, under the names of the graph."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from npllm.arrays import DTYPES, to_numpy
from npllm.errors import NpllmError, NpllmTypeError, NpllmValueError

__all__ = ["Weights", "model_of"]

Array = Any

BIASES = {"qkv_proj": "qkv_bias", "o_proj": "o_bias", "gate_up_proj": "gate_up_bias"}
BIASES["down_proj"] = "down_bias"


def model_of(model: Any, gold: Any) -> Any:
    """Return the model whose weights the gold was made with.

    Parameters
    ----------
    model : Model, str, Path or None
        None: the one that the gold's index names, or the checkpoint in its folder.
    gold : Recorded

    Raises
    ------
    NpllmValueError
        Where none can be found.
    """
    from npllm.loading import load

    if model is not None and not isinstance(model, str | Path):
        if not hasattr(model, "params") or not hasattr(model, "config"):
            raise NpllmTypeError(f"model must be a model or a path, got {type(model).__name__}")
        return model
    name = model if model is not None else gold.folder or gold.index.get("model")
    if not isinstance(name, str | Path) or not str(name):
        raise NpllmValueError(
            f"{gold.where}: its index names no model, whose weights are needed; give model="
        )
    try:
        return load(name)
    except NpllmError as error:
        raise NpllmValueError(
            f"{gold.where}: the weights it was made with are needed ({error}); give model="
        ) from None


class Weights:
    """Parameters by the names of `npllm.tracing.graph`.

    Parameters
    ----------
    params : Params
    dtype : str, optional
        A 16-bit type that the other side holds its weights in.
    theirs : mapping of str to array, optional
        Parameters of the other side that take the place of ours, by the same names.
    """

    def __init__(
        self, params: Any, dtype: str | None = None, theirs: Mapping[str, Array] | None = None
    ) -> None:
        self.params, self.dtype, self.theirs = params, dtype, theirs or {}

    def weight(self, name: str) -> Array:
        """Return a weight as it is stored, or as the other side rounds it."""
        if name in self.theirs:
            return self.theirs[name]
        return self._rounded(self._stored(name))

    def bias(self, name: str) -> Array:
        """Return a bias; None where there is none."""
        leaf = name.rsplit(".", 1)[-1]
        if leaf not in BIASES:
            return None
        if f"{name}.bias" in self.theirs:
            return self.theirs[f"{name}.bias"]
        return self._rounded(getattr(self._layer(name), BIASES[leaf]))

    def _stored(self, name: str) -> Array:
        leaf = name.rsplit(".", 1)[-1]
        if name.startswith("model.layers."):
            return getattr(self._layer(name), leaf)
        return getattr(self.params, leaf)

    def _layer(self, name: str) -> Any:
        return self.params.layers[int(name.split(".")[2])]

    def _rounded(self, w: Array) -> Array:
        if w is None:
            return w
        w = to_numpy(w.widened() if hasattr(w, "widened") else w)  # int8, or a format of GGUF
        if self.dtype is None or str(w.dtype) == self.dtype:
            return w
        return w.astype(DTYPES[self.dtype])
