"""Engines in processes of their own, and the options of the commands that measure them."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench import contenders
from bench.processes import MODEL_OPTION, Child, command, json_of, pinned, serve, timed
from npllm.analysis import profiling
from npllm.analysis.machine import peak_memory
from npllm.checkpoints.fetch import weights_folder
from npllm.config.strict_json import read_json
from npllm.loading import checkpoint_folder


@click.command(hidden=True)
@click.argument("name")
@click.argument("folder")
def engine(name: str, folder: str) -> None:
    """Serve one contender: the answer to a task is the seconds of each call."""
    kind, _, dtype = name.partition(":")
    contender = contenders.CONTENDERS[kind](folder, dtype)
    rng = np.random.default_rng(0)

    def work(task: dict[str, int]) -> dict[str, Any]:
        n_prompt = task["n_prompt"]
        ids = rng.integers(3, 1000, (task["n_batch"], n_prompt + task["n_new"]))
        contender.reset(task["n_batch"])
        parts = [ids[:, :n_prompt]] + [ids[:, [at]] for at in range(n_prompt, ids.shape[1])]
        seconds = [timed(contender.feed, part) for part in parts]
        return {"seconds": seconds, "peak_bytes": peak_memory()}

    serve(contender.version, work)


class Engine(Child):
    """A contender behind the `engine` command."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        arguments = command("engine", name, folder)
        super().__init__(arguments, pinned(threads), stderr=subprocess.DEVNULL)

    def seconds(self, n_prompt: int, n_new: int = 0, n_batch: int = 1) -> list[float]:
        """Seconds of the prompt, and of each new token after it."""
        answer = self.measure(n_prompt=n_prompt, n_new=n_new, n_batch=n_batch)
        self.peak_bytes = answer["peak_bytes"]
        return answer["seconds"]


@click.command(hidden=True)
def limits() -> None:
    """Print the limits of the machine, as measured in a child's environment."""
    print(json.dumps(profiling.machine_limits()))


def machine_limits(threads: int) -> Any:
    """The limits of the machine with so many threads."""
    return json_of(command("limits"), pinned(threads))


def speed_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of the commands that measure engines."""
    for option in (
        MODEL_OPTION,
        click.option(
            "--config",
            type=click.Path(exists=True),
            help="Random weights in the shapes of this config.json.",
        ),
        click.option("--layers", type=int, help="With --config: fewer layers than it says."),
        click.option("-t", "--threads", default=len(os.sched_getaffinity(0)), show_default=True),
        click.option("-r", "--repeat", default=3, show_default=True),
        click.option(
            "--json",
            "json_path",
            type=click.Path(),
            help="Write every number into this file as well.",
        ),
    ):
        function = option(function)
    return function


def bench_folder(path: str | None, config: str | None, layers: int | None) -> Path:
    """The checkpoint to measure: given, or with random weights."""
    if config is None:
        return checkpoint_folder(path)
    name = os.path.basename(config).removesuffix(".json")
    folder = weights_folder() / f"bench-{name}-{layers or 'all'}-layers"
    if not (folder / "config.json").exists():
        from make_random_checkpoint import write_checkpoint

        write_checkpoint(read_json(config), folder, layers=layers)
    return folder
