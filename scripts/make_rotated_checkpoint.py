#!/usr/bin/env python3
"""Write a checkpoint that computes the function of another one with weights that were never
quantised.

    python scripts/make_rotated_checkpoint.py FOLDER [--model NAME]

The default model's published weights are in Q4_1 already, so that 4 bits hold them without an
error.  This script changes the basis: the residual stream is widened by zeros to a multiple of 256
and rotated by a random orthogonal matrix R, and so are the values of each head.

    norm gains g are folded into the next matrix:  W diag(g)
    embedding  E' = c [E 0] R            c = sqrt(new width / old width): a mean has more terms
    reading    W' = [W diag(g) 0] R / c
    writing    W' = c R^T [W; 0]

The functions are equal but for rounding; all matrices are float32, in no grid.  Heads of zeros are
added up to the new width, since a GGUF file of Phi-3 needs n_head * d_head = d_model.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from npllm.arrays import widen
from npllm.checkpoints.origin import read_params
from npllm.config.config import Config
from npllm.loading import checkpoint_folder

Array = Any
MULTIPLE = 256


def rotation(n: int, rng: np.random.Generator) -> Array:
    """Draw an orthogonal matrix [n, n]."""
    q, r = np.linalg.qr(rng.standard_normal((n, n)))
    return q * np.sign(np.diag(r))


def wide(x: Array) -> Array:
    """Return a tensor in float64."""
    return widen(x, np.float64)


def rotated_tensors(params: Any, config: Config, width: int, n_head: int) -> dict[str, Array]:
    """Compute all tensors of the new checkpoint in Phi-3's layout: name -> float32 array."""
    rng, d_model, d_head = np.random.default_rng(0), config.hidden_size, config.head_dim
    basis, scale = rotation(width, rng)[:d_model], (width / d_model) ** 0.5
    reading = basis / scale
    n_old, group = (
        config.num_attention_heads,
        config.num_attention_heads // config.num_key_value_heads,
    )
    rows = {"q": n_head - n_old, "k": n_head // group - n_old // group}
    found = {"model.norm.weight": np.ones(width)}
    found["model.embed_tokens.weight"] = scale * wide(params.embed_tokens) @ basis
    found["lm_head.weight"] = (wide(params.lm_head) * wide(params.norm)) @ reading
    for number, layer in enumerate(params.layers):
        name = f"model.layers.{number}."
        turns = [rotation(d_head, rng) for _ in range(n_old // group)]
        q, k, v = np.split(
            (wide(layer.qkv_proj) * wide(layer.input_layernorm)) @ reading,
            [n_old * d_head, (n_old + n_old // group) * d_head],
        )
        v = np.concatenate(
            [turn.T @ part for turn, part in zip(turns, np.split(v, len(turns)), strict=True)]
        )
        parts = [(q, "q"), (k, "k"), (v, "k")]
        padded = [np.pad(x, ((0, rows[kind] * d_head), (0, 0))) for x, kind in parts]
        o = np.split(wide(layer.o_proj), n_old, axis=1)
        o = np.concatenate([part @ turns[i // group] for i, part in enumerate(o)], axis=1)
        found[f"{name}self_attn.qkv_proj.weight"] = np.concatenate(padded)
        found[f"{name}self_attn.o_proj.weight"] = np.pad(
            scale * basis.T @ o, ((0, 0), (0, rows["q"] * d_head))
        )
        gate_up = wide(layer.gate_up_proj) * wide(layer.post_attention_layernorm)
        found[f"{name}mlp.gate_up_proj.weight"] = gate_up @ reading
        found[f"{name}mlp.down_proj.weight"] = scale * basis.T @ wide(layer.down_proj)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{name}{norm}.weight"] = np.ones(width)
    return {name: np.ascontiguousarray(x, np.float32) for name, x in found.items()}


def write_rotated(source: Path, folder: Path) -> Path:
    """Write the rotated checkpoint of a Phi-3 folder, with the tokenizer of its source."""
    config = Config.from_json(source)
    d_head = config.head_dim
    step = MULTIPLE // d_head * d_head
    width = -(-config.hidden_size // step) * step
    n_head = width // d_head
    group = config.num_attention_heads // config.num_key_value_heads
    if n_head % group:
        raise SystemExit(f"{n_head} heads cannot share keys in groups of {group}")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = rotated_tensors(read_params(source), config, width, n_head)
    save_file(tensors, folder / "model.safetensors")
    content = json.loads((source / "config.json").read_text(encoding="utf-8")) | {
        "hidden_size": width,
        "num_attention_heads": n_head,
        "num_key_value_heads": n_head // group,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)
    return folder


def main() -> None:
    """Write the folder that is named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", help="a Phi-3 checkpoint [the default model]")
    args = parser.parse_args()
    write_rotated(checkpoint_folder(args.model), args.folder)


if __name__ == "__main__":
    main()
