"""What a caller may ask of a decoding loop, checked and combined with generation_config.json."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from npllm.arguments import check_flag, check_integer, check_number, to_python
from npllm.cache import KVCache
from npllm.config.strict_json import is_token, quote
from npllm.decoding.generation_config import Constraints, GenerationConfig, Sampling
from npllm.errors import NpllmTypeError, NpllmValueError

__all__ = [
    "MAX_NEW_TOKENS",
    "Options",
    "check_constraints",
    "check_sampling",
    "require_details",
    "resolve_constraints",
    "resolve_options",
    "resolve_sampling",
]

Array = Any
MAX_NEW_TOKENS = 50  # where the caller does not say
MOST_TOKENS, MOST_BEAMS = 2**31, 2**16


@dataclass(frozen=True)
class Options:
    """What one call of `generate`, `stream` or `beam_search` is to do: checked and complete."""

    max_new_tokens: int | None = MAX_NEW_TOKENS
    sampling: Sampling = field(default_factory=Sampling)
    constraints: Constraints = field(default_factory=Constraints)
    logits_processors: tuple[Callable[[Array, Array], Array], ...] = ()
    stop: tuple[str, ...] = ()
    seed: int | None = None
    use_cache: bool = True
    cache: KVCache | None = None
    top_logprobs: int = 0
    prompt_lookup_num_tokens: int = 0
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False


def resolve_options(
    config: GenerationConfig,
    *,
    max_new_tokens: int | None = MAX_NEW_TOKENS,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
    use_cache: bool = True,
    cache: KVCache | None = None,
    top_logprobs: int = 0,
    prompt_lookup_num_tokens: int | None = None,
    logits_processors: Sequence[Callable[[Array, Array], Array]] = (),
    do_sample: bool | None = None,
    repetition_penalty: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    **others: Any,
) -> Options:
    """Check everything that a caller may ask for, before any work is done.

    Parameters
    ----------
    config : GenerationConfig
        Says what the caller leaves open.
    max_new_tokens, stop, ...
        As in `npllm.Model.generate`.
    **others
        The fields of `Constraints`; num_beams, num_return_sequences, length_penalty and
        early_stopping.

    Returns
    -------
    options : Options

    Raises
    ------
    NpllmTypeError, NpllmValueError
        Naming the option, and the file where the value comes from there.
    """
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    names = [entry.name for entry in fields(Constraints)]
    constraints = {name: others.pop(name) for name in names if name in others}
    n_new = _token_count(max_new_tokens)
    seed = None if seed is None else check_integer("seed", seed, 0, 2**64 - 1)
    sampling = resolve_sampling(
        config.sampling,
        config.source,
        do_sample=do_sample,
        repetition_penalty=repetition_penalty,
        **filters,
    )
    config.require_supported(sampling.do_sample)
    beams = _beam_options(config, **others)
    if beams["num_beams"] > 1 and not check_flag("use_cache", use_cache):
        raise NpllmValueError(
            f"num_beams = {beams['num_beams']} always uses the cache: leave out use_cache=False"
        )
    return Options(
        max_new_tokens=n_new,
        seed=seed,
        sampling=sampling,
        stop=_stop_strings(config, stop),
        constraints=resolve_constraints(config.constraints, config.source, **constraints),
        logits_processors=_processors(logits_processors),
        use_cache=check_flag("use_cache", use_cache),
        cache=_cache(cache, use_cache, beams["num_beams"]),
        top_logprobs=check_integer("top_logprobs", top_logprobs, 0, MOST_TOKENS),
        prompt_lookup_num_tokens=_lookup(prompt_lookup_num_tokens, use_cache, beams["num_beams"]),
        **beams,
    )


def require_details(options: Options, wanted: bool, how: str) -> None:
    """Raise for an option that would be ignored, or that beams cannot give.

    Parameters
    ----------
    options : Options
    wanted : bool
        Whether details are asked for.
    how : str
        What asks for them.
    """
    if options.top_logprobs and not wanted:
        raise NpllmValueError(f"top_logprobs = {options.top_logprobs} goes with {how}")
    if wanted and options.num_beams > 1:
        raise NpllmValueError(
            f"{how} takes one beam, got num_beams = {options.num_beams}; beam_search returns scores"
        )


def _token_count(n: Any) -> int | None:
    """How many tokens to generate at most; None: as many as the context holds."""
    if n is None:
        return None
    return check_integer("max_new_tokens", n, 0, MOST_TOKENS, " or None (until a stop)")


def resolve_sampling(
    defaults: Sampling,
    source: str = "generation_config.json",
    *,
    do_sample: bool | None = None,
    repetition_penalty: float | None = None,
    **filters: Any,
) -> Sampling:
    """Combine the caller's options with those of the checkpoint.

    Parameters
    ----------
    defaults : Sampling
        From generation_config.json.
    source : str
        That file, for error messages.
    do_sample : bool, optional
        None: True where a filter is given, else as the checkpoint says.
    repetition_penalty : float, optional
    **filters
        temperature, top_k, top_p, min_p; None: as the checkpoint says, else off.  temperature=0
        means greedy, in the file as well.

    Returns
    -------
    sampling : Sampling

    Raises
    ------
    NpllmValueError
        For contradictory options, and for values out of range.  A value of the file counts only
        where it is used.
    """
    given = {name: to_python(value) for name, value in filters.items() if value is not None}
    penalty = to_python(repetition_penalty)
    check_sampling(Sampling(repetition_penalty=penalty, **given))
    do_sample = None if do_sample is None else check_flag("do_sample", do_sample)
    is_cold = given.get("temperature") == 0
    if do_sample is False and given and not is_cold:
        raise NpllmValueError(
            f"do_sample=False contradicts {', '.join(f'{k}={v}' for k, v in given.items())}: "
            "greedy decoding uses no sampling options; leave them out, or set do_sample=True"
        )
    if do_sample is None:
        do_sample = bool(given) or check_flag(f"{source}: do_sample", defaults.do_sample)
    used = replace(defaults, do_sample=do_sample, **given)
    if penalty is not None:
        used = replace(used, repetition_penalty=penalty)
    if is_cold or not do_sample or _is_zero(used.temperature):
        used = Sampling(repetition_penalty=used.repetition_penalty)
    return check_sampling(used, f"{source}: ")


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 0


def check_sampling(sampling: Sampling, where: str = "") -> Sampling:
    """Return the argument; raise for values out of range, before any work is done."""
    ranges: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "temperature": ("a number of at least 0", lambda x: 0 <= x < 1e30),
        "top_k": ("an integer of at least 0", lambda x: 0 <= x < 2**63),
        "top_p": ("a number in 0 ... 1", lambda x: 0 <= x <= 1),
        "min_p": ("a number in 0 ... 1", lambda x: 0 <= x <= 1),
        "repetition_penalty": ("a number above 0", lambda x: 0 < x < 1e30),
    }
    for name, (wanted, holds) in ranges.items():
        value = getattr(sampling, name)
        kinds = int if name == "top_k" else int | float
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        if value is not None and not (is_number and holds(value)):
            raise NpllmValueError(f"{where}{name} must be {wanted}, got {quote(value)}")
    return sampling


def resolve_constraints(
    defaults: Constraints, source: str = "generation_config.json", **given: Any
) -> Constraints:
    """Combine the caller's constraints with those of the checkpoint; token ids become tuples.

    Parameters
    ----------
    defaults : Constraints
        From generation_config.json.
    source : str
        That file, for error messages.
    **given
        The fields of `Constraints`; None: as the checkpoint says, else off.

    Returns
    -------
    constraints : Constraints

    Raises
    ------
    NpllmTypeError
        For an option that does not exist.
    NpllmValueError
        For values out of range.
    """
    mine = {name: value for name, value in given.items() if value is not None}
    checked = check_constraints(mine)
    rest = {
        entry.name: getattr(defaults, entry.name)
        for entry in fields(Constraints)
        if entry.name not in mine and getattr(defaults, entry.name) is not None
    }
    return Constraints(**check_constraints(rest, f"{source}: ") | checked)


def check_constraints(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return constraints by name, token ids as tuples of int; raise for values out of range."""
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name in ("no_repeat_ngram_size", "min_new_tokens"):
            checked[name] = check_integer(where + name, value, 0, MOST_TOKENS)
        elif name == "bad_words_ids":
            checked[name] = _bad_words(where + name, value)
        else:
            checked[name] = _token_ids(where + name, value)
    return checked


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    """A token id, or a list or array of them, as a tuple."""
    value = value.tolist() if hasattr(value, "tolist") else value
    ids = [value] if isinstance(value, int) else value
    if not isinstance(ids, list | tuple) or not all(is_token(to_python(i)) for i in ids):
        raise NpllmValueError(f"{name} must be token ids, got {quote(value)}")
    return tuple(to_python(i) for i in ids)


