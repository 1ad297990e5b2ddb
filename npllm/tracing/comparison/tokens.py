"""What is compared before any value: token ids, positions, padding; and which mask the gold has."""

from typing import Any

import numpy as np

from npllm.testing.inputs import f64
from npllm.tracing.comparison.levels import Level
from npllm.tracing.comparison.nodes import Exact, Known, judged
from npllm.tracing.comparison.operations import Setting, call_of
from npllm.tracing.comparison.recorded import Recorded
from npllm.tracing.comparison.steps import Step, key_of
from npllm.tracing.graph import graph

__all__ = ["different_tokens", "documents_of"]

Array = Any


def different_tokens(own: Recorded, right: Recorded, found: Any) -> bool:
    """Compare the steps; tell whether the tokens differ, so that no value can be compared."""
    if own.index.get("steps") is right.index.get("steps"):
        return False
    if len(own.steps) != len(right.steps):
        found.differ(f"mine has {len(own.steps)} steps, gold has {len(right.steps)}")
        return True
    for t, (one, other) in enumerate(zip(own.steps, right.steps, strict=True)):
        text = _tokens(one, other)
        if text:
            found.differ(f"step {t}: {text}")
            return True
        found.notes += [f"step {t}: {text}" for text in _positions(one, other)]
    return False


def _tokens(one: Step, other: Step) -> str:
    """Say how ids or padding differ."""
    if one.ids.shape != other.ids.shape:
        return f"mine has input_ids {list(one.ids.shape)}, gold has {list(other.ids.shape)}"
    if one.valid.shape != other.valid.shape:
        return f"mine has {one.n_past} tokens before it, gold has {other.n_past}"
    if (one.valid != other.valid).any():
        return "attention_mask differs: mine and gold have padding in other places"
    wrong = (one.ids != other.ids) & one.real
    if wrong.any():
        at = tuple(int(n) for n in np.argwhere(wrong)[0])
        return (
            f"input_ids differ at {np.count_nonzero(wrong)} of {wrong.size} positions, first at "
            f"{list(at)}: mine has {one.ids[at]}, gold has {other.ids[at]}"
        )
    return ""


def _positions(one: Step, other: Step) -> list[str]:
    """Say how positions differ: by a constant, which RoPE does not see, or otherwise."""
    shift = np.where(one.real, one.positions - other.positions, 0)
    rows = np.flatnonzero(shift.any(axis=1))
    if not len(rows):
        return []
    row = int(rows[0])
    steps = set(shift[row][one.real[row]].tolist())
    text = f"position_ids differ in row {row}: mine {_ends(one.positions[row])}, "
    text += f"gold {_ends(other.positions[row])}"
    if len(steps) == 1:
        text += f": all by {steps.pop()}, which changes q and k and no score"
    is_column = (one.positions[row] == np.arange(one.ids.shape[1]) + one.n_past).all()
    return [f"C18 column index: {text}" if is_column and not one.valid.all() else text]


def _ends(x: Array) -> str:
    return ", ".join(str(n) for n in x[:4]) + (" ..." if len(x) > 4 else "")


def documents_of(right: Recorded, t: int, setting: Setting) -> Array:
    """Labels of packed documents, where the gold's attention keeps them apart.

    The index may say them.  Else positions that start again say where documents may begin; the
    gold's own attention in layer 0 says whether they are apart.
    """
    step = setting.step
    if step.documents is not None:
        return step.documents
    starts = (step.positions[:, 1:] == 0) & step.real[:, 1:] & step.real[:, :-1]
    if step.n_past or not starts.any():
        return None
    labels = np.concatenate([np.zeros((len(starts), 1), int), np.cumsum(starts, axis=1)], axis=1)
    return labels if _explains(right, t, setting, labels) else None


def _explains(right: Recorded, t: int, setting: Setting, labels: Array) -> bool:
    """Tell whether documents, and not their absence, make the gold's attention."""
    names = [f"model.layers.0.self_attn.{leaf}" for leaf in ("q", "k", "v", "heads")]
    if not all(right.has(key_of(name, t)) for name in names):
        return True
    q, k, v, heads = (f64(right.array(key_of(name, t))) for name in names)
    node = graph(1)[names[-1]]
    for documents in (None, labels):
        inputs = [Known(x) for x in (q, k, v)]
        call = call_of(names[-1], node, [q, k, v], setting._replace(documents=documents))
        exact = Exact(call, names[-1], inputs)
        if exact.value.shape != heads.shape:
            return True
        real = setting.step.real[:, None, :, None]
        one = judged(heads, exact, [Level("float64", "float64"), Level("float32")], real)
        if one.status != "wrong":
            return documents is not None
    return True
