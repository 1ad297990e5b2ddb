"""Activations in fewer bits: what `activations=` names, as formulas.

"float32"    nothing is rounded
"int16"      16-bit integers, with one scale for each group of adjacent entries of a row
"int8"       8-bit integers, likewise
"bfloat16"   the nearest bfloat16, ties to even
"""

from math import prod
from typing import Any

from npllm.arrays import DTYPES, array_namespace, expect_shape, ieee_semantics, is_packed, round_to
from npllm.errors import NpllmValueError
from npllm.quantized.packed import PackedMatrix
from npllm.quantized.permuted import PermutedWeight

__all__ = [
    "ACTIVATIONS",
    "DEFAULTS",
    "LIMITS",
    "N_BYTES",
    "SMALLEST",
    "activation_group",
    "check_activations",
    "check_applies",
    "default_activations",
    "is_rounded_for",
    "matrices_of",
    "restore",
    "round_activations",
    "rounded_values",
]

Array = Any

ACTIVATIONS = ("float32", "int16", "int8", "bfloat16")
N_BYTES = {"int8": 1, "int16": 2}
LIMITS = {1: 127, 2: 32767}  # largest code, by the bytes of a code
GROUP = PackedMatrix.activation_group  # of weights that have no groups of their own
DEFAULTS = {
    "int8": "int16",
    "Q8_0": "int16",
    "grouped": "float32",  # no kernel takes it
    "Q6_K": "float32",  # int16 is no faster with a scale for each 16 entries, int8 costs too much
    **dict.fromkeys(("Q5_0", "Q5_1", "Q5_K", "Q4_0", "Q4_1", "Q4_K"), "int8"),
}
"""What activations=None means for weights of a type: docs/quantisation.md has the measurements."""
SMALLEST = 2.0**-100  # a group whose entries are all smaller is rounded to 0


@ieee_semantics
def round_activations(x: Array, kind: str, group: int) -> tuple[Array, Array]:
    """Round rows to integers with one scale for each group of adjacent entries.

        m = max_i |x[..., i]| over the group,   limit = 127 ("int8") or 32767 ("int16")
        codes[..., i] = round(x[..., i] * (limit / m)),   scales[..., g] = m / limit

    Parameters
    ----------
    x : array [..., d_in]
        float32.
    kind : str
        "int8" or "int16".
    group : int
        Entries that share a scale.  The last group may be shorter.

    Returns
    -------
    codes : int8 or int16 array [..., d_in]
        In -limit ... limit.
    scales : float32 array [..., ceil(d_in / group)]

    Raises
    ------
    NpllmValueError
        For another kind, and a group below 1.

    Notes
    -----
    An entry is off by at most (1 / 2 + limit * 2**-22) scales: half a step, and three roundings of
    float32.  That is 0.4 % of the group's largest entry in int8, 0.0016 % in int16.

    Where m < 2**-100, codes and scale are 0.  Of a group that holds infinity or NaN the codes are
    0 and the scale is NaN, so that every product with it is NaN.

    An integer of 16 bits is two of 8: 256 * high + low, which is how a processor with products of
    bytes multiplies it.

    Source: "LLM.int8()" (Dettmers et al. 2022), section 2.1, absmax quantization.
    """
    if kind not in N_BYTES:
        raise NpllmValueError(f"kind must be int8 or int16, got {kind!r}")
    if group < 1:
        raise NpllmValueError(f"group must be at least 1, got {group}")
    xp = array_namespace(x)
    expect_shape("x", x, dots=None, d_in=None)
    groups = _in_groups(x, group, xp)
    limit = LIMITS[N_BYTES[kind]]
    largest = xp.max(xp.abs(groups), axis=-1, keepdims=True)
    is_small, is_finite = largest < SMALLEST, xp.isfinite(largest)
    one, nan = xp.ones_like(largest), xp.full_like(largest, xp.nan)
    factor = limit / xp.where(is_small | ~is_finite, one, largest)
    steps = xp.round(groups * factor)
    codes = xp.where(is_small | ~is_finite, xp.zeros_like(steps), steps)
    scales = xp.where(is_small, xp.zeros_like(largest), largest / limit)
    scales = xp.where(is_finite, scales, nan)[..., 0]
    flat = xp.reshape(codes, (*x.shape[:-1], -1))[..., : x.shape[-1]]
    return xp.astype(flat, getattr(xp, kind)), scales


