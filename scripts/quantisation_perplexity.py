#!/usr/bin/env python3
"""Compare the files that npllm and llama.cpp quantise of one checkpoint, both run in llama.cpp.

    python scripts/quantisation_perplexity.py MODEL [--types q4_0 q4_k_m q6_k q8_0] [--text FILE]

Needs llama-cpp-python and the package gguf.  A float32 GGUF file is written by npllm; each type is
made of it by `npllm.quantize` and by llama.cpp's `llama_model_quantize`.  Perplexity is that of
windows of 512 tokens; KL is the mean divergence from the float32 file, in nats a token.
"""

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from llama_cpp_runs import LlamaCpp, log_likelihoods, quantize_with_llama_cpp

import npllm
from npllm.checkpoints.gguf.tensor_types import FILE_TYPES

ROOT = Path(__file__).resolve().parents[1]
TYPES = ("q4_0", "q4_k_m", "q6_k", "q8_0")
WINDOW = 512


class Run(NamedTuple):
    """What llama.cpp computed with a file."""

    perplexity: float
    log_probabilities: list[np.ndarray]  # float32 [n_seq, n_vocab] of each window


def run(path: Path, windows: list[list[int]]) -> Run:
    """Run a file on all windows."""
    model = LlamaCpp(path, WINDOW)
    logits = [model.logits(ids) for ids in windows]
    model.close()
    found = np.concatenate(
        [log_likelihoods(x, ids) for x, ids in zip(logits, windows, strict=True)]
    )
    return Run(float(np.exp(-found.mean())), [log_softmax(x) for x in logits])


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Normalise rows of logits."""
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def divergence(exact: Run, other: Run) -> float:
    """Return the mean Kullback-Leibler divergence of the distributions from the exact ones."""
    return float(
        np.mean(
            [
                np.sum(np.exp(p) * (p - q), axis=-1).mean()
                for p, q in zip(exact.log_probabilities, other.log_probabilities, strict=True)
            ]
        )
    )


def windows_of(path: Path, text: str, n_tokens: int) -> list[list[int]]:
    """Cut the token ids of a text."""
    model = LlamaCpp(path, WINDOW)
    ids = model.tokenize(text)[:n_tokens]
    model.close()
    return [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW + 1, WINDOW)]


def compare(model: str, types: list[str], text: str, n_tokens: int) -> None:
    """Print the table in Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        wide, mine, other = (Path(folder) / f"{name}.gguf" for name in ("f32", "npllm", "llama"))
        npllm.quantize(model, wide, "f32")
        windows = windows_of(wide, text, n_tokens)
        exact = run(wide, windows)
        print(f"{len(windows)} windows of {WINDOW} tokens; float32: {exact.perplexity:.4f}\n")
        print("| type | MB | npllm | llama.cpp | difference | KL npllm | KL llama.cpp |")
        print("|---|---|---|---|---|---|---|")
        for name in types:
            npllm.quantize(wide, mine, name, overwrite=True)
            quantize_with_llama_cpp(wide, other, FILE_TYPES[name].number)
            ours, theirs = run(mine, windows), run(other, windows)
            ratio = ours.perplexity / theirs.perplexity
            cells = [
                name,
                f"{mine.stat().st_size / 1e6:.0f}",
                f"{ours.perplexity:.4f}",
                f"{theirs.perplexity:.4f}",
                f"{100 * (ratio - 1):+.2f} %",
                *(f"{divergence(exact, x):.5f}" for x in (ours, theirs)),
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("model", help="a checkpoint whose weights were never quantised")
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=list(FILE_TYPES))
    parser.add_argument("--text", type=Path, default=ROOT / "docs" / "chapter.md")
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args()
    compare(args.model, args.types, args.text.read_text(encoding="utf-8"), args.tokens)


if __name__ == "__main__":
    main()
