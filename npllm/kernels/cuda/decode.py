"""The decode engine: one new token a row, from its id to its logits, as one CUDA graph.

    x = embed(token);   x = layer(x) for each layer;   logits = W_head rms_norm(x)

A layer is seven kernels: norm and qkv; rotation and append; attention; the merge of its splits; o
and the residual; norm, gate, up and SwiGLU; down and the residual.  The token, its slot and its row
of the rotation tables lie in device memory, so that no argument of a kernel changes from token to
token: the launches are captured once in a CUDA graph, and replayed.  The reference is the same step
in `npllm.models.phi3`.
"""

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from npllm.arrays import is_packed
from npllm.cache import KVCache
from npllm.kernels.cuda.attention import WIDEST
from npllm.kernels.cuda.decode_graph import MOST_QUEUED, Plan
from npllm.kernels.cuda.launching import STORED
from npllm.kernels.cuda.weights import is_in_place, is_read
from npllm.quantized.stacked import StackedWeight

__all__ = ["MOST_QUEUED", "MOST_ROWS", "decode_step"]

Array = Any

MOST_ROWS = 8  # sequences of a batch
PRODUCTS = (
    ("qkv_proj", "input_layernorm", "qkv_bias"),
    ("o_proj", None, "o_bias"),
    ("gate_up_proj", "post_attention_layernorm", "gate_up_bias"),
    ("down_proj", None, "down_bias"),
)
_PLANS: WeakKeyDictionary[KVCache, Plan] = WeakKeyDictionary()
_REFUSED: WeakKeyDictionary[KVCache, tuple[Any, Any]] = WeakKeyDictionary()


def decode_step(
    tokens: Any,
    variants: Array,
    params: Any,
    step: Any,
    tables: Any,
    n_greedy: int = 0,
    n_keep: int = 1,  # noqa: ARG001 - there is one new token a row
    *,
    use_graph: bool = True,
) -> Array:
    """Score the token after one new token of each row, or choose the n_greedy tokens after it.

    Parameters
    ----------
    tokens : Tokens
        ids, valid and positions of one new token a row, NumPy, checked.
    variants : integer array [n_batch]
        Which RoPE frequencies each row uses, those of its cached keys.
    params : Params
    step : Step
        The cache is appended to; the caller advances it.  cos and sin are not used.
    tables : function (positions [n], variants [1]) -> cos, sin [n, d_rope]
    n_greedy : int
        At most MOST_QUEUED.  Each step chooses the token of the highest logit, and the next one
        reads it in device memory: the host waits once, after the last.
    n_keep : int
        Not used: several new tokens a row are not this engine's, see `Ops`.
    use_graph : bool
        False: each kernel is launched by itself, for tests and measurements.

    Returns
    -------
    logits : float32 array [n_batch, 1, n_vocab]
        A new array.  With n_greedy the tokens instead: int64 [n_batch, n_greedy], NumPy, -1 where
        the logits were no distribution.  NotImplemented where the engine does not apply: more than
        8 rows, float64, other weights than float32, bfloat16, float16, int8 and blocks, other masks
        than a band of distances, padding that is not on the left.
    """
    plan = _placed_plan(tokens, variants, params, step, tables, max(1, n_greedy))
    if plan is None:
        return NotImplemented
    if n_greedy:
        return plan.greedy(n_greedy, use_graph=use_graph)
    return plan.logits_of_step(use_graph=use_graph)


def _placed_plan(
    tokens: Any, variants: Array, params: Any, step: Any, tables: Any, n_new: int
) -> Plan | None:
    """The plan of this cache, made anew where its arrays were, with the tokens put into it."""
    n_batch, start = len(tokens.ids), first_slots(tokens.valid)
    if start is None or n_batch > MOST_ROWS or tokens.ids.shape[1] != 1 or n_new > MOST_QUEUED:
        return None
    if not step.cache.n_ctx or not is_in(tokens.ids, len(params.embed_tokens)):
        return None
    plan = _PLANS.get(step.cache)
    if plan is None or not plan.is_for(params, step):
        plan = _new_plan(params, step, n_batch)
        if plan is None:
            return None
    like = plan.like
    if n_new > 1:
        like = plan.xp.broadcast_to(like, (*like.shape[:2], n_new, like.shape[3]))
    layers = step.cache.reserve_in_layers(like, like, range(step.cache.n_layer))
    positions = np.broadcast_to(tokens.positions, (n_batch, 1))[:, -1]
    if not plan.bind(layers, positions + n_new - 1, variants, tables, step.cache):
        _REFUSED[step.cache] = params, step.masks
        return None
    _PLANS[step.cache] = plan
    plan.put(tokens.ids[:, -1], step.cache.n_ctx, positions, variants, start)
    return plan


def _new_plan(params: Any, step: Any, n_batch: int) -> Plan | None:
    """Make a plan; None where the kernels do not take the model, looked at once for a cache."""
    refused = _REFUSED.get(step.cache, ())
    if refused and refused[0] is params and refused[1] is step.masks:
        return None
    if applies(params, step):
        return Plan(params, step, n_batch)
    _REFUSED[step.cache] = params, step.masks
    return None


def is_in(ids: Array, n: int) -> bool:
    """Tell whether ids are rows of an embedding with n rows; of others `embed` says so."""
    return bool(0 <= ids.min() and ids.max() < n)


def first_slots(valid: Array) -> Array | None:
    """First slot of each row that holds a token; None where padding is not on the left."""
    n_ctx = valid.shape[1]
    start = valid.argmax(axis=1)
    on_the_left = (valid == (np.arange(n_ctx) >= start[:, None])).all()
    return start if on_the_left else None


def applies(params: Any, step: Any) -> bool:
    """Tell whether the kernels take the weights, the heads and the masks of a model."""
    head = params.lm_head
    d_head = params.layers[0].qkv_proj.shape[0] // (step.n_head + 2 * step.n_kv_head)
    heads = d_head % 32 == 0 and d_head <= WIDEST and step.n_head % step.n_kv_head == 0
    bands = step.masks is not None and all(
        getattr(mask, "left_band", None) is not None and mask.left_band[2] is None
        for mask in step.masks
    )
    products = [
        (getattr(layer, weight), gain and getattr(layer, gain), getattr(layer, bias))
        for layer in params.layers
        for weight, gain, bias in PRODUCTS
    ]
    gated = not any(isinstance(layer.gate_up_proj, StackedWeight) for layer in params.layers)
    table = params.embed_tokens
    rows = is_read(table) and is_in_place(table) and not isinstance(table, StackedWeight)
    if head is None or not (heads and bands and gated and rows):
        return False
    if len(table) < len(head):  # a chosen token is a row of both
        return False
    return all(_product_fits(*one) for one in [*products, (head, params.norm, None)])


def _product_fits(weight: Array, gain: Array | None, bias: Array | None) -> bool:
    """Tell whether a kernel takes a weight, and the vectors that it is fused with."""
    if not (is_read(weight) and is_in_place(weight)):
        return False
    vectors = [x for x in (gain, bias) if x is not None]
    if is_packed(weight):
        return all(x.dtype in STORED for x in vectors)
    return all(x.dtype == weight.dtype for x in vectors)
