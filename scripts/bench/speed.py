"""`speed`: prefill and decoding of every installed engine, beside the limits of the machine."""

import statistics
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import click

import npllm
from bench import contenders
from bench.engines import Engine, bench_folder, machine_limits, speed_options
from bench.processes import machine, write_json
from npllm.checkpoints.phi3_layout import expected_shapes

ENGINES = (
    "npllm:bfloat16",
    "npllm:float16",
    "npllm:float32",
    "npllm:bfloat16+bfloat16",
    "npllm:int8+float32",
    "npllm:int8+int16",
    "npllm:int8+int8",
    "npllm:bfloat16/tiled",
    "transformers:bfloat16",
    "transformers:float16",
    "transformers:float32",
    "llama.cpp:bfloat16",
    "llama.cpp:float16",
    "llama.cpp:float32",
    "llama.cpp:int8",
)
GGUF_ENGINES = "npllm:as stored", "llama.cpp:as stored"
# bytes of a weight; int8 and int4 with the scales of groups, as npllm has them; llama.cpp's is Q8_0
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 8.25 / 8, "int4": 4.5 / 8}
BYTES["llama.cpp:int8"] = 8.5 / 8


@click.command()
@speed_options
@click.option(
    "--engines",
    help=f"Of a folder, or of --config: engine:dtype, which may be a type of GGUF files such as "
    f"q4_0, or npllm:dtype+activations; {','.join(ENGINES)}. "
    f"Of a GGUF file: {','.join(GGUF_ENGINES)}.",
)
@click.option("--prompts", default="256,1024", show_default=True)
@click.option("-n", "--n-new", default=16, show_default=True)
def speed(
    path: str | None,
    config: str | None,
    layers: int | None,
    threads: int,
    repeat: int,
    json_path: str | None,
    engines: str | None,
    prompts: str,
    n_new: int,
) -> None:
    """Time prefill and decoding of every engine that is installed, on the same weights and ids, in
    turns.
    """
    folder = bench_folder(path, config, layers)
    if engines is None:
        engines = ",".join(GGUF_ENGINES if folder.suffix == ".gguf" else ENGINES)
    names = [name for name in engines.split(",") if contenders.installed(name.partition(":")[0])]
    running = {name: Engine(name, folder, threads) for name in names}
    tasks = {f"prefill {n}": (int(n), 0) for n in prompts.split(",")} | {"decode": (64, n_new)}
    seconds, best = measured(running, tasks, threads, repeat)
    result = {
        "folder": folder.name,
        "parameters": matrix_parameters(folder),
        "bytes": {name: bytes_of_token(folder, name) for name in names},
        "repeat": repeat,
        "threads": threads,
        "seconds": seconds,
        "versions": {name: contender.version for name, contender in running.items()},
        "machine": machine(),
        "peak_bytes": {name: contender.peak_bytes for name, contender in running.items()},
        "limits": best,
    }
    write_json(json_path, result)
    click.echo("\n".join(speed_table(result)))


