#!/usr/bin/env python3
"""Write a checkpoint with random bfloat16 weights, of any size: for measuring, and for trying a
shape without its weights.

    python scripts/make_random_checkpoint.py CONFIG.json FOLDER --shards 2 [--layers N]

The weights are normal with standard deviation 0.02 (norms are 1), cut from one block of random
numbers at random places, so that 7 GB take seconds and little memory.  There is no tokenizer: the
model takes token ids.
"""

import argparse
import json
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from npllm.checkpoints.phi3_layout import expected_shapes
from npllm.config.config import Config
from npllm.config.strict_json import read_json

BLOCK = 2**25  # random numbers drawn once
Shapes = dict[str, tuple[int, ...]]  # by the tensor's name


def split_in_shards(shapes: Shapes, n_shards: int) -> list[Shapes]:
    """Cut the tensors, in order, into shards of about equal size."""
    total, done = sum(map(prod, shapes.values())), 0
    shards: list[Shapes] = [{} for _ in range(n_shards)]
    for name, shape in shapes.items():
        shards[min(done * n_shards // total, n_shards - 1)][name] = shape
        done += prod(shape)
    return [shard for shard in shards if shard]


def write_shard(path: Path, shapes: Shapes, rng: np.random.Generator, block: np.ndarray) -> None:
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
            half = len(block) // 2
            for size in [half] * (prod(shape) // half) + [prod(shape) % half]:
                start = rng.integers(0, half)
                file.write(
                    (
                        np.ones(size, block.dtype)
                        if "norm" in name
                        else block[start : start + size]
                    ).tobytes()
                )


def write_checkpoint(
    config: dict[str, Any],
    folder: str | Path,
    *,
    shards: int = 1,
    layers: int | None = None,
    seed: int = 0,
) -> None:
    """Write a folder with random weights in the shapes of a config.

    config.json is written last, so that a folder with one is complete.

    Parameters
    ----------
    config : dict
        Content of config.json.
    folder : str or Path
    shards, seed : int
    layers : int, optional
        Fewer layers than the config says.
    """
    data = {key: value for key, value in config.items() if key != "auto_map"}
    data |= {"num_hidden_layers": layers} if layers else {}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    parts = split_in_shards(expected_shapes(Config.from_json(data)), shards)
    names = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    names = ["model.safetensors"] if len(parts) == 1 else names
    block = random_block(rng, max(prod(shape) for shapes in parts for shape in shapes.values()))
    for name, shapes in zip(names, parts, strict=True):
        write_shard(folder / name, shapes, rng, block)
    if len(parts) > 1:
        write_index(folder, names, parts)
    (folder / "config.json").write_text(json.dumps(data, indent=2), encoding="utf-8")


def random_block(rng: np.random.Generator, largest: int) -> np.ndarray:
    """Draw the numbers that weights are cut from: BLOCK of them, fewer where the largest tensor is
    small.
    """
    n = min(BLOCK, 2 * largest)
    return (rng.standard_normal(n, dtype=np.float32) * 0.02).astype(ml_dtypes.bfloat16)


def write_index(folder: Path, names: list[str], parts: list[Shapes]) -> None:
    """Write the table of tensors and files."""
    weight_map = {
        tensor: name for name, shapes in zip(names, parts, strict=True) for tensor in shapes
    }
    size = 2 * sum(prod(shape) for shapes in parts for shape in shapes.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config_file")
    parser.add_argument("folder")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--layers", type=int, help="Fewer layers than the config says.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_checkpoint(
        read_json(options.config_file),
        options.folder,
        shards=options.shards,
        layers=options.layers,
        seed=options.seed,
    )


if __name__ == "__main__":
    main()
