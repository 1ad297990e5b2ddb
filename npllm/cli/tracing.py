"""Commands that look inside a run: `npllm trace` and `npllm lens`."""

from collections.abc import Callable, Iterator
from typing import Any

import click

from npllm.cli.options import (
    adapter_option,
    json_option,
    load_causal,
    model_options,
    path_option,
    prompt_options,
    refuse_without,
    threads_option,
)
from npllm.cli.streams import print_json, write
from npllm.model import Model
from npllm.progress import write_line

__all__ = ["COMMANDS"]

Facts = dict[str, Any]


class Numbers(click.ParamType):
    """Integers with commas and ranges between: "0,3:6" is 0, 3, 4 and 5."""

    name = "numbers"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[int]:
        """Turn the text into a list."""
        numbers: list[int] = []
        for part in str(value).split(","):
            start, colon, stop = part.partition(":")
            try:
                numbers += range(int(start), int(stop)) if colon else [int(start)]
            except ValueError:
                self.fail(f"{part!r} is neither a number nor a range START:STOP", param, ctx)
        return numbers


@click.command()
@prompt_options
@path_option
@adapter_option
@threads_option
@click.option("-o", "--output", metavar="DIR", required=True, help="Write a new or empty folder.")
@click.option("--layers", type=Numbers(), metavar="N,N:N", help="Keep only these layers. [all]")
@click.option(
    "--names",
    multiple=True,
    metavar="PATTERN",
    help="Keep only these values, such as 'model.layers.*.mlp.*'; may be given again. "
    "*.self_attn.mask and *.self_attn.weights are kept on request only.",
)
@click.option("--tokens", type=Numbers(), metavar="N,N:N", help="Keep only these positions. [all]")
@click.option(
    "--dtype",
    type=click.Choice(("float32", "float64")),
    help="Run the definitions in this dtype. [the model's own operations and dtype]",
)
@click.option(
    "-n",
    "--max-new-tokens",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Decode so many tokens greedily, and trace each.",
)
@json_option
def trace(
    path: str | None,
    adapter: str | None,
    prompt: str,
    output: str,
    names: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Write every value of a run on PROMPT to DIR: safetensors files, and index.json, which says
    how each was made.
    """
    from npllm.tracing.record import trace as run

    model = load_causal(path, adapter=adapter)
    found = run(model, prompt, folder=output, names=names or None, **options)
    facts = {
        "folder": output,
        "values": len(found),
        "bytes": sum(x.nbytes for x in found.values()),
        "steps": len(found.index["steps"]),
        "tokens": sum(len(step["input_ids"][0]) for step in found.index["steps"]),
        "ops": found.index["ops"],
        "adapter": found.index["adapter"],
        "dtype": found.index["dtype"],
    }
    if as_json:
        print_json(facts)
        return
    click.echo(
        f"{output}: {facts['values']} values, {facts['bytes'] / 1e6:.1f} MB, "
        f"{facts['tokens']} tokens in {facts['steps']} step(s), {facts['ops']} ops"
    )


@click.command()
@prompt_options
@model_options
@click.option(
    "--position",
    type=int,
    default=-1,
    show_default=True,
    help="Take the token at this position; -1 is the last.",
)
@click.option(
    "-k",
    "--top",
    "--top-k",
    "n_top",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Show so many tokens.",
)
@click.option("--attention", is_flag=True, help="Show where each head looks instead.")
@json_option
def lens(
    model: Callable[[], Model], prompt: str, attention: bool, as_json: bool, **options: Any
) -> None:
    """Show what each layer would predict after PROMPT (the logit lens), or where each head
    looks.
    """
    from npllm.tracing.lens import lens_facts

    if as_json:
        refuse_without("--json holds both", "attention")
    if attention:
        refuse_without("--attention shows heads, not predictions", "n_top")
    facts = lens_facts(model(), prompt, **options)
    if as_json:
        print_json(facts)
        return
    for line in _attention_lines(facts) if attention else _lens_lines(facts):
        write(line + "\n")
    if not attention:
        write_line(f"after {_quoted(facts['token'])} comes {_quoted(facts['prediction'])}")


def _lens_lines(facts: Facts) -> Iterator[str]:
    """Lay out the layers: rank and probability of the final token, distance, most likely tokens."""
    yield f"{'layer':>5} {'rank':>6} {'p':>7} {'KL':>7}  most likely tokens"
    for row in facts["layers"]:
        top = "  ".join(f"{_quoted(token)} {token['probability']:.3f}" for token in row["top"])
        number = row["name"].rpartition(".")[2]
        layer = number if number.isdigit() else "embed"
        yield f"{layer:>5} {row['rank']:>6} {row['probability']:>7.4f} {row['kl']:>7.3f}  {top}"


def _attention_lines(facts: Facts) -> Iterator[str]:
    """Lay out the heads: entropy, share of the first token, mean distance."""
    yield f"{'layer':>5} {'head':>4} {'entropy':>7} {'first':>6} {'distance':>8}"
    for head in facts["attention"]:
        yield (
            f"{head['layer']:>5} {head['head']:>4} {head['entropy']:>7.3f} "
            f"{head['first']:>6.1%} {head['distance']:>8.2f}"
        )


def _quoted(token: Facts) -> str:
    return str(token["id"]) if token["text"] is None else repr(token["text"])


COMMANDS = (trace, lens)
"""What `npllm` registers."""
