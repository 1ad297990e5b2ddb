"""The parameters of a port, and its config, against the checkpoint's: before any value is looked
at.

A wrong order of rows (C6, C7), a transposed matrix, a gain stored as w - 1 (C28), a head that is
tied (C33), eps and the RoPE base (C29, C25) show from the parameters alone.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from npllm.arrays import DTYPES, to_numpy
from npllm.config.config import Config
from npllm.config.strict_json import printable
from npllm.errors import NpllmError, NpllmValueError
from npllm.testing.inputs import widened_weight
from npllm.tracing.comparison.comparison import Finding
from npllm.tracing.comparison.levels import SHORT
from npllm.tracing.comparison.row_orders import qkv_index, rope_rows
from npllm.tracing.comparison.their_weights import Pair, array_of, open_weights, pairs_of

__all__ = ["check_config", "check_weights"]

Array = Any

CLOSE = 0.15  # relative root mean square difference up to which a weight may be quantised
NAMED = {
    "rms_norm_eps": "C29",
    "rope_parameters": "C25, C3, C4 or C5",
    "sliding_window": "C10",
    "tie_word_embeddings": "C33",
    "num_attention_heads": "",
    "num_key_value_heads": "C8",
    "head_dim": "C21",
    "hidden_size": "",
    "intermediate_size": "",
    "num_hidden_layers": "",
    "vocab_size": "",
    "original_max_position_embeddings": "C3",
    "attention_bias": "",
    "mlp_bias": "",
    "hidden_act": "",
}
"""Entries of config.json that change the numbers, and the conventions they belong to."""


def check_config(mine: Any, gold: Any) -> list[str]:
    """Say in which entries two config.json differ that change the numbers.

    Parameters
    ----------
    mine, gold : dict or None
        The content of config.json.
    """
    if not isinstance(mine, dict) or mine is gold or not isinstance(gold, dict):
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            own, right = Config.from_json(mine), Config.from_json(gold)
        except NpllmError as error:
            return [f"the config of mine cannot be read: {error}"]
    notes = []
    for name, convention in NAMED.items():
        one, other = getattr(own, name), getattr(right, name)
        if one != other:
            one, other = _parts(one, other)
            text = f"config: {name} is {one} in mine, {other} in gold"
            notes.append(f"{convention}: {text}" if convention else text)
    return notes


def _parts(one: Any, other: Any) -> tuple[Any, Any]:
    """Of two sets of rope parameters the entries that differ."""
    if not hasattr(one, "__dataclass_fields__"):
        return one, other
    names = [field.name for field in fields(one)]
    names = [name for name in names if getattr(one, name) != getattr(other, name)]
    return ({n: getattr(one, n) for n in names}, {n: getattr(other, n) for n in names})


def check_weights(
    source: Any, params: Any, config: Config
) -> tuple[list[Finding], dict[str, Array]]:
    """Compare parameters one by one.

    Parameters
    ----------
    source : mapping, str or Path
        The port's.
    params : Params
    config : Config

    Returns
    -------
    findings : list of Finding
    theirs : dict of str to array
        Parameters that are rounded otherwise than ours, fused as ours are, by the names of the
        graph; biases with ".bias".

    Raises
    ------
    NpllmOSError, NpllmTypeError
        As `open_weights`.
    NpllmValueError
        When no name is that of a parameter.
    """
    theirs = open_weights(source)
    names = set(theirs)
    pairs = [*pairs_of(names, params, config)]
    if not names & {pair.name for pair in pairs}:
        raise NpllmValueError(
            f"weights: none of the {len(names)} names is a parameter of this checkpoint, such as "
            f"{pairs[0].name}, got {printable(', '.join(sorted(map(str, names))[:3])) or 'no name'}"
        )
    known = {_mark(pair.ours): pair.name for pair in pairs if not hasattr(pair.ours, "widened")}
    found = []
    for pair in pairs:
        if pair.name not in names:
            found.append(Finding(pair.name, "missing", "is not there"))
            continue
        found.append(_compared(array_of(theirs, pair.name), pair, config, known))
    extra = sorted(names - {pair.name for pair in pairs} - {_tied(params)})
    found += [
        Finding(name, "unknown", "is no parameter of this checkpoint")
        for name in extra
        if not name.endswith("inv_freq")
    ]
    return found, _rounded(theirs, pairs, found)


def _tied(params: Any) -> str:
    return "lm_head.weight" if params.lm_head is params.embed_tokens else ""


def _rounded(
    theirs: Mapping[str, Any], pairs: list[Pair], found: list[Finding]
) -> dict[str, Array]:
    """Parameters to compute with in place of ours."""
    status = {one.name: one.status for one in found}
    fields_: dict[str, list[Pair]] = {}
    for pair in pairs:
        fields_.setdefault(pair.field, []).append(pair)
    kept = {}
    for field, parts in fields_.items():
        states = {status[pair.name] for pair in parts}
        if states <= {"same", "rounded"} and "rounded" in states:
            kept[field] = np.concatenate([array_of(theirs, pair.name) for pair in parts])
    return kept


def _mark(x: Array) -> tuple[Any, ...]:
    """A few numbers by which a matrix is known again."""
    x = to_numpy(x)
    flat = x.reshape(-1)
    return (*x.shape, *(float(n) for n in flat[:: max(1, len(flat) // 7)][:7]))


def _compared(x: Array, pair: Pair, config: Config, known: Mapping[tuple, str]) -> Finding:
    """What is to be said of one parameter."""
    y, _ = widened_weight(pair.ours)
    wide = x.astype(np.float64)
    if not np.isfinite(wide).all():
        n = int(np.count_nonzero(~np.isfinite(wide)))
        return Finding(pair.name, "different", f"{n} of {x.size} entries are NaN or infinite")
    if x.shape == y.shape:
        if np.array_equal(wide, y):
            return Finding(pair.name, "same", "the same values")
        for short in SHORT:
            if np.array_equal(y.astype(DTYPES[short]).astype(np.float64), wide):
                return Finding(pair.name, "rounded", f"rounded to {short}")
    for says, change in _changes(pair, config, wide.shape):
        try:
            other = change(wide)
        except (ValueError, IndexError):
            continue
        if other.shape == y.shape and _same(other, y):
            return Finding(pair.name, "other order", says)
    return _unexplained(x, wide, y, pair, known)


def _same(one: Array, other: Array) -> bool:
    """Tell whether two arrays agree but for a rounding to 16 bits."""
    return bool(np.allclose(one, other, rtol=2.0**-8, atol=1e-6 * np.abs(other).max(initial=0.0)))


def _changes(
    pair: Pair, config: Config, shape: tuple[int, ...]
) -> Iterator[tuple[str, Callable[[Array], Array]]]:
    """What ports do to parameters: sentence, and what undoes it."""
    leaf = pair.name.rsplit(".", 2)[-2]
    if len(shape) == 2:
        yield "C31: transposed, [d_in, d_out]", np.transpose
        turned = shape[::-1]
        yield "C31: the buffer is read as [d_in, d_out]", lambda x: x.T.reshape(turned).T
    if leaf in ("q_proj", "k_proj"):
        yield (
            "rows are permuted to interleaved RoPE pairs (C1, as in GGUF files)",
            lambda x: x[rope_rows(len(x), config)],
        )
        yield (
            "rows are permuted from interleaved RoPE pairs to halves, though they stood in halves",
            lambda x: x[np.argsort(rope_rows(len(x), config))],
        )
    if leaf == "qkv_proj":
        yield (
            "rows of q and k are permuted to interleaved RoPE pairs (C1, as in GGUF files)",
            lambda x: x[qkv_index(config, "rope")],
        )
        for order, convention in (
            ("per-head interleave", "C6"),
            ("k and v swapped", "C22"),
            ("q and k swapped", "C22"),
        ):
            yield f"{convention} {order}", _rows_by(qkv_index(config, order))
    if leaf == "gate_up_proj":
        half = shape[0] // 2
        yield "C7 up first", lambda x: np.concatenate([x[half:], x[:half]])
        yield "C7 interleaved", lambda x: np.concatenate([x[0::2], x[1::2]])
    if len(shape) == 1:
        yield "C28: holds w - 1, for a norm that multiplies by 1 + w", lambda x: x + 1
        yield "C28: holds w + 1", lambda x: x - 1


def _rows_by(index: Array) -> Callable[[Array], Array]:
    return lambda x: x[index]


def _unexplained(
    x: Array, wide: Array, y: Array, pair: Pair, known: Mapping[tuple, str]
) -> Finding:
    """Another parameter, a factor, quantised values, or other values."""
    if x.shape != y.shape:
        return Finding(pair.name, "different", f"shape {list(x.shape)} for {list(y.shape)}")
    other = known.get(_mark(x))
    if other is not None and other != pair.name:
        if pair.name == "lm_head.weight" and "embed" in other:
            return Finding(pair.name, "different", "C33 tied: holds the embedding table")
        return Finding(pair.name, "different", f"holds {other}")
    size = float(np.sqrt(np.mean(y * y))) or 1.0
    factor = float(np.sum(wide * y) / (np.sum(y * y) or 1.0))
    if factor > 0 and _same(wide, factor * y):
        return Finding(pair.name, "different", f"multiplied by {factor:.6g}")
    error = float(np.sqrt(np.mean((wide - y) ** 2))) / size
    if error <= CLOSE:
        return Finding(pair.name, "rounded", f"within {error:.2%} (root mean square)")
    order = np.lexsort(np.round(wide.reshape(len(wide), -1)[:, :2], 9).T)
    right = np.lexsort(np.round(y.reshape(len(y), -1)[:, :2], 9).T)
    if _same(wide[order], y[right]):
        return Finding(pair.name, "other order", "the same rows in another order")
    return Finding(pair.name, "different", f"other values, by {error:.2g} of their size")
