"""The sampler and the text of a stream with one convention chosen otherwise, and classic faults."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from npllm import ops
from npllm.testing.planted.bug import Array, plant, run

__all__: list[str] = []

FILTERS = ("temperature", "top_k", "top_p", "min_p")


def _filtered(inputs: dict[str, Any], order: tuple[str, ...], **other: Callable) -> Array:
    """Logits after the filters in some order, some of them replaced."""
    z = inputs["logits"]
    if inputs.get("repetition_penalty") is not None:
        z = other.get("repetition_penalty", ops.repetition_penalty)(
            z, inputs["seen"], inputs["repetition_penalty"]
        )
    for name in order:
        if inputs.get(name) is not None:
            z = other.get(name, getattr(ops, name))(z, inputs[name])
    return z


def _variant(
    name: str,
    convention: str | None,
    says: str,
    order: tuple[str, ...] = FILTERS,
    **other: Callable,
) -> None:
    def fn(**inputs: Any) -> Array:
        return ops.softmax(_filtered(inputs, order, **other))

    fn.__doc__ = says
    plant("sampler", name, convention)(fn)


def _nucleus(keeps: Callable[[Array, Array, float], Array]) -> Callable:
    """A top-p whose set is kept where `keeps(mass before, mass with, p)`."""

    def top_p(z: Array, p: float) -> Array:
        order = np.argsort(-z, axis=-1, kind="stable")
        ranked = np.take_along_axis(ops.softmax(z.astype(np.float64)), order, axis=-1)
        mass = np.cumsum(ranked, axis=-1)
        kept = keeps(mass - ranked, mass, p)
        kept[..., 0] = True
        place = np.argsort(order, axis=-1)
        return np.where(np.take_along_axis(kept, place, axis=-1), z, -np.inf).astype(z.dtype)

    return top_p


def _exactly_k(z: Array, k: int) -> Array:
    rank = np.argsort(np.argsort(-z, axis=-1, kind="stable"), axis=-1)
    return np.where(rank < k, z, -np.inf).astype(z.dtype)


_variant(
    "temperature last",
    "C15",
    "The temperature comes after the filters.",
    (*FILTERS[1:], "temperature"),
)
_variant(
    "top-p before top-k",
    "C15",
    "Top-p comes before top-k.",
    ("temperature", "top_p", "top_k", "min_p"),
)
_variant(
    "min-p first", "C15", "Min-p comes before top-k.", ("temperature", "min_p", "top_k", "top_p")
)
_variant(
    "at most p",
    "C16",
    "The largest set of at most p.",
    top_p=_nucleus(lambda _, mass, p: mass <= p),
)
_variant(
    "more than p",
    "C16",
    "The smallest set of more than p.",
    top_p=_nucleus(lambda before, _, p: before <= p),
)
_variant("ties in top-k cut", "C16", "Exactly k tokens are left.", top_k=_exactly_k)
_variant(
    "top-k off by one",
    None,
    "k - 1 tokens are left.",
    top_k=lambda z, k: ops.top_k(z, max(k - 1, 1)),
)
_variant("top-k ignored", None, "Top-k is left out.", top_k=lambda z, _: z)
_variant(
    "min-p absolute",
    None,
    "Min-p is a probability, not a share of the largest.",
    min_p=lambda z, p: np.where(ops.softmax(z) >= p, z, -np.inf).astype(z.dtype),
)


@plant("sampler", "filters see the whole", "C17")
def _whole(**inputs: Any) -> Array:
    """Each filter sees the probabilities before any filter."""
    z = _filtered(inputs, ("temperature",))
    kept = [
        getattr(ops, name)(z, inputs[name]) for name in FILTERS[1:] if inputs.get(name) is not None
    ]
    for other in kept:
        z = np.where(other > -np.inf, z, -np.inf).astype(z.dtype)
    return ops.softmax(z)


@plant("sampler", "not renormalised", "C17")
def _not_divided(**inputs: Any) -> Array:
    """The probabilities that are left are not divided by their sum."""
    z = _filtered(inputs, FILTERS)
    return np.where(z > -np.inf, ops.softmax(_filtered(inputs, ("temperature",))), 0)


@plant("sampler", "greedy")
def _greedy(**inputs: Any) -> Array:
    """The likeliest token has probability 1."""
    right = run("sampler", inputs)
    return (np.arange(right.shape[-1]) == right.argmax(axis=-1)[..., None]).astype(right.dtype)


@plant("detokenize", "token by token", "C20")
def _each_alone(prefixes: Array, tokens: Array) -> list[str]:  # noqa: ARG001
    """Each id is decoded alone."""
    return [str(token) for token in tokens]


@plant("detokenize", "incomplete shown", "C20")
def _incomplete(prefixes: Array, tokens: Array) -> list[str]:  # noqa: ARG001
    """An incomplete character is shown."""
    pieces = [str(prefixes[0])] if len(prefixes) else []
    for before, after in pairwise(prefixes):
        pieces.append(str(after)[len(str(before)) :])
    return pieces
