"""Standard input, output and error of the commands."""

import json
import sys
from collections.abc import Callable
from typing import Any

import click

from npllm.errors import NpllmOSError, NpllmValueError
from npllm.progress import report, write_line

__all__ = [
    "from_stdin",
    "print_json",
    "print_stats",
    "read_file",
    "read_prompt",
    "write",
]


def read_prompt(prompt: str, chat: bool = False) -> Any:
    """Return the prompt, read from standard input where it is "-"; as a message where the chat
    template is wanted.
    """
    text = from_stdin(sys.stdin.read) if prompt == "-" else prompt
    return [{"role": "user", "content": text}] if chat else text


def from_stdin(read: Callable[..., str], *args: Any) -> str:
    """Call a function that reads standard input; raise NpllmValueError for what is not text."""
    try:
        return read(*args)
    except UnicodeDecodeError as error:
        raise NpllmValueError(
            f"standard input is not valid {error.encoding} text "
            f"({error.reason} at byte {error.start})"
        ) from None


def read_file(file: str) -> str:
    """Return the text of a UTF-8 file, or of standard input where its name is "-"."""
    if file == "-":
        return from_stdin(sys.stdin.read)
    try:
        with open(file, encoding="utf-8") as stream:
            return stream.read()
    except UnicodeDecodeError as error:
        raise NpllmValueError(
            f"{file}: is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None
    except OSError as error:
        raise NpllmOSError(f"{file}: cannot be read ({error.strerror})") from None


def print_json(data: Any) -> None:
    """Print one JSON value; escape what is not ASCII unless stdout is UTF-8."""
    is_utf8 = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
    click.echo(json.dumps(data, ensure_ascii=not is_utf8, indent=2))


def write(text: str) -> None:
    """Print a piece of text and flush it."""
    click.echo(text, nl=False)


def print_stats(stats: dict[str, Any]) -> None:
    """Print speed and memory of a run on stderr, and what compiling the kernels took."""
    if stats["compile_seconds"]:
        report(f"compiled the kernels in {stats['compile_seconds']:.1f} s, not counted below")
    write_line(
        f"prompt {stats['prompt_tokens']} tokens, "
        f"{stats['prompt_tokens_per_second']:.1f} tokens/s; "
        f"generation {stats['new_tokens']} tokens, "
        f"{stats['new_tokens_per_second']:.1f} tokens/s; "
        f"peak memory {stats['peak_bytes'] / 1e6:.0f} MB"
    )
