"""Commands that generate text: `npllm generate`, `chat` and `beam`."""

from collections.abc import Callable
from typing import Any

import click

from npllm.analysis.speed import generate_timed
from npllm.cli.chat_loop import run_chat
from npllm.cli.options import (
    chat_option,
    json_option,
    model_options,
    new_tokens_option,
    prompt_options,
    refuse_without,
    sampling_options,
)
from npllm.cli.streams import as_prompt, print_json, print_stats, write
from npllm.model import Model

__all__ = ["COMMANDS"]

Load = Callable[[], Model]

EARLY_STOPPING: dict[str, bool | str] = {"true": True, "false": False, "never": "never"}


@click.command()
@prompt_options
@model_options
@sampling_options
@chat_option
@click.option("--system", metavar="TEXT", help="Begin with this system message, with --chat.")
@click.option(
    "--top-logprobs",
    type=click.IntRange(min=0),
    default=0,
    help="Name so many of the most likely tokens at each step, with --json.",
)
@json_option
def generate(
    prompt: str, model: Load, chat: bool, system: str | None, as_json: bool, **options: Any
) -> None:
    """Continue PROMPT ("-": standard input) and stream the new text.

    A model that was trained to chat goes on with a PROMPT as with any text; with --chat it answers.
    """
    if not as_json:
        refuse_without("log-probabilities are printed with --json", "top_logprobs")
    if not chat:
        refuse_without("a system message goes with --chat", "system")
    text, loaded = as_prompt(prompt, chat, system), model()
    if as_json:
        print_json(generate_timed(loaded, text, lambda _: None, details=True, **options))
        return
    stats = generate_timed(loaded, text, write, echo=True, **options)
    click.echo()
    print_stats(stats)


@click.command()
@model_options
@sampling_options
@click.option("--system", metavar="TEXT", help="Begin with this system message.")
@click.option("--save", metavar="FILE", type=click.Path(), help="Save the conversation at the end.")
@click.option(
    "--resume", metavar="FILE", type=click.Path(), help="Go on with a saved conversation."
)
def chat(
    model: Load, system: str | None, save: str | None, resume: str | None, **options: Any
) -> None:
    """Chat with the model.  /help lists the commands, /exit or Ctrl-D ends the program, Ctrl-C
    stops an answer.
    """
    if resume is not None:
        refuse_without("a saved conversation has its own system message", "system")
    if not options["use_cache"]:
        refuse_without("a conversation is saved with its cache", "save", "resume")
    run_chat(model(), system, options, save=save, resume=resume)


@click.command()
@prompt_options
@model_options
@click.option(
    "--num-beams",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Keep so many beams at each step.",
)
@click.option(
    "--num-return-sequences",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Return so many answers, at most --num-beams.",
)
@new_tokens_option(50, least=1)
@click.option(
    "--length-penalty",
    type=float,
    default=1.0,
    show_default=True,
    help="Divide scores by the length to this power; larger values prefer longer answers.",
)
@click.option(
    "--early-stopping",
    type=click.Choice(tuple(EARLY_STOPPING)),
    default="false",
    show_default=True,
    help="End with the first finished answers; when no better one is likely; when none is "
    "possible.",
)
@click.option("--repetition-penalty", type=float, help="Make repeated tokens less likely, above 1.")
@chat_option
@json_option
def beam(
    prompt: str, model: Load, chat: bool, early_stopping: str, as_json: bool, **options: Any
) -> None:
    """Find the most likely answers to PROMPT ("-": standard input) by beam search."""
    text = as_prompt(prompt, chat)
    answers = model().beam_search(text, early_stopping=EARLY_STOPPING[early_stopping], **options)
    if as_json:
        print_json(answers)
        return
    for answer in answers:
        write(f"{answer['score']:9.4f}  {answer['text']!r}\n")


COMMANDS = (generate, chat, beam)
