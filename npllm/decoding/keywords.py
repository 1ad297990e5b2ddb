"""The keyword arguments of `generate`, `stream` and `beam_search`, each written once.

The types are read by type checkers and editors (PEP 692); `takes` gives each function a signature
of the same names, with their defaults, for `help`, Jupyter and Sphinx, and refuses other names.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, TypeVar

from npllm.cache import KVCache
from npllm.decoding.options import MAX_NEW_TOKENS
from npllm.errors import NpllmTypeError

__all__ = ["BeamArguments", "GenerateArguments", "StreamArguments", "takes"]

Array = Any
LogitsProcessor = Callable[[Array, Array], Array]
Function = TypeVar("Function", bound=Callable[..., Any])


class _Common(TypedDict, total=False):
    """What every kind of decoding takes."""

    max_new_tokens: int | None
    repetition_penalty: float | None
    stop: str | Sequence[str] | None
    min_new_tokens: int | None
    no_repeat_ngram_size: int | None
    bad_words_ids: Sequence[Sequence[int]] | None
    suppress_tokens: Sequence[int] | None
    begin_suppress_tokens: Sequence[int] | None
    forced_eos_token_id: int | Sequence[int] | None
    logits_processors: Sequence[LogitsProcessor]
    tools: Sequence[dict[str, Any]] | None


class StreamArguments(_Common, total=False):
    """What `Model.stream` takes."""

    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    use_cache: bool
    cache: KVCache | None
    num_beams: int | None
    prompt_lookup_num_tokens: int | None
    top_logprobs: int


class GenerateArguments(StreamArguments, total=False):
    """What `Model.generate` takes."""

    attention_mask: Any
    return_dict_in_generate: bool


class BeamArguments(_Common, total=False):
    """What `Model.beam_search` takes."""

    attention_mask: Any
    num_beams: int
    num_return_sequences: int
    length_penalty: float
    early_stopping: bool | str


DEFAULTS: dict[str, Any] = {
    "max_new_tokens": MAX_NEW_TOKENS,
    "use_cache": True,
    "logits_processors": (),
    "return_dict_in_generate": False,
    "top_logprobs": 0,
}
"""Of every other argument the default is None."""

FIRST = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p")
"""What a signature begins with: the arguments that are used most."""


def takes(arguments: type, **defaults: Any) -> Callable[[Function], Function]:
    """Decorate a function whose last parameter is `**options: Unpack[arguments]`.

    Parameters
    ----------
    arguments : TypedDict
    **defaults
        That differ from those of the other functions.

    Returns
    -------
    decorate : function (function) -> function
        Its `inspect.signature` names every argument; another one raises NpllmTypeError, with the
        names that are spelled nearly like it.
    """
    types = arguments.__annotations__
    names = sorted(types, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    known = DEFAULTS | defaults
    added = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=known.get(name), annotation=types[name]
        )
        for name in names
    ]

    def decorate(function: Function) -> Function:
        own = inspect.signature(function)
        kept = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        accepted = [p.name for p in kept] + names

        @functools.wraps(function)
        def checked(*args: Any, **options: Any) -> Any:
            for name in options:
                if name not in accepted:
                    raise NpllmTypeError(_unknown(function.__name__, name, accepted))
            return function(*args, **options)

        checked.__signature__ = own.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
        return checked  # type: ignore[return-value]

    return decorate


def _unknown(function: str, name: str, accepted: Sequence[str]) -> str:
    """Say that a function has no such argument, and which one may be meant."""
    near = difflib.get_close_matches(name, accepted, n=2)
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"{function} has no argument {name!r}{meant}"
