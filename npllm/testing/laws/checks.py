"""Checks: a search for a case on which a function breaks a law."""

import importlib
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from npllm.errors import MissingExtraError, NpllmValueError, install_extra
from npllm.testing.laws.broken import LawBroken
from npllm.testing.laws.sampler import check_kind
from npllm.testing.laws.subjects import (
    Subject,
    features_for,
    parameter_names,
    subject_named,
)
from npllm.testing.laws.trial import Seen, examine

__all__ = [
    "Report",
    "check",
    "check_attention",
    "check_linear",
    "check_rms_norm",
    "check_rope",
    "check_sampler",
    "check_swiglu",
    "replay",
]


ARITHMETIC = ("accumulate", "roundings", "operands", "probabilities", "flush_to_zero")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Report:
    """What a check that found nothing has seen.

    Parameters
    ----------
    op : str
    features : tuple of str
        That were on.
    left_out : tuple of str
        That were off: not asked for, or not taken by the function.
    n_trial : int
        Calls whose output was judged.
    n_undecided : int
        Of them, those that rounding alone could explain.
    used : float
        Largest share of the error budget.
    seed : int
        Of the search.
    """

    op: str
    features: tuple[str, ...]
    left_out: tuple[str, ...]
    n_trial: int
    n_undecided: int
    used: float
    seed: int


def check(
    op: str,
    fn: Callable,
    features: Iterable[str] | None = None,
    tiles: tuple[int, ...] = (16, 64),
    max_examples: int = 200,
    *,
    dtype: str = "float32",
    seed: int | None = None,
    shrink: bool = True,
    kind: str = "probabilities",
    **arithmetic: Any,
) -> Report:
    """Check a function against every law of an operation.

    Parameters
    ----------
    op : str
        "attention", "apply_rope", "rope_tables", "rope_frequencies", "rope", "rms_norm", "linear",
        "swiglu", "qkv_projection", "embed", "lm_head", "sampler" or "detokenize".
    fn : callable
        With the signature of `npllm.ops.<op>`, on NumPy arrays (`npllm.testing.adapt` makes one);
        "rope" and "sampler" are called with the inputs of `diagnose` by name.
    features : set of str, optional
        What is on, of `SUBJECTS[op].features`.  None: all that the function's signature takes.
    tiles : tuple of int
        Lengths lie around multiples of them.
    max_examples : int
    dtype : str
        Of the inputs and the output: "float32", "float16" or "bfloat16".
    seed : int, optional
        Replays a search.  None: drawn, and given in the report and the failure.
    shrink : bool
        Report the smallest case, not the first.
    kind : str
        Of a sampler: what it returns, "probabilities" or "draws".
    **arithmetic
        As in `npllm.testing.verdict`: accumulate, roundings, operands, probabilities,
        flush_to_zero.

    Returns
    -------
    report : Report

    Raises
    ------
    LawBroken
        With the law in words, the smallest case, the share of the budget, the diagnosis, and a line
        of Python that replays it.
    NpllmValueError
        For an unknown operation or feature.
    MissingExtraError
        When Hypothesis is not installed.
    """
    subject = subject_named(op)
    _refuse_arithmetic(op, arithmetic)
    if dtype not in DTYPES or max_examples < 1:
        raise NpllmValueError(
            f"dtype must be one of {', '.join(DTYPES)} and max_examples at least 1, "
            f"got {dtype!r} and {max_examples}"
        )
    on = features_for(subject, fn, features)
    seed = secrets.randbelow(2**32) if seed is None else seed
    cases, extra = _cases(subject, on, fn, tiles, dtype, kind, max_examples)
    cases = cases.map(_of_normal_numbers) if arithmetic.get("flush_to_zero") else cases
    called, seen = subject.wrap(fn), Seen()
    takes_out = "out" in (parameter_names(fn) or ())

    def hold(case: dict[str, Any]) -> Any:
        return examine(called, subject.trials(case, on, **extra, **arithmetic), seen, takes_out)

    first_broken = _strategies().first_broken
    found = first_broken(cases, hold, max_examples=max_examples, seed=seed, shrink=shrink)
    if found is not None:
        case, finding = found
        error = LawBroken(finding, case | _replayed(op, on, extra, arithmetic), op, fn, seed)
        raise error from finding.cause
    left_out = tuple(sorted(set(subject.features) - on))
    return Report(op, tuple(sorted(on)), left_out, seen.n, seen.n_undecided, seen.used, seed)


