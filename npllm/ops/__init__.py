"""Every operation of the model as a plain function of arrays, and `Ops`, the set of them that a model runs on.

The functions in this folder are the *definitions*: formula in the docstring, the same formula in the code, nothing but the array
API standard.  A model is given an `Ops` and calls `ops.attention(...)`; which implementation stands behind the name is the
caller's choice:

    model = npllm.load(path, ops=npllm.ops.reference.replace(attention=my_attention))
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from dataclasses import replace as _replace
from functools import partial

from npllm.errors import NpllmTypeError
from npllm.ops import mask
from npllm.ops.attention import attention, attention_weights
from npllm.ops.attention_io import attention_io
from npllm.ops.blockwise import blockwise_attention, merge_attention, split_kv_attention
from npllm.ops.embedding import add_positions, embed, sinusoidal_positions
from npllm.ops.emulate import emulate
from npllm.ops.feedforward import gelu, relu, silu, swiglu
from npllm.ops.frequencies import (
    dynamic_base,
    linear_frequencies,
    llama3_frequencies,
    longrope_scale,
    rope_frequencies,
    yarn_frequencies,
    yarn_scale,
)
from npllm.ops.fusions import (
    COMPOSITIONS,
    FUSIONS,
    attention_block,
    decoder_layers,
    linear_add,
    mlp_block,
    norm_linear,
    norm_swiglu,
    rope_attention,
)
from npllm.ops.linear import linear, mean_pool_kv_heads, merge_heads, split_heads
from npllm.ops.norm import layer_norm, rms_norm
from npllm.ops.residual import add
from npllm.ops.rope import apply_rope, apply_rope_complex, rope_tables, rotation_matrix
from npllm.ops.sampling import greedy, log_softmax, min_p, repetition_penalty, sample, softmax, temperature, top_k, top_p
from npllm.ops.special import erf, erfc

__all__ = [
    "Ops", "add", "add_positions", "apply_rope", "apply_rope_complex", "attention", "attention_block", "attention_io",
    "attention_weights", "blockwise", "blockwise_attention", "decoder_layers", "dynamic_base", "embed", "emulate", "erf", "erfc",
    "gelu", "greedy", "layer_norm", "linear", "linear_add", "linear_frequencies", "llama3_frequencies", "log_softmax",
    "longrope_scale", "mask", "mean_pool_kv_heads", "merge_attention", "merge_heads", "min_p", "mlp_block", "norm_linear",
    "norm_swiglu", "reference", "relu", "repetition_penalty", "rms_norm", "rope_attention", "rope_frequencies",
    "rope_tables", "rotation_matrix", "sample", "silu", "sinusoidal_positions", "softmax", "split_heads",
    "split_kv_attention", "swiglu", "temperature", "top_k", "top_p", "yarn_frequencies", "yarn_scale",
]


@dataclass(frozen=True)
class Ops:
    """The set of operations a model runs on: one callable for each name, with the signature of the definition.

    A fusion that is left out (None) is composed of the set's own parts.
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
    name: str = "custom"

    def __post_init__(self):
        for field in fields(self):
            op = getattr(self, field.name)
            if field.name != "name" and not callable(op) and not (op is None and field.name in FUSIONS):
                raise NpllmTypeError(f"Ops.{field.name} must be a function like npllm.ops.{field.name}, got {op!r}")
        for fusion, composition in COMPOSITIONS.items():
            if getattr(self, fusion) is None:
                object.__setattr__(self, fusion, partial(composition, self))

    def replace(self, **ops):
        """Return a set with some operations replaced.

        Parameters
        ----------
        **ops : callable
            New implementations by name.  A fusion that contains a replaced part falls back to the composition, so that the new
            part is the one that runs, unless the fusion is given as well.

        Returns
        -------
        new : Ops

        Raises
        ------
        NpllmTypeError
            For a name that no operation has, or a value that cannot be called.
        """
        names = [field.name for field in fields(self)]
        unknown = sorted(set(ops) - set(names))
        if unknown:
            raise NpllmTypeError(f"no operation is called {', '.join(unknown)}; an Ops has {', '.join(names)}")
        broken = {fusion: None for fusion, parts in FUSIONS.items() if fusion not in ops and any(part in ops for part in parts)}
        return _replace(self, **{"name": f"{self.name}, replaced {', '.join(sorted(ops))}", **broken, **ops})

    def unfused(self):
        """Return a set without fusions, in which every intermediate value exists."""
        return _replace(self, **dict.fromkeys(FUSIONS))


reference = Ops(embed, linear, rms_norm, rope_tables, apply_rope, attention, swiglu, name="reference")
"""The definitions, attention with its n x n table included: for reading and checking."""

blockwise = _replace(reference, attention=blockwise_attention, name="blockwise").unfused()
"""The definitions with the blockwise attention: no n x n table."""
