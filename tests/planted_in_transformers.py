"""Mistakes that are planted in one layer of a Transformers model, by replacing functions and forwards.

Each entry of MISTAKES says where it shows and what it is called.  `plant` puts one in, and takes it
away again.  The layer and the wrong option are drawn by the caller's generator.
"""

import contextlib
import math
import sys
from typing import NamedTuple

import numpy as np
import tiny
import torch

BASE = {"num_hidden_layers": 3, "max_position_embeddings": 4096, "rope_theta": 500000.0}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
BIASES = BASE | LLAMA | {"attention_bias": True, "mlp_bias": True}
LONG = BASE | {
    "original_max_position_embeddings": 8,
    "max_position_embeddings": 64,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.5, 2.0, 4.0, 9.0],
    },
}
PARTIAL = BASE | {"partial_rotary_factor": 0.5}
EPS = BASE | {"rms_norm_eps": 1e-2}  # with 1e-5 another eps is within rounding for large rows
WINDOW = BASE | {"sliding_window": 4}
ALL = ("prefill", "cached", "padded", "padded cached", "packed")


class Mistake(NamedTuple):
    """What is planted, where it shows, and its name.

    `op` is the leaf (or leaves, where it depends on what the recorder sees); "model." and "lm_head"
    names belong to no layer.  `name` is a part of the diagnosis; "" where the list has no entry.
    """

    kind: str
    option: str
    op: tuple[str, ...]
    name: str
    plant: object
    config: dict = BASE
    modes: tuple[str, ...] = ALL
    layer: bool = True


class Site(NamedTuple):
    """Where to plant: the model, one of its layers, and the stack that takes everything away."""

    model: object
    number: int
    stack: contextlib.ExitStack
    option: str

    @property
    def layer(self):
        return self.model.model.layers[self.number]

    @property
    def file(self):
        return sys.modules[type(self.model).__module__]

    def put(self, owner, name, value):
        """Replace an attribute for the time of the test."""
        has = name in vars(owner)
        old = vars(owner).get(name)
        setattr(owner, name, value)
        self.stack.callback(*((setattr, owner, name, old) if has else (delattr, owner, name)))


def plant(mistake, model, number, stack):
    """Put a mistake in; the stack takes it away."""
    mistake.plant(Site(model, number, stack, mistake.option))


# ------------------------------------------------------------------------------- rotation


