#!/usr/bin/env python3
"""Measure what rounded activations cost beside what quantised weights cost.

    python scripts/activations_divergence.py [--models rotated phi3 minilm default] [--tokens 192]

The table of docs/quantisation.md, and the rule that `npllm.quantized.activations.DEFAULTS` follows:
the fastest type that costs less than a tenth of quantising.  Models whose weights were never
quantised:

    rotated   the default model in another basis, `make_rotated_checkpoint.py`; text of a chapter
    phi3      two layers of Phi-3-mini's shapes: random weights, of which one in a thousand is ten
              times as large, and gains of which one in a hundred is ten times as large
    minilm    all-MiniLM-L6-v2, stored in float32; texts of the same chapter
    default   the default model, whose weights are in 4 bits already: agreement alone

The cost is the mean Kullback-Leibler divergence, in nats a token, of next-token distributions: of
(quantised weights, float32 activations) from (float weights), and of (quantised, rounded) from
(quantised, float32).  An encoder has no distribution: there it is the squared relative distance of
its last hidden state.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from make_rotated_checkpoint import write_rotated

import npllm
from npllm.checkpoints.fetch import EMBEDDING_MODEL, fetch
from npllm.config.config import Config
from npllm.errors import NpllmValueError
from npllm.loading import checkpoint_folder, load_model
from npllm.models.params import LayerParams, Params
from npllm.quantized.block_packing import quantize_blocks
from npllm.quantized.int8 import quantize
from npllm.tracing.precision.distances import kl_divergence

Array = Any
ROOT = Path(__file__).resolve().parents[1]
TYPES = ("int8", "Q8_0", "Q6_K", "Q5_1", "Q5_K", "Q5_0", "Q4_1", "Q4_K", "Q4_0")
KINDS = ("int16", "int8")
PHI3 = {
    "model_type": "phi3",
    "vocab_size": 8192,
    "num_hidden_layers": 2,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--tokens", type=int, default=192)
    args = parser.parse_args()
    for name in args.models:
        print(f"\n{name}\n\n| weights | quantising | int16 | share | int8 | share |")
        print("|---|---|---|---|---|---|", flush=True)
        MODELS[name](args.tokens)


def print_rows(model: Any, outputs: Callable[[Any], Array], distance: Any) -> None:
    """Print a row for each type of weights: what quantising costs, and each kind of activations."""
    exact = outputs(model)
    for name in TYPES:
        try:
            params = quantised(model.params, name)
        except NpllmValueError:
            continue  # rows are no whole blocks
        plain = outputs(rebuilt(model, params, "float32"))
        cost = distance(plain, exact)
        found = [distance(outputs(rebuilt(model, params, kind)), plain) for kind in KINDS]
        cells = " | ".join(f"{x:.2e} | {x / cost:.4f}" for x in found)
        print(f"| {name} | {cost:.2e} | {cells} |", flush=True)


def quantised(params: Any, name: str) -> Any:
    """Round the matrices of the layers; embedding, head and vectors stay as they are."""
    rounded = quantize if name == "int8" else partial(quantize_blocks, name=name)

    def of(x: Any) -> Any:
        if isinstance(x, tuple):
            return type(x)(*map(of, x)) if hasattr(x, "_fields") else tuple(map(of, x))
        return rounded(np.asarray(x)) if getattr(x, "ndim", 0) == 2 else x

    return params._replace(layers=of(params.layers))


def rebuilt(model: Any, params: Any, activations: str) -> Any:
    """The model with other weights, on the fastest set with a kind of activations."""
    ops = npllm.kernels.choose_ops("fast", activations=activations)
    return type(model)(model.config, params, ops=ops)


def divergence(logits: Array, exact: Array) -> float:
    """Mean Kullback-Leibler divergence from the exact distributions, in nats."""
    return float(np.mean(kl_divergence(exact, logits)))


def squared_distance(x: Array, exact: Array) -> float:
    """Squared relative distance."""
    lost = np.sum((x - exact).astype(np.float64) ** 2)
    return float(lost / np.sum(exact.astype(np.float64) ** 2))


def chapter() -> str:
    """The text of a chapter."""
    return (ROOT / "docs" / "chapter.md").read_text(encoding="utf-8")


def rotated(n: int) -> None:
    """The default model in another basis."""
    with tempfile.TemporaryDirectory() as folder:
        model = load_model(write_rotated(checkpoint_folder(None), Path(folder) / "rotated"))
        ids = np.array([model.tokenizer.encode(chapter())[:n]])
        print_rows(model, lambda m: m(ids)[0], divergence)


def random_phi3(rng: np.random.Generator) -> Any:
    """Draw a model of Phi-3-mini's shapes."""

    def matrix(d_out: int, d_in: int) -> Array:
        w = rng.standard_normal((d_out, d_in), dtype=np.float32) * np.float32(d_in**-0.5)
        return w * np.where(rng.random((d_out, d_in)) < 1e-3, np.float32(10), np.float32(1))

    def gain() -> Array:
        return np.where(rng.random(d) < 1e-2, np.float32(10), np.float32(1))

    config = Config.from_json(PHI3)
    d, d_ff = config.hidden_size, config.intermediate_size
    layers = tuple(
        LayerParams(
            gain(), matrix(3 * d, d), matrix(d, d), gain(), matrix(2 * d_ff, d), matrix(d, d_ff)
        )
        for _ in range(config.num_hidden_layers)
    )
    embedding = rng.standard_normal((config.vocab_size, d), dtype=np.float32)
    norm = np.ones(d, np.float32)
    params = Params(embedding, layers, norm, matrix(config.vocab_size, d))
    return npllm.Model(config, params)


def phi3(n: int) -> None:
    """Two layers of Phi-3-mini's shapes; logits with the spread of a trained model's."""
    rng = np.random.default_rng(0)
    model = random_phi3(rng)
    ids = rng.integers(0, PHI3["vocab_size"], (1, n))
    print_rows(model, lambda m: 3 * m(ids)[0], divergence)


def minilm(n: int) -> None:
    """An encoder stored in float32."""
    model = npllm.load(fetch(EMBEDDING_MODEL))
    ids = np.array([model.tokenizer.encode(chapter())[: min(n, 256)]])
    print_rows(model, lambda m: m(ids)[0], squared_distance)


def default(n: int) -> None:
    """The default model: how often the likeliest token is the same, beside the divergences."""
    model = npllm.load(dtype="float32")
    ids = np.array([model.tokenizer.encode(chapter())[:n]])
    print_rows(model, lambda m: m(ids)[0], disagreement)


def disagreement(logits: Array, exact: Array) -> float:
    """The share of positions whose likeliest token is another one, or a small number for none."""
    return max(float(np.mean(logits.argmax(-1) != exact.argmax(-1))), 1e-9)


MODELS = {"rotated": rotated, "phi3": phi3, "minilm": minilm, "default": default}

if __name__ == "__main__":
    main()
