"""What rounding costs a model on a prompt: float32, 16-bit arithmetic and quantized weights against
the float64 definitions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from npllm.arrays import array_namespace
from npllm.decoding.prompt import read_prompt
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.finite_scores import FROM_MODEL, check_scores
from npllm.forward_pass import Tokens
from npllm.model import Model
from npllm.progress import progress_bar
from npllm.tracing.precision.arithmetics import EMULATED, GOLD, TYPES, Key, arithmetics
from npllm.tracing.precision.distances import LogitDistance, relative_error
from npllm.tracing.precision.extremes import LargestValues, first_overflow, worst_by_op
from npllm.tracing.precision.passes import (
    QUANTIZED,
    Arithmetic,
    for_each,
    logits_of,
    residual_streams,
)
from npllm.tracing.precision.report import Flip, Precision, Row, Share

__all__ = ["precision"]

Array = Any

TOKENS = 64  # whose logits are in memory at a time


def precision(
    model: Model,
    prompt: Any,
    *,
    attention_mask: Any = None,
    types: Sequence[str] = TYPES,
    shares: bool = True,
    progress: bool = False,
) -> Precision:
    """Measure what each arithmetic costs on a prompt, against the float64 definitions.

    Parameters
    ----------
    model : Model
        On NumPy.  Its weights are the reference, in the dtype in which they were loaded.
    prompt : str, list of str, list of messages, or integer array [n_batch, n_prompt]
    attention_mask : array [n_batch, n_prompt], optional
        Only with an array of ids: 0 for padding on the left.  Padding is not measured.
    types : sequence of str
        Of "own" (the model as it is), "bfloat16" and "float16" (as Transformers computes in them,
        `npllm.ops.emulate`), "int8" and "int4" (weights, under the model's own operations), "Q4_K"
        and the other block formats of GGUF (weights likewise, quantized here), "float64" (the
        definitions once more, at distance 0).
    shares : bool
        Also find what each rounding point of the 16-bit types causes: 32 passes for each type.
    progress : bool
        Show a bar on stderr where it is a terminal and tqdm is installed.

    Returns
    -------
    report : Precision
        `str(report)` is the table.

    Raises
    ------
    NpllmTypeError, NpllmValueError
        For another type, what is no prompt, padding on the right, a model on a GPU, a classifier,
        and where the float64 logits are not finite.

    Notes
    -----
    The error of a residual stream x beside the float64 one g:

        error = sqrt(mean over tokens of |x - g|**2 / |g|**2)

    that of the logits y beside z, since a shift common to all logits of a token changes nothing:

        d = y - z;   error = sqrt(mean over tokens and vocabulary of (d - mean over vocabulary)**2)

    The share of a rounding point in the square of that error, left out or alone:

        without = 1 - (error without the point / error)**2,   alone = (error of it alone / error)**2

    Shares are sorted by `alone`, which adds up to about 1.  `without` may be negative: roundings
    have signs, and one may cancel others.

    Peak memory: the weights, one layer in each type of weights, the residual streams of all passes,
    twice, and an attention table [n_batch, n_head, n_prompt, n_prompt] for each thread.

    The emulation sums in float32 in the library's order (`emulate(..., bitwise=False)`).
    """
    _check(model, types)
    found = read_prompt(model, prompt, attention_mask)
    tokens = Tokens(found.ids, found.valid, _positions(found.valid))
    ways = arithmetics(model, types, shares)
    largest = LargestValues()
    depth, hidden = _depth(model, tokens, ways, largest, progress)
    distances = _distances(model, ways, hidden, largest)
    places = [(int(row), int(column)) for row, column in np.argwhere(tokens.valid)]
    return Precision(
        model=model.folder.name if model.folder else model.config.model_type,
        ops=model.ops.name,
        n_tokens=len(places),
        depths=_depth_names(len(model.params.layers)),
        rows=[_row(kind, depth, distances, places) for kind in dict.fromkeys(types)],
        largest=worst_by_op(largest.found),
        overflow=first_overflow(largest.found),
    )


def _depth_names(n_layer: int) -> list[str]:
    """Where the residual stream is measured, as `npllm.models.taps` names it."""
    return ["model.embed_tokens", *(f"model.layers.{n}" for n in range(n_layer)), "model.norm"]


def _check(model: Any, types: Sequence[str]) -> None:
    """Raise for what cannot be measured."""
    if not isinstance(model, Model):
        raise NpllmTypeError(
            f"precision takes a causal language model, as npllm.load gives it, got {model!r}"
        )
    library = array_namespace(model.params.embed_tokens).__name__
    if library != "numpy":
        raise NpllmValueError(
            f"precision computes in NumPy, got weights in {library}; "
            'load the model with backend="numpy"'
        )
    known = ("own", "float64", *EMULATED, *QUANTIZED)
    if isinstance(types, str) or not types or not set(types) <= set(known):
        raise NpllmValueError(f"types must be some of {', '.join(known)}, got {types!r}")


def _positions(valid: Array) -> Array:
    """Positions as a model counts them: along the tokens of each row."""
    counted = np.maximum(np.cumsum(valid, axis=1) - 1, 0)
    return counted[0] if valid.all() else counted


def _depth(
    model: Model, tokens: Tokens, ways: dict[Key, Arithmetic], largest: LargestValues, shown: bool
) -> tuple[dict[Key, list[float]], list[Array]]:
    """The error of the residual stream of each pass by depth; the last streams, token by token."""
    depth: dict[Key, list[float]] = {key: [] for key in ways}
    layers, hidden = model.params.layers, []
    with progress_bar(len(layers) + 2, "layers", unit="layer", wanted=shown) as advance:
        streams = residual_streams(model, tokens, [*ways.values()], largest)
        for number, states in enumerate(streams):
            hidden = [x[tokens.valid] for x in states]  # [n_batch, n_seq, ...] -> [n, ...]
            for key, x in zip(ways, hidden, strict=True):
                depth[key].append(relative_error(x, hidden[0]))
            if number < len(layers):
                largest.see_layer(f"model.layers.{number}", layers[number])
            advance(1)
    return depth, hidden


def _distances(
    model: Model, ways: dict[Key, Arithmetic], hidden: list[Array], largest: LargestValues
) -> dict[Key, LogitDistance]:
    """The distances of the logits of each pass, some tokens at a time."""
    head = model.params.lm_head
    largest.see_weight("model.norm.weight", model.params.norm)
    largest.see_weight("lm_head.weight", head)
    distances = {key: LogitDistance(is_full=not key.point) for key in ways}
    for start in range(0, len(hidden[0]), TOKENS):
        rows = {key: x[start : start + TOKENS] for key, x in zip(ways, hidden, strict=True)}
        gold = logits_of(ways[GOLD], rows[GOLD], head)
        check_scores(gold, "the float64 logits", FROM_MODEL)
        largest.see("lm_head", gold)

        def measure(key: Key, rows: dict[Key, Array] = rows, gold: Array = gold) -> None:
            distances[key].see(logits_of(ways[key], rows[key], head), gold)

        for_each(measure, ways, model.ops)
    return distances


def _row(
    kind: str,
    depth: dict[Key, list[float]],
    distances: dict[Key, LogitDistance],
    places: list[tuple[int, int]],
) -> Row:
    """What was measured of one type."""
    found = distances[Key(kind)]
    flips = [Flip(*places[token], best, here, gap) for token, best, here, gap in found.flips]
    return Row(
        type=kind,
        depth=depth[Key(kind)],
        logits=found.error,
        kl_mean=float(np.mean(found.kl)),
        kl_max=float(np.max(found.kl)),
        top1=found.n_same / len(places),
        flips=flips,
        shares=_shares(kind, distances),
    )


def _shares(kind: str, distances: dict[Key, LogitDistance]) -> list[Share]:
    """What each rounding point causes, the largest first; nothing where the error is not finite."""
    points = [key.point for key in distances if key[::2] == (kind, "alone")]
    whole = distances[Key(kind)].error ** 2
    if not 0 < whole < np.inf:
        return []
    shares = [
        Share(
            point,
            1 - distances[Key(kind, point, "without")].error ** 2 / whole,
            distances[Key(kind, point, "alone")].error ** 2 / whole,
        )
        for point in points
    ]
    return sorted(shares, key=lambda share: -share.alone)
