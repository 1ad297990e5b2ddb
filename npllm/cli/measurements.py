"""Commands that measure: `npllm bench` and `npllm doctor`."""

from collections.abc import Callable, Iterable
from typing import Any

import click

from npllm.analysis.machine import machine_facts
from npllm.analysis.profiling import profile
from npllm.analysis.speed import compare_sets, speed
from npllm.cli.layout import machine_lines, profile_lines, set_lines, speed_lines
from npllm.cli.options import json_option, model_options
from npllm.cli.streams import print_json
from npllm.kernels import SETS
from npllm.model import Model
from npllm.progress import report, write_line

__all__ = ["COMMANDS"]

Lines = Callable[[dict[str, Any]], Iterable[str]]


@click.command()
@model_options
@click.option(
    "-p",
    "--n-prompt",
    type=click.IntRange(min=1),
    default=51,
    show_default=True,
    help="Take a prompt of so many tokens.",
)
@click.option(
    "-n",
    "--n-new",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Generate so many tokens.",
)
@click.option(
    "-r",
    "--repeat",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Measure so many times.",
)
@click.option(
    "--profile",
    "by_op",
    is_flag=True,
    help="Time every operation, beside the limits of the machine.",
)
@click.option(
    "--against",
    type=click.Choice(SETS),
    multiple=True,
    help="Measure the same model on another set of operations as well; may be given again.",
)
@json_option
def bench(
    model: Callable[[], Model], as_json: bool, by_op: bool, against: tuple[str, ...], **sizes: Any
) -> None:
    """Measure prefill and decode tokens/s, with the cache and without."""
    if by_op and against:
        raise click.UsageError(
            "--profile measures one set of operations: leave out --against, and choose the set "
            "with --ops"
        )
    facts, lines = _measure(model(), by_op, against, sizes)
    facts["machine"] = machine_facts()
    if as_json:
        print_json(facts)
        return
    for line in lines(facts):
        click.echo(line)
    if lines is speed_lines:
        write_line(_sizes_line(facts))


def _measure(
    model: Model, by_op: bool, against: tuple[str, ...], sizes: dict[str, Any]
) -> tuple[dict[str, Any], Lines]:
    """The measured facts, and the function that lays them out."""
    if against:
        return compare_sets(model, against, **sizes), set_lines
    if by_op:
        return profile(model, **sizes), profile_lines
    return speed(model, **sizes), speed_lines


def _sizes_line(facts: dict[str, Any]) -> str:
    return (
        f"median of {facts['repeat']} runs, {facts['n_prompt']} prompt and {facts['n_new']} new "
        f"tokens, {facts['ops']} ops, peak memory {facts['peak_bytes'] / 1e6:.0f} MB"
    )


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Show versions, BLAS and threads, CuPy and the GPU or why there is none."""
    facts = machine_facts()
    if as_json:
        print_json(facts)
        return
    for line in machine_lines(facts):
        click.echo(line)
    if "OPENBLAS_CORETYPE" in facts["environment"]:
        report(
            "warning: OPENBLAS_CORETYPE fixes the kernels of OpenBLAS; unset it for the best speed"
        )


COMMANDS = (bench, doctor)
