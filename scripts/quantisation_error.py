"""Measure the error of each weight format, and print the table of docs/quantisation.md.

    python scripts/quantisation_error.py [--llama-cpp]

With --llama-cpp, which needs llama-cpp-python, a cell holds the errors of npllm's quantiser and of
llama.cpp's.
The matrices were never quantised: those of all-MiniLM-L6-v2, stored in float32, whose width is a
multiple of 256, and those of width 384, which have no K format; random normal ones; and random ones
with outliers, one entry in a thousand ten times as large.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from npllm.checkpoints.fetch import EMBEDDING_MODEL, fetch
from npllm.checkpoints.safetensors import read_entries
from npllm.checkpoints.tensor_files import view_of
from npllm.errors import NpllmValueError
from npllm.quantized.block_formats import FORMATS
from npllm.quantized.block_packing import quantize_blocks
from npllm.quantized.dtypes import QUANTIZERS

D_OUT, D_IN = 512, 3072
ORDER = ("Q4_0", "Q4_K", "Q4_1", "Q5_0", "Q5_K", "Q5_1", "Q6_K", "Q8_0")


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--llama-cpp", action="store_true")
    quantizers: list[Any] = [quantize_blocks]
    if parser.parse_args().llama_cpp:
        from llama_cpp_runs import quantize_matrix_with_llama_cpp

        quantizers.append(quantize_matrix_with_llama_cpp)
    kinds = {
        "MiniLM": minilm(1536),
        "MiniLM, 384 wide": minilm(384),
        "normal": [normal()],
        "outliers": [with_outliers()],
    }
    print(f"| format | bits a weight | {' | '.join(kinds)} |")
    print("|---|---|" + "---|" * len(kinds))
    for name in ORDER:
        rounded = [partial(quantize, name=name) for quantize in quantizers]
        print_row(name, f"{FORMATS[name].bits:g}", kinds, rounded)
    for name, bits in (("int8", "8.25"), ("int4", "4.5 or 5")):
        print_row(f'dtype="{name}"', bits, kinds, [QUANTIZERS[name]])


def print_row(name: str, bits: str, kinds: dict[str, Any], rounded: list[Any]) -> None:
    """Print one format: the errors of each quantiser."""
    cells = []
    for matrices in kinds.values():
        errors = [error(matrices, x) for x in rounded]
        known = [f"{100 * x:.2f}" for x in errors if x is not None]
        cells.append(f"{' / '.join(known)} %" if known else "")
    print(f"| {name} | {bits} | {' | '.join(cells)} |")


def error(matrices: list[np.ndarray], rounded: Callable[[Any], Any]) -> float | None:
    """Relative error of all matrices together; None where rows are no whole blocks."""
    lost = total = 0.0
    for x in matrices:
        try:
            packed = rounded(x)
        except NpllmValueError:
            return None
        lost += float(np.sum((packed.widened() - x).astype(np.float64) ** 2))
        total += float(np.sum(x.astype(np.float64) ** 2))
    return (lost / total) ** 0.5


def minilm(width: int) -> list[np.ndarray]:
    """The matrices of the layers of all-MiniLM-L6-v2 with rows of this width."""
    entries = read_entries(fetch(EMBEDDING_MODEL)).items()
    return [
        view_of(x)
        for name, x in entries
        if ".layer." in name and len(x.shape) == 2 and x.shape[1] == width
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
