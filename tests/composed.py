"""The slots of a set called with plain arguments: its kernel, else the composition that
npllm/models/phi3.py spells out.
"""

from npllm import ops
from npllm.models import phi3
from npllm.models.params import LayerParams
from npllm.ops import Step


class Composed:
    """A set of operations in which every slot can be called; everything else is the set's own."""

    def __init__(self, set_):
        self.ops = set_

    def __getattr__(self, name):
        return getattr(self.ops, name)

    def _kernel(self, slot, *args):
        kernel = getattr(self.ops, slot)
        return NotImplemented if kernel is None else kernel(*args)

    def norm_linear(self, x, norm_weight, eps, weight, bias=None):
        y = self._kernel("norm_linear", x, norm_weight, eps, weight, bias)
        return (
            self.ops.linear(self.ops.rms_norm(x, norm_weight, eps), weight, bias)
            if y is NotImplemented
            else y
        )

    def norm_swiglu(self, x, norm_weight, eps, weight, bias=None):
        y = self._kernel("norm_swiglu", x, norm_weight, eps, weight, bias)
        if y is not NotImplemented:
            return y
        both = self.norm_linear(x, norm_weight, eps, weight, bias)
        d_ff = both.shape[-1] // 2
        return self.ops.swiglu(both[..., :d_ff], both[..., d_ff:])

    def linear_add(self, x, weight, residual, bias=None):
        y = self._kernel("linear_add", x, weight, residual, bias)
        return (
            self.ops.add(residual, self.ops.linear(x, weight, bias)) if y is NotImplemented else y
        )

    def rope_attention(self, qkv, cos, sin, n_head, n_kv_head, *, mask=None, cache=None, layer=0):
        return phi3.rope_attention(
            qkv,
            Step(cos, sin, n_head, n_kv_head, 0.0, [mask] * (layer + 1), cache, layer),
            self.ops,
        )

    def attention_block(
        self,
        x,
        norm_weight,
        eps,
        qkv_weight,
        o_weight,
        cos,
        sin,
        n_head,
        n_kv_head,
        qkv_bias=None,
        o_bias=None,
        *,
        mask=None,
        cache=None,
        layer=0,
    ):
        params = LayerParams(
            norm_weight, qkv_weight, o_weight, None, None, None, qkv_bias=qkv_bias, o_bias=o_bias
        )
        return phi3.attention_block(
            x,
            params,
            Step(cos, sin, n_head, n_kv_head, eps, [mask] * (layer + 1), cache, layer),
            self.ops,
        )

    def mlp_block(
        self, x, norm_weight, eps, gate_up_weight, down_weight, gate_up_bias=None, down_bias=None
    ):
        params = LayerParams(
            None,
            None,
            None,
            norm_weight,
            gate_up_weight,
            down_weight,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
        )
        return phi3.mlp_block(x, params, Step(None, None, 1, 1, eps), self.ops)

    def decoder_layers(
        self, x, layers, eps, cos, sin, n_head, n_kv_head, *, masks=None, cache=None, layer=0
    ):
        masks = None if masks is None else [masks[0]] * layer + list(masks)
        return phi3.decoder_layers(
            x, layers, Step(cos, sin, n_head, n_kv_head, eps, masks, cache, layer), self.ops
        )


definitions = Composed(ops.reference)