def _refuse_arithmetic(op: str, arithmetic: dict[str, Any]) -> None:
    """Refuse what no verdict knows, and what an operation that rounds nothing is told."""
    known = () if op in ("sampler", "detokenize") else ARITHMETIC
    for name in arithmetic:
        if name not in known:
            raise NpllmValueError(
                f"check of {op} takes no option {name!r}; there are {', '.join(known) or 'none'}"
            )


def _cases(
    subject: Subject,
    on: frozenset[str],
    fn: Callable,
    tiles: tuple[int, ...],
    dtype: str,
    kind: str,
    max_examples: int,
) -> tuple[Any, dict[str, Any]]:
    """Return the strategy of a check, and what its trials are told beside the case."""
    strategy = _strategies().CASES[subject.cases]
    if subject.has_tiles:
        return strategy(on, tiles, dtype), {}
    if subject.name != "sampler":
        return strategy(on), {}
    draws = check_kind(kind)
    takes_u = "u" in (parameter_names(fn) or ())
    return strategy(on, takes_u), {"max_examples": max_examples, "draws": draws}


def _of_normal_numbers(case: dict[str, Any]) -> dict[str, Any]:
    """Return the case without subnormal inputs: flushed to zero, they leave nothing to prove."""
    return case | {"size": "plain"} if case.get("size") == "subnormal" else case


def _strategies() -> Any:
    try:
        return importlib.import_module("npllm.testing.strategies")
    except ImportError as error:
        raise MissingExtraError(
            f"cases are drawn by Hypothesis ({error}); {install_extra('test')}"
        ) from error


def _replayed(
    op: str, on: frozenset[str], extra: dict[str, Any], arithmetic: dict[str, Any]
) -> dict[str, Any]:
    """What a case needs beside its own values, to be replayed."""
    more = dict(arithmetic)
    if op == "attention" and "empty rows" not in on:
        more["empty_rows"] = False
    return more | ({"kind": "draws"} if extra.get("draws") else {})


def replay(fn: Callable, op: str, case: dict[str, Any]) -> None:
    """Run one case again: what a failure printed.

    Parameters
    ----------
    fn : callable
    op : str
        As in `check`.
    case : dict

    Raises
    ------
    LawBroken
        When the case still breaks a law.
    """
    if op == "decoder":
        return _replay_decoder(fn, dict(case))
    subject, case = subject_named(op), dict(case)
    extra: dict[str, Any] = {name: case.pop(name) for name in ARITHMETIC if name in case}
    is_empty_defined = case.pop("empty_rows", True)
    if case.pop("kind", None) == "draws":
        extra["draws"] = True
    on = frozenset(subject.features) - (set() if is_empty_defined else {"empty rows"})
    takes_out = "out" in (parameter_names(fn) or ())
    finding = examine(subject.wrap(fn), subject.trials(case, on, **extra), Seen(), takes_out)
    if finding is not None:
        raise LawBroken(finding, case, op, fn) from finding.cause


def _replay_decoder(fn: Callable, case: dict[str, Any]) -> None:
    from npllm.testing.laws import decoder as laws

    asked = laws._decoder(fn, None, None, case.pop("n_vocab", None), case.pop("tolerance"))
    on = laws._features(asked, fn, None)
    finding = next(laws.decoder_findings(asked, case, on, laws._Worst()), None)
    if finding is not None:
        raise LawBroken(finding, case, "decoder", fn) from finding.cause


