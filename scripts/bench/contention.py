"""`scripts/bench.py contention`: decoding beside busy processes, and two processes at once.

A busy process is a loop in Python, of normal priority.  Every engine decodes greedily for some
seconds, in turns, beside each number of busy processes.  npllm runs as it is by default, and with
1 and 2 threads that spin or block while they wait: the fixed settings it is judged by.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench import contenders
from bench.processes import MODEL_OPTION, Child, command, environment, serve
from npllm.loading import checkpoint_folder

SPIN, BLOCK = "30000", "0"
FIXED = {
    f"npllm, {n} thread{'s' * (n > 1)}, {name}": {
        "OMP_NUM_THREADS": str(n),
        "GOMP_SPINCOUNT": spins,
    }
    for n, (name, spins) in product((1, 2), (("spin", SPIN), ("block", BLOCK)))
}
OURS, PEERS = "npllm", ("llama.cpp", "transformers")
PEER_SETTINGS = {"OMP_NUM_THREADS": "2"}
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
N_PROMPT, N_CTX = 51, 400
DISTURBED = 0.1  # cores that other programs used during a run: it is left out of the medians


def decode_rate(engine: Any, seconds: float) -> float:
    """Decode for some seconds, and return tokens/s; prompts are not counted."""
    ids = np.random.default_rng(0).integers(3, 1000, (1, N_PROMPT))
    steps, spent, until = 0, 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        engine.reset()
        logits = engine.feed(ids)
        begin, n = time.perf_counter(), N_PROMPT
        while time.perf_counter() < until and n < N_CTX:
            logits = engine.feed(np.argmax(logits, axis=-1)[:, None])
            n += 1
        steps, spent = steps + n - N_PROMPT, spent + time.perf_counter() - begin
    return steps / spent


def busy_seconds() -> float | None:
    """CPU seconds of all programs since the system began; None where it does not say."""
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/stat", encoding="ascii") as file:
            ticks = [int(x) for x in file.readline().split()[1:8]]
        return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
    return None


def cpu_seconds(pids: list[int]) -> float:
    """CPU seconds of some processes."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def started(name: str, path: str, settings: dict[str, str]) -> Child:
    """A contender in a process of its own: seconds in, tokens/s out."""
    kept = environment()
    for key in (*THREAD_VARIABLES, "GOMP_SPINCOUNT"):
        kept.pop(key, None)
    arguments = command("decode-rates", name, path)
    return Child(arguments, kept | settings, stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def busy_processes(n: int) -> Any:
    """Run n processes that never wait."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    time.sleep(0.2)
    try:
        yield [process.pid for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()


def measured(engines: list[Child], seconds: float, pids: list[int]) -> dict[str, Any]:
    """Let engines decode at the same time; tokens/s of each, and cores that others used."""
    pids = [*pids, os.getpid(), *(engine.process.pid for engine in engines)]
    before = busy_seconds()
    own = None if before is None else cpu_seconds(pids)
    for engine in engines:
        engine.ask(seconds)
    rates = [engine.answer() for engine in engines]
    others = None
    if before is not None:
        others = (busy_seconds() - before - cpu_seconds(pids) + own) / seconds
    return {"tokens_per_second": rates, "others": others}


def median_rate(runs: list[dict[str, Any]]) -> float:
    """The median of the slower engine of each run that nothing disturbed, or of all of them."""
    calm = [run for run in runs if not run["others"] or run["others"] < DISTURBED]
    return statistics.median(min(run["tokens_per_second"]) for run in calm or runs)


def table(runs: dict[str, dict[str, list]], counts: list[int]) -> list[str]:
    """Lines of a Markdown table, and what ours reaches of the best fixed setting."""
    medians = {
        name: [median_rate(rows[str(n)]) for n in counts]
        for name, rows in runs.items()
        if name != "two processes"
    }
    lines = [f"| busy processes | {' | '.join(map(str, counts))} |", "|---" * (len(counts) + 1)]
    lines[1] += "|"
    for name, row in medians.items():
        lines.append(f"| {name}, tok/s | {' | '.join(f'{rate:.0f}' for rate in row)} |")
    best = [
        max(medians[name][at] for name in FIXED if name in medians) for at in range(len(counts))
    ]
    ratios = [ours / other for ours, other in zip(medians[OURS], best, strict=True)]
    lines.append(f"| npllm / the best fixed | {' | '.join(f'{x:.2f}' for x in ratios)} |")
    beside = [ratio for n, ratio in zip(counts, ratios, strict=True) if n > 0]
    if beside:
        lines.append(
            f"\ngeometric mean beside busy processes: {statistics.geometric_mean(beside):.2f}"
        )
    if "two processes" in runs and 0 in counts:
        share = median_rate(runs["two processes"]["0"]) / medians[OURS][counts.index(0)]
        lines.append(f"two processes at once: the slower gets {share:.0%} of one alone")
    n_left_out = sum(
        bool(run["others"]) and run["others"] >= DISTURBED
        for rows in runs.values()
        for cell in rows.values()
        for run in cell
    )
    lines.append(f"runs left out since other programs used the cores: {n_left_out}")
    return lines


@click.command()
@MODEL_OPTION
@click.option("--gguf", type=click.Path(exists=True), help="What llama.cpp reads. [it is left out]")
@click.option("-b", "--busy", default="0,1,2,4", show_default=True)
@click.option("-s", "--seconds", default=5.0, show_default=True, help="Of each run.")
@click.option("-r", "--repeat", default=9, show_default=True)
@click.option("--peers/--no-peers", default=True, show_default=True)
@click.option("--two/--no-two", default=True, show_default=True, help="Two processes at once.")
@click.option("--json", "json_path", type=click.Path(), help="Add every run to those in this file.")
def contention(
    path: str | None,
    gguf: str | None,
    busy: str,
    seconds: float,
    repeat: int,
    peers: bool,
    two: bool,
    json_path: str | None,
) -> None:
    """Time decoding beside busy processes: npllm, its fixed settings, llama.cpp, Transformers."""
    folder, counts = str(checkpoint_folder(path)), [int(n) for n in busy.split(",")]
    engines = {name: started("npllm", folder, how) for name, how in ({OURS: {}} | FIXED).items()}
    for name in PEERS if peers else ():
        place = gguf if name == "llama.cpp" else folder
        if place and contenders.installed(name):
            engines[name] = started(name, place, PEER_SETTINGS)
    other = started("npllm", folder, {}) if two else None
    result = {"seconds": seconds, "versions": {}, "runs": {}}
    if json_path and Path(json_path).exists():
        result = json.loads(Path(json_path).read_text(encoding="utf-8"))
    result["versions"] |= {name: engine.version for name, engine in engines.items()}
    for _ in range(repeat):
        measure_round(result["runs"], engines, other, counts, seconds)
        if json_path:
            Path(json_path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for engine in (*engines.values(), *([other] if other else [])):
        engine.process.terminate()
    click.echo("\n".join(table(result["runs"], counts)))


def measure_round(
    runs: dict[str, dict[str, list]],
    engines: dict[str, Child],
    other: Child | None,
    counts: list[int],
    seconds: float,
) -> None:
    """One run of every engine beside every number of busy processes, added to `runs`."""
    for n in counts:
        with busy_processes(n) as pids:
            for name, engine in engines.items():
                cell = runs.setdefault(name, {}).setdefault(str(n), [])
                cell.append(measured([engine], seconds, pids))
    if other is not None:
        cell = runs.setdefault("two processes", {}).setdefault("0", [])
        cell.append(measured([engines[OURS], other], seconds, []))


@click.command(name="decode-rates", hidden=True)
@click.argument("name")
@click.argument("path")
def decode_rates(name: str, path: str) -> None:
    """Serve one contender: the answer to a number of seconds is tokens/s."""
    dtype = "bfloat16" if name == "transformers" else ""
    engine = contenders.CONTENDERS[name](path, dtype)
    decode_rate(engine, 0.5)  # compiles, and reads the weights
    serve(engine.version, lambda seconds: decode_rate(engine, seconds))
