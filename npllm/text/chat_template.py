"""Chat templates: the Jinja source of a folder, and the text that it makes of a conversation.

A template comes with the checkpoint, and anybody can publish one.  It runs in a sandbox, in a
process of its own with a limit of time and of memory: see `npllm.text.template_process`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from npllm.config.regular_file import is_present, read_text
from npllm.config.strict_json import LARGEST_JSON, printable
from npllm.errors import NpllmOSError, NpllmTypeError, NpllmValueError
from npllm.text.template_process import Allowance, process

__all__ = ["LARGEST_TEMPLATE", "read_chat_template", "render"]

LARGEST_TEMPLATE = 2**16  # characters; the longest published ones have some 20,000
LARGEST_TEXT = 10**7  # characters beyond those of the conversation


def render(
    source: str,
    messages: Any,
    names: dict[str, Any],
    allowance: Allowance | None = None,
) -> str:
    """Write a conversation with a chat template.

    Parameters
    ----------
    source : str
        Jinja source.
    messages : list of dict
    names : dict
        What else the template sees: bos_token, tools, add_generation_prompt, ...
    allowance : Allowance, optional
        Time that is shared with other renderings.

    Returns
    -------
    text : str

    Raises
    ------
    NpllmTypeError
        When `messages` or `names` hold what JSON cannot.
    NpllmValueError
        When the template is too long, is no Jinja, fails, refuses, reaches for what is not allowed,
        or needs too much time or memory.

    Notes
    -----
    Source: `render_jinja_template` in Transformers (trim_blocks, lstrip_blocks, loop controls,
    `{% generation %}`, a tojson that escapes nothing).
    """
    if len(source) > LARGEST_TEMPLATE:
        raise NpllmValueError(
            f"the chat template has {len(source)} characters; more than {LARGEST_TEMPLATE} are "
            "refused"
        )
    request = {"source": source, "messages": messages, "names": names, "n_more": LARGEST_TEXT}
    try:
        answer = process.ask(_to_json(request), Allowance() if allowance is None else allowance)
    except NpllmValueError as error:
        answer = {"error": str(error)}
    if "error" in answer:
        raise NpllmValueError(f"the chat template failed: {printable(answer['error'])}")
    return answer["text"]


def read_chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """Read the chat template of a folder.

    Parameters
    ----------
    folder : Path
    settings : dict
        Content of tokenizer_config.json.

    Returns
    -------
    source : str or None
        From chat_template.jinja, else from the settings: a string, or the default of a list of
        named ones.

    Raises
    ------
    NpllmOSError
        When the file is not UTF-8 text.
    NpllmValueError
        When the entry is no string.
    """
    file = folder / "chat_template.jinja"
    if is_present(file):
        try:
            return read_text(file, LARGEST_JSON, "utf-8")
        except NpllmValueError as error:
            raise NpllmOSError(f"{file}: cannot be read as UTF-8 text ({error})") from None
    template = settings.get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        named = [entry for entry in entries if entry.get("name") == "default"]
        template = named[-1].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise NpllmValueError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a string, got "
            f"{type(template).__name__}"
        )
    return template


def _to_json(request: dict[str, Any]) -> str:
    """Write a request as JSON."""
    try:
        return json.dumps(request, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise NpllmTypeError(
            "messages and tools must be what JSON can hold: text, numbers, true, false, null, "
            f"lists and objects ({printable(str(error)[:300])})"
        ) from None


def _plain(value: Any) -> Any:
    """The Python number of a NumPy scalar, which JSON does not know."""
    if isinstance(value, np.generic) and not isinstance(value, np.void | np.bytes_):
        return value.item()
    raise TypeError(f"got {type(value).__name__}")
