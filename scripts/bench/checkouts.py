"""`checkouts`: prefill and decoding of several checkouts of npllm, which take turns."""

import json
import os
import statistics
import subprocess
import sys
from typing import Any

import click

from bench.processes import MODEL_OPTION, environment
from npllm.loading import checkpoint_folder

CHECKOUT = """
import json, sys, time
import numpy as np
import npllm
model, n_prompt, n_new = npllm.load(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
ids = np.random.default_rng(0).integers(0, 1000, (1, n_prompt))
model(ids[:, :8], cache=model.new_cache(), logits_to_keep=1)
print(npllm.__file__, flush=True)
for _ in sys.stdin:
    cache, clock = model.new_cache(), [time.perf_counter()]
    model(ids, cache=cache, logits_to_keep=1)
    clock.append(time.perf_counter())
    for step in range(n_new):
        at = step % n_prompt
        model(ids[:, at : at + 1], cache=cache)
        clock.append(time.perf_counter())
    steps = np.diff(clock)
    print(json.dumps({"prefill": steps[0], "decode": float(np.median(steps[1:]))}), flush=True)
"""
KEYS = "prefill", "decode"


@click.command()
@click.argument("checkouts", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False))
@MODEL_OPTION
@click.option("-p", "--n-prompt", default=256, show_default=True)
@click.option("-n", "--n-new", default=64, show_default=True)
@click.option("-r", "--repeat", default=9, show_default=True)
def checkouts(
    checkouts: tuple[str, ...], path: str | None, n_prompt: int, n_new: int, repeat: int
) -> None:
    """Time prefill and decoding of several checkouts of npllm, which take turns; only functions of
    `npllm` are used.
    """
    arguments = [str(checkpoint_folder(path)), str(n_prompt), str(n_new)]
    children = [started(place, arguments) for place in checkouts]
    for place, contender in zip(checkouts, children, strict=True):
        if not contender.stdout.readline().startswith(os.path.abspath(place)):
            raise SystemExit(f"{place}: another npllm was imported")
    runs = [[] for _ in children]
    for _ in range(repeat + 1):
        for seconds, contender in zip(runs, children, strict=True):
            contender.stdin.write("\n")
            contender.stdin.flush()
            seconds.append(json.loads(contender.stdout.readline()))
    medians = [
        {key: statistics.median(run[key] for run in seconds[1:]) for key in KEYS}
        for seconds in runs
    ]
    click.echo(
        f"| {n_prompt} tokens, then {n_new}; medians of {repeat} "
        "| prefill ms | ratio | decode ms | ratio |\n|---|---|---|---|---|"
    )
    for place, median in zip(checkouts, medians, strict=True):
        cells = [f"{median[key] * 1e3:.2f} | {median[key] / medians[0][key]:.3f}" for key in KEYS]
        click.echo(f"| {place} | {' | '.join(cells)} |")


def started(place: str, arguments: list[str]) -> Any:
    """A process in a checkout: -c imports from the current folder first."""
    return subprocess.Popen(
        [sys.executable, "-c", CHECKOUT, *arguments],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
        cwd=place,
    )
