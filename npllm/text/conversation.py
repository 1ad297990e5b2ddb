"""Conversations: what they must be, and what a chat template leaves out of them."""

from typing import Any

from npllm.config.strict_json import quote
from npllm.errors import NpllmError, NpllmTypeError, NpllmValueError
from npllm.text.chat_template import render
from npllm.text.template_process import Allowance

__all__ = ["check_messages", "check_tools", "find_left_out"]


def check_messages(messages: Any) -> None:
    """Raise unless messages are a list of {"role": ..., "content": ...}."""
    if not isinstance(messages, list | tuple):
        raise NpllmTypeError(f"messages must be a list of dicts, got {type(messages).__name__}")
    if not messages:
        raise NpllmValueError("messages must hold at least one message")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise NpllmValueError(
                f'a message must be {{"role": ..., "content": ...}}, got {quote(message)}'
            )
        if "content" not in message and not _calls_tools(message):
            raise NpllmValueError(
                f'a message must be {{"role": ..., "content": ...}}, got {quote(message)}; only an '
                'assistant\'s message with "tool_calls" may have no content'
            )


def _calls_tools(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and "tool_calls" in message


def check_tools(tools: Any) -> None:
    """Raise unless tools are a list of objects, or None."""
    if tools is None:
        return
    if not isinstance(tools, list | tuple):
        raise NpllmTypeError(f"tools must be a list of JSON schemas, got {type(tools).__name__}")
    for tool in tools:
        if not isinstance(tool, dict):
            raise NpllmTypeError(f"a tool must be a JSON schema (a dict), got {quote(tool)}")


def find_left_out(
    source: str, messages: Any, names: dict[str, Any], text: str, allowance: Allowance
) -> list[str]:
    """Name what a template leaves out: messages that are not the assistant's, and tools.

    A message is left out when another content in its place gives the same text.

    Parameters
    ----------
    source, messages, names
        As in `render`.
    text : str
        What they give.
    allowance : Allowance
        When the time is over, what is not known by then counts as read.

    Returns
    -------
    left_out : list of str
        "the system message", ...: each role once.

    Notes
    -----
    Another content decides, not a conversation without the message: a template may write the role
    without the content, or the same text by default.  Templates leave out the assistant's thoughts
    by design, so its messages are not looked at.  One rendering with a number in the place of
    every content finds the messages that are read; only the others are tried one by one.
    """

    def differs(other_messages: Any, other_names: dict[str, Any]) -> bool:
        try:
            return render(source, other_messages, other_names, allowance) != text
        except NpllmError:  # the template reads it: it refuses another content
            return True

    others = _replaced(messages, text)
    try:
        marked = render(source, [other for other, _ in others], names, allowance)
    except NpllmError:
        marked = ""
    left_out: list[str] = []
    for i, (other, mark) in enumerate(others):
        what = f"the {messages[i]['role']} message"
        if mark is None or mark in marked or what in left_out:
            continue
        if not differs([*messages[:i], other, *messages[i + 1 :]], names):
            left_out.append(what)
    if names.get("tools") and not differs(messages, names | {"tools": None}):
        left_out.append("the list of tools")
    return left_out


def _replaced(messages: Any, text: str) -> list[tuple[Any, str | None]]:
    """Each message with a number in the place of its content, and the number; None where there is
    no content, or where it is the assistant's.
    """
    base = 90_817_263
    while str(base) in text:
        base += 1
    others: list[tuple[Any, str | None]] = []
    for i, message in enumerate(messages):
        mark = f"{base}{i:06d}"
        content = _with_mark(message.get("content"), mark)
        read = message["role"] != "assistant" and content != message.get("content")
        others.append((message | {"content": content}, mark) if read else (message, None))
    return others


def _with_mark(content: Any, mark: str) -> Any:
    """A content with a mark in the place of every text that is not blank."""
    if isinstance(content, str):
        return mark if content.strip() else content
    if isinstance(content, list | tuple):
        return [_with_mark(part, mark) for part in content]
    if isinstance(content, dict) and "text" in content:
        return content | {"text": _with_mark(content["text"], mark)}
    return content