def measured(
    running: dict[str, Engine], tasks: dict[str, tuple[int, int]], threads: int, repeat: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Seconds of each task of each engine, in turns, and the limits of the machine; the engines
    are ended.
    """
    seconds = {name: {task: [] for task in tasks} for name in running}
    found = []
    for contender in running.values():
        contender.seconds(32, 2)  # warm up
    for _ in range(repeat):
        found.append(machine_limits(threads))
        for task, (n_prompt, n_more) in tasks.items():
            for name, contender in running.items():
                times = contender.seconds(n_prompt, n_more)
                seconds[name][task].append(statistics.median(times[1:]) if n_more else times[0])
    for contender in running.values():
        contender.process.terminate()
    return seconds, best_limits(found)


def best_limits(runs: list[Any]) -> dict[str, Any]:
    """The limits of a machine that changes while it is measured: the best of all probes, of all
    rounds.
    """
    probes = {
        kind: {name: max(run[kind][name] for run in runs) for name in runs[0][kind]}
        for kind in ("read_probes", "sgemm")
    }
    return {
        "read": max(probes["read_probes"].values()),
        "flops": max(probes["sgemm"].values()),
        **probes,
    }


def matrix_parameters(folder: Path) -> dict[str, int]:
    """Entries of the matrices that a token passes: of the layers, and of lm_head, which prefill
    uses for one row only.
    """
    if folder.suffix == ".gguf":
        config = npllm.load(folder).config
    else:
        config = npllm.Config.from_json(folder)
    shapes = expected_shapes(config)
    layers = sum(
        prod(shape) for name, shape in shapes.items() if ".layers." in name and len(shape) == 2
    )
    return {"layers": layers, "lm_head": config.vocab_size * config.hidden_size}


def bytes_of_token(folder: Path, name: str) -> float:
    """Bytes of the matrices that a token passes in an engine, such as "npllm:int8+int16"."""
    name = name.partition("/")[0].partition("+")[0]
    dtype = name.partition(":")[2]
    if dtype in BYTES:
        return BYTES.get(name, BYTES[dtype]) * sum(matrix_parameters(folder).values())
    params = npllm.load(contenders.gguf_file(folder, dtype)).params
    matrices = [x for layer in params.layers for x in layer if x is not None and x.ndim == 2]
    return sum(x.nbytes for x in (*matrices, params.lm_head))


def speed_table(result: dict[str, Any]) -> Iterator[str]:
    """Lines of a Markdown table: medians, the share of the machine's limit, and how npllm
    compares, in bfloat16 where that is measured.
    """
    medians = {
        name: {task: statistics.median(runs) for task, runs in tasks.items()}
        for name, tasks in result["seconds"].items()
    }
    tasks = [task for task in next(iter(medians.values())) if task != "decode"]
    yield headline(result)
    columns = " | ".join(f"{task}, tok/s | of the limit" for task in tasks)
    yield f"| engine | decode, ms/token | GB/s | of the limit | {columns} |"
    yield "|---" * (4 + 2 * len(tasks)) + "|"
    n_layers, sgemm = result["parameters"]["layers"], result["limits"]["flops"]
    for name, row in medians.items():
        rate = result["bytes"][name] / row["decode"]
        share = rate / result["limits"]["read"]
        cells = [name, f"{row['decode'] * 1e3:.1f}", f"{rate / 1e9:.1f}", f"{share:.0%}"]
        for task in tasks:
            n = int(task.split()[1])
            cells += [f"{n / row[task]:.0f}", f"{2 * n_layers * n / row[task] / sgemm:.0%}"]
        yield "| " + " | ".join(cells) + " |"
    yield from ratios(medians)


def headline(result: dict[str, Any]) -> str:
    """What was measured, where, and the limits of the machine."""
    facts, blas = result["machine"], result["machine"]["blas"]
    read, sgemm = result["limits"]["read"], result["limits"]["flops"]
    n_read = sum(result["parameters"].values())
    return (
        f"{result['folder']}, {n_read / 1e6:.0f}e6 parameters read per token; {facts['cpu']}, "
        f"{result['threads']} threads, BLAS {blas['name']} {blas['version']} "
        f"({blas['kernels']} kernels); medians of {result['repeat']} alternating runs; limits: "
        f"{read / 1e9:.1f} GB/s read, {sgemm / 1e9:.0f} GFLOP/s float32 matrix product\n"
    )


def ratios(medians: dict[str, dict[str, float]]) -> Iterator[str]:
    """A line for each other engine: how many times as fast npllm is."""
    names = [name for name in medians if name.startswith("npllm:")]
    first = "npllm:bfloat16" if "npllm:bfloat16" in names else next(iter(names), "")
    ours = medians.get(first)
    for name, row in medians.items() if ours else ():
        if not name.startswith(first):
            words = [f"{row[task] / ours[task]:.2f} times as fast in {task}" for task in row]
            yield f"\n{name}: {first} is {', '.join(words)}"
