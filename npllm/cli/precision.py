"""The command that says what rounding costs: `npllm precision`."""

from collections.abc import Callable
from typing import Any

import click

from npllm.cli.options import chat_option, json_option, model_options, prompt_options
from npllm.cli.streams import as_prompt, print_json
from npllm.model import Model
from npllm.tracing.precision.arithmetics import TYPES
from npllm.tracing.precision.measuring import precision as measure
from npllm.tracing.precision.passes import BLOCKS
from npllm.tracing.precision.plot import draw_precision

__all__ = ["COMMANDS"]


@click.command()
@prompt_options
@model_options
@click.option(
    "--type",
    "types",
    type=click.Choice((*TYPES, *BLOCKS, "float64")),
    multiple=True,
    help=f"Measure this type; may be given again. [{', '.join(TYPES)}]",
)
@click.option(
    "--shares/--no-shares",
    default=True,
    help="Show what each rounding point of the 16-bit types causes: most of the time goes there.",
)
@click.option("--plot", type=click.Path(), help="Draw error against depth, and the shares.")
@chat_option
@json_option
def precision(
    model: Callable[[], Model],
    prompt: str,
    types: tuple[str, ...],
    plot: str | None,
    chat: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Show what float32, 16-bit arithmetic and quantized weights cost on PROMPT."""
    text = as_prompt(prompt, chat)
    report = measure(model(), text, types=types or TYPES, progress=True, **options)
    if plot:
        draw_precision(plot, report)
    if as_json:
        print_json(report.facts())
        return
    click.echo(str(report))


COMMANDS = (precision,)
