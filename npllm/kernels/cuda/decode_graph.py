"""The captured CUDA graph of a decode step: its buffers, its launches, their capture."""

from collections.abc import Callable
from typing import Any

import numpy as np

from npllm.arrays import array_namespace, is_packed, widen
from npllm.kernels.cuda import launching
from npllm.kernels.cuda.attention import Place, count_splits, launch_attend, parts_shape
from npllm.kernels.cuda.launching import entry, pointer
from npllm.kernels.cuda.linear import Vectors, launch_linear
from npllm.kernels.cuda.rope import launch_rope
from npllm.kernels.cuda.weights import operand

__all__ = ["MOST_QUEUED", "Plan"]

Array = Any

THREADS, CHOOSE_THREADS = 256, 1024  # of embed.cu and choose.cu
UNIT = 32  # entries of a thread of embed_blocks.cu
MOST_QUEUED = 256  # greedy tokens that are chosen before the host looks
STATE = ("token", "slot", "table_row", "start", "n_chosen")  # rows of the state in device memory


class Plan:
    """Buffers and launches of a decode step: everything is allocated here, and nothing in a step.

    Parameters
    ----------
    params : Params
    step : Step
    n_batch : int

    Attributes
    ----------
    like : float32 array [n_batch, n_kv_head, 1, d_head]
        Of the shape, dtype and library of new keys and values.
    """

    def __init__(self, params: Any, step: Any, n_batch: int):
        self.params, self.masks = params, step.masks
        self.n_head, self.n_kv_head, self.eps = step.n_head, step.n_kv_head, step.eps
        self.xp = xp = array_namespace(params.norm)
        self.n_batch = n_batch
        self.layers: list[tuple[Array, Array, int]] = []
        self._graphs: dict[str, Any] = {}
        self.n_table = 0
        self.known_variants: tuple[int, ...] = ()

        def empty(*shape: int) -> Array:
            return xp.empty((n_batch, *shape), dtype=xp.float32)

        first = params.layers[0]
        d_model, width = params.norm.shape[0], first.qkv_proj.shape[0]
        d_head = width // (step.n_head + 2 * step.n_kv_head)
        self.x, self.middle, self.qkv = empty(d_model), empty(d_model), empty(1, width)
        self.q, self.heads = (empty(step.n_head, 1, d_head) for _ in range(2))
        self.like = self.q[:, : step.n_kv_head]
        self.gated = empty(first.gate_up_proj.shape[0] // 2)
        self.logits = empty(params.lm_head.shape[0])
        self.state = xp.zeros((len(STATE), n_batch), dtype=xp.int64)
        self.token, self.slot, self.table_row, self.start, self.n_chosen = (
            self.state[row] for row in range(len(STATE))
        )
        self.chosen = xp.zeros((n_batch, MOST_QUEUED), dtype=xp.int64)
        self.vectors = [_vectors_of(layer, self.x, self.middle) for layer in params.layers]
        self.last = Vectors(_of_the_type_of(params.lm_head, params.norm))

    def is_for(self, params: Any, step: Any) -> bool:
        """Tell whether a step of these weights and masks runs as this one."""
        mine = (self.n_head, self.n_kv_head, self.eps)
        masks = len(self.masks) == len(step.masks or ()) and all(
            one is other for one, other in zip(self.masks, step.masks, strict=True)
        )
        same = self.params is params and mine == (step.n_head, step.n_kv_head, step.eps)
        return same and masks and self.n_batch == step.cache.n_batch

    def bind(
        self, layers: list, positions: Array, variants: Array, tables: Callable, cache: Any
    ) -> bool:
        """Take over the arrays of the cache and the tables of the rotation; where they are new, the
        graphs are captured again.  False for keys that the kernels do not write.
        """
        longest = int(positions.max()) + 1
        known = set(variants.tolist()) <= set(self.known_variants) and longest <= self.n_table
        moved = len(layers) != len(self.layers) or any(
            one is not other for one, other in zip(layers, self.layers, strict=True)
        )
        if moved and any(entry(k) is None or entry(k) != entry(v) for k, v, _ in layers):
            return False
        if not known:
            self._make_tables(max(longest, layers[0][0].shape[-2]), variants, tables, cache)
        if moved:
            self.layers = list(layers)
            seen = max(self._seen(number) for number in range(len(layers)))
            self.parts = None
            if count_splits(seen) > 1:
                shape = parts_shape(self.q, count_splits(seen))
                self.parts = self.xp.empty(shape, dtype=self.xp.float32)
        if moved or not known:
            self._graphs = {}
        return True

    def _make_tables(self, n: int, variants: Array, tables: Callable, cache: Any) -> None:
        """Compute cosines and sines of n positions or more, for each variant below the other."""
        n = min(max(64, 1 << (n - 1).bit_length()), max(cache.max_slots, n))
        self.known_variants = tuple(sorted(set(variants.tolist())))
        found = [tables(np.arange(n), np.array([one])) for one in self.known_variants]
        self.cos, self.sin = (
            self.xp.ascontiguousarray(self.xp.concat(list(both), axis=0))
            for both in zip(*found, strict=True)
        )
        self.n_table = n

    def _seen(self, number: int) -> int:
        """Most keys that a query of a layer can see in the arrays that it has."""
        low, high, _ = self.masks[number].left_band
        return min(self.layers[number][0].shape[-2], high - low)

    def put(self, ids: Array, slot: int, positions: Array, variants: Array, start: Array) -> None:
        """Write the tokens and their places into device memory, in one copy."""
        state = np.zeros((len(STATE), self.n_batch), dtype=np.int64)
        state[0], state[1], state[3] = ids, slot, start
        offsets = [self.known_variants.index(one) * self.n_table for one in variants.tolist()]
        state[2] = positions + np.array(offsets)
        self.state.set(state)

    def logits_of_step(self, *, use_graph: bool) -> Array:
        """Run the step; return a copy of its logits [n_batch, 1, n_vocab]."""
        self._run("step", use_graph)
        return self.xp.astype(self.logits[:, None, :], self.xp.float32)

    def greedy(self, n: int, *, use_graph: bool) -> Array:
        """Choose the n tokens behind the one that was put; NumPy int64 [n_batch, n]."""
        for _ in range(n):
            self._run("greedy", use_graph)
        return self.chosen.get()[:, :n]

    def _run(self, name: str, use_graph: bool) -> None:
        """Launch the kernels; from the second time on by a graph."""
        launches = self._step if name == "step" else self._greedy_step
        if not use_graph or name not in self._graphs:
            self._graphs[name] = None
            launches()  # compiles, and loads every kernel: neither can be captured
            return
        if self._graphs[name] is None:
            self._graphs[name] = captured(launches)
        self._graphs[name].launch()

    def _greedy_step(self) -> None:
        """The step of the token that was chosen last, and the next choice."""
        self._step()
        self._choose()

    def _step(self) -> None:
        """Launch every kernel from the token to the logits."""
        suffix, name, values, scales = operand(self.params.embed_tokens)
        n_threads = self.x.size // (UNIT if suffix else 1)
        launching.launch(
            f"embed{suffix}",
            (("ENTRY", name),),
            -(-n_threads // THREADS),
            THREADS,
            self.token,
            values,
            pointer(scales),
            self.x,
            *map(np.int64, (self.x.size, self.x.shape[-1])),
        )
        for number in range(len(self.layers)):
            self._layer(number)
        launch_linear(self.x, self.params.lm_head, self.logits, self.last, eps=self.eps)

    def _layer(self, number: int) -> None:
        """Launch the seven kernels of a layer, six where the keys are one split."""
        weights, (keys, values, first) = self.params.layers[number], self.layers[number]
        qkv, o, gate_up, down = self.vectors[number]
        low, high, _ = self.masks[number].left_band
        n_split = count_splits(self._seen(number))
        launch_linear(self.x, weights.qkv_proj, self.qkv, qkv, eps=self.eps)
        launch_rope(
            self.qkv,
            self.cos,
            self.sin,
            self.q,
            keys,
            values,
            slots=self.slot,
            table_rows=self.table_row,
            k_slot=first,
        )
        launch_attend(
            self.q,
            keys,
            values,
            self.heads,
            self.parts if n_split > 1 else None,
            Place(low, high, 0, first),
            scale=self.q.shape[-1] ** -0.5,
            n_split=n_split,
            start=self.start,
            slots=self.slot,
        )
        launch_linear(self.heads, weights.o_proj, self.middle, o)
        launch_linear(
            self.middle, weights.gate_up_proj, self.gated, gate_up, eps=self.eps, gated=True
        )
        launch_linear(self.gated, weights.down_proj, self.x, down)

    def _choose(self) -> None:
        """Launch the choice of the most likely tokens; it also advances every row by one slot."""
        launching.launch(
            "choose",
            (),
            self.n_batch,
            CHOOSE_THREADS,
            self.logits,
            self.token,
            self.slot,
            self.table_row,
            self.n_chosen,
            self.chosen,
            np.uint32(self.logits.shape[-1]),
            np.int64(MOST_QUEUED),
        )


def captured(launches: Callable[[], None]) -> Any:
    """Record launches in a CUDA graph, on a stream of its own, without running them."""
    import cupy

    with cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        launches()
        return stream.end_capture()


def _vectors_of(layer: Any, x: Array, middle: Array) -> tuple[Vectors, ...]:
    """What the four products of a layer are fused with."""
    of = _of_the_type_of
    return (
        Vectors(of(layer.qkv_proj, layer.input_layernorm), of(layer.qkv_proj, layer.qkv_bias)),
        Vectors(None, of(layer.o_proj, layer.o_bias), x),
        Vectors(
            of(layer.gate_up_proj, layer.post_attention_layernorm),
            of(layer.gate_up_proj, layer.gate_up_bias),
        ),
        Vectors(None, of(layer.down_proj, layer.down_bias), middle),
    )


def _of_the_type_of(weight: Array, vector: Array | None) -> Array | None:
    """A vector in one piece, in the type that the kernel reads: float32 beside an int8 weight."""
    if vector is None:
        return None
    vector = widen(vector) if is_packed(weight) else vector
    return array_namespace(vector).ascontiguousarray(vector)
