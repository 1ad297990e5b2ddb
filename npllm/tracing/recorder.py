"""The tap of a trace: takes the values that are wanted, and writes them layer by layer."""

from pathlib import Path
from typing import Any

import numpy as np

from npllm.arrays import to_numpy
from npllm.forward_pass import Tokens
from npllm.tracing.folder import write_values
from npllm.tracing.graph import Node, graph
from npllm.tracing.index import step_name, value_entry
from npllm.tracing.selection import Selection

__all__ = ["Recorder"]

Array = Any

BY_TOKEN = ("n_seq", "n_kept")
CACHED = (".cached_k", ".cached_v")


class Recorder:
    """A tap that keeps values: in memory those of one layer, the others in files.

    Parameters
    ----------
    folder : Path
        Exists.
    chosen : Selection
    n_layers : int

    Attributes
    ----------
    index : dict
        "steps" and "values" of index.json, so far.
    pairs : bool
        Whether masks and weights are wanted; see `npllm.models.taps`.
    n_logits : int
        For how many positions of this step logits are needed; 0: all.
    """

    def __init__(self, folder: Path, chosen: Selection, n_layers: int) -> None:
        self._folder, self._chosen, self._n_layers = folder, chosen, n_layers
        self.pairs, self.n_logits = chosen.has_pairs, 0
        self.index: dict[str, Any] = {"steps": [], "values": {}}
        self.last_positions = np.zeros((0, 1), np.int64)
        self._pending: dict[str, Array] = {}
        self._file = ""

    def begin(self, step: int, tokens: Tokens, *, cached: bool) -> None:
        """Start a forward pass, with the tokens that go in."""
        n_batch, n_seq = tokens.ids.shape
        n_past = tokens.valid.shape[1] - n_seq
        positions = np.broadcast_to(tokens.positions, (n_batch, n_seq))
        self._step, self._places = step, self._chosen.places(n_past, n_seq)
        self._nodes = _nodes(self._n_layers, step, cached)
        needed = any(self._chosen.wants(name, step) for name in ("lm_head", "lm_head.input"))
        self.n_logits, self.last_positions = 0 if needed else 1, tokens.positions[..., -1:]
        self.index["steps"].append(
            {
                "input_ids": tokens.ids.tolist(),
                "position_ids": positions.tolist(),
                "attention_mask": None if tokens.valid.all() else tokens.valid.astype(int).tolist(),
                "n_past": n_past,
                "cached": cached,
                "tokens": None if self._places is None else self._places.tolist(),
            }
        )

    def __call__(self, node: str, x: Array) -> Array:
        """Keep a value where it is wanted."""
        if self._chosen.wants(node, self._step):
            self._keep(node, x)
        return x

    def _keep(self, node: str, x: Array) -> None:
        """Put a value into the file of its layer; write the file before."""
        found = self._nodes.get(node) or _pair(node, self._nodes)
        kept = to_numpy(x)
        entry = value_entry(node, self._step, kept, found, is_partial=False)
        axis = next((at for at, name in enumerate(entry["axes"]) if name in BY_TOKEN), None)
        if axis is not None and self._places is not None:
            if not len(self._places):
                return
            is_cut = len(self._places) < kept.shape[axis]
            kept = kept.take(self._places, axis)
            entry = value_entry(node, self._step, kept, found, is_partial=is_cut)
        if entry["file"] != self._file:
            self._write()
        name = step_name(node, self._step)
        self._file = entry["file"]
        self._pending[name] = kept
        self.index["values"][name] = entry

    def _write(self) -> None:
        """Write the values of a layer, and let go of them."""
        if self._pending:
            write_values(self._folder, self._file, self._pending)
        self._pending = {}

    def end(self, *, is_anew: bool) -> None:
        """End a forward pass.

        Parameters
        ----------
        is_anew : bool
            Whether cached keys were computed anew, with the RoPE frequencies of a longer sequence:
            they do not follow from those of the step before.
        """
        self._write()
        if not is_anew:
            return
        for entry in self.index["values"].values():
            if entry["step"] == self._step and entry["op"] == "cache":
                entry["inputs"] = entry["inputs"][:1]


def _nodes(n_layers: int, step: int, cached: bool) -> dict[str, Node]:
    """The graph of a step; a cache reads what is new, and behind it what it held."""
    nodes = {}
    for name, node in graph(n_layers, cached=cached).items():
        inputs = [step_name(one, step) for one in node.inputs]
        if name.endswith(CACHED) and step:
            inputs.append(step_name(name, step - 1))
        nodes[name] = node._replace(inputs=tuple(inputs))
    return nodes


def _pair(node: str, nodes: dict[str, Node]) -> Node:
    """How a mask or attention weights are made."""
    module, _, word = node.rpartition(".")
    if word == "mask":
        return Node("mask")
    return Node("attention_weights", (*nodes[f"{module}.heads"].inputs[:2],))
