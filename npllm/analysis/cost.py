"""What a model costs: parameters, operations, bytes moved and bytes of KV cache, as formulas of its
configuration.

Nothing here runs a model or needs weights.  Each formula is confirmed by `counting_ops`, a set of
ops that counts while it runs: the tests compare the two number by number.

What counts (the conventions that the formulas and the counting run share):

    one operation   a product, a sum, a comparison for a maximum, exp, sqrt, sin, cos, a quotient
    linear          2 * d_in for each output, the bias one more
    rms_norm        4 * d + 3 a row: squares, sum, the factor (mean, eps and root), x / root, times weight
    rope_tables     d_rope / 2 products, then sin, cos and two scalings of d_rope each, a position
    apply_rope      3 for each rotated channel
    attention       2 * d_head + 1 + 5 + 2 * d_value for each visible pair of query and key, a query head: the score, its scale,
                    the softmax (maximum, difference, exp, sum, quotient), the weighted value
    swiglu          5 for each channel: -x, exp, 1 +, the quotient, times up
    embed           none

Bytes: each op reads its arguments once and writes its result once, as if nothing stayed in fast
memory between two ops and nothing went there and back within one.  `embed` reads only the rows it
gathers.  Sums of the residual stream (2 d_model for each token and layer) and copies into the cache
belong to no op and are not counted; nor is the evaluation of masks.
"""

from typing import NamedTuple

import numpy as np

from npllm.arrays import dtype_named
from npllm.errors import NpllmValueError
from npllm.ops import reference
from npllm.ops.attention import evaluate_mask

__all__ = [
    "COUNTS",
    "Cost",
    "bytes_moved",
    "cost_facts",
    "counting_ops",
    "decode_cost",
    "forward_cost",
    "kv_cache_bytes",
    "kv_table",
    "parameter_counts",
    "prefill_cost",
    "total",
    "uncached_flops",
    "visible_pairs",
]

SOFTMAX = 5  # operations for each visible pair


class Cost(NamedTuple):
    """Operations, and bytes moved."""

    flops: int
    bytes: int

    @property
    def intensity(self):
        """Operations for each byte moved: arithmetic intensity."""
        return self.flops / self.bytes if self.bytes else 0.0

    def __add__(self, other):
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def parameter_counts(config):
    """Count parameters by part.

        embedding = n_vocab * d_model;   lm_head = the same, or 0 where it is tied to the embedding
        attention = n_layer * (d_model * (n_head + 2 * n_kv_head) * d_head + n_head * d_head * d_model)  [+ biases]
        mlp       = n_layer * 3 * d_model * d_ff  [+ biases];   norms = (2 * n_layer + 1) * d_model

    Parameters
    ----------
    config : Config
        Of a language model.

    Returns
    -------
    counts : dict of str to int

    Notes
    -----
    Source: the shapes of `Phi3ForCausalLM` in Transformers;
    `npllm.checkpoints.phi3_layout.expected_shapes` lists them one by one.
    """
    _require_lm(config)
    d, n_layer = config.hidden_size, config.num_hidden_layers
    maps, biases = _maps(config), _bias_sizes(config)
    part = {name: n_layer * (maps[name][0] * maps[name][1] + biases[name]) for name in maps}
    vocabulary = config.vocab_size * d
    return {
        "embedding": vocabulary,
        "attention": part["qkv"] + part["o"],
        "mlp": part["gate_up"] + part["down"],
        "norms": (2 * n_layer + 1) * d,
        "lm_head": 0 if config.tie_word_embeddings else vocabulary,
    }


def visible_pairs(n_seq, n_past=0, window=None):
    """Count the pairs of a query and a key that it sees, for n_seq queries after n_past cached
    tokens.

        sum_(i = n_past ... n_past + n_seq - 1) min(i + 1, window)

    Parameters
    ----------
    n_seq, n_past : int
    window : int, optional

    Returns
    -------
    n_pair : int

    Notes
    -----
    Source: causal mask of "Attention Is All You Need" (Vaswani et al. 2017), section 3.2.3.
    """
    stop = n_past + n_seq
    if window is None or stop <= window:
        return _triangle(stop) - _triangle(n_past)
    n_growing = max(0, window - n_past)  # queries that still see every earlier key
    return _triangle(n_past + n_growing) - _triangle(n_past) + (n_seq - n_growing) * window


