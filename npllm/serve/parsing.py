"""From the body of a request to prompts and options."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from npllm.config.strict_json import is_int, is_token, quote
from npllm.decoding.options import Options, resolve_options
from npllm.errors import NpllmError
from npllm.serve.errors import Refusal
from npllm.serve.fields import CHAT, COMPLETION, DECODING, checked_fields
from npllm.serve.penalties import penalties

__all__ = ["Ask", "Limits", "parse_chat", "parse_completion", "require_model", "texts_or_ids"]

MESSAGE = ("role", "content", "name", "tool_calls", "tool_call_id")  # what templates may read
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens


@dataclass(frozen=True)
class Limits:
    """What a request may be.

    Attributes
    ----------
    max_prompt_tokens : int
    max_sequences : int
        Prompts times choices of one request.
    """

    max_prompt_tokens: int
    max_sequences: int


@dataclass(frozen=True)
class Ask:
    """A request: one entry of `options` for each prompt."""

    prompts: list[list[int]]
    options: list[Options]
    n: int = 1
    is_chat: bool = False
    echo: bool = False
    logprobs: bool = False
    stream: bool = False
    include_usage: bool = False


def require_model(name: Any, names: tuple[str, ...]) -> None:
    """Raise where a request names another model than the one that is served."""
    if name is not None and name not in names:
        raise Refusal(
            f"the model {quote(name)} is not served here; the one that is: {names[0]}",
            "model",
            "model_not_found",
            404,
        )


def parse_chat(model: Any, names: tuple[str, ...], body: Mapping[str, Any], limits: Limits) -> Ask:
    """Read the body of /v1/chat/completions.

    Raises
    ------
    Refusal, NpllmError
    """
    fields = checked_fields(body, CHAT)
    require_model(fields.get("model"), names)
    _require(fields, "messages")
    if "max_tokens" in fields and "max_completion_tokens" in fields:
        raise Refusal("give max_tokens or max_completion_tokens, not both", "max_tokens")
    messages = [_message(message, n) for n, message in enumerate(fields["messages"])]
    try:
        ids = model.require_tokenizer().encode_chat(messages)
    except NpllmError as error:
        raise Refusal(str(error), "messages", "invalid_value") from None
    n_new = fields.get("max_completion_tokens", fields.get("max_tokens"))
    with_logprobs, n_top = fields.get("logprobs", False), fields.get("top_logprobs", 0)
    if n_top and not with_logprobs:
        raise Refusal("top_logprobs goes with logprobs = true", "top_logprobs", "invalid_value")
    ask = _ask(model, fields, [ids], n_new, n_top, limits)
    return replace(ask, is_chat=True, logprobs=with_logprobs)


def parse_completion(
    model: Any, names: tuple[str, ...], body: Mapping[str, Any], limits: Limits
) -> Ask:
    """Read the body of /v1/completions.

    Raises
    ------
    Refusal, NpllmError
    """
    fields = checked_fields(body, COMPLETION)
    require_model(fields.get("model"), names)
    _require(fields, "prompt")
    prompts = [_ids_of(model, prompt) for prompt in texts_or_ids(fields["prompt"], "prompt")]
    n_new = fields.get("max_tokens", COMPLETION_TOKENS)
    ask = _ask(model, fields, prompts, n_new, fields.get("logprobs", 0), limits)
    return replace(ask, echo=fields.get("echo", False), logprobs="logprobs" in fields)


def texts_or_ids(value: Any, name: str) -> list[Any]:
    """Return a list of prompts: texts, or lists of token ids.

    Raises
    ------
    Refusal
        For anything else.
    """
    if isinstance(value, str):
        return [value]
    one = [value] if all(is_int(x) for x in value) else value
    for prompt in one:
        is_ids = isinstance(prompt, list) and bool(prompt) and all(map(is_token, prompt))
        if not (is_ids or (isinstance(prompt, str) and prompt)):
            raise Refusal(
                f"{name} must be a string, a list of token ids, or a list of either, none of them "
                f"empty, got {quote(value)}",
                name,
                "invalid_value",
            )
    return one


def _require(fields: Mapping[str, Any], name: str) -> None:
    if name not in fields:
        raise Refusal(f"{name} is missing", name, "missing_required_parameter")


def _message(message: Any, n: int) -> Any:
    """A message whose content is text: parts of type "text" are joined; null counts as left out."""
    if not isinstance(message, dict):
        return message
    message = {key: value for key, value in message.items() if value is not None}
    unknown = next((key for key in message if key not in MESSAGE), None)
    if unknown is not None:
        raise Refusal(
            f"a message may have {', '.join(MESSAGE)}, got {quote(unknown)}",
            "messages",
            "unsupported_parameter",
        )
    if message.get("role", "user") not in ROLES:
        raise Refusal(
            f"messages[{n}].role must be one of {', '.join(ROLES)}, got {quote(message['role'])}",
            "messages",
            "invalid_value",
        )
    content = message.get("content")
    if not isinstance(content, list):
        return message
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise Refusal(
                f'a part of a message must be {{"type": "text", "text": ...}}, got {quote(part)}',
                "messages",
                "invalid_value",
            )
    return message | {"content": "".join(part["text"] for part in content)}


def _ids_of(model: Any, prompt: Any) -> list[int]:
    """The token ids of a prompt."""
    n_vocab = model.config.vocab_size
    ids = prompt if isinstance(prompt, list) else model.require_tokenizer().encode(prompt)
    if not ids or max(ids) >= n_vocab:
        wrong = f"id {max(ids)}" if ids else "no token"
        raise Refusal(
            f"a prompt must hold ids below vocab_size = {n_vocab}, at least one, got {wrong}",
            "prompt",
            "invalid_value",
        )
    return ids


def _ask(
    model: Any,
    fields: Mapping[str, Any],
    prompts: list[list[int]],
    n_new: int | None,
    n_top: int,
    limits: Limits,
) -> Ask:
    """A request of some prompts, every limit checked."""
    n = fields.get("n", 1)
    if len(prompts) * n > limits.max_sequences:
        raise Refusal(
            f"{len(prompts)} prompts times n = {n} are more than {limits.max_sequences} sequences",
            "n" if n > 1 else "prompt",
            "too_many_sequences",
        )
    for ids in prompts:
        _check_length(model, len(ids), n_new, limits)
    given = {name: value for name, value in fields.items() if name in DECODING}
    seeds = [secrets.randbits(32) for _ in prompts]  # each prompt as by a request of its own
    options = [
        _options(model, {"seed": seed} | given, fields, len(ids), n_new, n_top)
        for ids, seed in zip(prompts, seeds, strict=True)
    ]
    streamed = fields.get("stream", False)
    return Ask(
        prompts, options, n, stream=streamed, include_usage=_includes_usage(fields, streamed)
    )


def _options(
    model: Any,
    given: dict[str, Any],
    fields: Mapping[str, Any],
    n_prompt: int,
    n_new: int | None,
    n_top: int,
) -> Options:
    """What `generate` would be asked for."""
    config = model.config
    if given.get("stop") is not None:
        model.require_tokenizer()
    if n_new is None:
        n_new = config.context_length - n_prompt
    try:
        return resolve_options(
            model.generation_config,
            max_new_tokens=n_new,
            top_logprobs=n_top,
            logits_processors=penalties(fields, n_prompt, config.vocab_size),
            num_beams=1,
            **given,
        )
    except Refusal:
        raise
    except NpllmError as error:
        param = next((name for name in given if name in str(error)), None)
        raise Refusal(str(error), param, "invalid_value") from None


def _check_length(model: Any, n_prompt: int, n_new: int | None, limits: Limits) -> None:
    """Raise where a prompt is too long, alone or with its answer."""
    most, length = limits.max_prompt_tokens, model.config.context_length
    if n_prompt > most:
        message = f"the prompt has {n_prompt} tokens, but this server takes at most {most}"
    elif n_prompt + (1 if n_new is None else n_new) > length:
        message = (
            f"the prompt has {n_prompt} tokens and the answer may have {n_new or 1}, but the "
            f"context length is {length}: shorten the prompt, or ask for fewer tokens"
        )
    else:
        return
    raise Refusal(message, "prompt", "context_length_exceeded")


def _includes_usage(fields: Mapping[str, Any], streamed: bool) -> bool:
    """Whether a stream ends with the counts of tokens."""
    options = fields.get("stream_options")
    if options is None:
        return False
    if not streamed:
        raise Refusal("stream_options goes with stream = true", "stream_options", "invalid_value")
    wrong = [name for name in options if name not in ("include_usage", "include_obfuscation")]
    usage = options.get("include_usage", False)
    if wrong or not isinstance(usage, bool):
        raise Refusal(
            f'stream_options must be {{"include_usage": true or false}}, got {quote(options)}',
            "stream_options",
            "invalid_value",
        )
    return usage
