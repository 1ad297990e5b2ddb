"""Attention: every head of every layer, one head step by step, and shared heads."""

from typing import Any

import numpy as np

from npllm.analysis.cost import kv_table
from npllm.arrays import to_numpy
from npllm.page.data.rounding import significant, thousandths
from npllm.page.run import Run
from npllm.tracing.lens import summarize_attention

__all__ = ["attention", "heads", "sharing"]

Array = Any
Data = dict[str, Any]


def heads(run: Run) -> Data:
    """Give the attention weights of every head of every layer, in thousandths."""
    layers = range(run.model.config.num_hidden_layers)
    weights = [run.of_layer("self_attn.weights", layer) for layer in layers]
    return {
        "tokens": [run.token(i) for i in run.ids],
        "weights": [[thousandths(w) for w in layer] for layer in weights],
        "summary": [
            {
                "entropy": significant(head.entropy, 4),
                "first": significant(head.first, 4),
                "distance": significant(head.distance, 4),
            }
            for head in summarize_attention(run.trace)
        ],
    }


def attention(run: Run) -> Data:
    """Give the steps of attention of one layer, in the order of `npllm.analysis.steps`."""
    config = run.model.config
    q, k, v = (run.of_layer(f"self_attn.{name}") for name in "qkv")
    name = f"model.layers.{run.layer - 1}" if run.layer else "model.embed_tokens"
    return {
        "layer": run.layer,
        "tokens": [run.token(i) for i in run.ids],
        "group": config.num_attention_heads // config.num_key_value_heads,
        "scale": significant(config.head_dim**-0.5, 7),
        "stream": significant(run.value(name), 4),
        "x": significant(run.of_layer("input_layernorm"), 4),
        "q_proj": significant(run.of_layer("self_attn.q_proj"), 4),
        "k_proj": significant(run.of_layer("self_attn.k_proj"), 4),
        "q": significant(q, 4),
        "k": significant(k, 4),
        "v": significant(v, 4),
        "scores": _scores(run, q, k),
        "weights": significant(run.of_layer("self_attn.weights"), 6),
        "output": significant(run.of_layer("self_attn.heads"), 4),
        "added": significant(run.of_layer("self_attn.o_proj"), 4),
        "shares": significant(_shares(run), 4),
        "lengths": _lengths(run, run.value(name), q, k, v),
    }


def _lengths(run: Run, stream: Array, q: Array, k: Array, v: Array) -> Data:
    """Lengths of the vectors, which the page cannot compute exactly from rounded channels."""
    added = run.of_layer("self_attn.o_proj")
    heads = run.of_layer("self_attn.heads")
    vectors = {
        "x": run.of_layer("input_layernorm"),
        "q_proj": run.of_layer("self_attn.q_proj"),
        "k_proj": run.of_layer("self_attn.k_proj"),
        "q": q,
        "k": k,
        "v": v,
        "output": heads,
        "merged": np.concatenate(list(heads), axis=-1),
        "added": added,
        "stream": stream,
        "after": stream + added,
    }
    return {name: significant(np.linalg.norm(x, axis=-1), 6) for name, x in vectors.items()}


def _scores(run: Run, q: Array, k: Array) -> list[Any]:
    """The scores, scale * q . k, of every head and query; None where the mask excludes the key."""
    config, weights = run.model.config, run.of_layer("self_attn.weights")
    k = np.repeat(k, config.num_attention_heads // config.num_key_value_heads, axis=0)
    scores = q @ k.mT * config.head_dim**-0.5
    slots = np.arange(len(run.ids))
    rule = run.model.mask_rule(run.layer)
    visible = np.broadcast_to(rule(slots[:, None], slots[None, :]), weights.shape)
    return [
        [
            [significant(s, 7) if seen else None for s, seen in zip(*row, strict=True)]
            for row in zip(*head, strict=True)
        ]
        for head in zip(scores, visible, strict=True)
    ]


def _shares(run: Run) -> Array:
    """Length of what each head alone adds to the stream: [n_head, n_seq]."""
    y = run.trace[f"model.layers.{run.layer}.self_attn.heads"][0]  # [n_head, n_seq, d_head]
    n_head, n_seq, d_head = y.shape
    alone = np.zeros((n_head, n_seq, n_head, d_head), y.dtype)
    alone[np.arange(n_head), :, np.arange(n_head)] = y
    rows = run.model.to_backend(alone.reshape(n_head, n_seq, n_head * d_head))
    weight = run.model.params.layers[run.layer].o_proj
    return np.linalg.norm(to_numpy(run.model.ops.linear(rows, weight)), axis=-1)


def sharing(run: Run) -> Data:
    """Give the heads of multi-head, grouped-query and multi-query attention, and their bytes."""
    config = run.model.config
    table = kv_table(config, 1)
    return {
        "n_head": config.num_attention_heads,
        "n_layer": config.num_hidden_layers,
        "d_head": config.head_dim,
        "context_length": config.context_length,
        "kinds": {
            name: {"n_kv_head": row["n_kv_head"], "bytes_per_token": row["full"]}
            for name, row in table.items()
        },
    }
