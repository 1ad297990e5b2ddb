"""The command `npllm compare`: where a port departs from the right answer, and why."""

from pathlib import Path
from typing import Any

import click

from npllm.cli.options import (
    adapter_option,
    json_option,
    load_causal,
    path_option,
    threads_option,
)
from npllm.cli.streams import print_json, usage_errors

__all__ = ["COMMANDS"]

EXIT_CODES = {"same": 0, "differs": 1, "not decidable": 3}


@click.command()
@click.argument("mine", type=click.Path())
@click.argument("gold", type=click.Path())
@click.option(
    "--weights",
    type=click.Path(),
    help="Compare the port's own parameters first, of a safetensors file or a folder.",
)
@path_option
@adapter_option
@threads_option
@click.option(
    "--names",
    default="transformers",
    show_default=True,
    help="Read the values of MINE under these names.",
)
@click.option("--all", "everything", is_flag=True, help="Print every row.")
@click.option("--plot", type=click.Path(), help="Draw the error against depth into this file.")
@click.option("--html", type=click.Path(), help="Write a page that needs no other file.")
@json_option
@click.pass_context
def compare(
    context: click.Context,
    mine: str,
    gold: str,
    weights: str | None,
    path: str | None,
    adapter: str | None,
    names: str,
    everything: bool,
    plot: str | None,
    html: str | None,
    as_json: bool,
) -> None:
    """Say which operation of a port is wrong.

    MINE holds what the port computed, GOLD what `npllm trace --dtype float64` wrote for the same
    tokens, or one of npllm's golden bundles.  Each operation is evaluated in float64 on the inputs
    that the port recorded; errors are in units of the budget of the operation.

    Exit codes: 0 same, 1 differs, 2 usage or unreadable, 3 not decidable.
    """
    with usage_errors():
        model = path if adapter is None else load_causal(path, adapter=adapter)
        found = _compared(mine, gold, weights, model, names)
        _draw(found, plot, html)
    if as_json:
        print_json(found.facts())
    else:
        from npllm.tracing.comparison.report import lines_of

        click.echo("\n".join(lines_of(found, everything=everything)))
    context.exit(EXIT_CODES[found.status])


def _compared(mine: str, gold: str, weights: str | None, model: Any, names: str) -> Any:
    from npllm import compare as compared
    from npllm.testing.golden_bundles import BUNDLES, golden

    right = golden(gold) if gold in BUNDLES and not Path(gold).exists() else gold
    return compared(mine, right, weights=weights, model=model, names=names)


def _draw(found: Any, plot: str | None, html: str | None) -> None:
    """Write the pictures that were asked for."""
    if plot:
        from npllm.tracing.comparison.error_plot import draw_errors

        draw_errors(plot, found)
    if html:
        from npllm.tracing.comparison.html_report import write_page

        write_page(html, found)


COMMANDS = (compare,)
"""What `npllm` registers."""
