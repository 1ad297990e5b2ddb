"""The arithmetics of a precision report: which weights, which operations, for every pass."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from npllm import ops
from npllm.arrays import compute_dtype
from npllm.model import Model
from npllm.ops.emulate import POINTS
from npllm.tracing.precision.passes import QUANTIZED, STORED, Arithmetic

__all__ = ["EMULATED", "GOLD", "PARAMETERS", "TYPES", "Key", "arithmetics"]

EMULATED = ("bfloat16", "float16")
TYPES = ("own", *EMULATED, "int8")  # by default; the others are QUANTIZED and "float64"
PARAMETERS = "parameters"  # the rounding of the weights: a point beside those of POINTS


class Key(NamedTuple):
    """Which pass: a type; with one rounding point left out ("without") or "alone"."""

    type: str
    point: str = ""
    how: str = ""


GOLD = Key("gold")


def arithmetics(model: Model, types: Sequence[str], shares: bool) -> dict[Key, Arithmetic]:
    """List every pass that a report needs, the float64 one first.

    Parameters
    ----------
    model : Model
    types : sequence of str
        "own", "float64", and of EMULATED and QUANTIZED.
    shares : bool
        With two passes for each rounding point of a 16-bit type.

    Returns
    -------
    ways : dict of Key to Arithmetic
    """
    own = compute_dtype(model.params.embed_tokens)
    plain = {
        "own": Arithmetic(STORED, model.ops, own),
        "float64": Arithmetic("float64", ops.reference, np.float64),
        **{kind: Arithmetic(kind, model.ops, np.float32) for kind in QUANTIZED},
    }
    ways = {GOLD: plain["float64"]}
    for kind in dict.fromkeys(types):
        ways |= _emulated(kind, shares) if kind in EMULATED else {Key(kind): plain[kind]}
    return ways


def _emulated(kind: str, shares: bool) -> dict[Key, Arithmetic]:
    """A 16-bit type, and all its passes with a rounding point less, and with one point alone."""
    every = frozenset((*POINTS, PARAMETERS))
    chosen = {Key(kind): every}
    for point in (*POINTS, PARAMETERS) if shares else ():
        chosen[Key(kind, point, "without")] = every - {point}
        chosen[Key(kind, point, "alone")] = frozenset((point,))
    return {key: _emulation(kind, points) for key, points in chosen.items()}


def _emulation(kind: str, points: frozenset[str]) -> Arithmetic:
    """A 16-bit type that rounds at some points only."""
    weights = kind if PARAMETERS in points else "float32"
    emulation = ops.emulate(kind, points - {PARAMETERS}, bitwise=False)
    return Arithmetic(weights, emulation, np.float32)
