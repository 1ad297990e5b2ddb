"""One prompt through a model in several arithmetics, layer by layer: each layer's weights are
converted once, and no second copy of the model exists.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from npllm.arrays import dtype_named, round_to, widen
from npllm.models.phi3 import decoder_layers
from npllm.models.rope_tables import Rotations
from npllm.models.taps import Tap
from npllm.ops import Ops, Step, mask
from npllm.quantized.block_formats import FORMATS
from npllm.quantized.block_packing import quantize_with_fallback
from npllm.quantized.dtypes import QUANTIZERS
from npllm.threads import run_blocks

__all__ = [
    "BLOCKS",
    "QUANTIZED",
    "STORED",
    "Arithmetic",
    "convert",
    "for_each",
    "logits_of",
    "residual_streams",
]

Array = Any

STORED = "stored"
BLOCKS = {name: partial(quantize_with_fallback, name=name) for name in FORMATS}
QUANTIZED: dict[str, Callable[[Array], Any]] = {**QUANTIZERS, **BLOCKS}
"""Every type that a matrix can be rounded to, other than those of floats."""
ENTRIES = 2**22  # of the output matrix, to convert at a time


class Arithmetic(NamedTuple):
    """One way to compute: how weights are held, and what the operations round.

    `weights` is "stored" (as the model holds them), "float64", "float32", "bfloat16", "float16" or
    one of `QUANTIZED`.  `dtype` is that of the activations.
    """

    weights: str
    ops: Ops
    dtype: Any


def convert(weight: Any, kind: str) -> Any:
    """Return a weight in the values of a type.

    Parameters
    ----------
    weight : array or PackedMatrix or None
    kind : str
        As `Arithmetic.weights`.

    Returns
    -------
    converted : array or PackedMatrix or None
        float32 for the 16-bit types, whose values they hold; for a matrix in int8 or int4 what
        `npllm.load(path, dtype="int8")` makes of it, for one in blocks what
        `npllm.quantized.block_packing.quantize_with_fallback` does.
    """
    if weight is None or kind == STORED:
        return weight
    if kind in QUANTIZED:
        is_plain = weight.ndim == 2 and not hasattr(weight, "widened")
        return QUANTIZED[kind](weight) if is_plain else weight
    if kind in ("float32", "float64"):
        return widen(weight, dtype_named(kind))
    return round_to(widen(weight, np.float32), kind)


def residual_streams(
    model: Any, tokens: Any, ways: Sequence[Arithmetic], tap: Tap | None = None
) -> Iterator[list[Array]]:
    """Compute the residual stream of every arithmetic after the embedding, after each layer, and
    after the final norm.

    Parameters
    ----------
    model : Model
        On NumPy.
    tokens : Tokens
        As `CausalLM` checks them.
    ways : sequence of Arithmetic
    tap : function (name, array) -> array, optional
        Sees the values of the first arithmetic.

    Returns
    -------
    streams : iterator of list of array [n_batch, n_seq, d_model]
        n_layer + 2 lists, one array for each arithmetic.  Peak memory: one layer in each type of
        weights, and two of these lists.
    """
    params, eps = model.params, model.config.rms_norm_eps
    taps = [tap if number == 0 else None for number in range(len(ways))]
    states = [_embedded(way, tokens.ids, params.embed_tokens) for way in ways]
    steps = [_step(model, tokens, way) for way in ways]
    _show(tap, "model.embed_tokens", states[0])
    yield states
    for number, layer in enumerate(params.layers):

        def through_layer(at: int, x: Array, weights: Any, number: int = number) -> Array:
            step, ops = steps[at].at(number), ways[at].ops
            return decoder_layers(x, (weights,), step, ops, taps[at])

        states = _advance(through_layer, states, ways, layer, model.ops)
        yield states

    def through_norm(at: int, x: Array, weights: Any) -> Array:
        return ways[at].ops.rms_norm(x, weights[0], eps)

    states = _advance(through_norm, states, ways, (params.norm,), model.ops)
    _show(tap, "model.norm", states[0])
    yield states


def logits_of(way: Arithmetic, hidden: Array, weight: Any) -> Array:
    """Score the vocabulary in one arithmetic, converting some rows of the output matrix at a time.

    Parameters
    ----------
    way : Arithmetic
    hidden : array [n, d_model]
    weight : array [n_vocab, d_model] or Int8Weight

    Returns
    -------
    logits : array [n, n_vocab]
    """
    n_vocab, d_model = weight.shape
    n_rows = n_vocab if way.weights == STORED else max(1, ENTRIES // d_model)
    blocks = [weight[start : start + n_rows] for start in range(0, n_vocab, n_rows)]
    parts = [way.ops.linear(hidden, convert(block, way.weights)) for block in blocks]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def _embedded(way: Arithmetic, ids: Array, weight: Any) -> Array:
    """Look the tokens up first; convert those rows then."""
    numbers, places = np.unique(ids, return_inverse=True)
    rows = weight.take(numbers) if hasattr(weight, "widened") else weight[numbers]
    return widen(way.ops.embed(places.reshape(ids.shape), convert(rows, way.weights)), way.dtype)


def _step(model: Any, tokens: Any, way: Arithmetic) -> Step:
    """The tables and masks of the pass, in the dtype of the activations."""
    config = model.config
    rotations = Rotations(config, way.dtype, np)
    variants = rotations.variants(tokens.positions, len(tokens.ids), None)
    cos, sin = rotations.tables(way.ops, tokens.positions, variants)
    sizes = config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps
    rules = [model.mask_rule(layer) for layer in range(config.num_hidden_layers)]
    if not tokens.valid.all():
        padding = mask.padding(tokens.valid)
        rules = [rule & padding for rule in rules]
    return Step(cos, sin, *sizes, rules)


def for_each(work: Callable[[Any], None], ways: Mapping[Any, Arithmetic], own: Ops) -> None:
    """Call a function with the key of every arithmetic.

    The model's own operations use all threads by themselves; every other arithmetic takes one.
    """
    for key, way in ways.items():
        if way.ops is own:
            work(key)
    run_blocks(work, [key for key, way in ways.items() if way.ops is not own])


def _advance(
    function: Any, states: list[Array], ways: Sequence[Arithmetic], weights: Any, own: Ops
) -> list[Array]:
    """Call function (number, state, weights) for every arithmetic, by type of weights."""
    after = [*states]
    for kind in dict.fromkeys(way.weights for way in ways):
        converted = [convert(x, kind) for x in weights]
        converted = type(weights)(*converted) if hasattr(weights, "_fields") else converted

        def work(at: int, converted: Any = converted) -> None:
            after[at] = function(at, states[at], converted)

        chosen = {at: way for at, way in enumerate(ways) if way.weights == kind}
        for_each(work, chosen, own)
    return after


def _show(tap: Tap | None, name: str, x: Array) -> None:
    if tap is not None:
        tap(name, x)