def rotate(x, cos, sin, pairing="half", sign=1):
    """Rotate the first channels of x [n_batch, n_head, n_seq, d_head]; tables [n_batch, n_seq, d_rope]."""
    cos, sin = cos[:, None], sign * sin[:, None]
    d = cos.shape[-1]
    turned, rest = x[..., :d], x[..., d:]
    if pairing == "interleaved":
        partner = torch.stack([-turned[..., 1::2], turned[..., 0::2]], dim=-1).flatten(-2)
    else:
        partner = torch.cat([-turned[..., d // 2 :], turned[..., : d // 2]], dim=-1)
    return torch.cat([turned * cos + partner * sin, rest], dim=-1)


def interleave(table):
    """Column c holds angle c // 2."""
    half = table[..., : table.shape[-1] // 2]
    return half.repeat_interleave(2, dim=-1)


def wide_table(site, dtype):
    """Tables over the whole head."""
    config = site.model.config
    d_head = config.hidden_size // config.num_attention_heads
    base = config.rope_parameters["rope_theta"]
    angle = site.model.npllm_positions.double()[..., None]
    angle = angle * base ** (-torch.arange(0, d_head, 2).double() / d_head)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotated(site, x, cos, sin):
    """The wrong rotation of one tensor."""
    d, half = cos.shape[-1], cos.shape[-1] // 2
    if site.option == "interleaved":
        return rotate(x, interleave(cos), interleave(sin), "interleaved")
    if site.option == "interleaved table, half-split rotation":
        return rotate(x, interleave(cos), interleave(sin))
    if site.option == "half-split table, interleaved rotation":
        return rotate(x, cos, sin, "interleaved")
    if site.option == "-sin":
        return rotate(x, cos, sin, sign=-1)
    if site.option == "full":
        return rotate(x, *wide_table(site, cos.dtype))
    if site.option == "i + d_head/2":
        d_head = x.shape[-1]
        order = [*range(half), *range(d_head // 2, d_head // 2 + half)]
        order += [i for i in range(d_head) if i not in order]
        moved = rotate(x[..., order], cos, sin)
        return moved[..., np.argsort(order).tolist()]
    if site.option == "on q and k":
        scale = site.model.model.rotary_emb.attention_scaling
        return torch.cat([rotate(x, cos, sin)[..., :d], scale * x[..., d:]], dim=-1)
    if site.option == "omitted":
        return rotate(x, cos, sin) / site.model.model.rotary_emb.attention_scaling
    if site.option == "position off by one":
        return rotate(x, *(shifted(site, cos) if x.shape[-2] == 1 else (cos, sin)))
    if site.option == "left out":
        return x
    raise AssertionError(site.option)


def shifted(site, like):
    """The tables of position + 1."""
    rotary = site.model.model.rotary_emb.forward  # no hook sees it
    return rotary(like, position_ids=site.model.npllm_positions + 1)


def rotation(site):
    """Seen by the recorder: the file's own function is replaced, for this layer."""
    current, right = [], site.file.apply_rotary_pos_emb
    attention = site.layer.self_attn
    for hook in (
        attention.register_forward_pre_hook(lambda *_: current.append(1)),
        attention.register_forward_hook(lambda *_: current.clear()),
    ):
        site.stack.callback(hook.remove)
    keep = site.model.model.rotary_emb.register_forward_pre_hook(
        lambda m, a, kw: setattr(site.model, "npllm_positions", kw["position_ids"]),  # noqa: ARG005
        with_kwargs=True,
    )
    site.stack.callback(keep.remove)

    def apply_rotary_pos_emb(q, k, cos, sin, **options):
        if not current:
            return right(q, k, cos, sin, **options)
        return tuple(rotated(site, x, cos, sin) for x in (q, k))

    site.put(site.file, "apply_rotary_pos_emb", apply_rotary_pos_emb)


def tables(site):
    """The tables that all layers read."""
    rotary = site.model.model.rotary_emb
    right = rotary.forward

    def forward(x, position_ids):
        if site.option == "bfloat16 positions":
            position_ids = position_ids.to(torch.bfloat16).float()
        if site.option == "magnitude":
            cos, sin = right(x, position_ids)
            return cos / rotary.attention_scaling, sin / rotary.attention_scaling
        if site.option == "10000":
            n = rotary.inv_freq.shape[0]
            angle = position_ids[..., None].float() * 10000.0 ** (-torch.arange(n).float() / n)
        elif site.option in ("always short", "ignored"):
            factors = torch.tensor(site.model.config.rope_parameters["short_factor"])
            factors = factors if site.option == "always short" else torch.ones_like(factors)
            n = len(factors)
            base = site.model.config.rope_parameters["rope_theta"]
            angle = position_ids[..., None].float() / (
                factors * base ** (torch.arange(n).float() / n)
            )
        else:
            return right(x, position_ids)
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos() * rotary.attention_scaling, angle.sin() * rotary.attention_scaling

    site.put(rotary, "forward", forward)


# ------------------------------------------------------------------------------ attention


def attend(q, k, v, visible, scale, expand="repeat", softmax=torch.float32):
    """Plain attention with grouped heads."""
    group = q.shape[1] // k.shape[1]
    if expand == "tile":
        k, v = (x.repeat(1, group, 1, 1) for x in (k, v))
    else:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    s = (q @ k.transpose(-1, -2) * scale).masked_fill(~visible, -torch.inf)
    p = s.to(softmax).softmax(-1).to(q.dtype).nan_to_num(0.0)
    return (p @ v).transpose(1, 2)


def attention(site):
    """An entry of the registry that goes another way in this layer."""
    registry, right = site.file.ALL_ATTENTION_FUNCTIONS, site.file.eager_attention_forward
    kind = site.model.config._attn_implementation

    def dispatch(module, q, k, v, mask, scaling, **options):
        if module is not site.layer.self_attn:
            return right(module, q, k, v, mask, scaling=scaling, **options)
        return wrong_attention(site, q, k, v, mask, scaling), None

    registry[kind] = dispatch
    site.stack.callback(registry.pop, kind)


def wrong_attention(site, q, k, v, mask, scale):
    n_seq, n_ctx, d = q.shape[-2], k.shape[-2], q.shape[-1]
    i = torch.arange(n_seq)[:, None] + n_ctx - n_seq
    j = torch.arange(n_ctx)[None]
    seen = (
        torch.ones(1, 1, n_seq, n_ctx, dtype=torch.bool) if mask is None else mask[..., :n_ctx] > -1
    )
    real = seen.any(dim=-2, keepdim=True)  # keys that are no padding
    option = site.option
    if option == "tile":
        return attend(q, k, v, seen, scale, expand="tile")
    if option == "top-left":
        return attend(q, k, v, seen & (j <= i - (n_ctx - n_seq)), scale)
    if option == "one key early":
        return attend(q, k, v, seen & (j < i), scale)
    if option == "not causal":
        return attend(q, k, v, seen | (j > i), scale)
    if option == "w + 1 keys":
        w = site.model.config.sliding_window
        return attend(q, k, v, seen | ((j == i - w) & real), scale)
    if option == "ignored":
        return attend(q, k, v, (j <= i) & real, scale)
    if option in ("no document mask", "padding enters"):
        return attend(q, k, v, (j <= i)[None, None], scale)
    if option == "rotated part":
        return attend(q, k, v, seen, (d * 0.5) ** -0.5)
    if option in SCALES:
        return attend(q, k, v, seen, SCALES[option](d))
    if option == "k and v swapped":
        return attend(q, v, k, seen, scale)
    if option == "softmax in bfloat16":
        return attend(q, k, v, seen, scale, softmax=torch.bfloat16)
    if option == "zero tail to 16":
        pad = -n_ctx % 16
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, pad)) for x in (k, v))
        return attend(q, k, v, torch.nn.functional.pad(seen, (0, pad), value=True), scale)
    if option == "output position-major":
        y = attend(q, k, v, seen, scale)  # [n_batch, n_seq, n_head, d]
        return y.reshape(y.transpose(1, 2).shape).transpose(1, 2)
    raise AssertionError(option)


SCALES = {
    "1 / d_head": lambda d: 1 / d,
    "constant 1/8": lambda _: 1 / 8,
    "twice": lambda d: 1 / d,
    "omitted": lambda _: 1.0,
}


def heads_cut(site):
    """The fused projection is cut otherwise, in a forward of its own."""
    module, config = site.layer.self_attn, site.model.config
    n, m = config.num_attention_heads, config.num_key_value_heads
    group, d = n // m, module.head_dim

    def cut(qkv):
        b, s = qkv.shape[:2]
        if site.option == "per-head interleave":
            parts = qkv.view(b, s, m, group + 2, d)
            q = parts[..., :group, :].reshape(b, s, n, d)
            return q, parts[..., group, :], parts[..., group + 1, :]
        q, rest = qkv[..., : n * d].view(b, s, n, d), qkv[..., n * d :].view(b, s, 2, m, d)
        k, v = rest.unbind(2)
        return (q, v, k) if site.option == "k and v swapped" else (q, k, v)

    def forward(hidden_states, position_embeddings, attention_mask, past_key_values=None, **_):
        q, k, v = (x.transpose(1, 2) for x in cut(module.qkv_proj(hidden_states)))
        q, k = site.file.apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, module.layer_idx)
        look_up = site.file.ALL_ATTENTION_FUNCTIONS.get_interface
        function = look_up("eager", site.file.eager_attention_forward)
        y, _ = function(module, q, k, v, attention_mask, scaling=module.scaling)
        if site.option == "heads not moved back":
            y = y.transpose(1, 2).reshape(y.shape)
        return module.o_proj(y.flatten(-2)), None

    site.put(module, "forward", forward)


def cache_rows(site):
    """What the cache gives back in this layer, from the second step on."""
    import transformers

    right = transformers.DynamicCache.update

    def update(self, k, v, layer_idx, *args, **kwargs):
        before = self.get_seq_length(layer_idx)
        keys, values = right(self, k, v, layer_idx, *args, **kwargs)
        if layer_idx != site.number or not before:
            return keys, values
        return tuple(wrong_rows(site.option, x, k.shape[-2]) for x in (keys, values))

    site.put(transformers.DynamicCache, "update", update)


def wrong_rows(option, x, n_new):
    x = x.clone()
    old = x.shape[-2] - n_new
    if option == "another request's rows":
        x[:, :, :old] = x[:, :, :old].roll(1, dims=0)
    elif option == "new row not written":
        x[:, :, old:] = 0
    elif option == "one slot early":
        x[:, :, old - 1 : -1] = x[:, :, old:].clone()
        x[:, :, -1] = 0
    return x


# ---------------------------------------------------------------------- norms and products


def norm(site, leaf):
    """One of the norms."""
    module = site.model.model.norm if leaf == "model.norm" else getattr(site.layer, leaf)
    w, eps = module.weight, module.variance_epsilon

    def forward(x):
        ms = x.pow(2).mean(-1, keepdim=True)
        gain = {"1 + w": 1 + w, "twice": w * w, "omitted": torch.ones_like(w)}.get(site.option, w)
        if site.option == "sum of squares":
            ms = x.pow(2).sum(-1, keepdim=True)
        if site.option == "centred":
            x = x - x.mean(-1, keepdim=True)
            ms = x.pow(2).mean(-1, keepdim=True)
        if site.option == "left out":
            return x
        if site.option == "eps outside the root":
            return gain * (x / (ms.sqrt() + eps))
        wrong = {"eps 1e-6": 1e-6, "eps omitted": 0.0}.get(site.option, eps)
        if site.option == "bfloat16 accumulator":
            ms = in_bfloat16(x.pow(2)) / x.shape[-1]
        return gain * (x * torch.rsqrt(ms + wrong))

    site.put(module, "forward", forward)


def in_bfloat16(terms):
    """The sum of the last axis, keepdim, rounded to bfloat16 after each term."""
    total = torch.zeros_like(terms[..., 0])
    for term in terms.unbind(-1):
        total = (total + term).bfloat16().float()
    return total[..., None]


def product(site, leaf):
    """One of the matrix products."""
    module = site.model.lm_head if leaf == "lm_head" else site.layer.get_submodule(leaf)
    w, bias = module.weight, module.bias

    def forward(x):
        if site.option == "bfloat16 accumulator":
            return torch.stack([in_bfloat16(x * row)[..., 0] for row in w], dim=-1)
        if site.option == "float16 inputs":
            return x.half().float() @ w.half().float().T
        if site.option == "weight [d_in, d_out]":
            return x @ w.reshape(w.shape[1], w.shape[0])
        if site.option == "the bias is left out":
            return x @ w.T
        if site.option == "the weights are those of layer":
            other = site.model.model.layers[(site.number + 1) % 3].get_submodule(leaf).weight
            return x @ other.T
        if site.option == "tied":
            return x @ site.model.model.embed_tokens.weight.T
        raise AssertionError(site.option)

    assert bias is None or site.option == "the bias is left out"
    site.put(module, "forward", forward)


# ------------------------------------------------------------------------- mlp and residual


def mlp(site):
    module = site.layer.mlp

    def forward(x):
        first, second = module.gate_up_proj(x).chunk(2, dim=-1)
        if site.option == "up first":
            return module.down_proj(first * module.activation_fn(second))
        if site.option == "interleaved":
            whole = torch.cat([first, second], dim=-1)
            return module.down_proj(whole[..., 1::2] * module.activation_fn(whole[..., 0::2]))
        wrong = {
            "GELU": torch.nn.functional.gelu,
            "ReLU": torch.relu,
            "sigmoid": torch.sigmoid,
            "no gate": torch.ones_like,
        }
        return module.down_proj(second * wrong[site.option](first))

    site.put(module, "forward", forward)


def residual(site):
    layer = site.layer

    def forward(hidden_states, **options):
        y, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **options)
        x = y if site.option == "attention" else hidden_states + y
        y = layer.mlp(layer.post_attention_layernorm(x))
        return y if site.option == "mlp" else x + y

    site.put(layer, "forward", forward)


def nothing(_):
    """The mistake is in what the model is given."""


def embedding(site):
    scale = math.sqrt(site.model.config.hidden_size)
    hook = site.model.model.embed_tokens.register_forward_hook(lambda m, i, y: scale * y)  # noqa: ARG005
    site.stack.callback(hook.remove)


# ------------------------------------------------------------------------------ the list


def _norms(kind, option, name=None, config=BASE):
    for leaf in ("input_layernorm", "post_attention_layernorm", "model.norm"):
        yield Mistake(
            kind,
            option,
            (leaf,),
            f"{kind} {option}" if name is None else name,
            lambda site, leaf=leaf: norm(site, leaf),
            config,
            layer=leaf != "model.norm",
        )


def _products(kind, option, leaves, name, config=BASE):
    for leaf in leaves:
        yield Mistake(
            kind,
            option,
            (leaf,),
            name,
            lambda site, leaf=leaf: product(site, leaf),
            config,
            layer=leaf != "lm_head",
        )


def _of(kind, options, op, function, config=BASE, modes=ALL, layer=True, name=None):
    for option in options:
        said = f"{kind} {option}" if name is None else name
        yield Mistake(kind, option, op, said, function, config, modes, layer)


Q = ("self_attn.q",)
HEADS = ("self_attn.heads",)
COS = ("model.rotary_emb.cos",)
LINEAR = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
LINEARS = (*LINEAR, "lm_head")
SPLIT = ("self_attn.o_proj", "mlp.down_proj")
# One kind a list; the generator draws one of its entries.
KINDS = {
    "C1 pairing": [*_of("C1", ["interleaved"], Q, rotation)],
    "C2 phase dtype": [
        *_of("C2", ["bfloat16 positions"], COS, tables, modes=("far",), layer=False)
    ],
    "C3 factors": [
        *_of(
            "C3",
            ["always short"],
            COS,
            tables,
            LONG,
            ("prefill", "cached", "padded", "padded cached"),
            False,
        ),
        *_of("C3", ["ignored"], COS, tables, LONG, layer=False),
    ],
    "C4 magnitude": [
        *_of("C4", ["magnitude"], COS, tables, LONG, layer=False, name="C4 omitted"),
        *_of("C4", ["omitted"], Q, rotation, LONG),
    ],
    "C5 fraction": [*_of("C5", ["full"], Q, rotation, PARTIAL)],
    "C6 qkv rows": [*_of("C6", ["per-head interleave"], ("self_attn.q_proj",), heads_cut)],
    "C7 gate and up": [*_of("C7", ["up first", "interleaved"], ("mlp.gate", "mlp.swiglu"), mlp)],
    "C8 expansion": [*_of("C8", ["tile"], HEADS, attention)],
    "C9 causality": [
        *_of("C9", ["top-left"], HEADS, attention, modes=("cached", "padded cached")),
        *_of("C9", ["one key early", "not causal"], HEADS, attention, modes=("prefill",)),
    ],
    "C10 window": [
        *_of("C10", ["w + 1 keys", "ignored"], HEADS, attention, WINDOW, ("prefill", "padded"))
    ],
    "C14 softmax": [*_of("C14", ["softmax in bfloat16"], HEADS, attention, name="")],
    "C18 positions": [
        *_of(
            "C18",
            ["column index"],
            (),
            nothing,
            modes=("padded", "padded cached"),
            layer=False,
        )
    ],
    "C19 packing": [*_of("C19", ["no document mask"], HEADS, attention, modes=("packed",))],
    "C21 scale": [
        *_of("C21", ["constant 1/8", "omitted"], HEADS, attention),
        *_of("C21", ["1 / d_head", "twice"], HEADS, attention, name="C21"),
    ],
    "C22 operands": [
        *_of("C22", ["k and v swapped"], HEADS, attention),
        *_of("C22", ["k and v swapped"], ("self_attn.k_proj",), heads_cut),
    ],
    "C23 keys beyond the end": [
        *_of("C23", ["zero tail to 16"], HEADS, attention),
        *_of("C23", ["padding enters"], HEADS, attention, modes=("padded", "padded cached")),
    ],
    "C25 base": [*_of("C25", ["10000"], COS, tables, layer=False)],
    "C26 table layout": [
        *_of(
            "C26",
            ["interleaved table, half-split rotation", "half-split table, interleaved rotation"],
            Q,
            rotation,
        )
    ],
    "C27 direction": [*_of("C27", ["-sin"], Q, rotation)],
    "C28 gain": [m for o in ("1 + w", "twice", "omitted") for m in _norms("C28", o)],
    "C29 statistic": [m for o in ("sum of squares", "centred") for m in _norms("C29", o)],
    "C29 eps": [
        *_norms("C29", "eps outside the root", config=EPS),
        *_norms("C29", "eps 1e-6", "C29 eps", config=EPS),
        *_norms("C29", "eps omitted", "C29 eps", config=EPS),
    ],
    "C30 accumulation": [
        # which bits come out depends on the root as well: the place is found, the name is not
        *_norms("C30", "bfloat16 accumulator", ""),
        *_products("C30", "bfloat16 accumulator", LINEARS, "C30 bfloat16 accumulator"),
    ],
    "C31 layout": [
        *_of(
            "C31",
            ["output position-major"],  # values of padding would move to tokens
            HEADS,
            attention,
            modes=("prefill", "cached", "packed"),
        ),
        *_of(
            "C31",
            ["heads not moved back"],
            ("self_attn.attention",),
            heads_cut,
            modes=("prefill", "cached", "packed"),
            name="C31",
        ),
        *_products("C31", "weight [d_in, d_out]", LINEARS, "C31 weight [d_in, d_out]"),
    ],
    "C32 cache rows": [
        *_of(
            "C32",
            ["another request's rows"],  # with padding, keys of padding move to tokens
            ("self_attn.cached_k",),
            cache_rows,
            modes=("cached",),
        ),
        *_of(
            "C32",
            ["new row not written", "one slot early"],
            ("self_attn.cached_k",),
            cache_rows,
            modes=("cached", "padded cached"),
        ),
    ],
    "C32 position": [
        *_of("C32", ["position off by one"], Q, rotation, modes=("cached", "padded cached"))
    ],
    "C33 embedding scale": [
        *_of("C33", ["times sqrt(d_model)"], ("model.embed_tokens",), embedding, layer=False)
    ],
    "C33 head": [*_products("C33", "tied", ("lm_head",), "C33 tied")],
    "C34 partner": [*_of("C34", ["i + d_head/2"], Q, rotation, PARTIAL)],
    "activation": [
        *_of("", ["GELU"], ("mlp.swiglu",), mlp, name="GELU in place of SiLU"),
        *_of("", ["ReLU"], ("mlp.swiglu",), mlp, name="ReLU in place of SiLU"),
        *_of("", ["sigmoid"], ("mlp.swiglu",), mlp, name="sigmoid in place of SiLU"),
        *_of("", ["no gate"], ("mlp.swiglu",), mlp, name="no gate"),
    ],
    "residual": [
        *_of("", ["attention"], ("residual",), residual, name="the first term is left out"),
        *_of("", ["mlp"], ("output",), residual, name="the first term is left out"),
    ],
    "bias": [*_products("", "the bias is left out", SPLIT, "the bias is left out", BIASES)],
    "weights of another layer": [
        *_products("", "the weights are those of layer", LINEAR, "the weights are those of layer")
    ],
    "norm left out": [*_norms("", "left out", "rms_norm is left out")],
    "rotation left out": [*_of("", ["left out"], Q, rotation, name="rope is left out")],
    "half precision": [*_products("", "float16 inputs", LINEARS, "")],
}


# ------------------------------------------------------------------------------ the runs


class Run(NamedTuple):
    """What a model is given: arguments of `record` and of `npllm.trace`."""

    ids: np.ndarray
    mask: np.ndarray | None = None
    positions: np.ndarray | None = None
    n_new: int = 0
    labels: np.ndarray | None = None


def run_of(mode):
    """Two rows of tokens; documents of 5 and 7 tokens where they are packed."""
    ids = tiny.random_ids(2, 12)
    if mode.startswith("padded"):
        mask = np.ones_like(ids)
        mask[0, :3] = 0
        return Run(ids, mask, np.maximum(mask.cumsum(1) - 1, 0), 2 if "cached" in mode else 0)
    if mode == "packed":
        positions = np.array([[*range(5), *range(7)]] * 2)
        return Run(ids, None, positions, labels=np.array([[1] * 5 + [2] * 7] * 2))
    if mode == "far":
        return Run(ids, None, np.arange(1000, 1012)[None].repeat(2, 0))
    return Run(ids, n_new=2 if mode == "cached" else 0)
