"""A precision report as a picture.  Needs matplotlib, the extra "plot"."""

from pathlib import Path
from typing import Any

import numpy as np

from npllm.analysis.plots import new_figure, save_figure
from npllm.tracing.precision.report import Precision, Row

__all__ = ["draw_precision"]


def draw_precision(path: str | Path, report: Precision) -> None:
    """Draw error against depth, one line for each arithmetic, and the share of each rounding point.

    Parameters
    ----------
    path : str or Path
        The file to write; its suffix chooses the format.
    report : Precision

    Raises
    ------
    MissingExtraError
        When matplotlib is not installed.
    NpllmOSError
        When the file cannot be written.
    """
    shared = [row for row in report.rows if row.shares]
    n_panels = 1 + bool(shared)
    figure = new_figure((6.4 * n_panels, 4.4), layout="tight")
    _draw_depth(figure.add_subplot(1, n_panels, 1), report)
    if shared:
        _draw_shares(figure.add_subplot(1, n_panels, 2), shared)
    figure.suptitle(f"{report.model}, {report.n_tokens} tokens", fontsize=9, parse_math=False)
    save_figure(figure, path)


def _draw_depth(axes: Any, report: Precision) -> None:
    for row in report.rows:
        error = np.array(row.depth)
        error[~np.isfinite(error) | (error == 0)] = np.nan  # a logarithmic axis has no place
        axes.plot(range(len(error)), error, label=row.title)
    axes.set_yscale("log")
    axes.set_xlabel("depth: 0 is the embedding, the last the final norm")
    axes.set_ylabel("relative error of the residual stream")
    axes.legend(fontsize=8)


def _draw_shares(axes: Any, rows: list[Row]) -> None:
    points = [share.point for share in rows[0].shares]
    height = 0.8 / len(rows)
    for number, row in enumerate(rows):
        share_of = {share.point: share.alone for share in row.shares}
        places = np.arange(len(points)) + number * height
        axes.barh(places, [share_of[point] for point in points], height, label=row.title)
    axes.set_yticks(np.arange(len(points)) + 0.4 - height / 2, points, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("squared error of the logits by this rounding alone, of the whole")
    axes.legend(fontsize=8)
