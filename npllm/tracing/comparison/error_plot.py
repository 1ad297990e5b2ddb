"""The error of a run against depth: what each operation introduces, and what it inherits."""

from pathlib import Path
from typing import Any

import numpy as np

from npllm.analysis.plots import new_figure, save_figure

__all__ = ["draw_errors"]

LEAST = 1e-3  # budgets; smaller errors are drawn there


def draw_errors(path: str | Path, comparison: Any) -> None:
    """Draw introduced and inherited errors, in budgets, in the order of execution.

    Parameters
    ----------
    path : str or Path
        The file to write; its suffix chooses the format.
    comparison : Comparison

    Raises
    ------
    MissingExtraError
        When matplotlib is not installed.
    NpllmOSError
        When the file cannot be written.
    """
    figure = new_figure((10, 4), layout="tight")
    axes = figure.add_subplot()
    rows = comparison.rows
    places = np.arange(len(rows))
    for name, style in (("inherited", "-"), ("introduced", ".")):
        values = [getattr(row, name) for row in rows]
        heights = [np.nan if v is None else np.clip(v, LEAST, 1e16) for v in values]
        axes.plot(places, heights, style, label=name, markersize=4)
    wrong = [n for n, row in enumerate(rows) if row.status in ("wrong", "wrong capture")]
    tops = [float(np.clip(rows[n].introduced or LEAST, LEAST, 1e16)) for n in wrong]
    axes.plot(wrong, tops, "rx", label="wrong", markersize=8)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_ylabel("error / budget")
    _label_layers(axes, rows)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def _label_layers(axes: Any, rows: list[Any]) -> None:
    """Write the layers below the place of their first value."""
    first: dict[tuple[int, int], int] = {}
    for place, row in enumerate(rows):
        if row.layer is not None:
            first.setdefault((row.step, row.layer), place)
    every = max(1, len(first) // 16)
    some = [*first.items()][::every]
    axes.set_xticks([place for _, place in some], [str(layer) for (_, layer), _ in some])
    axes.set_xlabel("layer")
