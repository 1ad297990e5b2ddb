"""The parameters of requests: which there are, and what each may be."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from npllm.config.strict_json import is_int, is_token, quote
from npllm.serve.errors import Refusal

__all__ = ["CHAT", "COMPLETION", "EMBEDDING", "checked_fields"]


class Kind(NamedTuple):
    """What a value must be."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _integer(least: int, most: int) -> Kind:
    return Kind(f"an integer in {least} ... {most}", lambda x: is_int(x) and least <= x <= most)


def _number(least: float, most: float) -> Kind:
    words = f"a number in {least:g} ... {most:g}"
    return Kind(words, lambda x: _is_number(x) and least <= x <= most)


def _list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, list) and all(map(holds, x))


FLAG = Kind("true or false", lambda x: isinstance(x, bool))
TEXT = Kind("a string", lambda x: isinstance(x, str))
COUNT = _integer(0, 2**31 - 1)
TOKENS = Kind("a list of token ids", _list_of(is_token))
OBJECT = Kind("an object", lambda x: isinstance(x, dict))


def _is_stop(x: Any) -> bool:
    return isinstance(x, str) and 0 < len(x) <= MOST_STOP


MOST_STOP = 1000  # characters of a stop string, with which the end of the text is compared
STOP = Kind(
    f"a string or a list of at most 16 strings, each of 1 ... {MOST_STOP} characters",
    lambda x: _is_stop(x) or (_list_of(_is_stop)(x) and len(x) <= 16),
)
BIAS = Kind(
    "an object of token ids to numbers in -100 ... 100",
    lambda x: (
        isinstance(x, dict)
        and all(
            key.isdecimal() and len(key) < 10 and _is_number(value) and -100 <= value <= 100
            for key, value in x.items()
        )
    ),
)
ANY = Kind("anything", lambda _: True)

DECODING = {
    "temperature": _number(0, 1e6),
    "top_p": _number(0, 1),
    "top_k": COUNT,
    "min_p": _number(0, 1),
    "repetition_penalty": Kind("a number above 0", lambda x: _is_number(x) and 0 < x < 1e30),
    "seed": _integer(0, 2**64 - 1),
    "stop": STOP,
    "min_new_tokens": COUNT,
    "no_repeat_ngram_size": COUNT,
    "bad_words_ids": Kind("lists of token ids", _list_of(_list_of(is_token))),
    "suppress_tokens": TOKENS,
    "begin_suppress_tokens": TOKENS,
    "forced_eos_token_id": Kind("a token id", is_token),
}
PENALTIES = {
    "frequency_penalty": _number(-2, 2),
    "presence_penalty": _number(-2, 2),
    "logit_bias": BIAS,
}
COMMON = {
    "model": TEXT,
    "stream": FLAG,
    "stream_options": OBJECT,
    "max_tokens": COUNT,
    "n": _integer(1, 128),
    **DECODING,
    **PENALTIES,
}
CHAT = {
    **COMMON,
    "messages": Kind(
        "a list of at least one message", lambda x: isinstance(x, list) and len(x) > 0
    ),
    "max_completion_tokens": COUNT,
    "logprobs": FLAG,
    "top_logprobs": _integer(0, 20),
}
COMPLETION = {
    **COMMON,
    "prompt": Kind(
        "a string, a list of token ids, or a list of either, none of them empty",
        lambda x: bool(x) and isinstance(x, str | list),
    ),
    "echo": FLAG,
    "logprobs": _integer(0, 20),
}
EMBEDDING = {
    "model": TEXT,
    "input": Kind("a string or a list of strings", lambda x: bool(x) and isinstance(x, str | list)),
    "encoding_format": Kind('"float" or "base64"', lambda x: x in ("float", "base64")),
    "dimensions": _integer(1, 2**31 - 1),
}

HARMLESS = ("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier")
"""Accepted and ignored: none of their values changes an answer."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "store": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "verbosity": ("medium",),
}
"""Not implemented: the values that change no answer."""


KNOWN = ("reasoning_effort", "audio", "prediction", "web_search_options")
"""Parameters of OpenAI's that have no neutral value here."""


def _why_refused(name: str, value: Any, fields: Mapping[str, Kind]) -> str:
    """Say why a parameter is not taken: OpenAI's ones, others, and what a typing error meant."""
    shown = quote(name)[1:-1]
    if name in NEUTRAL or name in KNOWN:
        return (
            f"{shown} = {quote(value)} is not implemented and would change the answer: leave it out"
        )
    close = difflib.get_close_matches(name[:100], fields, 1)
    return f"there is no parameter {shown}" + (f"; did you mean {close[0]}?" if close else "")


def checked_fields(body: Mapping[str, Any], fields: Mapping[str, Kind]) -> dict[str, Any]:
    """Return the parameters of a request; null counts as left out.

    Raises
    ------
    Refusal
        For a value of the wrong kind, and for a parameter that is not implemented and would change
        the answer: names it.
    """
    found = {}
    for name, value in body.items():
        if value is None or name in HARMLESS or value in NEUTRAL.get(name, ()):
            continue
        if name not in fields:
            raise Refusal(_why_refused(name, value, fields), name, "unsupported_parameter")
        kind = fields[name]
        if not kind.holds(value):
            raise Refusal(f"{name} must be {kind.words}, got {quote(value)}", name, "invalid_value")
        found[name] = value
    return found
