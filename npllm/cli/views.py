"""Commands that show attention: `npllm attention` and `npllm masks`."""

from collections.abc import Callable
from typing import Any

import click

from npllm.analysis.plots import draw_masks, draw_weights
from npllm.analysis.steps import attention_rows, attention_steps
from npllm.cli.layout import attention_lines
from npllm.cli.options import json_option, model_options, prompt_options, refuse_without
from npllm.cli.streams import print_json
from npllm.model import Model

__all__ = ["COMMANDS"]


@click.command()
@prompt_options
@model_options
@click.option("--layer", type=int, required=True)
@click.option("--head", type=int, required=True)
@click.option(
    "--position",
    type=int,
    default=-1,
    show_default=True,
    help="Of the query; -1 is the last token.",
)
@click.option(
    "--plot",
    type=click.Path(),
    help="Draw the weights of all positions into this PNG; of all heads with --all-heads.",
)
@click.option("--all-heads", is_flag=True, help="With --plot: draw every head of the layer.")
@json_option
def attention(
    model: Callable[[], Model],
    prompt: str,
    head: int,
    plot: str | None,
    all_heads: bool,
    as_json: bool,
    **place: Any,
) -> None:
    """Show score, weight and length of the weighted value of every token of PROMPT, for one head
    and one query.
    """
    if not plot:
        refuse_without("every head of the layer is drawn with --plot FILE", "all_heads")
    steps = attention_steps(model(), prompt, head=head, **place)
    if plot:
        weights = steps.all_weights if all_heads else steps.all_weights[head]
        draw_weights(plot, weights, steps.tokens, f"{prompt!r}, layer {place['layer']}")
    rows = attention_rows(steps)
    if as_json:
        print_json(rows)
        return
    for line in attention_lines(rows):
        click.echo(line)


@click.command()
@click.argument("path", type=click.Path(), default="masks.png")
@click.option("-n", "--slots", type=click.IntRange(min=16), default=32, show_default=True)
def masks(path: str, slots: int) -> None:
    """Draw every mask rule into one image."""
    draw_masks(path, n=slots)
    click.echo(path)


COMMANDS = (attention, masks)
