"""The command `npllm eval`."""

from collections.abc import Callable
from typing import Any

import click

from npllm.cli.options import json_option, model_options
from npllm.cli.streams import print_json
from npllm.model import Model
from npllm.progress import report

__all__ = ["COMMANDS"]

KEPT = ("results", "groups", "n-samples", "versions", "n-shot", "higher_is_better")


@click.command(name="eval")
@click.option(
    "--tasks", required=True, metavar="NAME,...", help="Run these tasks or groups of lm-eval."
)
@model_options
@click.option(
    "--num-fewshot", type=click.IntRange(min=0), help="Show so many examples. [as the task says]"
)
@click.option(
    "--limit",
    type=click.FloatRange(min=0),
    help="Take at most so many documents of each task; below 1, that share of them.",
)
@click.option(
    "--include-path",
    type=click.Path(exists=True, file_okay=False),
    help="Find further tasks in this folder.",
)
@click.option(
    "--output-path", type=click.Path(), help="Write all results to this .json file, or to a folder."
)
@click.option(
    "--apply-chat-template", is_flag=True, help="Put each prompt through the chat template."
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Continue so many prompts at a time.",
)
@json_option
def evaluate(
    tasks: str,
    model: Callable[[], Model],
    output_path: str | None,
    limit: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Evaluate a model on tasks of lm-eval, the language model evaluation harness."""
    from npllm.evaluation.run import evaluate as run
    from npllm.evaluation.run import result_table, write_results

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    whole = int(limit) if limit is not None and limit >= 1 else limit
    results = run(model(), names, limit=whole, **options)
    if output_path is not None:
        report(f"results are in {write_results(results, output_path)}")
    if as_json:
        print_json({key: results[key] for key in KEPT if key in results})
    else:
        click.echo(result_table(results))


COMMANDS = (evaluate,)
"""What `npllm` registers."""
