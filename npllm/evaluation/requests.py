"""Generation options of lm-eval's tasks as those of `Model.generate`."""

from typing import Any, NamedTuple

from npllm.config.strict_json import quote
from npllm.errors import NpllmTypeError, NpllmValueError

__all__ = ["GenerationRequest", "generation_request"]

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = ("temperature", "top_k", "top_p", "min_p")
OTHERS = ("repetition_penalty", "min_new_tokens", "no_repeat_ngram_size", "num_beams")


class GenerationRequest(NamedTuple):
    """What a task asks of a generation."""

    until: tuple[str, ...]  # the answer ends before the first of these
    max_new_tokens: int
    options: dict[str, Any]  # of `Model.generate`


def generation_request(kwargs: Any, max_gen_toks: int) -> GenerationRequest:
    """Read the generation_kwargs of a task.

    Parameters
    ----------
    kwargs : dict
        until, max_gen_toks (or max_new_tokens, max_tokens, max_completion_tokens), do_sample,
        temperature, top_k, top_p, min_p, repetition_penalty, min_new_tokens, no_repeat_ngram_size,
        num_beams.
    max_gen_toks : int
        Where the task says nothing.

    Returns
    -------
    request : GenerationRequest

    Raises
    ------
    NpllmTypeError, NpllmValueError
        For an option that is none of these.

    Notes
    -----
    Without do_sample a positive temperature means sampling; do_sample: false is greedy, whatever
    the temperature.

    Source: `normalize_gen_kwargs` in lm-eval 0.4.13.
    """
    if not isinstance(kwargs, dict):
        raise NpllmTypeError(f"generation_kwargs must be a dict, got {quote(kwargs)}")
    known = ("until", "do_sample", *LENGTHS, *SAMPLING, *OTHERS)
    unknown = sorted(set(kwargs) - set(known))
    if unknown:
        raise NpllmValueError(
            f"generation_kwargs: {', '.join(unknown)} is not supported; {', '.join(known)} are"
        )
    until = kwargs.get("until") or []
    until = [until] if isinstance(until, str) else until
    lengths = [kwargs[name] for name in LENGTHS if kwargs.get(name) is not None]
    do_sample = kwargs.get("do_sample")
    if do_sample is None:
        do_sample = float(kwargs.get("temperature") or 0) > 0
    names = (*SAMPLING, *OTHERS) if do_sample else OTHERS
    options = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    n_new = int(lengths[0]) if lengths else max_gen_toks
    return GenerationRequest(
        tuple(x for x in until if x), n_new, {"do_sample": bool(do_sample), **options}
    )
