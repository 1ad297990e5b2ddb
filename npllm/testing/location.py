"""Where the error lives: which entries are wrong, in the words of the axes."""

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["AXES", "features_of", "where"]

Array = Any

TILES = (512, 256, 128, 64, 32, 16, 8)

AXES = {
    "linear": ("n_batch", "n_seq", "d_out"),
    "qkv_projection": ("n_batch", "n_head", "n_seq", "d_head"),
    "rms_norm": ("n_batch", "n_seq", "d_model"),
    "layer_norm": ("n_batch", "n_seq", "d_model"),
    "rope": ("n_batch", "n_head", "n_seq", "d_head"),
    "softmax": ("n_batch", "n_seq", "n"),
    "attention": ("n_batch", "n_head", "n_seq", "d_value"),
    "swiglu": ("n_batch", "n_seq", "d_ff"),
    "gelu": ("n_batch", "n_seq", "d_ff"),
    "embed": ("n_batch", "n_seq", "d_model"),
    "add": ("n_batch", "n_seq", "d_model"),
}
"""Names of the last axes of an operation's output."""


def where(wrong: Array, op: str, features: Mapping[str, Array] | None = None) -> str:
    """Describe which entries are wrong.

    Parameters
    ----------
    wrong : bool array
        Of the output's shape.
    op : str
        The operation, for the names of the axes.
    features : dict, optional
        Sentence -> bool array that broadcasts to `wrong`: rows that have something in common, such
        as a cache.

    Returns
    -------
    text : str
        "nowhere"; "everywhere"; or the indices axis by axis: "n_head 3; n_seq 96 ... 99: the last,
        incomplete tile of 32".
    """
    wrong = np.asarray(wrong)
    if not wrong.any():
        return "nowhere"
    names = _axis_names(op, wrong.ndim)
    parts = [_feature(wrong, features or {})]
    for axis, name in enumerate(names):
        others = tuple(other for other in range(wrong.ndim) if other != axis)
        hit = wrong.any(axis=others)
        if not hit.all():
            parts.append(f"{name} {describe_indices(np.flatnonzero(hit), len(hit))}")
    parts = [part for part in parts if part]
    n = int(np.count_nonzero(wrong))
    if parts:
        return f"{'; '.join(parts)} ({n} of {wrong.size} entries)"
    return (
        "everywhere"
        if wrong.mean() > 0.5
        else f"scattered over all axes ({n} of {wrong.size} entries)"
    )


def _axis_names(op: str, ndim: int) -> list[str]:
    known = AXES.get(op, ())
    return [f"axis {n}" for n in range(ndim - len(known))] + list(
        known[max(0, len(known) - ndim) :]
    )


def _feature(wrong: Array, features: Mapping[str, Array]) -> str:
    """The sentence of the smallest group of rows that holds all wrong entries."""
    if features:  # they have one batch axis, whatever the output has
        wrong = wrong.reshape(-1, *wrong.shape[-3:])
    rows = wrong.any(axis=-1)
    found = []
    for text, has in features.items():
        has = np.broadcast_to(has, wrong.shape).any(axis=-1)
        if (
            has.any()
            and not has.all()
            and not (rows & ~has).any()
            and (rows & has).sum() * 2 > has.sum()
        ):
            found.append((int(has.sum()), text))
    return min(found)[1] if found else ""


def describe_indices(indices: Array, n: int) -> str:
    """Describe some of the indices 0 ... n - 1: one, a run, a tail, every k-th, or a list."""
    first, last, count = int(indices[0]), int(indices[-1]), len(indices)
    if count == 1:
        return f"{first}" + _tail(first, last, n)
    steps = np.unique(np.diff(indices))
    if len(steps) == 1 and steps[0] == 1:
        return f"{first} ... {last}" + _tail(first, last, n)
    if len(steps) == 1 and count > 2:
        return f"{first}, {first + int(steps[0])}, ...: every {int(steps[0])}th"
    periodic = _periodic(indices, n)
    if periodic:
        return periodic
    shown = ", ".join(str(int(i)) for i in indices[:8])
    return shown + (f", ... ({count} of {n})" if count > 8 else "")


def _tail(first: int, last: int, n: int) -> str:
    """Say whether a run that reaches the end is the last tile, which is incomplete."""
    if last != n - 1:
        return ""
    for tile in TILES:
        if first > 0 and first == n // tile * tile and n % tile:
            return f": the last, incomplete tile of {tile}"
    return f": the last {n - first}" if first > 0 else ""


def _periodic(indices: Array, n: int) -> str:
    """Indices that repeat with the period of a tile."""
    for tile in sorted(TILES):
        inside = np.unique(indices % tile)
        expected = [i for i in range(n) if i % tile in set(inside.tolist())]
        if n >= 2 * tile and len(inside) < tile and len(expected) == len(indices):
            places = f"{inside[0]}" if len(inside) == 1 else f"{inside[0]} ... {inside[-1]}"
            return f"{places} of every tile of {tile}"
    return ""


def features_of(op: str, inputs: Mapping[str, Any]) -> dict[str, Array]:
    """Name the groups of an attention's rows that implementations get wrong together."""
    if op != "attention":
        return {}
    from npllm.testing.inputs import visible_keys

    q, k = inputs["q"], inputs["k"]
    valid, window = inputs.get("valid"), inputs.get("window")
    causal, mask = inputs.get("causal", True), inputs.get("mask")
    shape = (q.shape[-2], k.shape[-2])
    count = np.count_nonzero(visible_keys(shape, causal, window, valid, mask), axis=-1)[..., None]
    features = {"rows that see no key": count == 0, "rows that see one key only": count == 1}
    if window is not None:
        whole = np.count_nonzero(visible_keys(shape, causal, None, valid, mask), axis=-1)[..., None]
        features["rows from which the window hides keys"] = count < whole
    if valid is not None:
        n_valid = np.count_nonzero(np.asarray(valid), axis=-1)[:, None, None, None]
        features["sequences with padding"] = n_valid < shape[1]
        features["sequences without padding"] = n_valid == shape[1]
        features["sequences with a cache (more keys than queries)"] = n_valid > shape[0]
    return features
