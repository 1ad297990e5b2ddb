"""The conversation of `npllm chat`: read a line, print the answer, keep the messages."""

import sys
from typing import Any

import click

from npllm.analysis.speed import generate_timed
from npllm.cli.streams import from_stdin, print_stats, write
from npllm.errors import NpllmError
from npllm.model import Model
from npllm.progress import report

__all__ = ["run_chat"]

Messages = list[dict[str, str]]


def run_chat(model: Model, system: str | None, options: dict[str, Any]) -> None:
    """Answer line after line until /exit or the end of the input.

    Parameters
    ----------
    model : Model
    system : str or None
        System message.
    options : dict
        As in `Model.generate`.

    Raises
    ------
    NpllmError
        Before the first line, when an option is invalid or the model has no chat template.
    """
    opening = [] if system is None else [_message("system", system)]
    messages = list(opening)
    model.stream([*opening, _message("user", "Hello")], **options)  # raises before the first line
    while True:
        line = _read_line()
        if line is None or line == "/exit":
            return
        if line == "/reset":
            messages = list(opening)
        elif line:
            messages = _answer(model, [*messages, _message("user", line)], options)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _read_line() -> str | None:
    """Read a line, with line editing on a terminal.

    None at the end of the input, "" after Ctrl-C.
    """
    try:
        import readline  # noqa: F401 - its import switches line editing on
    except ImportError:
        pass
    try:
        return from_stdin(input, "> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        click.echo()
        return ""


def _answer(model: Model, messages: Messages, options: dict[str, Any]) -> Messages:
    """Print the answer and return the messages with it.  After Ctrl-C the answer so far is kept;
    after an error, such as a full context, the last message is dropped.
    """
    answer: list[str] = []

    def write_piece(piece: str) -> None:
        answer.append(piece)
        write(piece)

    try:
        stats = generate_timed(model, messages, write_piece, **options)
        click.echo()
        print_stats(stats)
    except KeyboardInterrupt:
        click.echo(" [stopped]")
    except NpllmError as error:
        report(f"{error}; /reset starts a new conversation")
        return messages[:-1]
    return [*messages, _message("assistant", "".join(answer))]
