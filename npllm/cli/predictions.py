"""Commands that show probabilities: `npllm topk`, `score`, `perplexity`; and `npllm embed`."""

from collections.abc import Callable
from typing import Any

import click

from npllm.analysis.predictions import next_tokens, perplexity_facts, score_facts
from npllm.checkpoints.fetch import EMBEDDING_MODEL, fetch
from npllm.cli.options import (
    chat_option,
    filter_options,
    json_option,
    model_options,
    prompt_options,
    threads_option,
)
from npllm.cli.streams import as_prompt, print_json, read_file, write
from npllm.decoding.sampler_chain import FILTER_ORDERS
from npllm.encoder import Encoder, cosine_similarities
from npllm.errors import NpllmTypeError
from npllm.loading import load
from npllm.model import Model
from npllm.progress import write_line

__all__ = ["COMMANDS"]

Load = Callable[[], Model]


@click.command()
@prompt_options
@model_options
@click.option(
    "-k",
    "--top",
    "n",
    type=click.IntRange(min=1),
    help="Show so many tokens. [as many as --top-k keeps, else 10]",
)
@filter_options
@click.option(
    "--order",
    type=click.Choice(tuple(FILTER_ORDERS)),
    default="transformers",
    show_default=True,
    help="Apply the filters in this order.",
)
@chat_option
@json_option
def topk(
    prompt: str, model: Load, n: int | None, chat: bool, as_json: bool, **filters: Any
) -> None:
    """Show the most likely next tokens after PROMPT, and their probabilities after the filters."""
    n = n or filters["top_k"] or 10
    rows = next_tokens(model(), as_prompt(prompt, chat), n, **filters)
    if as_json:
        print_json(rows)
        return
    for row in rows:
        bar = "█" * round(40 * row["probability"])
        click.echo(f"{row['id']:>7}  {row['text']!r:<20} {row['probability']:8.4f}  {bar}")


@click.command()
@prompt_options
@model_options
@json_option
def score(prompt: str, model: Load, as_json: bool) -> None:
    """Show the log-probability of every token of PROMPT, given the tokens before it."""
    facts = score_facts(model(), prompt, progress=True)
    if as_json:
        print_json(facts)
        return
    for row in facts["tokens"]:
        value = "" if row["log_probability"] is None else f"{row['log_probability']:.4f}"
        write(f"{row['id']:>7}  {row['text']!r:<20} {value:>9}\n")
    click.echo(
        f"log-probability {facts['log_probability']:.4f}, perplexity {facts['perplexity']:.4f}"
    )


@click.command()
@click.argument("file", default="-", type=click.Path(allow_dash=True))
@model_options
@click.option(
    "--max-length",
    type=click.IntRange(min=2),
    help="Give a window so many tokens. [2048, or the context length]",
)
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    help="Begin a window so many tokens after the last one. [half a window]",
)
@json_option
def perplexity(file: str, model: Load, as_json: bool, **options: Any) -> None:
    """Measure the perplexity of a text FILE ("-": standard input) of any length, with overlapping
    windows.
    """
    facts = perplexity_facts(model(), read_file(file), progress=True, **options)
    if as_json:
        print_json(facts)
        return
    click.echo(
        f"perplexity {facts['perplexity']:.4f}, {facts['bits_per_byte']:.4f} bits per byte, "
        f"{facts['tokens']} tokens"
    )
    write_line(f"{facts['tokens_per_second']:.1f} tokens/s, {facts['seconds']:.1f} s")


@click.command()
@click.argument("texts", metavar="TEXT TEXT ...", nargs=-1, required=True)
@click.option(
    "-m",
    "--model",
    "path",
    metavar="PATH",
    help="Load this folder of an encoder, or fetched encoder. "
    f"[{EMBEDDING_MODEL}, fetched on first use]",
)
@threads_option
@json_option
def embed(texts: tuple[str, ...], path: str | None, as_json: bool) -> None:
    """Show the cosine similarity of every pair of texts, by their embeddings."""
    encoder = load(fetch(EMBEDDING_MODEL) if path is None else path)
    if not isinstance(encoder, Encoder):
        raise NpllmTypeError(
            f"{path} is a language model and is no encoder, which turns texts into vectors: leave "
            f"out -m for {EMBEDDING_MODEL}, or name a folder of model_type bert"
        )
    similarities = cosine_similarities(encoder.embed(list(texts)))
    if as_json:
        print_json({"texts": list(texts), "similarities": similarities.tolist()})
        return
    for number, (row, text) in enumerate(zip(similarities, texts, strict=True), 1):
        write(f"{number:>3}  {' '.join(f'{value:7.4f}' for value in row)}  {text[:80]!r}\n")


COMMANDS = (topk, score, perplexity, embed)
