#!/usr/bin/env python3
"""Write a checkpoint with random bfloat16 weights, of any size: for measuring, and for trying a shape without its weights.

    python scripts/make_random_checkpoint.py CONFIG.json FOLDER --shards 2 [--layers N]

The weights are normal with standard deviation 0.02 (norms are 1), cut from one block of random numbers at random places, so that
7 GB take seconds and little memory.  There is no tokenizer: the model takes token ids.
"""

import json
from math import prod
from pathlib import Path

import click
import ml_dtypes
import numpy as np

from npllm.checkpoints.safetensors import expected_shapes
from npllm.config.config import Config, read_json

BLOCK = 2**25  # random numbers drawn once


def split_in_shards(shapes, n_shards):
    """Cut the tensors, in order, into shards of about equal size."""
    total, done, shards = sum(map(prod, shapes.values())), 0, [{} for _ in range(n_shards)]
    for name, shape in shapes.items():
        shards[min(done * n_shards // total, n_shards - 1)][name] = shape
        done += prod(shape)
    return [shard for shard in shards if shard]


def write_shard(path, shapes, rng, block):
    """Write one safetensors file tensor by tensor: header length, header, bytes."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        n_bytes = 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + n_bytes]}
        offset += n_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for size in [BLOCK // 2] * (prod(shape) // (BLOCK // 2)) + [prod(shape) % (BLOCK // 2)]:
                start = rng.integers(0, BLOCK // 2)
                file.write((np.ones(size, block.dtype) if "norm" in name else block[start : start + size]).tobytes())


@click.command()
@click.argument("config_file", type=click.Path(exists=True))
@click.argument("folder", type=click.Path(file_okay=False))
@click.option("--shards", default=1, show_default=True)
@click.option("--layers", type=int, help="Fewer layers than the config says.")
@click.option("--seed", default=0, show_default=True)
def main(config_file, folder, shards, layers, seed):
    """Write FOLDER with random weights in the shapes of CONFIG_FILE."""
    data = read_json(config_file)
    data |= {"num_hidden_layers": layers} if layers else {}
    data.pop("auto_map", None)
    config = Config.from_json(data)
    Path(folder).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    block = (rng.standard_normal(BLOCK, dtype=np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    parts = split_in_shards(expected_shapes(config), shards)
    names = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    names = ["model.safetensors"] if len(parts) == 1 else names
    for name, shapes in zip(names, parts, strict=True):
        write_shard(Path(folder, name), shapes, rng, block)
    if len(parts) > 1:
        weight_map = {tensor: name for name, shapes in zip(names, parts, strict=True) for tensor in shapes}
        size = 2 * sum(prod(shape) for shapes in parts for shape in shapes.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        Path(folder, "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    Path(folder, "config.json").write_text(json.dumps(data, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
