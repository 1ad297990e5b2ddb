"""Measure the error of each weight format, and print the table of docs/quantisation.md.

    python scripts/quantisation_error.py

The matrices were never quantised: those of all-MiniLM-L6-v2, stored in float32, whose width is a
multiple of 256; random normal ones; and random ones with outliers, one entry in a thousand ten
times as large.
"""

import numpy as np

from npllm.checkpoints.fetch import EMBEDDING_MODEL, fetch
from npllm.checkpoints.safetensors import read_entries
from npllm.checkpoints.tensor_files import view_of
from npllm.quantized.block_formats import FORMATS
from npllm.quantized.block_packing import quantize_blocks
from npllm.quantized.int8 import quantize

D_OUT, D_IN = 512, 3072
ORDER = ("Q4_0", "Q4_K", "Q4_1", "Q5_0", "Q5_K", "Q5_1", "Q6_K", "Q8_0")


def main() -> None:
    """Print the table in Markdown."""
    kinds = {"MiniLM": minilm(), "normal": [normal()], "outliers": [with_outliers()]}
    print(f"| format | bits a weight | {' | '.join(kinds)} |")
    print("|---|---|" + "---|" * len(kinds))
    for name in ORDER:
        errors = [error(x, name) for x in kinds.values()]
        print_row(name, FORMATS[name].bits, errors)
    print_row('dtype="int8"', 8.5, [error(x, None) for x in kinds.values()])


def print_row(name: str, bits: float, errors: list[float]) -> None:
    """Print one format."""
    print(f"| {name} | {bits:g} | {' | '.join(f'{100 * x:.2f} %' for x in errors)} |")


def error(matrices: list[np.ndarray], name: str | None) -> float:
    """Relative error of all matrices together; None: 8 bits in groups of 64."""
    lost = total = 0.0
    for x in matrices:
        packed = quantize(x) if name is None else quantize_blocks(x, name)
        lost += float(np.sum((packed.widened() - x).astype(np.float64) ** 2))
        total += float(np.sum(x.astype(np.float64) ** 2))
    return (lost / total) ** 0.5


def minilm() -> list[np.ndarray]:
    """The matrices of all-MiniLM-L6-v2 whose width is a multiple of 256."""
    entries = read_entries(fetch(EMBEDDING_MODEL)).items()
    return [
        view_of(x)
        for name, x in entries
        if name.endswith("output.dense.weight") and x.shape[1] % 256 == 0
    ]


def normal() -> np.ndarray:
    """Draw a matrix of normal numbers."""
    return np.random.default_rng(0).standard_normal((D_OUT, D_IN)).astype(np.float32)


def with_outliers() -> np.ndarray:
    """Draw one whose entries are ten times as large at random places."""
    is_large = np.random.default_rng(1).random((D_OUT, D_IN)) < 1e-3
    return normal() * np.where(is_large, np.float32(10), np.float32(1))


if __name__ == "__main__":
    main()
