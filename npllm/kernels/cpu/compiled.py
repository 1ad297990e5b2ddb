"""The set compiled with Numba: a layer, all layers, and the parts of `dispatch`.

Decoding a small model is bound by Python call overhead: Python's own code and data, which reading
the weights has evicted from the caches, are needed between two kernels.  So half a layer is one
kernel, and so are all layers where they are alike, with the logits behind them.
"""

from dataclasses import replace
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np

from npllm.cache import KVCache
from npllm.kernels import FEW_ROWS
from npllm.kernels.cpu import gemm
from npllm.kernels.cpu.adapted import base_layer, is_adapted
from npllm.kernels.cpu.adapted_blocks import launch_adapted_attention, launch_adapted_mlp
from npllm.kernels.cpu.block_gemv import fits_blocks
from npllm.kernels.cpu.decode import attention_step, layers_step, logits_step, mlp_step
from npllm.kernels.cpu.dispatch import (
    add_bias,
    embed,
    gated_panels,
    gelu,
    linear,
    linear_add,
    many_rows,
    norm_linear,
    norm_swiglu,
    rms_norm,
)
from npllm.kernels.cpu.fits import is_float32
from npllm.kernels.cpu.launching import launch
from npllm.kernels.cpu.layout import row_major_copy, rows_of
from npllm.kernels.cpu.operands import (
    BLOCKS,
    as_bits,
    bias_or_empty,
    fits_gain,
    fits_gated,
    fits_product,
    fits_weight,
    kernel_operands,
)
from npllm.kernels.cpu.rope_attention import (
    decode_inputs,
    fits_rope,
    rope_attention,
)
from npllm.kernels.cpu.tiled import TILED
from npllm.models.params import LayerParams, Params
from npllm.ops import Step
from npllm.quantized.int8 import Int8Weight
from npllm.quantized.stacked import StackedWeight
from npllm.threads import scratch

__all__ = ["COMPILED", "attention_block", "decode_step", "decoder_layers", "mlp_block"]

Array = Any


def attention_block(x: Array, layer: LayerParams, step: Step) -> Any:
    """Compute the first half of a layer: one kernel for a few tokens with a cache; for many, q, k
    and v stay in a buffer.
    """
    adapted = is_adapted(layer.qkv_proj, layer.o_proj)
    base = base_layer(layer) if adapted else layer
    if not fits_attention(x, base, step):
        return NotImplemented
    if x.size > FEW_ROWS * x.shape[-1]:
        return NotImplemented if adapted else attention_of_many(x, layer, step)
    if step.cache is None:
        return NotImplemented
    d_head = len(layer.qkv_proj) // (step.n_head + 2 * step.n_kv_head)
    tokens = decode_inputs(step, len(x), x.shape[1], d_head)
    if tokens is None:
        return NotImplemented
    y = row_major_copy(x)
    if adapted:
        launch_adapted_attention(y, layer, base, step, tokens)
        return add_bias(y, layer.o_bias).reshape(x.shape)
    launch(
        attention_step,
        y,
        as_bits(layer.input_layernorm),
        np.float32(step.eps),
        *kernel_operands(layer.qkv_proj),
        bias_or_empty(layer.qkv_bias),
        *tokens,
        step.n_head,
        *kernel_operands(layer.o_proj),
    )
    return add_bias(y, layer.o_bias).reshape(x.shape)