def _triangle(n):
    """Pairs of the first n queries without a window."""
    return n * (n + 1) // 2


def forward_cost(config, n_seq, *, n_past=0, n_batch=1, n_logits=1, dtype=None):
    """Cost of one pass of n_seq new tokens through the model, by op.

        flops = T * per_token + B * visible_pairs(n_seq, n_past, window) * n_layer * n_head * (4 * d_head + 6)
                + B * n_logits * 2 * d_model * n_vocab + rope_tables,   T = B * n_seq
        per_token = n_layer * (2 * parameters of the linear maps of a layer + rms_norm, apply_rope and swiglu) + rms_norm

    Parameters
    ----------
    config : Config
    n_seq : int
        New tokens of each sequence.
    n_past : int
        Tokens in the KV cache.
    n_batch : int
    n_logits : int
        Positions of each sequence whose logits are computed: 1 to generate, n_seq to score.
    dtype : str, optional
        Of the weights; default: as the configuration says.  Activations are float32, float64 for
        "float64".

    Returns
    -------
    costs : dict of str to Cost
        Op name -> cost; `total` adds them up.

    Raises
    ------
    NpllmValueError
        When a number is below its least value, or the tokens do not fit the context.

    Notes
    -----
    Without padding; no op is fused.  With a cache and a window, attention is given min(n_past,
    window - 1) + n_seq keys.

    Source: "Scaling Laws for Neural Language Models" (Kaplan et al. 2020), table 1, with everything
    it leaves out.
    """
    _check(config, n_seq, n_past, n_batch, n_logits)
    size = _Sizes(config, n_seq, n_past, n_batch, n_logits, dtype)
    return {
        "embed": _embed(size),
        "rope_tables": _rope_tables(size),
        "rms_norm": _rms_norm(size),
        "linear": _linear(size),
        "apply_rope": _apply_rope(size),
        "attention": _attention(size),
        "swiglu": _swiglu(size),
    }


def prefill_cost(config, n_prompt, *, n_batch=1, chunk=512, dtype=None):
    """Cost of reading a prompt into the cache, `chunk` tokens at a time, up to the first token's
    logits.

        cost = sum over the chunks of forward_cost(n, n_past = tokens before it), logits for the last position only

    Parameters
    ----------
    config : Config
    n_prompt, n_batch : int
    chunk : int
        Tokens that go through the layers at a time; weights are read once a chunk.
    dtype : str, optional

    Returns
    -------
    costs : dict of str to Cost
    """
    sizes = [(start, min(chunk, n_prompt - start)) for start in range(0, n_prompt, chunk)]
    parts = [
        forward_cost(
            config,
            n,
            n_past=start,
            n_batch=n_batch,
            n_logits=int(start + n == n_prompt),
            dtype=dtype,
        )
        for start, n in sizes
    ]
    return _sum(parts)


def decode_cost(config, n_context, *, n_batch=1, dtype=None):
    """Cost of one more token for each sequence, with n_context tokens in the cache: `forward_cost`
    of one token.
    """
    return forward_cost(config, 1, n_past=n_context, n_batch=n_batch, dtype=dtype)


def total(costs):
    """Add up the costs of all ops."""
    return sum(costs.values(), Cost(0, 0))


def uncached_flops(config, n, *, n_batch=1):
    """Operations to produce n tokens one after another, with the KV cache and without it.

        cached   = sum_(i = 1 ... n) flops(one token after i - 1 cached)    grows with n**2 at most
        uncached = sum_(i = 1 ... n) flops(all i tokens anew)               grows with n**3

    Parameters
    ----------
    config : Config
    n, n_batch : int

    Returns
    -------
    cached, uncached : int

    Notes
    -----
    In closed form, since flops are linear in tokens t, visible pairs p and logits: the cached run
    has t = n and p = visible_pairs(n); the other has t = n (n + 1) / 2 and the sum of
    visible_pairs(i), i = 1 ... n.
    """
    _check(config, n, 0, n_batch, 1)
    window = config.sliding_window
    token, pair, logit = _rates(config, n_batch)
    w = n if window is None else min(window, n)
    tail = (
        n - w
    )  # lengths beyond the window: each has the pairs of length w, and w for every token more
    pairs = w * (w + 1) * (w + 2) // 6 + tail * visible_pairs(w) + w * (tail * (tail + 1) // 2)
    return (
        n * token + visible_pairs(n, 0, window) * pair + n * logit,
        n * (n + 1) // 2 * token + pairs * pair + n * logit,
    )


