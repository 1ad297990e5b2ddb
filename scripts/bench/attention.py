"""`attention`: the definition, both schedules, a window, and torch, by sequence length."""

import json
import statistics
from collections.abc import Callable
from typing import Any

import click
import numpy as np

from bench.generation import installed
from bench.processes import command, cpu_name, environment, json_of, timed
from npllm import ops
from npllm.analysis.machine import peak_memory


def attention_variant(
    name: str, n: int, n_head: int, d_head: int, window: int
) -> Callable[[], Any]:
    """A function that runs one kind of attention once."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n_head, n, d_head), dtype=np.float32) for _ in range(3))
    causal, local = ops.mask.causal(), ops.mask.sliding_window(window)
    if name == "torch":
        import torch

        q, k, v = (torch.from_numpy(x)[None] for x in (q, k, v))
        return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return {
        "definition": lambda: ops.attention(q, k, v, mask=causal),
        "flash 1": lambda: ops.blockwise_attention(q, k, v, mask=causal, outer="keys"),
        "flash 2": lambda: ops.blockwise_attention(q, k, v, mask=causal),
        f"window {window}": lambda: ops.blockwise_attention(q, k, v, mask=local),
    }[name]


@click.command(hidden=True)
@click.argument("name")
@click.argument("sizes", type=int, nargs=4)
@click.argument("repeat", type=int)
def attend(name: str, sizes: tuple[int, ...], repeat: int) -> None:
    """Run one kind of attention; print its seconds, and by how much memory grew."""
    run = attention_variant(name, *sizes)
    before = peak_memory()
    seconds = statistics.median(timed(run) for _ in range(repeat))
    print(json.dumps({"seconds": seconds, "bytes": peak_memory() - before}))


@click.command()
@click.option("--longest", default=32768, show_default=True)
@click.option("--n-head", default=2, show_default=True)
@click.option("--d-head", default=64, show_default=True)
@click.option("--window", default=2047, show_default=True)
@click.option(
    "--most",
    default=4.0,
    show_default=True,
    help="GiB of scores beyond which the definition is left out.",
)
@click.option("-r", "--repeat", default=3, show_default=True)
@click.option("--plot", type=click.Path(), help="Draw the table into this PNG.")
def attention(
    longest: int,
    n_head: int,
    d_head: int,
    window: int,
    most: float,
    repeat: int,
    plot: str | None,
) -> None:
    """Time causal self-attention in float32 by length, each kind and length in a process of its
    own.
    """
    names = ["definition", "flash 1", "flash 2", f"window {window}"]
    names += ["torch"] * installed("transformers")
    lengths = [n for n in (2**e for e in range(10, 31)) if n <= longest]
    rows = {name: {} for name in names}
    for n, name in ((n, name) for n in lengths for name in names):
        if name == "definition" and 4 * n_head * n * n > most * 2**30:
            continue
        times = repeat if n < 16384 else 1
        task = command("attend", name, n, n_head, d_head, window, times)
        rows[name][n] = json_of(task, environment())
    click.echo(
        f"causal attention, float32, {n_head} heads of {d_head}; "
        f"median seconds / MiB beyond the inputs; {cpu_name()}\n"
    )
    click.echo("\n".join(table(rows, lengths)))
    if plot:
        draw(plot, rows)


def table(rows: dict[str, dict[int, Any]], lengths: list[int]) -> list[str]:
    """Lines of a Markdown table: seconds and memory by length."""
    lines = ["| n | " + " | ".join(rows) + " |", "|" + "---|" * (len(rows) + 1)]
    for n in lengths:
        found = [cells.get(n) for cells in rows.values()]
        cells = [
            f"{cell['seconds']:.3f} s / {cell['bytes'] / 2**20:.0f}" if cell else "-"
            for cell in found
        ]
        lines.append(f"| {n:,} | " + " | ".join(cells) + " |")
    return lines


def draw(path: str, rows: dict[str, dict[int, Any]]) -> None:
    """Seconds and memory by length, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2))
    panels = ("seconds", "seconds", 1), ("bytes", "MiB beyond the inputs", 2**20)
    for number, (key, label, unit) in enumerate(panels, 1):
        axes = figure.add_subplot(1, 2, number)
        for name, cells in rows.items():
            heights = [max(cell[key] / unit, 1e-3) for cell in cells.values()]
            axes.plot(list(cells), heights, marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("n")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
