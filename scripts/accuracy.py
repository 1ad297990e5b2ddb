#!/usr/bin/env python3
"""Measure how far float32 logits are from float64, for npllm's sets and for Transformers.

    python scripts/accuracy.py

The judge is float64: the definitions on the weights as stored.  Every contender computes in float32
from the same weights.  The texts are 8 to 256 tokens long and are cut from this project's own
pages.  For each text the error is the root mean square over all its logits; the error over all
texts is the root mean square of those.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

import npllm
from npllm import kernels, ops
from npllm.loading import checkpoint_folder

Array = Any
Logits = Callable[[Array], Array]  # ids [1, n] -> float32 [n, n_vocab]

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CHANGELOG.md", "docs/*.md")
SHORTEST, LONGEST = 8, 256
STEP = "/steps"  # a suffix: token by token, as in decoding
NAMES = ("compiled", "tiled", "definitions", "transformers:eager", "transformers:sdpa")


def texts(model: npllm.Model, n_text: int) -> list[Array]:
    """Cut texts [1, n] from the pages: lengths in geometric progression, evenly spaced starts."""
    pages = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    words = "\n".join(path.read_text(encoding="utf-8") for path in pages)
    ids = np.array(model.tokenizer.encode(words))
    lengths = np.geomspace(SHORTEST, LONGEST, n_text).round().astype(int)
    lengths = np.random.default_rng(0).permutation(lengths)
    starts = np.linspace(0, len(ids) - LONGEST, n_text).astype(int)
    return [ids[None, at : at + n] for at, n in zip(starts, lengths, strict=True)]


def contender(name: str, folder: Path) -> Logits:
    """The logits of a contender: a set of npllm, or Transformers with an attention of its own."""
    kind, _, attention = name.removesuffix(STEP).partition(":")
    if kind == "transformers":
        return transformers_logits(folder, attention)
    sets = {
        "compiled": kernels.compiled_ops,
        "tiled": kernels.tiled_ops,
        "definitions": lambda: ops.reference,
    }
    model = npllm.load(folder, ops=sets[kind]())
    if not name.endswith(STEP):
        return lambda ids: model(ids)[0]

    def step_by_step(ids: Array) -> Array:
        cache = model.new_cache()
        return np.stack([model(ids[:, t : t + 1], cache=cache)[0, 0] for t in range(ids.shape[1])])

    return step_by_step


def transformers_logits(folder: Path, attention: str) -> Logits:
    """The logits of Transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )

    def run(ids: Array) -> Array:
        with torch.inference_mode():
            return model(torch.from_numpy(ids)).logits[0].numpy()

    return run


def measure(folder: Path, names: list[str], n_text: int) -> dict[str, Any]:
    """Return the error of every contender for every text."""
    judge = npllm.load(folder, dtype="float64", ops=ops.reference)
    running = {name: contender(name, folder) for name in names}
    errors: dict[str, list[float]] = {name: [] for name in names}
    cut = texts(judge, n_text)
    with click.progressbar(cut, file=sys.stderr) as bar:
        for ids in bar:
            exact = judge(ids)[0]
            for name, logits in running.items():
                errors[name].append(root_mean_square(logits(ids) - exact))
    lengths = [ids.shape[1] for ids in cut]
    return {"folder": folder.name, "lengths": lengths, "errors": errors}


def root_mean_square(x: Array) -> float:
    """sqrt(mean x**2)."""
    return float(np.sqrt(np.mean(np.square(x))))


def table(result: dict[str, Any]) -> Iterator[str]:
    """Lines of a Markdown table, each contender beside each Transformers."""
    errors = {name: np.array(runs) for name, runs in result["errors"].items()}
    peers = [name for name in errors if name.startswith("transformers")]
    n = len(result["lengths"])
    yield f"{result['folder']}, {n} texts of {SHORTEST} to {LONGEST} tokens\n"
    columns = ["float32 logits", "rms error"]
    for peer in peers:
        columns += [f"of {peer}", "nearer than it"]
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * (2 + 2 * len(peers)) + "|"
    for name, error in errors.items():
        cells = [name, f"{root_mean_square(error):.2e}"]
        for peer in peers:
            ratio = root_mean_square(error) / root_mean_square(errors[peer])
            cells += [f"{ratio:.2f}", f"{np.sum(error < errors[peer])} of {n}"]
        yield "| " + " | ".join(cells) + " |"


@click.command()
@click.option("-m", "--model", "path", help="Checkpoint folder. [the default checkpoint]")
@click.option("-n", "--texts", "n_text", default=100, show_default=True)
@click.option("--sets", "names", default=",".join(NAMES), show_default=True)
@click.option("--json", "json_path", type=click.Path(), help="Write every number into this file.")
def main(path: str | None, n_text: int, names: str, json_path: str | None) -> None:
    """Print the error of every contender, beside that of Transformers.

    A set may be followed by /steps: then it gets the tokens one by one.
    """
    result = measure(checkpoint_folder(path), names.split(","), n_text)
    if json_path:
        Path(json_path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    click.echo("\n".join(table(result)))


if __name__ == "__main__":
    main()
