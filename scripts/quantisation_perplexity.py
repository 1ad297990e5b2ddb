#!/usr/bin/env python3
"""Compare the files that npllm and llama.cpp quantise of one checkpoint, both run in llama.cpp.

    python scripts/quantisation_perplexity.py [MODEL] [--types q4_0 q4_k_m ...] [--text FILE]
        [--tokens N] [--threads N] [--output FILE.json]

MODEL is by default the default model's GGUF file.  Needs llama-cpp-python and the package gguf.
npllm writes a float32 GGUF file of it; from that each type is made by `npllm.quantize` and by
llama.cpp's `llama_model_quantize`.  Both files run in llama.cpp, and npllm's in npllm as well.

Perplexity is that of windows of 512 tokens; KL is the mean divergence from the float32 file in
llama.cpp, in nats a token.  The error of a difference is its standard error over tokens:

    difference = exp(-mean_i(x[i])) - 1,   error = std_i(x[i]) / sqrt(n)
    x[i] = log p(token i), npllm's file - log p(token i), llama.cpp's file
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from llama_cpp_runs import LlamaCpp, log_likelihoods, quantize_with_llama_cpp

import npllm
from npllm.checkpoints.fetch import DEFAULT_GGUF
from npllm.checkpoints.gguf.tensor_types import FILE_TYPES
from npllm.ops import log_softmax

ROOT = Path(__file__).resolve().parents[1]
TYPES = ("q4_0", "q4_k_m", "q5_k_m", "q6_k", "q8_0")
WINDOW = 512
COLUMNS = ("type", "MB", "npllm", "llama.cpp", "difference", "npllm in npllm")
DIVERGENCES = ("KL npllm", "KL llama.cpp", "KL npllm in npllm", "error of their difference")

Logits = Callable[[list[int]], np.ndarray]  # of a window: [n_seq, n_vocab]


class Run(NamedTuple):
    """What a program computed with a file."""

    found: np.ndarray  # float64 [n]: log p of each token
    lost: np.ndarray  # [n_window * n_seq]: divergence from the float32 file, nats

    @property
    def perplexity(self) -> float:
        """Return exp(-mean log p)."""
        return float(np.exp(-self.found.mean()))


def divergence(p: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Return the Kullback-Leibler divergences of distributions from the exact ones, log p."""
    return np.sum(np.exp(p) * (p - log_softmax(logits)), axis=-1)


def measure(logits_of: Logits, windows: list[list[int]], exact: list[np.ndarray]) -> Run:
    """Run all windows beside the exact log probabilities of each."""
    found, lost = [], []
    for ids, p in zip(windows, exact, strict=True):
        logits = logits_of(ids)
        found.append(log_likelihoods(logits, ids))
        lost.append(divergence(p, logits))
    return Run(np.concatenate(found), np.concatenate(lost))


def in_llama_cpp(path: Path, windows: list[list[int]], exact: list[Any], n_threads: int) -> Run:
    """Run a file in llama.cpp."""
    model = LlamaCpp(path, WINDOW, n_threads)
    try:
        return measure(model.logits, windows, exact)
    finally:
        model.close()


def in_npllm(path: Path, windows: list[list[int]], exact: list[Any], n_threads: int) -> Run:
    """Run a file in npllm, with the activations that `npllm.load` takes by default."""
    model = npllm.load(path, threads=n_threads)
    return measure(lambda ids: model(np.array([ids]))[0], windows, exact)


def prepare(path: Path, text: str, n_tokens: int, n_threads: int) -> tuple[list[Any], list[Any]]:
    """Cut the token ids of a text; return the windows and their log probabilities in float32."""
    model = LlamaCpp(path, WINDOW, n_threads)
    ids = model.tokenize(text)[:n_tokens]
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW + 1, WINDOW)]
    exact = [log_softmax(model.logits(x)) for x in windows]
    model.close()
    return windows, exact


def standard_error(x: np.ndarray) -> float:
    """Return the standard error of a mean over tokens."""
    return float(x.std() / len(x) ** 0.5)


def row_of(name: str, n_bytes: int, ours: Run, theirs: Run, own: Run) -> dict[str, Any]:
    """Put the numbers of a type together."""
    x = ours.found - theirs.found
    return {
        "type": name,
        "bytes": n_bytes,
        "perplexity": {
            "npllm": ours.perplexity,
            "llama.cpp": theirs.perplexity,
            "npllm in npllm": own.perplexity,
        },
        "difference": float(np.expm1(-x.mean())),
        "standard_error": standard_error(x),
        "divergence": {
            "npllm": float(ours.lost.mean()),
            "llama.cpp": float(theirs.lost.mean()),
            "npllm in npllm": float(own.lost.mean()),
        },
        "standard_error_of_divergence": standard_error(ours.lost - theirs.lost),
    }


def print_row(row: dict[str, Any]) -> None:
    """Print the line of a type in Markdown."""
    perplexity = row["perplexity"]
    cells = [
        row["type"],
        f"{row['bytes'] / 1e6:.0f}",
        f"{perplexity['npllm']:.3f}",
        f"{perplexity['llama.cpp']:.3f}",
        f"{100 * row['difference']:+.2f} ± {100 * row['standard_error']:.2f} %",
        f"{perplexity['npllm in npllm']:.3f}",
        *(f"{x:.5f}" for x in row["divergence"].values()),
        f"{row['standard_error_of_divergence']:.5f}",
    ]
    print(f"| {' | '.join(cells)} |", flush=True)


def compare(args: argparse.Namespace, folder: Path) -> None:
    """Quantise and run every type; print the table; write all numbers after each type."""
    wide, mine, other = (folder / f"{name}.gguf" for name in ("f32", "npllm", "llama"))
    npllm.quantize(args.model, wide, "f32", progress=False)
    text = args.text.read_text(encoding="utf-8")
    windows, exact = prepare(wide, text, args.tokens, args.threads)
    given = windows, exact, args.threads
    found = [log_likelihoods(p, ids) for p, ids in zip(exact, windows, strict=True)]
    float32 = {
        "llama.cpp": float(np.exp(-np.concatenate(found).mean())),
        "npllm": in_npllm(wide, *given).perplexity,
    }
    print(f"{len(windows)} windows of {WINDOW} tokens; float32: {float32['llama.cpp']:.4f}\n")
    columns = (*COLUMNS, *DIVERGENCES)
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    content: dict[str, Any] = {
        "made by": "scripts/quantisation_perplexity.py",
        "versions": {name: version(name) for name in ("npllm", "llama-cpp-python")},
        "model": Path(args.model).name,
        "text": args.text.name,
        "windows": len(windows),
        "tokens_a_window": WINDOW,
        "float32": float32,
        "types": [],
    }
    for name in args.types:
        npllm.quantize(wide, mine, name, overwrite=True, progress=False)
        quantize_with_llama_cpp(wide, other, FILE_TYPES[name].number, args.threads)
        runs = in_llama_cpp(mine, *given), in_llama_cpp(other, *given), in_npllm(mine, *given)
        content["types"].append(row_of(name, mine.stat().st_size, *runs))
        print_row(content["types"][-1])
        if args.output:
            args.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("model", nargs="?", default=DEFAULT_GGUF)
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=list(FILE_TYPES))
    parser.add_argument("--text", type=Path, default=ROOT / "docs" / "chapter.md")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(args, Path(folder))


if __name__ == "__main__":
    main()
