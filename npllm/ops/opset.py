"""Ops: the set of operations that a model runs on, and the two sets of definitions."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from dataclasses import replace as _replace
from typing import Any, NamedTuple

from npllm.errors import NpllmTypeError
from npllm.ops.attention import attention
from npllm.ops.blockwise import blockwise_attention
from npllm.ops.embedding import add_positions, embed
from npllm.ops.feedforward import gelu, relu, silu, swiglu
from npllm.ops.linear import linear
from npllm.ops.norm import layer_norm, rms_norm
from npllm.ops.residual import add
from npllm.ops.rope import apply_rope, rope_tables

__all__ = ["SLOTS", "Ops", "Step", "blockwise", "parts_of", "reference"]

Array = Any

# Stretches of a decoder layer that one kernel may take over: what each directly consists of.  What
# a slot computes is the composition in npllm/models/phi3.py; there is no second definition of it.
SLOTS = {
    "norm_linear": ("rms_norm", "linear"),
    "norm_swiglu": ("norm_linear", "swiglu"),
    "linear_add": ("linear", "add"),
    "rope_attention": ("apply_rope", "attention"),
    "attention_block": ("norm_linear", "rope_attention", "linear_add"),
    "mlp_block": ("norm_swiglu", "linear_add"),
    "decoder_layers": ("attention_block", "mlp_block"),
}


# Fields of a set that are no operations; decode_step is a whole run, see `Ops`.
DATA = ("name", "activations", "replaced", "decode_step", "n_queued", "prefill_chunk")


def parts_of(slot: str) -> frozenset[str]:
    """List every operation and every smaller slot that a slot contains."""
    direct = SLOTS.get(slot, ())
    return frozenset(direct).union(*map(parts_of, direct))


class Step(NamedTuple):
    """What stays the same from layer to layer of one call, and the number of the layer.

    The tables are those of `rope_tables`.  `masks` holds one rule for each layer of the model;
    None: every key is visible.
    """

    cos: Array  # [n_seq, d_rope], or [n_batch, n_seq, d_rope] where they differ by row
    sin: Array  # as cos
    n_head: int
    n_kv_head: int
    eps: float  # of the norms
    masks: Any = None  # sequence of Rule or None
    cache: Any = None  # KVCache: is appended to; the caller advances it
    layer: int = 0  # its place in masks and cache

    @property
    def mask(self) -> Any:
        """The rule of this layer."""
        return None if self.masks is None else self.masks[self.layer]

    def at(self, layer: int) -> "Step":
        """Return the same for another layer."""
        return self._replace(layer=layer)


@dataclass(frozen=True)
class Ops:
    """The set of operations that a model runs on: one callable for each name, with its definition's
    signature.

    A slot (the names in `SLOTS`) holds a kernel for a stretch of a layer, or None: the stretch then
    runs operation by operation, as `npllm.models.phi3` spells it out.  A kernel returns
    NotImplemented for a call that it is not made for, which then runs in the same way.

        norm_linear(x, norm_weight, eps, weight, bias)   rms_norm, then linear
        norm_swiglu(x, norm_weight, eps, weight, bias)   norm_linear, then swiglu of its two halves
        linear_add(x, weight, residual, bias)            linear, then add to the residual stream
        rope_attention(qkv, step)                        heads, apply_rope, cache, attention
        attention_block(x, layer, step)                  the first half of a decoder layer
        mlp_block(x, layer, step)                        the second half
        decoder_layers(x, layers, step)                  all decoder layers

    `layer` is a `LayerParams`, `step` a `Step`.

    `decode_step` takes over a whole run of a few new tokens, from their ids to the logits, or is
    None.  It contains every operation: a set of which any is replaced has none.

        decode_step(tokens, variants, params, step, tables, 0, n_keep)   the logits after the last
                                          n_keep tokens of each row [n_batch, n_keep, n_vocab]
        decode_step(tokens, variants, params, step, tables, n_queued)    int64 [n_batch, n_queued]

    The second form, the most likely tokens one after another, is for sets with `n_queued`.
    """

    embed: Callable
    linear: Callable
    rms_norm: Callable
    rope_tables: Callable
    apply_rope: Callable
    attention: Callable
    swiglu: Callable
    add: Callable = add
    layer_norm: Callable = layer_norm
    relu: Callable = relu
    gelu: Callable = gelu
    silu: Callable = silu
    add_positions: Callable = add_positions
    norm_linear: Callable | None = None
    norm_swiglu: Callable | None = None
    linear_add: Callable | None = None
    rope_attention: Callable | None = None
    attention_block: Callable | None = None
    mlp_block: Callable | None = None
    decoder_layers: Callable | None = None
    decode_step: Callable | None = None
    n_queued: int = 0  # greedy tokens that decode_step chooses before the host looks for a stop
    prefill_chunk: int | None = None  # tokens that go through the layers at a time; None: 512
    name: str = "custom"
    activations: str = "float32"  # what linear maps round: `npllm.quantized.activations`
    replaced: frozenset[str] = (
        frozenset()
    )  # what `replace` was given: these run under a tap as well

    def __post_init__(self) -> None:
        for name in self.names():
            op = getattr(self, name)
            if not callable(op) and not (op is None and name in SLOTS):
                wanted = (
                    "a kernel or None" if name in SLOTS else f"a function like npllm.ops.{name}"
                )
                raise NpllmTypeError(f"Ops.{name} must be {wanted}, got {op!r}")

    @classmethod
    def names(cls) -> list[str]:
        """List the names of all operations and slots."""
        return [field.name for field in fields(cls) if field.name not in DATA]

    def replace(self, **ops: Any) -> "Ops":
        """Return a set with some operations replaced.

        Parameters
        ----------
        **ops : callable
            New implementations by name, and `name` for the set.  A slot that contains a replaced
            operation is emptied, so that the new operation is the one that runs, unless the slot is
            given as well.  `decode_step=None` lets the other slots run in a decode step.

        Returns
        -------
        new : Ops

        Raises
        ------
        NpllmTypeError
            For a name that no operation has, or a value that cannot be called.
        """
        unknown = sorted(set(ops) - {*self.names(), "name", "decode_step"})
        if unknown:
            raise NpllmTypeError(
                f"no operation is called {', '.join(unknown)}; an Ops has {', '.join(self.names())}"
            )
        given = frozenset(ops) - {"name", "decode_step"}
        emptied = {slot: None for slot in SLOTS if slot not in given and parts_of(slot) & given}
        if given:
            emptied["decode_step"] = None
        name = f"{self.name}, replaced {', '.join(sorted(given))}" if given else self.name
        return _replace(
            self,
            **{"name": name, "replaced": self.replaced - set(emptied) | given, **emptied, **ops},
        )

    def without_slots(self) -> "Ops":
        """Return a set whose own slots are empty, so that every intermediate value exists.

        A slot that was replaced is kept: it is the caller's, and has to run.
        """
        emptied: dict[str, Any] = {slot: None for slot in SLOTS if slot not in self.replaced}
        return _replace(self, **emptied)


reference = Ops(
    embed, linear, rms_norm, rope_tables, apply_rope, attention, swiglu, name="reference"
)
"""The definitions, attention with its n x n table included: for reading and checking."""

blockwise = _replace(reference, attention=blockwise_attention, name="blockwise")
"""The definitions with the blockwise attention: no n x n table."""
