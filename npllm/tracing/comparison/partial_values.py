"""Values of which only some entries were recorded: they are compared, and nothing is computed from
them.
"""

from typing import Any

import numpy as np

from npllm.testing.inputs import f64
from npllm.tracing.comparison.graft import NotRecordedError, Run
from npllm.tracing.comparison.nodes import Exact, share_of
from npllm.tracing.comparison.recorded import Recorded
from npllm.tracing.comparison.row_orders import interleaved
from npllm.tracing.comparison.steps import key_of
from npllm.tracing.comparison.walking_row import Row

__all__ = ["compare_partial"]

Array = Any


def compare_partial(row: Row, run: Run, gold: Recorded, name: str, t: int) -> None:
    """Fill in a row from the entries that were recorded.

    The answer is computed from the nearest whole values before it, so that an error that arose
    between the two counts here: it is seen, and not placed.
    """
    key = key_of(name, t)
    kept = run.mine.kept(key)
    if kept is None:
        row.status, row.note = "not decidable", "partial, and the index has no kept indices"
        return
    try:
        exact = run.exact(name, t)
    except NotRecordedError as error:
        row.status, row.note = "not decidable", str(error)
        return
    x = run.raw(name, t)
    is_shared = x.ndim == 2 and name.startswith("model.rotary_emb.")  # one table for all rows
    y = exact.value[0] if is_shared else exact.value
    if len(kept) != y.ndim or any(
        axis.max(initial=0) >= n or axis.min(initial=0) < 0
        for axis, n in zip(kept, y.shape, strict=False)
    ):
        row.status, row.note = "wrong", f"indices beyond the shape {list(y.shape)}"
        return
    at = np.ix_(*kept)
    row.note = "partial"
    level, errors = _best(row, run, exact, x, (y, at), name)
    row.introduced, unit = errors
    row.arithmetic = str(level)
    row.status = "within" if row.introduced <= 1 else "wrong"
    if gold.has(key) and gold.array(key).shape == y.shape:
        right = f64(gold.array(key))[at]
        row.total, row.inherited = (
            share_of(np.abs(part - right), unit) for part in (f64(x), y[at])
        )


def _best(
    row: Row, run: Run, exact: Exact, x: Array, part: tuple[Array, tuple[Array, ...]], name: str
) -> tuple[Any, tuple[float, Array]]:
    """The smallest share, over the levels and the order of rotary pairs."""
    y, at = part
    half = run.mine.rounded_to(row.name) / 2
    found = []
    leaf = name.rsplit(".", 1)[-1]
    for says, change in interleaved(leaf, run.config.d_rope):
        for level in run.levels(x):
            error = np.broadcast_to(exact.error(level), exact.value.shape)
            error = error if error.ndim == y.ndim else error[0]
            unit = change(error)[at] + half
            share = share_of(np.abs(f64(x) - change(y)[at]), unit)
            found.append((share > 1, says, level, (share, unit)))
    found.sort(key=lambda one: (one[0], one[1] != ""))
    _, says, level, errors = found[0]
    row.note = "; ".join(text for text in (row.note, says) if text)
    return level, errors
