"""Probe inputs: small, fixed, and such that the options of an operation differ on them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from npllm.testing.forms import Array

__all__ = ["PROBES", "Probe"]


@dataclass(frozen=True)
class Probe:
    """An input that tells options apart.

    Parameters
    ----------
    name : str
    op : str
    says : str
        What it contains, and what it is for.
    make : function () -> dict
        The inputs by parameter name; the same at every call.
    dtype : str
        Of the output.
    rounding : bool
        It shows roundings, as rates of equal bits, and nothing else.
    """

    name: str
    op: str
    says: str
    make: Callable[[], dict[str, Any]]
    dtype: str = "float32"
    rounding: bool = False


def _normal(seed: int, *shape: int, scale: float = 1.0) -> Array:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def _bfloat16(x: Array) -> Array:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


# ------------------------------------------------------------------ attention


def _attention_padded() -> dict[str, Any]:
    q, k, v = _normal(1, 2, 6, 16, 16), _normal(2, 2, 3, 29, 16), _normal(3, 2, 3, 29, 16)
    q[:, :, 0] *= 2000  # scores that -1e4 cannot hide
    valid = np.ones((2, 29), dtype=bool)
    valid[0, :17] = False
    return {"q": q, "k": k, "v": v, "causal": True, "window": 4, "valid": valid, "scale": 0.3}


def _attention_cached() -> dict[str, Any]:
    return {
        "q": _normal(4, 2, 6, 5, 16),
        "k": _normal(5, 2, 3, 13, 16),
        "v": _normal(6, 2, 3, 13, 16),
        "causal": True,
        "window": 6,
        "scale": 0.4,
        "d_rope": 12,
    }


def _attention_unwindowed() -> dict[str, Any]:
    valid = np.arange(14) >= np.array([[5], [0]])
    return {
        "q": _normal(13, 2, 4, 6, 12),
        "k": _normal(14, 2, 2, 14, 12),
        "v": _normal(15, 2, 2, 14, 12),
        "valid": valid,
    }


def _attention_packed() -> dict[str, Any]:
    q, k, v = (_normal(seed, 1, 4, 9, 12) for seed in (7, 8, 9))
    return {
        "q": q,
        "k": k,
        "v": v,
        "causal": True,
        "scale": 0.35,
        "documents": np.array([[0, 0, 0, 0, 1, 1, 1, 1, 1]]),
    }


def _attention_bfloat16() -> dict[str, Any]:
    q, k, v = (_bfloat16(_normal(seed, 1, 4, 24, 24, scale=1.5)) for seed in (10, 11, 12))
    return {"q": q, "k": k, "v": v, "causal": True}


# ------------------------------------------------------------------ rope


def _rope_long() -> dict[str, Any]:
    factors = np.stack([np.linspace(1.0, 1.5, 6), np.linspace(2.0, 9.0, 6)]).astype(np.float32)
    return {
        "x": _normal(20, 2, 3, 4, 20),
        "positions": np.array([3, 15962, 15963, 70001]),
        "base": 5e5,
        "d_rope": 12,
        "magnitude": 1.19,
        "factors": factors,
        "n_original": 4096,
    }


def _rope_across() -> dict[str, Any]:
    return _rope_long() | {"x": _normal(21, 2, 3, 6, 20), "positions": np.arange(4093, 4099)}


def _rope_beyond() -> dict[str, Any]:
    return _rope_long() | {"x": _normal(22, 2, 3, 4, 20), "positions": np.arange(6000, 6004)}


def _rope_below() -> dict[str, Any]:
    return _rope_long() | {"x": _normal(23, 2, 3, 4, 20), "positions": np.arange(300, 304)}


def _rope_padded() -> dict[str, Any]:
    return {
        "x": _normal(24, 2, 3, 7, 20),
        "positions": np.array([[0, 0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]]),
        "base": 5e5,
        "d_rope": 12,
        "magnitude": 1.19,
    }


def _rope_packed() -> dict[str, Any]:
    return {
        "x": _normal(25, 1, 3, 7, 20),
        "positions": np.array([0, 1, 2, 3, 0, 1, 2]),
        "base": 5e5,
        "d_rope": 12,
        "magnitude": 1.19,
    }


def _rope_bits() -> dict[str, Any]:
    return {
        "x": _normal(26, 1, 4, 16, 32),
        "positions": np.arange(900, 916),
        "base": 5e5,
        "d_rope": 32,
    }


# ------------------------------------------------------------------ rows, sampler, text


def _norm_small() -> dict[str, Any]:
    sizes = np.array([3e-3, 1e-2, 1e-1, 1.0], dtype=np.float32)[:, None]
    gain = (0.3 + 0.1 * np.random.default_rng(31).standard_normal(24)).astype(np.float32)
    return {"x": sizes * (_normal(30, 4, 24) + np.float32(0.5)), "weight": gain, "eps": 1e-4}


def _norm_bfloat16() -> dict[str, Any]:
    return {
        "x": _bfloat16(_normal(32, 16, 96)),
        "weight": _bfloat16(1 + _normal(33, 96, scale=0.3)),
        "eps": 1e-5,
    }


def _linear_bfloat16() -> dict[str, Any]:
    return {"x": _bfloat16(_normal(34, 8, 96)), "weight": _bfloat16(_normal(35, 24, 96, scale=0.1))}


def _linear_rectangular() -> dict[str, Any]:
    return {"x": _normal(36, 5, 20), "weight": _normal(37, 12, 20)}


def _linear_biased() -> dict[str, Any]:
    return _linear_rectangular() | {"bias": _normal(45, 12)}


def _swiglu_moderate() -> dict[str, Any]:
    return {"gate_up": _normal(38, 6, 32) + np.repeat(np.array([0.5, -0.25], dtype=np.float32), 16)}


def _qkv_grouped() -> dict[str, Any]:
    return {
        "x": _normal(39, 2, 5, 10),
        "weight": _normal(40, 8 * 6, 10),
        "n_head": 4,
        "n_kv_head": 2,
    }


def _embed_table() -> dict[str, Any]:
    return {"ids": np.array([[3, 0, 7], [1, 6, 3]]), "weight": _normal(41, 8, 12)}


def _head_untied() -> dict[str, Any]:
    return {
        "hidden": _normal(42, 3, 12),
        "weight": _normal(43, 8, 12),
        "embedding": _normal(44, 8, 12),
    }


def _sampler_boundaries() -> dict[str, Any]:
    rows = [
        [3.0, 1.0, 0.0, -2.0, -1.5, -4.0, -3.5, -4.0],
        [1.5, 0.5, -2.0, -1.5, 2.0, 1.0, 0.0, -1.5],
        [-30.0, -30.0, 2.0, 3.0, 2.0, 3.0, 2.0, 2.0],
        [-2.5, 0.0, -1.5, -2.5, 3.5, 2.5, -3.0, 3.5],
        [2.0, 2.0, 3.0, 2.0, 3.0, 3.0, 2.0, 3.0],
        [0.5, 4.0, 1.5, 1.0, 2.5, 0.0, 3.0, 2.0],
        [2.0, 1.5, 2.5, 1.0, 1.5, 2.5, 0.5, 2.0],
        [1.0, 3.0, 1.0, 2.0, 1.0, 2.0, 3.0, 0.0],
    ]
    return {
        "logits": np.array(rows, dtype=np.float32),
        "temperature": 2.0,
        "top_k": 4,
        "top_p": 0.75,
        "min_p": 0.3,
    }


def _text_stream() -> dict[str, Any]:
    broken = "\ufffd"
    return {
        "prefixes": [
            "Hello",
            "Hello world",
            "Hello world " + broken,
            "Hello world \U0001f642",
            "Hello world \U0001f642!",
        ],
        "tokens": ["Hello", "world", broken, broken, "!"],
    }


_ALL = [
    Probe(
        "attention-padded",
        "attention",
        "Grouped heads, more keys than queries, window, left padding, rows without keys, "
        "one row of large q.",
        _attention_padded,
    ),
    Probe(
        "attention-cached",
        "attention",
        "A cache, no padding; a last tile that is not full.",
        _attention_cached,
    ),
    Probe(
        "attention-unwindowed",
        "attention",
        "Left padding and a cache, no window.",
        _attention_unwindowed,
    ),
    Probe(
        "attention-packed",
        "attention",
        "As many keys as queries, as many key heads as query heads, two documents.",
        _attention_packed,
    ),
    Probe(
        "attention-lse-padded",
        "attention_lse",
        "The log-sum-exp of attention-padded.",
        _attention_padded,
    ),
    Probe(
        "attention-lse-cached",
        "attention_lse",
        "The log-sum-exp of attention-cached.",
        _attention_cached,
    ),
    Probe(
        "attention-bfloat16",
        "attention",
        "Where the softmax and the scale round.",
        _attention_bfloat16,
        "bfloat16",
        True,
    ),
    Probe(
        "rope-long",
        "rope",
        "Positions 3 ... 70001, part of the head, a base of 5e5, a magnitude, two sets of factors.",
        _rope_long,
    ),
    Probe("rope-across", "rope", "A call that crosses the original context.", _rope_across),
    Probe("rope-beyond", "rope", "A call beyond the original context.", _rope_beyond),
    Probe("rope-below", "rope", "A call below the original context.", _rope_below),
    Probe("rope-padded", "rope", "Two rows, one of them padded on the left.", _rope_padded),
    Probe("rope-packed", "rope", "Positions that start again.", _rope_packed),
    Probe(
        "rope-bits",
        "rope",
        "Short positions, on which the dtype of the phase shows in the last bits.",
        _rope_bits,
        "float32",
        True,
    ),
    Probe(
        "rms-norm-small",
        "rms_norm",
        "Rows of size 3e-3 ... 1, off centre, a gain of about 0.3.",
        _norm_small,
    ),
    Probe(
        "rms-norm-bfloat16",
        "rms_norm",
        "Where the row is rounded.",
        _norm_bfloat16,
        "bfloat16",
        True,
    ),
    Probe("swiglu-moderate", "swiglu", "Gate and up different, and moderate.", _swiglu_moderate),
    Probe("linear-rectangular", "linear", "A weight that is not square.", _linear_rectangular),
    Probe("linear-biased", "linear", "A bias.", _linear_biased),
    Probe(
        "linear-bfloat16",
        "linear",
        "What the sums are rounded to.",
        _linear_bfloat16,
        "bfloat16",
        True,
    ),
    Probe("qkv-grouped", "qkv_projection", "Fewer key heads than query heads.", _qkv_grouped),
    Probe("embed-table", "embed", "A small table.", _embed_table),
    Probe("lm-head-untied", "lm_head", "A head and an embedding that differ.", _head_untied),
    Probe(
        "sampler-boundaries",
        "sampler",
        "Rows on which orders and boundaries differ; cumulative sums equal to top_p; ties.",
        _sampler_boundaries,
    ),
    Probe(
        "detokenize-stream",
        "detokenize",
        "A space inside, and a character of several tokens.",
        _text_stream,
    ),
]

PROBES: dict[str, Probe] = {probe.name: probe for probe in _ALL}
"""Name -> Probe."""
