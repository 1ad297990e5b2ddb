"""The command that writes the offline page: `npllm explain`."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from npllm.cli.options import chat_option, json_option, model_options, prompt_options
from npllm.cli.streams import as_prompt, print_json
from npllm.model import Model

__all__ = ["COMMANDS"]


@click.command()
@prompt_options
@model_options
@click.option("-o", "--output", metavar="FILE", required=True, help="Write this HTML file.")
@click.option(
    "--layer", type=int, help="Show the attention of this layer step by step. [the middle one]"
)
@click.option(
    "-n",
    "--max-new-tokens",
    type=click.IntRange(min=1, max=32),
    default=12,
    show_default=True,
    help="Show so many steps of the loop.",
)
@click.option(
    "--docs",
    metavar="ADDRESS",
    default="docs",
    show_default=True,
    help="Link the page to npllm's docs in this folder or at this address.",
)
@chat_option
@json_option
def explain(
    model: Callable[[], Model], prompt: str, output: str, chat: bool, as_json: bool, **options: Any
) -> None:
    """Write one HTML page that shows PROMPT in every figure of the chapter, with the numbers of
    the model.  It needs no network.
    """
    from npllm.page.explain import explain as run

    start = time.perf_counter()
    page = run(model(), as_prompt(prompt, chat), output, **options)
    facts = {
        "file": output,
        "bytes": Path(output).stat().st_size,
        "sections": len(page.data),
        "tokens": page.data["pipeline"]["n_seq"],
        "seconds": time.perf_counter() - start,
    }
    if as_json:
        print_json(facts)
        return
    click.echo(
        f"{output}: {facts['sections']} sections, {facts['tokens']} tokens, "
        f"{facts['bytes'] / 1e6:.1f} MB, {facts['seconds']:.0f} s"
    )


COMMANDS = (explain,)
"""What `npllm` registers."""