# ------------------------------------------------------------------ one name an operation


def check_attention(
    fn: Callable,
    features: Iterable[str] | None = None,
    tiles: tuple[int, ...] = (16, 64),
    max_examples: int = 200,
    **options: Any,
) -> Report:
    """Check an attention: `fn(q, k, v, *, mask, ...)`.

    Parameters
    ----------
    fn : callable
        With the signature of `npllm.ops.attention`; `mask` is a rule.
    features : set of str, optional
        Of "gqa", "window", "bias", "softcap", "slots", "padding", "cache"; "scale" (other than
        d_head ** -0.5), "empty rows" (a row without keys gives zeros), "poison" (NaN in hidden
        keys), "lse" (`return_lse=True`).  None: all that the signature takes.
    tiles, max_examples, **options
        As in `check`.

    Returns
    -------
    report : Report

    Raises
    ------
    LawBroken
        When a law is broken.
    """
    return check("attention", fn, features, tiles, max_examples, **options)


def check_rope(
    fn: Callable,
    features: Iterable[str] | None = None,
    tiles: tuple[int, ...] = (16, 64),
    max_examples: int = 200,
    *,
    part: str = "apply_rope",
    **options: Any,
) -> Report:
    """Check a rotation: `fn(x, cos, sin)`, or another part of it.

    Parameters
    ----------
    fn : callable
    features : set of str, optional
        Of "partial", "magnitude", "factors", "padding", "packing", "cache", "long".
    tiles, max_examples, **options
        As in `check`.
    part : str
        "apply_rope", "rope_tables", "rope_frequencies" or "rope" (the whole, by name: x, positions,
        base, d_rope, magnitude, factors, n_original).

    Returns
    -------
    report : Report

    Raises
    ------
    LawBroken
        When a law is broken.
    """
    return check(part, fn, features, tiles, max_examples, **options)


def check_rms_norm(fn: Callable, max_examples: int = 200, **options: Any) -> Report:
    """Check a norm: `fn(x, weight, eps)`; the other arguments are those of `check`."""
    return check("rms_norm", fn, max_examples=max_examples, **options)


def check_linear(
    fn: Callable, features: Iterable[str] | None = None, max_examples: int = 200, **options: Any
) -> Report:
    """Check a linear map: `fn(x, weight, bias=None)`; its feature is "bias"."""
    return check("linear", fn, features, max_examples=max_examples, **options)


def check_swiglu(fn: Callable, max_examples: int = 200, **options: Any) -> Report:
    """Check a gated product: `fn(gate, up)`; the other arguments are those of `check`."""
    return check("swiglu", fn, max_examples=max_examples, **options)


def check_sampler(
    fn: Callable,
    features: Iterable[str] | None = None,
    max_examples: int = 200,
    *,
    kind: str = "draws",
    **options: Any,
) -> Report:
    """Check a sampler: what it may draw, and how often it draws it.

    Parameters
    ----------
    fn : callable
        "draws": fn(logits [n, n_vocab], ...) returns ids, integers [n]; where its signature names
        `u`, it is given uniform numbers [n].  "probabilities": fn(logits=..., ...) returns
        [n_row, n_vocab].
    features : set of str, optional
        Of "temperature", "top_k", "top_p", "min_p", "repetition_penalty", by which they are given.
    max_examples : int
    kind : str
    **options
        As in `check`.

    Returns
    -------
    report : Report

    Raises
    ------
    LawBroken
        When a law is broken.

    Notes
    -----
    Each example draws 20,000 tokens and is rejected where Pearson's chi-square has a tail of less
    than 1e-6 / max_examples, so that a whole check raises a false alarm once in a million runs.
    """
    return check("sampler", fn, features, max_examples=max_examples, kind=kind, **options)
