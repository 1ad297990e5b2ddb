"""The conversation of `npllm chat`: messages in, answers out, the KV cache kept."""

import json
import sys
from dataclasses import dataclass, field
from typing import Any

import click

from npllm.analysis.speed import generate_timed
from npllm.cache import KVCache
from npllm.cache.files import read_note
from npllm.cli.streams import from_stdin, is_terminal, print_stats, write
from npllm.config.strict_json import parse_json
from npllm.errors import NpllmError, NpllmValueError
from npllm.model import Model
from npllm.progress import report, stderr_is_terminal, write_line

__all__ = ["run_chat"]

Messages = list[dict[str, str]]

HELP = """\
/help         this list
/undo         forget the last message and its answer
/reset        start a new conversation
/save FILE    save the conversation, for npllm chat --resume FILE
/exit         end the program, as Ctrl-D does
Ctrl-C stops an answer.
Several lines are one message where each but the last ends with \\, or between \"\"\" marks.
A message that begins with / is written //."""
QUOTES = '"""'


@dataclass
class Conversation:
    """Messages, and the cache of what the model has read of them.

    The cache is cut to the longest common prefix at the next message, so that nothing of it has to
    change when messages are forgotten.
    """

    model: Model
    opening: Messages
    options: dict[str, Any]
    messages: Messages = field(default_factory=list)
    cache: KVCache | None = None

    def save(self, file: str) -> None:
        """Write messages and cache to one file."""
        if self.cache is None:
            raise NpllmValueError("a conversation without a cache (--no-use-cache) is not saved")
        self.cache.save(file, note=json.dumps({"messages": self.messages}))

    def resume(self, file: str) -> None:
        """Go on with a saved conversation."""
        messages = parse_json(read_note(file) or "{}", file).get("messages")
        is_list = isinstance(messages, list) and all(
            isinstance(m, dict) and set(m) == {"role", "content"} for m in messages
        )
        if not is_list or not all(isinstance(x, str) for m in messages for x in m.values()):
            raise NpllmValueError(f"{file}: holds no conversation of npllm chat")
        self.messages, self.cache = messages, self.model.load_cache(file)


def run_chat(
    model: Model,
    system: str | None,
    options: dict[str, Any],
    *,
    save: str | None = None,
    resume: str | None = None,
) -> None:
    """Answer message after message until /exit or the end of the input.

    Parameters
    ----------
    model : Model
    system : str or None
        System message.
    options : dict
        As in `Model.generate`.
    save : str or None
        File to which the conversation is saved at the end.
    resume : str or None
        File of a saved conversation to go on with.

    Raises
    ------
    NpllmError
        Before the first line, when an option is invalid, the model has no chat template, or the
        saved conversation is not of this model.
    """
    opening = [] if system is None else [_message("system", system)]
    talk = Conversation(model, opening, options, list(opening))
    model.stream([*opening, _message("user", "Hello")], **options)  # raises before the first line
    if options.get("use_cache", True):
        talk.cache = model.new_cache()
    if resume is not None:
        talk.resume(resume)
    if is_terminal(sys.stdin) and stderr_is_terminal():
        write_line(f"{model.folder}, {model.ops.name} ops; /help lists the commands")
    _converse(talk)
    if save is not None:
        talk.save(save)


def _converse(talk: Conversation) -> None:
    """Read and answer until the end."""
    while True:
        line = _read_message()
        if line is None or line == "/exit":
            return
        if line.startswith("/") and not line.startswith("//"):
            _command(talk, *line.split(maxsplit=1))
        elif line:
            text = line[1:] if line.startswith("//") else line
            talk.messages = _answer(talk, [*talk.messages, _message("user", text)])


def _command(talk: Conversation, name: str, argument: str = "") -> None:
    """Do what a line that begins with a slash asks for."""
    if name == "/help":
        write_line(HELP)
    elif name == "/reset":
        talk.messages = list(talk.opening)
        report("a new conversation begins")
    elif name == "/undo":
        _undo(talk)
    elif name == "/save" and argument:
        try:
            talk.save(argument)
            report(f"saved to {argument}")
        except NpllmError as error:
            report(str(error))
    elif name == "/save":
        report("/save needs the name of a file")
    else:
        report(f"unknown command {name}: /help lists them; // begins a message with a slash")


def _undo(talk: Conversation) -> None:
    """Forget the last message of the user and all after it."""
    asked = [n for n, message in enumerate(talk.messages) if message["role"] == "user"]
    if not asked:
        report("there is no message to forget")
        return
    report(f"forgot {talk.messages[asked[-1]]['content'][:40]!r} and its answer")
    talk.messages = talk.messages[: asked[-1]]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _read_message() -> str | None:
    """Read a message of one line, or of several; None at the end of the input."""
    line = _read_line("> ")
    if line is None:
        return None
    if line.startswith(QUOTES):
        return _read_quoted(line.removeprefix(QUOTES))
    lines = []
    while line is not None and line.endswith("\\"):
        lines.append(line.removesuffix("\\"))
        line = _read_line(". ")
    return "\n".join([*lines, line or ""]).strip()


def _read_quoted(line: str | None) -> str:
    """Read lines until the closing quotes."""
    lines: list[str] = []
    while line is not None and QUOTES not in line:
        lines.append(line)
        line = _read_line(". ")
    return "\n".join([*lines, (line or "").partition(QUOTES)[0]]).strip()


def _read_line(prompt: str) -> str | None:
    """Read a line, with line editing on a terminal.

    None at the end of the input, "" after Ctrl-C.
    """
    try:
        import readline  # noqa: F401 - its import switches line editing on
    except ImportError:
        pass
    try:
        return from_stdin(input, prompt if is_terminal(sys.stdin) else "").rstrip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        click.echo()
        return ""


def _answer(talk: Conversation, messages: Messages) -> Messages:
    """Print the answer and return the messages with it.  After Ctrl-C the answer so far is kept;
    after an error, such as a full context, the last message is dropped.
    """
    answer: list[str] = []

    def write_piece(piece: str) -> None:
        answer.append(piece)
        write(piece)

    try:
        options = talk.options | {"cache": talk.cache}
        stats = generate_timed(talk.model, messages, write_piece, **options)
        click.echo()
        print_stats(stats)
    except KeyboardInterrupt:
        click.echo(" [stopped]")
    except NpllmError as error:
        report(f"{error}; /reset starts a new conversation")
        return messages[:-1]
    return [*messages, _message("assistant", "".join(answer))]
