"""Plots: the mask rules side by side, and attention weights as heat maps.  Needs matplotlib,
the extra "plot".
"""

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from npllm.analysis.plot_layout import (
    DOTS,
    label_tokens,
    place_panels,
    shorten,
    shown_text,
    text_width,
)
from npllm.errors import MissingExtraError, NpllmOSError, install_extra
from npllm.ops import mask

__all__ = ["draw_masks", "draw_weights", "example_rules", "new_figure", "save_figure"]

Array = Any

QUERY_AXIS, KEY_AXIS = "query position", "key position"
COLOURS = {
    "not visible": "#eceff4",
    "visible": "#7db3e8",
    "current position, visible to itself": "#c2500a",
}


def example_rules(n: int) -> dict[str, Any]:
    """Return one example of every rule by its name, scaled to n slots.

    Parameters
    ----------
    n : int

    Returns
    -------
    rules : dict of str to Rule
    """
    w = max(2, n // 8)
    labels = np.array([[0] * (n // 4) + [1] * (n // 2) + [2] * (n - n // 4 - n // 2)])
    causal = mask.causal()
    return {
        "causal": causal,
        "bidirectional": mask.bidirectional(),
        f"sliding_window({w})": mask.sliding_window(w),
        f"lookback({w})": mask.lookback(w),
        f"longformer_window({2 * w})": mask.longformer_window(2 * w),
        f"dilated_window({w}, 2)": mask.dilated_window(w, 2),
        f"band({w}, 2)": mask.band(w, 2),
        f"block_local({w})": mask.block_local(w),
        f"strided({w})": mask.strided(w),
        f"fixed({w}, 1)": mask.fixed(w, 1),
        "global_tokens([0, 5])": mask.global_tokens([0, 5]),
        f"random_blocks({w}, {-(-n // w)}, 2, 0)": mask.random_blocks(w, -(-n // w), 2, 0),
        f"prefix_lm({n // 3})": mask.prefix_lm(n // 3),
        "causal & documents": causal & mask.documents(labels),
        "causal & padding": causal & mask.padding(np.arange(n)[None, :] >= w),
        "causal & left_padding": causal & mask.left_padding(np.array([w])),
        "Big Bird": mask.longformer_window(w)
        | mask.global_tokens([0])
        | mask.random_blocks(w, -(-n // w), 1, 0),
    }


def draw_masks(
    path: str | Path, rules: dict[str, Any] | None = None, n: int = 32, columns: int = 4
) -> str:
    """Draw which keys each query sees, one panel for each rule, in the three colours of the key.

    Parameters
    ----------
    path : str or Path
        The file to write; its suffix chooses the format.
    rules : dict of str to Rule, optional
        Default: `example_rules(n)`.
    n : int
        Positions.
    columns : int
        Panels side by side.

    Returns
    -------
    size : str
        Of the picture: "1500 x 2000 pixels, 138 kB".

    Raises
    ------
    MissingExtraError
        When matplotlib is not installed.
    """
    rules = example_rules(n) if rules is None else rules
    figure = new_figure()
    panels = place_panels(figure, len(rules), columns, 2.1, (0.5, 0.45), 0.4, right=0.1)
    for axes, (name, rule) in zip(panels, rules.items(), strict=True):
        _draw_rule(axes, name, rule, np.arange(n))
    _add_key(figure)
    return save_figure(figure, path)


def _draw_rule(axes: Any, name: str, rule: Any, slots: Array) -> None:
    from matplotlib.colors import ListedColormap

    visible = np.asarray(rule(slots[:, None], slots[None, :])).reshape(-1, *slots.shape * 2)[0]
    shown = visible * (1 + np.eye(len(slots), dtype=int))  # 2: the current position itself
    colours = ListedColormap(list(COLOURS.values()))
    axes.imshow(shown, cmap=colours, vmin=0, vmax=2, interpolation="nearest")
    axes.set_title(f"{name}\n{visible.mean():.0%} visible", fontsize=8)
    ticks = sorted({0, len(slots) // 2, len(slots) - 1})
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    axes.tick_params(labelsize=6, length=2)
    axes.set_xlabel(KEY_AXIS, fontsize=7)
    axes.set_ylabel(QUERY_AXIS, fontsize=7)


def _add_key(figure: Any) -> None:
    """Say below the panels what the three colours mean."""
    from matplotlib.patches import Patch

    patches = [
        Patch(facecolor=colour, edgecolor="grey", label=name) for name, colour in COLOURS.items()
    ]
    figure.legend(handles=patches, loc="lower center", ncols=3, fontsize=9, frameon=False)


def draw_weights(
    path: str | Path,
    weights: Array,
    tokens: list[str],
    title: str = "",
    heads: Sequence[int] | None = None,
) -> str:
    """Draw attention weights as a heat map, or as a grid of heat maps, with a scale of the colours.

    Parameters
    ----------
    path : str or Path
    weights : array [n_seq, n_ctx]
        Or [n_head, n_seq, n_ctx]: one panel for each head.
    tokens : list of str
        n_ctx texts.  They label both axes; every second, third, ... where there are many.
    title : str
    heads : sequence of int, optional
        The number of each panel's head.  Default: 0 ... n_head - 1; none for [n_seq, n_ctx].

    Returns
    -------
    size : str
        Of the picture: "900 x 800 pixels, 45 kB".

    Raises
    ------
    MissingExtraError
        When matplotlib is not installed.
    """
    figure = new_figure()
    panels = np.asarray(weights).reshape(-1, *np.shape(weights)[-2:])
    if heads is None and np.ndim(weights) == 3:
        heads = range(len(panels))
    alone = len(panels) == 1
    size, n_most = (7, 16) if alone else (7 if len(tokens) <= 12 else 5.5, 10)
    side = min(11.0, max(3.0, 0.28 * len(tokens))) if alone else 2.4
    labels = [f"{n} {shorten(shown_text(token), n_most)}" for n, token in enumerate(tokens)]
    margin = 0.12 + max(text_width(label, size) for label in labels)
    columns = ceil(len(panels) ** 0.5)
    grid = place_panels(figure, len(panels), columns, side, (margin, margin), 0.25, right=1.0)
    for number, (axes, panel) in enumerate(zip(grid, panels, strict=True)):
        image = axes.imshow(panel, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        if heads is not None:
            axes.set_title(f"head {heads[number]}", fontsize=9, pad=3)
        label_tokens(axes, labels, len(panel), side, size)
    _add_scale(figure, image)
    _add_title(figure, title)
    return save_figure(figure, path)


def _add_scale(figure: Any, image: Any) -> None:
    """Name the axes, and the colours at the right of all panels."""
    width, height = figure.get_size_inches()
    tall = min(3.0, height - 1.2)
    box = (1 - 0.85 / width, 0.5 - tall / 2 / height, 0.14 / width, tall / height)
    bar = figure.colorbar(image, cax=figure.add_axes(box))
    bar.set_label("attention weight", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.supxlabel(KEY_AXIS, fontsize=9, y=0.06 / height, va="bottom")
    figure.supylabel(QUERY_AXIS, fontsize=9, x=0.06 / width, ha="left")


def _add_title(figure: Any, title: str) -> None:
    """Write a title that is no wider than the picture."""
    width, height = figure.get_size_inches()
    text = shown_text(title).replace("␣", " ")
    while len(text) > 20 and text_width(text, 9) > 0.95 * width - 0.2:
        text = shorten(text, len(text) - 5)
    figure.suptitle(text, fontsize=9, parse_math=False, y=1 - 0.1 / height, va="top")


def new_figure(size: tuple[float, float] = (1.0, 1.0), layout: Any = None) -> Any:
    """Create an empty figure that is saved to a file and needs no display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            f"plots need matplotlib ({error}); {install_extra('plot')}"
        ) from error
    return Figure(figsize=size, layout=layout, dpi=DOTS)


def save_figure(figure: Any, path: str | Path) -> str:
    """Write a figure to a file, whose suffix chooses the format.

    Returns
    -------
    size : str
        "1500 x 2000 pixels, 138 kB".

    Raises
    ------
    NpllmOSError
        When the file cannot be written, or no such format exists.
    """
    try:
        figure.savefig(path, dpi=DOTS)
        n_bytes = Path(path).stat().st_size
    except (OSError, ValueError) as error:
        raise NpllmOSError(f"{path}: cannot be written ({error})") from None
    width, height = (int(inches * DOTS) for inches in figure.get_size_inches())
    return f"{width} x {height} pixels, {n_bytes / 1000:.0f} kB"
