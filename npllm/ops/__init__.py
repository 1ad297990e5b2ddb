"""Every operation of the model as a plain function of arrays, and `Ops`, the set of them that a
model runs on.

The functions in this folder are the *definitions*: formula in the docstring, the same formula in
the code, nothing but the array API standard.  A model is given an `Ops` and calls
`ops.attention(...)`; which implementation runs under the name is the caller's choice:

    model = npllm.load(path, ops=npllm.ops.reference.replace(attention=my_attention))
"""

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
from npllm.ops.linear import linear, mean_pool_kv_heads, merge_heads, split_heads
from npllm.ops.low_rank import lora_linear
from npllm.ops.norm import layer_norm, rms_norm
from npllm.ops.opset import SLOTS as SLOTS
from npllm.ops.opset import Ops, blockwise, reference
from npllm.ops.opset import Step as Step
from npllm.ops.opset import parts_of as parts_of
from npllm.ops.processors import (
    bad_words_ids,
    begin_suppress_tokens,
    forced_eos_token_id,
    min_new_tokens,
    no_repeat_ngram_size,
    suppress_tokens,
)
from npllm.ops.projections import lm_head, qkv_projection
from npllm.ops.projections import split_qkv as split_qkv
from npllm.ops.residual import add
from npllm.ops.rope import apply_rope, apply_rope_complex, rope_tables, rotation_matrix
from npllm.ops.sampling import (
    greedy,
    log_softmax,
    min_p,
    repetition_penalty,
    sample,
    softmax,
    temperature,
    top_k,
    top_p,
)
from npllm.ops.special import erf, erfc

__all__ = [
    "add",
    "add_positions",
    "apply_rope",
    "apply_rope_complex",
    "attention",
    "attention_io",
    "attention_weights",
    "bad_words_ids",
    "begin_suppress_tokens",
    "blockwise",
    "blockwise_attention",
    "dynamic_base",
    "embed",
    "emulate",
    "erf",
    "erfc",
    "forced_eos_token_id",
    "gelu",
    "greedy",
    "layer_norm",
    "linear",
    "linear_frequencies",
    "llama3_frequencies",
    "lm_head",
    "log_softmax",
    "longrope_scale",
    "lora_linear",
    "mask",
    "mean_pool_kv_heads",
    "merge_attention",
    "merge_heads",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "Ops",
    "qkv_projection",
    "reference",
    "relu",
    "repetition_penalty",
    "rms_norm",
    "rope_frequencies",
    "rope_tables",
    "rotation_matrix",
    "sample",
    "silu",
    "sinusoidal_positions",
    "softmax",
    "split_heads",
    "split_kv_attention",
    "suppress_tokens",
    "swiglu",
    "temperature",
    "top_k",
    "top_p",
    "yarn_frequencies",
    "yarn_scale",
]


def __dir__() -> list[str]:
    """List the operations and what goes with them, not the modules that define them."""
    return sorted(__all__)
