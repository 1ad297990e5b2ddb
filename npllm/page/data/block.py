"""Inside a block: the residual stream, the feed-forward network, the norms of 2017 and 2024."""

from typing import Any

import numpy as np

from npllm import ops
from npllm.arrays import to_numpy, widen
from npllm.page.data.rounding import significant
from npllm.page.run import Run
from npllm.tracing.lens import lens

__all__ = ["block", "feedforward", "norms"]

Array = Any
Data = dict[str, Any]

N_NEURONS = 8
N_CHANNELS = 64


def block(run: Run) -> Data:
    """Give the length of the stream, of what each half adds, and what each layer would predict."""
    layers = range(run.model.config.num_hidden_layers)
    names = ("", "self_attn.o_proj", "mlp.down_proj")
    lengths = [
        [np.linalg.norm(_value(run, layer, name), axis=-1) for layer in layers] for name in names
    ]
    first = np.linalg.norm(run.value("model.embed_tokens"), axis=-1)
    rows = [
        {
            "name": row.name.rpartition(".")[2] if n else "embedding",
            "rank": row.rank,
            "probability": significant(row.probability),
            "kl": significant(row.kl, 7),
            "top": [run.token(i) | {"p": significant(p)} for i, p in row.top],
        }
        for n, row in enumerate(lens(run.model, run.trace))
    ]
    return {
        "tokens": [run.token(i) for i in run.ids],
        "stream": significant(np.array([first, *lengths[0]])),
        "attention": significant(np.array(lengths[1])),
        "mlp": significant(np.array(lengths[2])),
        "lens": rows,
    }


def _value(run: Run, layer: int, name: str) -> Array:
    return run.value(f"model.layers.{layer}.{name}".rstrip("."))


def feedforward(run: Run) -> Data:
    """Give the neurons that are most active at the last position, and what each would write.

    A neuron is a row of gate_up and a column of down_proj; the column goes through the LM head.
    """
    active = run.of_layer("mlp.swiglu")[-1]
    best = np.argsort(-np.abs(active), kind="stable")[:N_NEURONS]
    logits = _written(run, best, active)
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :4]
    rows = [
        {
            "neuron": int(n),
            "activation": significant(active[n], 7),
            "tokens": [run.token(i) for i in top],
        }
        for n, top in zip(best, order, strict=True)
    ]
    return {
        "layer": run.layer,
        "d_model": run.model.config.hidden_size,
        "d_ff": len(active),
        "last": run.token(run.ids[-1]),
        "neurons": rows,
        "activations": significant(active, 3),
        "small": significant(np.mean(np.abs(active) < 0.1 * np.abs(active).max())),
    }


def _written(run: Run, neurons: Array, active: Array) -> Array:
    """Logits of what each neuron adds to the stream: float64 [n_neuron, n_vocab]."""
    model = run.model
    weight = model.params.layers[run.layer].down_proj
    rows = np.zeros((len(neurons), len(active)), np.float32)
    rows[np.arange(len(neurons)), neurons] = active[neurons]
    added = model.ops.linear(_as_stream(run, rows), weight)
    return np.asarray(to_numpy(model.lm_head(added)), np.float64)


def _as_stream(run: Run, x: Array) -> Array:
    """An array in the dtype of the stream, on the model's device."""
    return run.model.to_backend(x.astype(run.trace["model.norm"].dtype))


def norms(run: Run) -> Data:
    """Give one vector of the stream under both norms, and the activations of 2017 and 2024."""
    name = f"model.layers.{run.layer - 1}" if run.layer else "model.embed_tokens"
    x, eps = run.value(name)[-1], run.model.config.rms_norm_eps
    one, zero = np.ones(len(x)), np.zeros(len(x))
    gain = to_numpy(widen(run.model.params.layers[run.layer].input_layernorm))
    vectors = {
        "x": x,
        "layer_norm": ops.layer_norm(x, one, zero, eps),
        "rms_norm": ops.rms_norm(x, one, eps),
        "with_gain": ops.rms_norm(x, np.asarray(gain, np.float64), eps),
    }
    at = np.linspace(-4, 4, 65)
    curves = {"relu": ops.relu(at), "gelu": ops.gelu(at), "silu": ops.silu(at)}
    return {
        "layer": run.layer,
        "vectors": {name: significant(v[:N_CHANNELS], 4) for name, v in vectors.items()},
        "mean": {name: significant(v.mean(), 4) for name, v in vectors.items()},
        "rms": {name: significant(np.sqrt((v**2).mean()), 4) for name, v in vectors.items()},
        "at": significant(at),
        "curves": {name: significant(y, 4) for name, y in curves.items()},
        "widths": [run.model.config.hidden_size, run.model.config.intermediate_size],
    }
