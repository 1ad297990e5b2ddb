"""Standard input, output and error of the commands."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click

from npllm.errors import NpllmError, NpllmOSError, NpllmValueError
from npllm.progress import report, write_line

__all__ = [
    "as_prompt",
    "from_stdin",
    "is_terminal",
    "print_json",
    "print_stats",
    "read_file",
    "read_prompt",
    "tokens_and_rate",
    "usage_errors",
    "write",
]

USAGE = 2  # exit code


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Report an error of the caller on stderr and exit with 2: exit code 1 is an answer."""
    try:
        yield
    except NpllmError as error:
        report(str(error))
        click.get_current_context().exit(USAGE)


def read_prompt(prompt: str | None, file: str | None = None) -> str:
    """Return the prompt: of a file, of standard input where it is "-" or left out, or itself.

    The newline that `echo` and editors put at the end of a text is no part of the prompt: one is
    removed from standard input and from a file.
    """
    if file is not None:
        return _without_newline(read_file(file))
    if prompt not in (None, "-"):
        return str(prompt)
    if is_terminal(sys.stdin):
        write_line("npllm: type the prompt, then Ctrl-D at the start of a line")
    return _without_newline(from_stdin(sys.stdin.read))


def _without_newline(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")


def is_terminal(stream: Any) -> bool:
    """Return whether a stream is a terminal; False where it is None, closed or no file."""
    try:
        return bool(stream.isatty())
    except (AttributeError, OSError, ValueError):
        return False


def as_prompt(text: str, chat: bool, system: str | None = None) -> Any:
    """Return a prompt as a conversation where the chat template is wanted, else as it is."""
    if not chat:
        return text
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": text}]


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
    prompt = tokens_and_rate(stats["prompt_tokens"], stats["prompt_tokens_per_second"])
    new = tokens_and_rate(stats["new_tokens"], stats["new_tokens_per_second"])
    write_line(f"prompt {prompt}; generation {new}; peak memory {stats['peak_bytes'] / 1e6:.0f} MB")


def tokens_and_rate(n: int, rate: float | None) -> str:
    """Say how many tokens, and how fast; no rate where too few of them came to measure one."""
    count = "1 token" if n == 1 else f"{n} tokens"
    return count if rate is None else f"{count}, {rate:.1f} tokens/s"
