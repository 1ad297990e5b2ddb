"""The operations that can be checked: their features, cases and trials."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from npllm.errors import NpllmValueError
from npllm.testing.laws import attention, positions, rows, sampler

__all__ = ["SUBJECTS", "Subject", "features_for", "parameter_names", "subject_named"]


@dataclass(frozen=True)
class Subject:
    """An operation, as it is checked.

    Parameters
    ----------
    name : str
        Of the function that is put to the test: a name of `npllm.ops`, or a whole such as "rope".
    cases : str
        Of the strategy.
    trials : function (case, features, **arithmetic) -> list of Trial
    features : tuple of str
    parameters : dict
        Feature -> the parameters that a function must have for it.
    wrap : function (fn) -> function
        Makes a function that takes the arguments of a trial.
    has_tiles : bool
        Lengths are drawn around tiles, and inputs in a dtype.
    """

    name: str
    cases: str
    trials: Callable[..., list]
    features: tuple[str, ...] = ()
    parameters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    wrap: Callable[[Callable], Callable] = lambda fn: fn
    has_tiles: bool = True


def _rope(part: str) -> Subject:
    def trials(case: dict[str, Any], features: frozenset[str], **arithmetic: Any) -> list:
        return positions.rope_trials(case, features, part, **arithmetic)

    def wrap(fn: Callable) -> Callable:
        return positions.rope_wrapper(fn, part)

    return Subject(part, "rope", trials, positions.FEATURES, wrap=wrap)


ON_REQUEST = frozenset({"poison"})

SUBJECTS: dict[str, Subject] = {
    "attention": Subject(
        "attention",
        "attention",
        attention.attention_trials,
        attention.FEATURES,
        attention.PARAMETERS,
    ),
    **{part: _rope(part) for part in ("apply_rope", "rope_tables", "rope_frequencies", "rope")},
    "linear": Subject(
        "linear", "linear", rows.ROW_TRIALS["linear"], ("bias",), {"bias": ("bias",)}
    ),
    **{
        name: Subject(name, name, rows.ROW_TRIALS[name])
        for name in ("rms_norm", "swiglu", "qkv_projection", "embed", "lm_head")
    },
    "sampler": Subject(
        "sampler",
        "sampler",
        sampler.sampler_trials,
        sampler.FEATURES,
        sampler.PARAMETERS,
        has_tiles=False,
    ),
    "detokenize": Subject(
        "detokenize", "detokenize", rows.ROW_TRIALS["detokenize"], has_tiles=False
    ),
}
"""Name -> Subject."""


def subject_named(name: str) -> Subject:
    """Return an operation that can be checked; raise for a name that is none."""
    if name not in SUBJECTS:
        raise NpllmValueError(f"op must be one of {', '.join(SUBJECTS)}, got {name!r}")
    return SUBJECTS[name]


def features_for(subject: Subject, fn: Callable, asked: Any) -> frozenset[str]:
    """Return the features of a check: those asked for, or all that the function can take.

    NaN in hidden keys is on only where it is asked for: a product of matrices makes NaN of 0 * NaN.

    Raises
    ------
    NpllmValueError
        For a feature that the operation does not have.
    """
    if asked is not None:
        unknown = sorted(set(asked) - set(subject.features))
        if unknown:
            raise NpllmValueError(
                f"features of {subject.name} must be of {', '.join(subject.features) or 'none'}; "
                f"got {', '.join(unknown)}"
            )
        return frozenset(asked)
    stated = getattr(fn, "npllm_features", None)  # what `adapt` knows of a function
    if stated is not None:
        return frozenset(stated) & frozenset(subject.features) - ON_REQUEST
    names = parameter_names(fn)
    takes = {
        feature
        for feature in subject.features
        if names is None
        or all(name in names or "**" in names for name in subject.parameters.get(feature, ()))
    }
    if "lse" in takes and (names is None or "return_lse" not in names):
        takes.discard("lse")
    return frozenset(takes) - ON_REQUEST


def parameter_names(fn: Callable) -> set[str] | None:
    """Names of a function's parameters, "**" among them; None where they cannot be known."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return None
    return {"**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters}
