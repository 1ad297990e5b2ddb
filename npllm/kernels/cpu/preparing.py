"""Every kernel of one weight type, called once with small weights, so that all are compiled."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from npllm.arrays import DTYPES
from npllm.cache import KVCache
from npllm.kernels import FEW_ROWS
from npllm.kernels.cpu.compiled import COMPILED
from npllm.kernels.cpu.rounded import rounded_compiled
from npllm.models.params import LayerParams, Params
from npllm.ops import Step
from npllm.ops.mask import causal
from npllm.quantized.block_formats import FORMATS
from npllm.quantized.block_weight import BlockWeight
from npllm.quantized.int8 import quantize

__all__ = ["compile_all"]

Array = Any

WIDTH = 256  # of the weights: a block of every format
GAINS = {"int8": "bfloat16"}  # the type of norms beside packed weights; GGUF files have float32


def compile_all(dtype: str, activations: str = "float32") -> None:
    """Call every kernel once for a weight type and a kind of activations.

    Parameters
    ----------
    dtype : str
        A float type, "int8", or a format of blocks such as "Q4_K".
    activations : str
        One of `npllm.quantized.activations.ACTIVATIONS`.
    """
    ops = COMPILED if activations == "float32" else rounded_compiled(activations)
    gain = frozen(
        np.zeros(WIDTH, DTYPES[dtype if dtype in DTYPES else GAINS.get(dtype, "float32")])
    )
    qkv_proj, square, gate_up_proj = (small_weight(n * WIDTH, dtype) for n in (3, 1, 2))
    layer = LayerParams(gain, qkv_proj, square, gain, gate_up_proj, square)
    for n in (1, 2, FEW_ROWS + 1):
        _call_all(ops, np.ones((1, n, WIDTH), np.float32), layer)
    _call_decode_step(ops, layer)


def _call_all(ops: Any, x: Array, layer: LayerParams) -> None:
    """Call the operations and fusions of a layer: all of them are in the compiled set."""
    table = np.ones((x.shape[1], 16), np.float32)
    step = Step(table, table, 2, 2, 0.0, [causal()])
    norm = layer.input_layernorm, 0.0
    step = step._replace(cache=KVCache(1, 1, 64))
    qkv = ops.norm_linear(x, *norm, layer.qkv_proj)
    ops.embed(np.zeros(x.shape[:2], np.int64), layer.o_proj)
    ops.linear(x, layer.o_proj)
    ops.linear_add(x, layer.o_proj, x)
    ops.norm_swiglu(x, *norm, layer.gate_up_proj)
    ops.mlp_block(x, layer, step)
    ops.rope_attention(qkv, step)
    ops.attention_block(x, layer, step._replace(cache=KVCache(1, 1, 64)))
    ops.decoder_layers(x, (layer,), step._replace(cache=KVCache(1, 1, 64)))
    ops.rms_norm(x, *norm)


def _call_decode_step(ops: Any, layer: LayerParams) -> None:
    """Call the kernel of a whole step."""
    ids, table = np.zeros((1, 1), np.int64), np.ones((1, 16), np.float32)
    tokens = SimpleNamespace(ids=ids, valid=np.ones((1, 1), bool), positions=ids[0])
    step = Step(None, None, 2, 2, 0.0, [causal()], KVCache(1, 1, 64))
    params = Params(layer.o_proj, (layer,), layer.input_layernorm, layer.o_proj)
    ops.decode_step(tokens, ids[0], params, step, lambda *_: (table, table))


def small_weight(d_out: int, dtype: str) -> Any:
    """Make a read-only matrix of zeros, as a checkpoint's are read-only."""
    if dtype in FORMATS:
        layout = FORMATS[dtype]
        n_bytes = WIDTH // layout.n_entries * layout.n_bytes
        return BlockWeight(frozen(np.zeros((d_out, n_bytes), np.uint8)), dtype)
    if dtype == "int8":
        return quantize(np.zeros((d_out, WIDTH)))
    return frozen(np.zeros((d_out, WIDTH), DTYPES[dtype]))


def frozen(x: Array) -> Array:
    """Make an array read-only."""
    x.flags.writeable = False
    return x