def kv_cache_bytes(config, n_context, *, n_batch=1, n_kv_head=None, window=None, itemsize=4):
    """Bytes of keys and values after n_context tokens.

        bytes = 2 * n_layer * n_batch * n_kv_head * d_head * min(n_context, window) * itemsize

    Parameters
    ----------
    config : Config
    n_context, n_batch : int
    n_kv_head : int, optional
        Default: the model's.  n_head is multi-head, 1 multi-query attention.
    window : int, optional
        Keys that a query sees.  None: all.
    itemsize : int
        Bytes of a number: 4 on a CPU, where keys and values are float32.

    Returns
    -------
    n_bytes : int

    Notes
    -----
    Of the keys that the last of the n_context queries sees.  `KVCache` holds room for growth
    besides.

    Source: "Fast Transformer Decoding" (Shazeer 2019), section 2.4; "GQA" (Ainslie et al. 2023),
    section 2.2.
    """
    n_kv_head = config.num_key_value_heads if n_kv_head is None else n_kv_head
    kept = n_context if window is None else min(n_context, window)
    return 2 * config.num_hidden_layers * n_batch * n_kv_head * config.head_dim * kept * itemsize


def kv_table(config, n_context, *, n_batch=1, itemsize=4):
    """Bytes of KV cache, had the model as many key heads as query heads (MHA), its own (GQA), or
    one (MQA), and a window.

    Returns
    -------
    table : dict of str to dict
        "mha", "gqa" and "mqa" -> {"n_kv_head", "full", "window"}; "window" is None where the model
        has none.
    """
    heads = {"mha": config.num_attention_heads, "gqa": config.num_key_value_heads, "mqa": 1}
    same = {"n_batch": n_batch, "itemsize": itemsize}
    return {
        name: {
            "n_kv_head": n,
            "full": kv_cache_bytes(config, n_context, n_kv_head=n, **same),
            "window": None
            if config.sliding_window is None
            else kv_cache_bytes(
                config, n_context, n_kv_head=n, window=config.sliding_window, **same
            ),
        }
        for name, n in heads.items()
    }


def cost_facts(config, n_context, *, n_batch=1, dtype=None):
    """Gather everything that `npllm cost` reports.

    Parameters
    ----------
    config : Config
    n_context : int
        Tokens of the prompt, and tokens in the cache at the decode step.
    n_batch : int
    dtype : str, optional

    Returns
    -------
    facts : dict

    Raises
    ------
    NpllmValueError
        When the context and one token more exceed the context length, or the model is no language
        model.
    """
    parameters = parameter_counts(config)
    prefill, decode = (
        run(config, n_context, n_batch=n_batch, dtype=dtype) for run in (prefill_cost, decode_cost)
    )
    anew = forward_cost(config, n_context + 1, n_batch=n_batch, dtype=dtype)
    cached, uncached = uncached_flops(config, n_context, n_batch=n_batch)
    weight_size, kv_size = _itemsizes(config, dtype)
    return {
        "context": n_context,
        "batch": n_batch,
        "dtype": dtype or config.dtype,
        "window": config.sliding_window,
        "parameters": sum(parameters.values()),
        "parameters_by_part": parameters,
        "weight_bytes": sum(parameters.values()) * weight_size,
        "kv_cache_bytes": kv_cache_bytes(
            config, n_context, n_batch=n_batch, window=config.sliding_window, itemsize=kv_size
        ),
        "kv_cache": kv_table(config, n_context, n_batch=n_batch, itemsize=kv_size),
        "prefill": _facts(prefill),
        "decode_step": _facts(decode),
        "decode_step_uncached": _facts(anew),
        "whole_run": {
            "tokens": n_context,
            "cached_flops": cached,
            "uncached_flops": uncached,
            "ratio": uncached / cached,
        },
    }


# ------------------------------------------------------------------------------------------------------- the formulas, op by op