def _bad_words(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    """A list of lists of token ids, as tuples."""
    words = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(words, list | tuple) or any(isinstance(word, int) for word in words):
        raise NpllmValueError(f"{name} must be lists of token ids, got {quote(value)}")
    found = tuple(_token_ids(name, word) for word in words)
    if not all(found):
        raise NpllmValueError(
            f"{name} must be lists of token ids, none of them empty, got {quote(value)}"
        )
    return found


def _stop_strings(config: GenerationConfig, stop: Any) -> tuple[str, ...]:
    """The strings that end an answer: the caller's, else those of the file."""
    where = "stop"
    if stop is None:
        where, stop = f"{config.source}: stop_strings", config.stop_strings
    texts = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(texts, list | tuple) or not all(isinstance(t, str) and t for t in texts):
        raise NpllmTypeError(f"{where} must be strings, none of them empty, got {quote(stop)}")
    return tuple(texts)


def _lookup(n: int | None, use_cache: bool, num_beams: int) -> int:
    """How many tokens prompt lookup may propose; 0: it is off."""
    if n is None:
        return 0
    found = check_integer("prompt_lookup_num_tokens", n, 1, MOST_TOKENS)
    if not use_cache or num_beams > 1:
        other = f"num_beams is {num_beams}" if use_cache else "use_cache is False"
        raise NpllmValueError(
            f"prompt_lookup_num_tokens = {found} needs the cache and a single beam, and {other}: "
            "leave one of them out"
        )
    return found


def _cache(cache: Any, use_cache: bool, num_beams: int) -> KVCache | None:
    """The caller's cache, which is of use with one beam only."""
    if cache is None:
        return None
    if not isinstance(cache, KVCache):
        raise NpllmTypeError(f"cache must be a KVCache of model.new_cache(), got {quote(cache)}")
    if not use_cache or num_beams > 1:
        other = f"num_beams is {num_beams}" if use_cache else "use_cache is False"
        raise NpllmValueError(f"cache is given, and {other}: leave one of them out")
    return cache


def _processors(given: Any) -> tuple[Callable[[Array, Array], Array], ...]:
    """The caller's own functions (ids, logits) -> logits."""
    found = (given,) if callable(given) else given
    if not isinstance(found, list | tuple) or not all(map(callable, found)):
        raise NpllmTypeError(
            f"logits_processors must be functions (ids, logits) -> logits, got {quote(given)}"
        )
    return tuple(found)


def _beam_options(
    config: GenerationConfig,
    *,
    num_beams: int | None = None,
    num_return_sequences: int = 1,
    length_penalty: float | None = None,
    early_stopping: bool | str | None = None,
) -> dict[str, Any]:
    """The options of a beam search: the caller's, else those of the file, else one beam."""
    names = "num_beams", "length_penalty", "early_stopping"
    given = dict(zip(names, (num_beams, length_penalty, early_stopping), strict=True))
    prefix = {name: "" if given[name] is not None else f"{config.source}: " for name in names}
    n, penalty, early = (
        to_python(getattr(config, name) if given[name] is None else given[name]) for name in names
    )
    n = check_integer(prefix["num_beams"] + "num_beams", 1 if n is None else n, 1, MOST_BEAMS)
    penalty = 1.0 if penalty is None else penalty
    early = False if early is None else early
    check_number(prefix["length_penalty"] + "length_penalty", penalty, -100, 100)
    if not isinstance(early, bool) and early != "never":
        raise NpllmValueError(
            f'{prefix["early_stopping"]}early_stopping must be True, False or "never", '
            f"got {quote(early)}"
        )
    n_return = check_integer("num_return_sequences", num_return_sequences, 1, n, " (num_beams)")
    found = n, n_return, penalty, early
    return dict(zip(("num_beams", "num_return_sequences", *names[1:]), found, strict=True))
