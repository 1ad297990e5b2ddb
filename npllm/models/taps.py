"""The values of a forward pass that a tap sees: their names, axes and formulas, and how a tap is
called.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from npllm.arrays import array_namespace, is_array
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.ops.attention import attention_weights, evaluate_mask

__all__ = ["NAMES", "PAIRS", "UNTAPPED", "NamedTap", "Tap", "check_returned"]

Array = Any
Tap = Callable[[str, Array], Array]

# Name -> axes, formula.  N is the number of the layer.  Names of modules are Transformers'.
NAMES = {
    "model.rotary_emb.cos": ("[n_seq, d_rope]", "cos(position * inv_freq) * attention_factor"),
    "model.rotary_emb.sin": ("[n_seq, d_rope]", "sin(position * inv_freq) * attention_factor"),
    "model.embed_tokens": ("[n_batch, n_seq, d_model]", "embed_tokens[ids]"),
    "model.layers.N.input_layernorm": ("[n_batch, n_seq, d_model]", "rms_norm(x)"),
    "model.layers.N.self_attn.qkv_proj": ("[n_batch, n_seq, d_qkv]", "W_qkv @ input_layernorm + b"),
    "model.layers.N.self_attn.q_proj": (
        "[n_batch, n_head, n_seq, d_head]",
        "queries before rotation",
    ),
    "model.layers.N.self_attn.k_proj": (
        "[n_batch, n_kv_head, n_seq, d_head]",
        "keys before rotation",
    ),
    "model.layers.N.self_attn.v": ("[n_batch, n_kv_head, n_seq, d_head]", "values"),
    "model.layers.N.self_attn.q": (
        "[n_batch, n_head, n_seq, d_head]",
        "apply_rope(q_proj, cos, sin)",
    ),
    "model.layers.N.self_attn.k": (
        "[n_batch, n_kv_head, n_seq, d_head]",
        "apply_rope(k_proj, cos, sin)",
    ),
    "model.layers.N.self_attn.cached_k": (
        "[n_batch, n_kv_head, n_ctx, d_head]",
        "keys that are seen, with a cache only",
    ),
    "model.layers.N.self_attn.cached_v": (
        "[n_batch, n_kv_head, n_ctx, d_head]",
        "values that are seen, with a cache only",
    ),
    "model.layers.N.self_attn.heads": (
        "[n_batch, n_head, n_seq, d_head]",
        "attention(q, k, v, mask)",
    ),
    "model.layers.N.self_attn.attention": ("[n_batch, n_seq, n_head*d_head]", "heads side by side"),
    "model.layers.N.self_attn.o_proj": ("[n_batch, n_seq, d_model]", "W_o @ attention + b"),
    "model.layers.N.residual": ("[n_batch, n_seq, d_model]", "x + o_proj"),
    "model.layers.N.post_attention_layernorm": ("[n_batch, n_seq, d_model]", "rms_norm(residual)"),
    "model.layers.N.mlp.gate_up_proj": (
        "[n_batch, n_seq, 2*d_ff]",
        "W_gate_up @ post_attention_layernorm + b",
    ),
    "model.layers.N.mlp.gate": ("[n_batch, n_seq, d_ff]", "the first half of gate_up_proj"),
    "model.layers.N.mlp.up": ("[n_batch, n_seq, d_ff]", "the second half of gate_up_proj"),
    "model.layers.N.mlp.swiglu": ("[n_batch, n_seq, d_ff]", "silu(gate) * up"),
    "model.layers.N.mlp.down_proj": ("[n_batch, n_seq, d_model]", "W_down @ swiglu + b"),
    "model.layers.N": ("[n_batch, n_seq, d_model]", "residual + down_proj"),
    "model.norm": ("[n_batch, n_seq, d_model]", "rms_norm of the last layer's output"),
    "lm_head.input": ("[n_batch, n_kept, d_model]", "the positions of model.norm that are kept"),
    "lm_head": ("[n_batch, n_kept, n_vocab]", "W_lm_head @ lm_head.input"),
}

# On request only, since they are n_seq x n_ctx: `tap.pairs` must be true.  They are shown, and
# cannot be replaced.
PAIRS = {
    "model.layers.N.self_attn.mask": ("[..., n_seq, n_ctx]", "True where a query sees a key"),
    "model.layers.N.self_attn.weights": (
        "[n_batch, n_head, n_seq, n_ctx]",
        "softmax(q @ k.T / sqrt(d_head)) under the mask",
    ),
}


class NamedTap:
    """A tap under a prefix: `named(name, x)` shows x and returns what is to be used in its place.

    A tap sees a read-only view of a NumPy array, and a copy of an array of another library, so that
    it cannot change x in place.  Without a tap, x goes through untouched.
    """

    def __init__(self, tap: Tap | None, prefix: str) -> None:
        self.tap, self.prefix = tap, prefix

    def __call__(self, name: str, x: Array) -> Array:
        """Show a value to the tap; return it, or what the tap gives in its place."""
        if self.tap is None:
            return x
        shown = _shown(x)
        y = self.tap(self.prefix + name, shown)
        if y is shown:
            return x
        check_returned(f"the tap of {self.prefix}{name}", y, x)
        return y

    def pairs(self, q: Array, k: Array, mask: Any, slots: dict[str, Any]) -> None:
        """Show the mask and the weights, where the tap asks for them."""
        if self.tap is None or not getattr(self.tap, "pairs", False):
            return
        xp, n_seq, n_ctx = array_namespace(q, k), q.shape[-2], k.shape[-2]
        q_slots, k_slots = (
            slots.get("q_slots", range(n_ctx - n_seq, n_ctx)),
            slots.get("k_slots", range(n_ctx)),
        )
        visible = evaluate_mask(xp, mask, q, q_slots, k_slots)
        visible = xp.ones((n_seq, n_ctx), dtype=xp.bool) if visible is None else visible
        self.tap(f"{self.prefix}self_attn.mask", _shown(visible))
        self.tap(f"{self.prefix}self_attn.weights", attention_weights(q, k, mask=mask, **slots))


UNTAPPED = NamedTap(None, "")


def check_returned(name: str, y: Any, x: Array) -> None:
    """Raise unless an array can replace another: same library, dtype and shape.

    Raises
    ------
    NpllmTypeError
        For what is no array, and for another library or dtype.
    NpllmValueError
        For another shape.
    """
    wanted = array_namespace(x).__name__
    if not is_array(y):
        raise NpllmTypeError(
            f"{name} must return an array of {wanted}, "
            f"got {type(y).__module__}.{type(y).__qualname__}"
        )
    if (array_namespace(y).__name__, y.dtype) != (wanted, x.dtype):
        raise NpllmTypeError(
            f"{name} must return an array of {wanted}, {x.dtype}, "
            f"got {array_namespace(y).__name__}, {y.dtype}"
        )
    if tuple(y.shape) != tuple(x.shape):
        raise NpllmValueError(f"{name} must return the shape {list(x.shape)}, got {list(y.shape)}")


def _shown(x: Array) -> Array:
    """What a tap sees: a read-only view where the library has them, else a copy."""
    if isinstance(x, np.ndarray):
        view = x.view()
        view.flags.writeable = False
        return view
    return array_namespace(x).astype(x, x.dtype)