class _Sizes:
    """The numbers that the formulas are made of."""

    def __init__(self, config, n_seq, n_past, n_batch, n_logits, dtype):
        self.config, self.n_seq, self.n_past, self.n_batch, self.n_logits = (
            config,
            n_seq,
            n_past,
            n_batch,
            n_logits,
        )
        self.weight, self.wide = _itemsizes(
            config, dtype
        )  # bytes of a stored number, and of an activation
        self.n_token, self.n_layer = n_batch * n_seq, config.num_hidden_layers
        self.d_q, self.d_kv = (
            n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads)
        )


def _embed(z):
    d = z.config.hidden_size
    return Cost(0, z.n_token * (8 + d * z.weight + d * z.wide))


def _rope_tables(z):
    d = z.config.d_rope
    return Cost(
        z.n_seq * (d // 2 + 4 * d), 8 * z.n_seq + d // 2 * z.wide + 2 * z.n_seq * d * z.wide
    )


def _rms_norm(z):
    n, d = 2 * z.n_layer + 1, z.config.hidden_size
    return Cost(n * z.n_token * (4 * d + 3), n * (2 * z.n_token * d * z.wide + d * z.weight))


def _linear(z):
    biases, d = _bias_sizes(z.config), z.config.hidden_size
    cost = Cost(0, 0)
    for name, (d_out, d_in) in _maps(z.config).items():
        flops = z.n_token * (2 * d_in * d_out + biases[name])
        n_bytes = z.n_token * (d_in + d_out) * z.wide + (d_in * d_out + biases[name]) * z.weight
        cost += Cost(z.n_layer * flops, z.n_layer * n_bytes)
    if z.n_logits == 0:
        return cost
    n, d_out = z.n_batch * z.n_logits, z.config.vocab_size
    return cost + Cost(2 * n * d * d_out, n * (d + d_out) * z.wide + d * d_out * z.weight)


def _apply_rope(z):
    d, tables = z.config.d_rope, 2 * z.n_seq * z.config.d_rope
    n_rotated = z.n_token * (z.config.num_attention_heads + z.config.num_key_value_heads) * d
    return Cost(
        z.n_layer * 3 * n_rotated,
        z.n_layer * z.wide * (2 * z.n_token * (z.d_q + z.d_kv) + 2 * tables),
    )


def _attention(z):
    window = z.config.sliding_window
    pairs = z.n_batch * visible_pairs(z.n_seq, z.n_past, window) * z.config.num_attention_heads
    n_key = z.n_seq + (z.n_past if window is None else min(z.n_past, window - 1))
    n_bytes = z.wide * (2 * z.n_token * z.d_q + 2 * z.n_batch * n_key * z.d_kv)
    return Cost(z.n_layer * pairs * (4 * z.config.head_dim + 1 + SOFTMAX), z.n_layer * n_bytes)


def _swiglu(z):
    d = z.config.intermediate_size
    return Cost(z.n_layer * 5 * z.n_token * d, z.n_layer * 3 * z.n_token * d * z.wide)


def _rates(config, n_batch):
    """Flops for each token, visible pair and logit row of a sequence, times n_batch: what
    `forward_cost` is linear in.
    """
    per_token = total(forward_cost(config, 1, n_batch=n_batch, n_logits=0)).flops
    pair = (
        n_batch
        * config.num_hidden_layers
        * config.num_attention_heads
        * (4 * config.head_dim + 1 + SOFTMAX)
    )
    return per_token - pair, pair, n_batch * 2 * config.hidden_size * config.vocab_size


def _maps(config):
    """Sizes (d_out, d_in) of the linear maps of a layer."""
    d, d_ff, d_head = config.hidden_size, config.intermediate_size, config.head_dim
    d_q, d_kv = config.num_attention_heads * d_head, config.num_key_value_heads * d_head
    return {"qkv": (d_q + 2 * d_kv, d), "o": (d, d_q), "gate_up": (2 * d_ff, d), "down": (d, d_ff)}


def _bias_sizes(config):
    """Numbers in the biases of those maps."""
    has = {
        "qkv": config.attention_bias,
        "o": config.attention_bias,
        "gate_up": config.mlp_bias,
        "down": config.mlp_bias,
    }
    return {name: d_out if has[name] else 0 for name, (d_out, _) in _maps(config).items()}


def _itemsizes(config, dtype):
    """Bytes of a weight, and of an activation."""
    weight = dtype_named(dtype or config.dtype).itemsize
    return weight, max(weight, 4)


def _sum(parts):
    return {name: sum((part[name] for part in parts), Cost(0, 0)) for name in parts[0]}


def _facts(costs):
    def facts(cost):
        return {"flops": cost.flops, "bytes": cost.bytes, "intensity": cost.intensity}

    return facts(total(costs)) | {"by_op": {name: facts(cost) for name, cost in costs.items()}}


def _require_lm(config):
    if config.head != "lm":
        raise NpllmValueError(
            f"the cost of a language model is counted, got {config.architectures[0]}"
        )


def _check(config, n_seq, n_past, n_batch, n_logits):
    _require_lm(config)
    if n_seq < 1 or n_batch < 1 or n_past < 0 or not 0 <= n_logits <= n_seq:
        raise NpllmValueError(
            "n_seq and n_batch must be at least 1, n_past at least 0 and n_logits in 0 ... n_seq, got "
            f"n_seq = {n_seq}, n_batch = {n_batch}, n_past = {n_past}, n_logits = {n_logits}"
        )
    if n_past + n_seq > config.context_length:
        raise NpllmValueError(
            f"{n_past} cached + {n_seq} new tokens do not fit: the context length (max_position_embeddings) is "
            f"{config.context_length}"
        )


# ------------------------------------------------------------------------------------------------------------ the counting run


def counting_ops(ops=reference):
    """Wrap a set of ops so that it counts what it is given while it runs.

    Parameters
    ----------
    ops : Ops

    Returns
    -------
    counted : Ops
        With empty slots, so that every op is called under its own name.
    costs : dict of str to Cost
        Op name -> what was counted so far; empty at first.

    Notes
    -----
    Knows nothing of the model: operations follow from the shapes of the arguments, visible pairs
    from the mask itself, bytes from the arrays.
    """
    costs = {}

    def wrap(name, op):
        def counted(*args, **options):
            y = op(*args, **options)
            costs[name] = costs.get(name, Cost(0, 0)) + Cost(
                COUNTS[name](*args, **options), bytes_moved(name, args, options, y)
            )
            return y

        return counted

    return ops.replace(**{name: wrap(name, getattr(ops, name)) for name in COUNTS}), costs


def _count_linear(x, weight, bias=None):
    return 2 * x.size * weight.shape[0] + (0 if bias is None else x.size // x.shape[-1] * bias.size)


def _count_attention(q, k, v, *, mask=None, q_slots=None, k_slots=None, **_):
    n_seq, n_ctx = q.shape[-2], k.shape[-2]
    slots = (
        range(n_ctx - n_seq, n_ctx) if q_slots is None else q_slots,
        range(n_ctx) if k_slots is None else k_slots,
    )
    visible = np.True_ if mask is None else evaluate_mask(np, mask, q, *slots)
    n_pair = int(np.broadcast_to(visible, (*q.shape[:-1], n_ctx)).sum())
    return n_pair * (2 * q.shape[-1] + 1 + SOFTMAX + 2 * v.shape[-1])


# Operations of a call, by the conventions at the top of this file.
COUNTS = {
    "embed": lambda *_: 0,
    "linear": _count_linear,
    "rms_norm": lambda x, *_: x.size // x.shape[-1] * (4 * x.shape[-1] + 3),
    "rope_tables": lambda positions, inv_freq, _scale=1.0: positions.size * 9 * inv_freq.shape[-1],
    "apply_rope": lambda x, cos, _sin: 3 * x.size // x.shape[-1] * cos.shape[-1],
    "attention": _count_attention,
    "swiglu": lambda gate, _up: 5 * gate.size,
}


def bytes_moved(name, args, options, y):
    """Bytes of all arrays that go in and come out; of an embedding matrix only the rows that are
    gathered.
    """
    arrays = [
        x
        for x in (*args, *options.values(), *(y if isinstance(y, tuple) else (y,)))
        if hasattr(x, "nbytes")
    ]
    if name == "embed":
        ids, weight = args
        return ids.nbytes + ids.size * weight.shape[1] * weight.dtype.itemsize + y.nbytes
    return sum(x.nbytes for x in arrays)