def attention_of_many(
    x: Array,
    layer: LayerParams,
    step: Step,
    product: Any = many_rows,
    add: Any = linear_add,
    attend: Any = rope_attention,
) -> Any:
    """Compute the first half of a layer for many tokens that `fits_attention` takes, where keys are
    kept in float32, by functions like `many_rows`, `linear_add` and `rope_attention`.
    """
    cache, d_qkv = step.cache, len(layer.qkv_proj)
    plain = cache is None or (type(cache) is KVCache and cache.dtype in (None, np.float32))
    if not (plain and gemm.panel_columns()):
        return NotImplemented
    panels = product(x, layer.qkv_proj, layer.input_layernorm, step.eps)
    qkv = gemm.unpacked(panels, scratch("qkv", (x.size // x.shape[-1], d_qkv), np.float32))
    y = attend(add_bias(qkv, layer.qkv_bias).reshape(*x.shape[:-1], d_qkv), step)
    return y if y is NotImplemented else add(y, layer.o_proj, x, layer.o_bias)


def mlp_block(x: Array, layer: LayerParams, step: Step) -> Any:
    """Compute the second half of a layer: one kernel for a few rows; panels from the norm to the
    sum for many.
    """
    adapted = is_adapted(layer.gate_up_proj, layer.down_proj)
    base = base_layer(layer) if adapted else layer
    gain, gate_up, down = base.post_attention_layernorm, base.gate_up_proj, base.down_proj
    gate_up_bias, down_bias = layer.gate_up_bias, layer.down_bias
    if not fits_mlp(x, gain, gate_up, down, gate_up_bias, down_bias):
        return NotImplemented
    rows = rows_of(x)
    if len(rows) > FEW_ROWS and (adapted or not gemm.panel_columns()):
        return NotImplemented
    y = row_major_copy(rows)
    if adapted:
        launch_adapted_mlp(y, layer, base, step.eps)
    elif len(rows) > FEW_ROWS:
        gated = gated_panels(rows, gain, step.eps, gate_up, gate_up_bias)
        gemm.add_unpacked(gemm.product(gated, *kernel_operands(down), len(rows)), y)
    else:
        launch(
            mlp_step,
            y,
            as_bits(gain),
            np.float32(step.eps),
            *kernel_operands(gate_up),
            bias_or_empty(gate_up_bias),
            *kernel_operands(down),
        )
    return add_bias(y, down_bias).reshape(x.shape)


def decoder_layers(x: Array, layers: Any, step: Step) -> Any:
    """Compute all layers: one kernel for a few tokens with a cache where layers are alike."""
    arguments = layers_arguments(x.shape, layers, step) if is_float32(x) and x.ndim == 3 else None
    if arguments is None:
        return NotImplemented
    y = row_major_copy(x)
    launch(layers_step, y, *arguments)
    return y


def decode_step(
    tokens: Any,
    variants: Array,
    params: Params,
    step: Step,
    tables: Any,
    n_greedy: int = 0,
    n_keep: int = 1,
) -> Any:
    """Compute the logits [n_batch, n_keep, n_vocab] after the last of a few new tokens, in one
    kernel where layers are alike and no row has padding.
    """
    ends = known_ends(params, step.cache)
    if n_greedy or ends is None or not tokens.valid.all():
        return NotImplemented
    ids = np.array(tokens.ids, np.int64, order="C")
    # the kernel would read beyond the embedding; `embed` raises.  -1 is a large number here
    if ids.view(np.uint64).max() >= len(params.embed_tokens):
        return NotImplemented
    shape = *ids.shape, params.embed_tokens.shape[1]
    cos, sin = tables(tokens.positions, variants)
    step = step._replace(cos=cos, sin=sin)
    arguments = layers_arguments(shape, params.layers, step)
    if arguments is None:
        return NotImplemented
    logits = launch(logits_step, ids, *ends[:2], arguments, *ends[2:], n_keep)
    return logits.reshape(len(ids), n_keep, -1)


def layers_arguments(shape: tuple[int, ...], layers: Any, step: Step) -> tuple | None:
    """What `layers_step` takes besides tokens [n_batch, n_seq, d_model]; None where it is not made
    for them: there are many, the layers differ, or what they are told does.
    """
    (n_batch, n_seq, d_model), masks, first = shape, step.masks, step.mask
    one_mask = masks is None or all(mask is first for mask in masks)
    few = 0 < n_batch * n_seq <= FEW_ROWS
    if not (one_mask and few and type(layers) is tuple and type(step.cache) is KVCache):
        return None
    arrays, table = known_arrays(layers, step.cache)
    if table is None or len(arrays[0][0]) != d_model:
        return None
    d_qkv, n_all = len(layers[0].qkv_proj), step.n_head + 2 * step.n_kv_head
    d_head = d_qkv // n_all
    if not (
        fits_rope((n_batch, n_seq, d_qkv), *step[:4])
        and layers[0].o_proj.shape[1] == step.n_head * d_head
    ):
        return None
    tokens = decode_inputs(step, n_batch, n_seq, d_head)
    if tokens is None:
        return None
    cos, sin, keys, values, bounds, seen = tokens
    columns = columns_of_layers(step, (n_batch, step.n_kv_head, n_seq, d_head), len(layers))
    if columns is None:
        return None
    columns = columns - columns[0] + np.array([data_address(keys), data_address(values)])
    eps, held = np.float32(step.eps), (*arrays[0], keys, values)
    return held, np.hstack((table, columns)), eps, cos, sin, bounds, seen, step.n_head


# ---------------------------------------------------------------- what the kernels are made for


def fits_attention(x: Array, layer: LayerParams, step: Step) -> bool:
    """Tell whether the attention half of a layer is what the kernels are made for."""
    qkv_proj, o_proj = layer.qkv_proj, layer.o_proj
    if not (
        fits_product(x, qkv_proj, layer.qkv_bias)
        and fits_gain(x, layer.input_layernorm)
        and fits_rope((*x.shape[:-1], len(qkv_proj)), *step[:4])
    ):
        return False
    d_head = len(qkv_proj) // (step.n_head + 2 * step.n_kv_head)
    return fits_weight(o_proj, step.n_head * d_head, layer.o_bias) and len(o_proj) == x.shape[-1]


def fits_mlp(
    x: Array,
    norm_weight: Array,
    gate_up_weight: Array,
    down_weight: Array,
    gate_up_bias: Array = None,
    down_bias: Array = None,
) -> bool:
    """Tell whether a feed-forward half is what the kernels are made for."""
    return (
        fits_gated(x, norm_weight, gate_up_weight, gate_up_bias)
        and fits_weight(down_weight, len(gate_up_weight) // 2, down_bias)
        and len(down_weight) == x.shape[-1]
    )


# ------------------------------------------------------------------- addresses of the weights

WEIGHTS = (
    "input_layernorm",
    "qkv_proj",
    "o_proj",
    "post_attention_layernorm",
    "gate_up_proj",
    "down_proj",
)
weights_of = attrgetter(*WEIGHTS)  # of a layer, in this order
BIASES = ("qkv_bias", "o_bias", "gate_up_bias", "down_bias")
# cache -> what was asked for it, and the answer: checking all weights for every token would cost as
# much as a layer
_LAYERS: WeakKeyDictionary[KVCache, tuple[Any, tuple[list, np.ndarray | None]]]
_LAYERS = WeakKeyDictionary()
_ENDS: WeakKeyDictionary[KVCache, tuple[Any, tuple | None]] = WeakKeyDictionary()


def known_arrays(layers: tuple, cache: KVCache) -> tuple[list, Array | None]:
    """The arrays of each layer as `arrays_of` gives them, and where they lie, [n_layer, 10].

    The table is None where layers differ, have biases, or are none that the kernels are made for.
    """
    known = _LAYERS.get(cache)
    if known is None or known[0] is not layers:
        arrays = [arrays_of(layer) for layer in layers] if are_alike(layers) else []
        table = np.array([list(map(data_address, row)) for row in arrays]) if arrays else None
        # references keep the arrays at the addresses alive
        known = _LAYERS[cache] = layers, (arrays, table)
    return known[1]


def are_alike(layers: tuple) -> bool:
    """Tell whether layers are what `layers_step` is made for, apart from their heads."""
    if not layers or not all(type(layer) is LayerParams for layer in layers):
        return False
    gain, qkv_proj, o_proj, *mlp = first = weights_of(layers[0])
    if type(gain) is not np.ndarray or gain.ndim != 1:
        return False
    x = np.empty((1, len(gain)), np.float32)  # its shape is asked for
    return (
        fits_product(x, qkv_proj)
        and fits_gain(x, gain)
        and fits_weight(o_proj, o_proj.shape[1])
        and len(o_proj) == len(gain)
        and fits_mlp(x, *mlp)
        and all(all(map(same_layout, weights_of(layer), first)) for layer in layers)
        and all(getattr(layer, name) is None for layer in layers for name in BIASES)
    )


def known_ends(params: Params, cache: KVCache) -> tuple | None:
    """The embedding with its scales, the final gain, and lm_head with its scales, as `logits_step`
    takes them; None where it is not made for them.
    """
    known = _ENDS.get(cache)
    if known is None or known[0] is not params:
        gain, embedding, head = params.norm, params.embed_tokens, params.lm_head
        fits = (
            type(gain) is np.ndarray
            and fits_gain(gain, gain)
            and all(fits_weight(weight, len(gain)) for weight in (embedding, head))
            and not isinstance(embedding, StackedWeight)
        )
        ends = (
            (*kernel_operands(embedding), as_bits(gain), *kernel_operands(head)) if fits else None
        )
        known = _ENDS[cache] = params, ends
    return known[1]


# cache -> keys of each layer, table: a reference proper would keep arrays that are replaced
_HELD: WeakKeyDictionary[KVCache, tuple[list[ref], np.ndarray | None]] = WeakKeyDictionary()


def columns_of_layers(step: Step, shape: tuple[int, ...], n_layer: int) -> Array | None:
    """Reserve slots for new keys of a shape [n_batch, n_kv_head, n_seq, d_head] in all layers.

    Returns where the first column of the keys and of the values of each layer lies, [n_layer, 2];
    None where layers hold different shapes, or begin with different slots.
    """
    k = np.empty(shape, np.float32)  # its shape is asked for
    held = step.cache.reserve_in_layers(k, k, range(step.layer, step.layer + n_layer))
    if any(x[2] != held[0][2] for x in held):
        return None
    known = _HELD.get(step.cache)
    if known is None or not _same_keys(known[0], held):
        keys, values, _ = held[0]
        same = all(same_layout(x[0], keys) and same_layout(x[1], values) for x in held)
        table = np.array([list(map(data_address, x[:2])) for x in held]) if same else None
        known = _HELD[step.cache] = [ref(x[0]) for x in held], table
    return known[1]


def _same_keys(kept: list[ref], held: list[tuple]) -> bool:
    """Tell whether layers hold the same keys as before."""
    return len(kept) == len(held) and all(one() is x[0] for one, x in zip(kept, held, strict=True))


def arrays_of(layer: LayerParams) -> tuple[Array, ...]:
    """The weights of a layer as `layers_step` takes them."""
    gain, qkv_proj, o_proj, next_gain, gate_up_proj, down_proj = weights_of(layer)
    return (
        as_bits(gain),
        *kernel_operands(qkv_proj),
        *kernel_operands(o_proj),
        as_bits(next_gain),
        *kernel_operands(gate_up_proj),
        *kernel_operands(down_proj),
    )


def same_layout(a: Any, b: Any) -> bool:
    """Tell whether two weights, or two caches, differ in their numbers and their place only."""
    if isinstance(a, BLOCKS) and isinstance(b, BLOCKS):
        return fits_blocks(a) and fits_blocks(b) and a.shape == b.shape
    if isinstance(a, Int8Weight) and isinstance(b, Int8Weight):
        return same_layout(a.values, b.values) and same_layout(a.scales, b.scales)
    return (
        type(a) is type(b) is np.ndarray
        and (a.dtype, a.shape, a.strides) == (b.dtype, b.shape, b.strides)
        and a.flags.aligned == b.flags.aligned
    )


def data_address(x: Array) -> int:
    """Where an array begins in memory."""
    return x.__array_interface__["data"][0]


COMPILED = replace(
    TILED,
    embed=embed,
    linear=linear,
    rms_norm=rms_norm,
    norm_linear=norm_linear,
    norm_swiglu=norm_swiglu,
    linear_add=linear_add,
    gelu=gelu,
    rope_attention=rope_attention,
    attention_block=attention_block,
    mlp_block=mlp_block,
    decoder_layers=decoder_layers,
    decode_step=decode_step,
    name="compiled",
)
