"""The command `npllm batch`."""

from collections.abc import Callable
from typing import Any

import click

from npllm.batch.run import batch as run_batch
from npllm.batch.tasks import TASKS
from npllm.cli.options import (
    any_model_options,
    decoding_options,
    json_option,
    refuse_without,
)
from npllm.cli.streams import print_json
from npllm.progress import report

__all__ = ["COMMANDS"]

DECODING = (
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "min_new_tokens",
    "seed",
    "stop",
)


@click.command()
@click.argument("source", metavar="IN.jsonl", type=click.Path())
@click.argument("out", metavar="OUT.jsonl", type=click.Path())
@click.option(
    "--task",
    type=click.Choice(TASKS),
    default="generate",
    show_default=True,
    help="Do this with every row.",
)
@click.option(
    "--keep-order/--no-keep-order",
    default=True,
    show_default=True,
    help="Write rows in the order of the input, or as they are answered.",
)
@click.option(
    "--engine",
    type=click.Choice(("local", "ray")),
    default="local",
    show_default=True,
    help="Answer in this process, or in actors of a Ray cluster.",
)
@click.option(
    "--workers", type=click.IntRange(min=1), default=1, help="Start so many actors of --engine ray."
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=64,
    help="Give an actor of --engine ray so many rows at a time.",
)
@any_model_options
@decoding_options
@json_option
@click.pass_context
def batch(
    context: click.Context,
    source: str,
    out: str,
    task: str,
    keep_order: bool,
    engine: str,
    workers: int,
    batch_size: int,
    model: Callable[[], Any],
    as_json: bool,
    **options: Any,
) -> None:
    """Answer every row of IN.jsonl: "prompt", "messages" or "text" of each, by --task.

    A run that was killed goes on where it stood.  Bad rows are written to OUT.errors.jsonl, and the
    exit code is then 1.
    """
    if task in ("score", "embed"):
        refuse_without(f"--task {task} generates nothing", *DECODING)
        options = {}
    runner = None
    if engine == "ray":
        from npllm.batch.ray_engine import ray_runner

        runner = ray_runner(model, n_workers=workers, batch_size=batch_size)
    else:
        refuse_without("they are of --engine ray", "workers", "batch_size")
    done = run_batch(
        model(),
        source,
        out,
        task=task,
        keep_order=keep_order,
        progress=True,
        runner=runner,
        **options,
    )
    if as_json:
        print_json(done._asdict() | {"errors": done.errors and str(done.errors)})
    report(f"{out}: {done.n_answered} rows answered, {done.n_reused} answered before")
    if done.n_dropped:
        report(f"{out}: {done.n_dropped} earlier answers, of other rows or settings, are gone")
    if done.n_failed:
        report(f"{done.n_failed} rows failed: {done.errors}")
        context.exit(1)


COMMANDS = (batch,)