@ieee_semantics
def restore(codes: Array, scales: Array, group: int) -> Array:
    """Return what codes and scales stand for: the inverse of `round_activations`.

        x[..., i] = scales[..., i // group] * codes[..., i]

    Parameters
    ----------
    codes : int8 or int16 array [..., d_in]
    scales : float32 array [..., ceil(d_in / group)]
    group : int

    Returns
    -------
    x : float32 array [..., d_in]
    """
    xp = array_namespace(codes, scales)
    wide = xp.repeat(scales, group, axis=-1)[..., : codes.shape[-1]]
    return wide * xp.astype(codes, xp.float32)


def check_activations(kind: Any) -> str:
    """Return the kind that a caller means, None being "float32"; raise for an unknown one."""
    if kind is None:
        return "float32"
    if kind not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise NpllmValueError(f"activations must be one of {known}, got {str(kind)[:40]!r}")
    return kind


def is_rounded_for(weight: Any, kind: str) -> bool:
    """Tell whether a kind of activations applies to products with a weight.

    Integers go with packed weights, bfloat16 with arrays of bfloat16.
    """
    weight = getattr(weight, "base", weight) if is_packed(weight) else weight  # under an adapter
    if kind in N_BYTES:
        return all(map(is_packed, getattr(weight, "parts", (weight,))))
    return kind == "bfloat16" and not is_packed(weight) and weight.dtype == DTYPES["bfloat16"]


def matrices_of(layers: Any) -> list[Any]:
    """Return the matrices of nested tuples of weights."""
    if isinstance(layers, tuple):
        return [w for part in layers for w in matrices_of(part)]
    return [layers] if getattr(layers, "ndim", 0) == 2 else []


def check_applies(params: Any, kind: str) -> None:
    """Raise unless a kind of activations applies to at least one matrix of a model.

    Parameters
    ----------
    params : Params or BertParams
    kind : str
        One of `ACTIVATIONS`.

    Raises
    ------
    NpllmValueError
        When no product would be rounded.
    """
    matrices = matrices_of(params.layers)
    if kind == "float32" or any(is_rounded_for(w, kind) for w in matrices):
        return
    held = sorted({type(w).__name__ if is_packed(w) else str(w.dtype) for w in matrices})
    wanted = "bfloat16 weights" if kind == "bfloat16" else "weights in int8 or in blocks"
    dtypes = '"bfloat16"' if kind == "bfloat16" else '"int8" or "int4"'
    raise NpllmValueError(
        f'activations="{kind}" goes with {wanted}, got {", ".join(held)}: load with '
        f'dtype={dtypes}, or with activations="float32"'
    )


def activation_group(weight: Any) -> int:
    """Count the entries of x that share a scale in a product with a weight: those of the weight's
    own groups, else GROUP.
    """
    return getattr(weight, "activation_group", GROUP)


def default_activations(params: Any) -> str:
    """Return the kind of activations that goes with the weights of a model.

    Of `DEFAULTS` for the type that holds most entries of packed matrices: the fastest kind whose
    Kullback-Leibler divergence from float32 activations is below a tenth of what quantising the
    weights costs.  "float32" where no matrix is packed.

    Parameters
    ----------
    params : Params or BertParams

    Returns
    -------
    kind : str
        One of `ACTIVATIONS`.
    """
    sizes: dict[str, int] = {}
    for part in (part for matrix in matrices_of(params.layers) for part in _parts(matrix)):
        if is_packed(part):
            name = getattr(part, "format", "int8")
            sizes[name] = sizes.get(name, 0) + prod(part.shape)
    return DEFAULTS[max(sizes, key=sizes.__getitem__)] if sizes else "float32"


def _parts(weight: Any) -> list[Any]:
    """The matrices that a weight stacks, in whatever order their columns are."""
    weight = weight.base if isinstance(weight, PermutedWeight) else weight
    parts = getattr(weight, "parts", None)
    return [weight] if parts is None else [x for part in parts for x in _parts(part)]


def rounded_values(x: Array, kind: str, group: int = GROUP) -> Array:
    """Return the float32 values that rows have in a kind of activations.

    Parameters
    ----------
    x : array [..., d_in]
        float32.
    kind : str
        One of `ACTIVATIONS`.
    group : int
        Of the integers.

    Returns
    -------
    y : float32 array [..., d_in]
    """
    if kind == "float32":
        return x
    if kind == "bfloat16":
        return round_to(x, "bfloat16")
    return restore(*round_activations(x, kind, group), group)


def _in_groups(x: Array, group: int, xp: Any) -> Array:
    """Cut the last axis into groups, the last one filled up with zeros."""
    d_in = x.shape[-1]
    n_group = -(-d_in // group)
    missing = n_group * group - d_in
    if missing:
        x = xp.concat([x, xp.zeros((*x.shape[:-1], missing), dtype=x.dtype)], axis=-1)
    return xp.reshape(x, (*x.shape[:-1], n_group, group))
