"""Rotary position embedding with one convention chosen otherwise, and its classic faults."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from npllm import ops
from npllm.testing.planted.bug import Array, plant, run

__all__: list[str] = []

Tables = tuple[Array, Array]

# ------------------------------------------------------------------ the rotation


def _pair(x: Array, cos: Array, sin: Array, first: Array, second: Array) -> Array:
    """Turn the pairs (first[n], second[n]) by columns of the tables, n for each of the two."""
    cos, sin = (np.expand_dims(t, -3) if t.ndim > 2 else t for t in (cos, sin))
    y, n = x.copy(), len(first)
    a, b = x[..., first], x[..., second]
    y[..., first] = a * cos[..., :n] - b * sin[..., :n]
    y[..., second] = b * cos[..., n:] + a * sin[..., n:]
    return y


@plant("apply_rope", "interleaved", "C1")
def _interleaved(x: Array, cos: Array, sin: Array, *, interleaved: bool = False) -> Array:
    """Pairs 2i with 2i + 1, and the other layout where that is asked for."""
    return ops.apply_rope(x, cos, sin, interleaved=not interleaved)


@plant("apply_rope", "interleaved table, half-split rotation", "C26")
def _table_pairs(x: Array, cos: Array, sin: Array, **_: Any) -> Array:
    """Reads column c of the table as angle c // 2."""
    c = np.arange(cos.shape[-1])
    half = len(c) // 2
    return _pair(x, cos[..., c // 2], sin[..., c // 2], c[:half], c[half:])


@plant("apply_rope", "half-split table, interleaved rotation", "C26")
def _table_halves(x: Array, cos: Array, sin: Array, **_: Any) -> Array:
    """Turns 2i with 2i + 1, by the angles of a half-split table."""
    even, odd = np.arange(0, cos.shape[-1], 2), np.arange(1, cos.shape[-1], 2)
    order = np.concatenate([even, odd])
    return _pair(x, cos[..., order], sin[..., order], even, odd)


@plant("apply_rope", "-sin", "C27")
def _backwards(x: Array, cos: Array, sin: Array, *, interleaved: bool = False) -> Array:
    """Turns backwards."""
    return ops.apply_rope(x, cos, -sin, interleaved=interleaved)


@plant("apply_rope", "i + d_head/2", "C34")
def _far_partner(x: Array, cos: Array, sin: Array, **_: Any) -> Array:
    """The partner lies half the head further."""
    first = np.arange(cos.shape[-1] // 2)
    return _pair(x, cos, sin, first, first + x.shape[-1] // 2)


@plant("apply_rope", "cos and sin swapped")
def _swapped(x: Array, cos: Array, sin: Array, *, interleaved: bool = False) -> Array:
    """Cosine and sine are exchanged."""
    return ops.apply_rope(x, sin, cos, interleaved=interleaved)


@plant("apply_rope", "rest dropped")
def _rest(x: Array, cos: Array, sin: Array, *, interleaved: bool = False) -> Array:
    """Channels that do not turn are zero."""
    y = ops.apply_rope(x, cos, sin, interleaved=interleaved).copy()
    y[..., cos.shape[-1] :] = 0
    return y


@plant("apply_rope", "first position everywhere")
def _one_position(x: Array, cos: Array, sin: Array, *, interleaved: bool = False) -> Array:
    """Every row turns by the angles of the first."""
    first = (np.broadcast_to(t[..., :1, :], t.shape) for t in (cos, sin))
    return ops.apply_rope(x, *first, interleaved=interleaved)


# ------------------------------------------------------------------ tables and frequencies


def _tabled(name: str, convention: str | None, says: str) -> Callable:
    """List a bug that changes positions, frequencies or scale before the tables are made."""

    def listed(change: Callable) -> Callable:
        def fn(positions: Array, inv_freq: Array, scale: float = 1.0) -> Tables:
            with np.errstate(over="ignore", invalid="ignore"):
                return ops.rope_tables(*change(np.asarray(positions), inv_freq, scale))

        fn.__doc__ = says
        plant("rope_tables", name, convention)(fn)
        return change

    return listed


def _rounded(x: Array, dtype: Any) -> Array:
    with np.errstate(over="ignore"):
        return x.astype(np.float32).astype(dtype).astype(np.float32)


@_tabled("bfloat16 positions", "C2", "Positions are rounded to bfloat16.")
def _bfloat16_positions(positions: Array, inv_freq: Array, scale: float) -> tuple:
    return _rounded(positions, ml_dtypes.bfloat16), inv_freq, scale


@_tabled("float16 positions", "C2", "Positions are rounded to float16.")
def _float16_positions(positions: Array, inv_freq: Array, scale: float) -> tuple:
    return _rounded(positions, np.float16), inv_freq, scale


@plant("rope_tables", "bfloat16 throughout", "C2")
def _bfloat16_phase(positions: Array, inv_freq: Array, scale: float = 1.0) -> Tables:
    """Positions, frequencies and phases are bfloat16."""
    narrow = _rounded(np.asarray(positions), ml_dtypes.bfloat16)[..., None] * _rounded(
        inv_freq, ml_dtypes.bfloat16
    )
    phase = np.concatenate([_rounded(narrow, ml_dtypes.bfloat16)] * 2, axis=-1)
    return scale * np.cos(phase), scale * np.sin(phase)


@_tabled("omitted", "C4", "The magnitude is left out.")
def _no_magnitude(positions: Array, inv_freq: Array, _: float) -> tuple:
    return positions, inv_freq, np.float32(1)


@_tabled("column index", "C18", "Positions count padding.")
def _columns(positions: Array, inv_freq: Array, scale: float) -> tuple:
    n_seq = positions.shape[-1]
    columns = np.arange(n_seq) + positions[..., -1].max() + 1 - n_seq
    return np.broadcast_to(columns, positions.shape), inv_freq, scale


@_tabled("positions run on", "C19", "Positions do not start again.")
def _run_on(positions: Array, inv_freq: Array, scale: float) -> tuple:
    return positions[..., :1] + np.arange(positions.shape[-1]), inv_freq, scale


@_tabled("position off by one", "C32", "The first token of this call has the position behind it.")
def _off_by_one(positions: Array, inv_freq: Array, scale: float) -> tuple:
    return positions + 1, inv_freq, scale


@_tabled("positions from zero", None, "Every call starts at position 0.")
def _from_zero(positions: Array, inv_freq: Array, scale: float) -> tuple:
    return np.broadcast_to(np.arange(positions.shape[-1]), positions.shape), inv_freq, scale


@plant("rope_frequencies", "10000", "C25")
def _base(d_rope: int, base: float = 10000.0, factors: Array = None) -> Array:  # noqa: ARG001
    """The base is a hard-coded 10000."""
    return ops.rope_frequencies(d_rope, 10000.0, factors)


@plant("rope_frequencies", "ignored", "C3")
def _no_factors(d_rope: int, base: float = 10000.0, factors: Array = None) -> Array:  # noqa: ARG001
    """The factors of LongRoPE are left out."""
    return ops.rope_frequencies(d_rope, base)


@plant("rope_frequencies", "factors multiply")
def _inverse_factors(d_rope: int, base: float = 10000.0, factors: Array = None) -> Array:
    """The factors of LongRoPE speed up the turns that they should slow."""
    return ops.rope_frequencies(
        d_rope, base, None if factors is None else 1 / np.asarray(factors, dtype=np.float32)
    )


@plant("rope_frequencies", "exponent i / d_rope")
def _half_exponent(d_rope: int, base: float = 10000.0, factors: Array = None) -> Array:
    """The exponent is i / d_rope instead of 2i / d_rope."""
    return ops.rope_frequencies(d_rope, base**0.5, factors)


# ------------------------------------------------------------------ the whole


def _factored(name: str, says: str, choose: Callable[[Array, int], int]) -> None:
    def fn(**inputs: Any) -> Array:
        factors = inputs.get("factors")
        if factors is not None and factors.ndim == 2:
            inputs["factors"] = factors[choose(inputs["positions"], inputs["n_original"])]
        return run("rope", inputs)

    fn.__doc__ = says
    plant("rope", name, "C3")(fn)


_factored("always long", "The long factors at every length.", lambda *_: 1)
_factored("always short", "The short factors at every length.", lambda *_: 0)
_factored(
    "by cache offset",
    "The length is taken without the tokens of this call.",
    lambda p, n: int(p.min() > n),
)


@plant("rope", "on q and k", "C4")
def _whole_head(**inputs: Any) -> Array:
    """The magnitude multiplies the whole head."""
    magnitude = inputs.get("magnitude", 1.0)
    return run("rope", inputs | {"x": inputs["x"] * np.float32(magnitude), "magnitude": 1.0})


@plant("rope", "full", "C5")
def _full(**inputs: Any) -> Array:
    """All channels turn."""
    width = inputs["x"].shape[-1]
    factors = inputs.get("factors")
    if factors is not None:
        more = np.ones(
            (*factors.shape[:-1], max(width // 2 - factors.shape[-1], 0)), dtype=factors.dtype
        )
        inputs["factors"] = np.concatenate([factors, more], axis=-1)
    return run("rope", inputs | {"d_rope": width})


@plant("rope", "exponents over d_head", "C5")
def _head_exponents(**inputs: Any) -> Array:
    """The exponents are 2i / d_head."""
    base = inputs["base"] ** (inputs["d_rope"] / inputs["x"].shape[-1])
    return run("rope", inputs | {"base": base})
