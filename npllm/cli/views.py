"""Commands that show attention: `npllm attention` and `npllm masks`."""

from collections.abc import Callable
from typing import Any

import click

from npllm.analysis.plots import draw_masks, draw_weights, example_rules
from npllm.analysis.step_facts import attention_facts
from npllm.analysis.steps import AttentionSteps, attention_steps
from npllm.cli.layout import attention_lines
from npllm.cli.options import json_option, model_options, prompt_options, refuse_without
from npllm.cli.streams import print_json
from npllm.model import Model
from npllm.progress import report

__all__ = ["COMMANDS"]


@click.command()
@prompt_options
@model_options
@click.option("--layer", type=int, required=True, help="Show this layer.")
@click.option("--head", type=int, required=True, help="Show this head.")
@click.option(
    "--position",
    type=int,
    default=-1,
    show_default=True,
    help="Take the query at this position; -1 is the last token.",
)
@click.option(
    "--plot",
    type=click.Path(),
    help="Draw the weights of all positions into this PNG; of all heads with --all-heads.",
)
@click.option("--all-heads", is_flag=True, help="Draw every head of the layer, with --plot.")
@json_option
def attention(
    model: Callable[[], Model],
    prompt: str,
    plot: str | None,
    all_heads: bool,
    as_json: bool,
    **place: Any,
) -> None:
    """Show attention step by step for one head and one query of PROMPT.

    From the residual stream through queries, keys, values, scores and weights back into the
    stream.
    """
    if not plot:
        refuse_without("every head of the layer is drawn with --plot FILE", "all_heads")
    steps = attention_steps(model(), prompt, **place)
    if plot:
        report(_drawn(plot, steps, prompt, all_heads))
    facts = attention_facts(steps)
    if as_json:
        print_json(facts)
        return
    for line in attention_lines(facts):
        click.echo(line)


def _drawn(plot: str, steps: AttentionSteps, prompt: str, all_heads: bool) -> str:
    """Draw the weights, and return the line that says what was written."""
    n_head, n_seq, _ = steps.all_weights.shape
    heads = list(range(n_head)) if all_heads else [steps.head]
    which = f"all {n_head} heads" if all_heads else f"head {steps.head}"
    title = f"Layer {steps.layer}, {which}: {prompt}"
    size = draw_weights(plot, steps.all_weights[heads], steps.tokens, title, heads)
    return f"{plot}: attention weights of layer {steps.layer}, {which}, {n_seq} tokens, {size}"


@click.command()
@click.argument("path", type=click.Path(), default="masks.png")
@click.option(
    "-n",
    "--slots",
    type=click.IntRange(min=16),
    default=32,
    show_default=True,
    help="Draw so many slots.",
)
def masks(path: str, slots: int) -> None:
    """Draw every mask rule into one image."""
    rules = example_rules(slots)
    size = draw_masks(path, rules, n=slots)
    click.echo(f"{path}: {len(rules)} mask rules over {slots} positions, {size}")


COMMANDS = (attention, masks)
