"""`context` and `batch`: a decode step by the length of the context and by the sequences."""

import statistics
from typing import Any

import click

import npllm
from bench.engines import Engine, bench_folder, machine_limits, speed_options
from bench.processes import cpu_name, machine, write_json


@click.command()
@speed_options
@click.option("--contexts", default="128,1024,4096", show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
def context(
    path: str | None,
    config: str | None,
    layers: int | None,
    threads: int,
    repeat: int,
    json_path: str | None,
    contexts: str,
    dtype: str,
) -> None:
    """Time one token more by the length of the context, beside what its keys and values take to
    read.
    """
    folder = bench_folder(path, config, layers)
    contender, settings = Engine(f"npllm:{dtype}", folder, threads), npllm.Config.from_json(folder)
    contender.seconds(32, 2)
    rows = {n: step_seconds(contender, repeat, n, 8) for n in map(int, contexts.split(","))}
    read = machine_limits(threads)["read"]
    per_key = 8 * settings.num_key_value_heads * settings.head_dim * settings.num_hidden_layers
    result = {
        "folder": folder.name,
        "seconds": rows,
        "read": read,
        "bytes_per_key": per_key,
        "machine": machine(),
    }
    write_json(json_path, result)
    click.echo("\n".join(context_table(result, settings.sliding_window)))


def context_table(result: dict[str, Any], window: int | None) -> list[str]:
    """Lines of a Markdown table: a step, and what reading the keys and values more takes."""
    rows, read, per_key = result["seconds"], result["read"], result["bytes_per_key"]
    lines = [
        f"{result['folder']}, {per_key} bytes of keys and values for each visible token; "
        f"{read / 1e9:.1f} GB/s; {cpu_name()}\n",
        "| context | ms/token | more than at the first | of which reading takes at the limit |",
        "|---|---|---|---|",
    ]
    first = min(rows)
    for n, value in rows.items():
        seen = min(n, window or n) - min(first, window or first)
        lines.append(
            f"| {n} | {value * 1e3:.2f} | {(value - rows[first]) * 1e3:.2f} "
            f"| {seen * per_key / read * 1e3:.2f} |"
        )
    return lines


@click.command()
@speed_options
@click.option("--batches", default="1,2,4,8,16", show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
def batch(
    path: str | None,
    config: str | None,
    layers: int | None,
    threads: int,
    repeat: int,
    json_path: str | None,
    batches: str,
    dtype: str,
) -> None:
    """Time decoding of several sequences at once, which share one read of the weights."""
    folder = bench_folder(path, config, layers)
    contender = Engine(f"npllm:{dtype}", folder, threads)
    contender.seconds(32, 2)
    rows = {b: step_seconds(contender, repeat, 32, 8, b) for b in map(int, batches.split(","))}
    write_json(json_path, {"folder": folder.name, "seconds": rows, "machine": machine()})
    click.echo(f"{folder.name}, {dtype}; {cpu_name()}, {threads} threads\n")
    click.echo("| sequences | ms/step | tokens/s | of one |\n|---|---|---|---|")
    for b, value in rows.items():
        click.echo(f"| {b} | {value * 1e3:.1f} | {b / value:.1f} | {b * rows[1] / value:.2f} |")


def step_seconds(contender: Engine, repeat: int, *sizes: int) -> float:
    """Median time of one step of decoding, over several runs."""
    runs = (contender.seconds(*sizes)[1:] for _ in range(repeat))
    return statistics.median(statistics.median(seconds) for seconds in runs)
