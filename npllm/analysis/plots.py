"""Plots: the mask rules side by side, and attention weights as heat maps.  Needs matplotlib,
`npllm[plot]`.
"""

from pathlib import Path
from typing import Any

import numpy as np

from npllm.errors import MissingExtraError, NpllmOSError
from npllm.ops import mask

__all__ = ["draw_masks", "draw_weights", "example_rules", "new_figure", "save_figure"]

Array = Any


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
) -> None:
    """Draw which keys each query sees, one panel for each rule.

    Parameters
    ----------
    path : str or Path
        The file to write; its suffix chooses the format.
    rules : dict of str to Rule, optional
        Default: `example_rules(n)`.
    n : int
        Slots.
    columns : int
        Panels side by side.

    Raises
    ------
    MissingExtraError
        When matplotlib is not installed.
    """
    rules = example_rules(n) if rules is None else rules
    lines = -(-len(rules) // columns)
    figure = new_figure((2.4 * columns, 2.6 * lines))
    for number, (name, rule) in enumerate(rules.items(), 1):
        _draw_rule(figure.add_subplot(lines, columns, number), name, rule, np.arange(n))
    save_figure(figure, path)


def _draw_rule(axes: Any, name: str, rule: Any, slots: Array) -> None:
    visible = np.asarray(rule(slots[:, None], slots[None, :])).reshape(-1, *slots.shape * 2)[0]
    axes.imshow(visible, cmap="Blues", vmin=0, vmax=1.3, interpolation="nearest")
    axes.set_title(f"{name}\n{visible.mean():.0%} visible", fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel("key slot", fontsize=7)
    axes.set_ylabel("query slot", fontsize=7)


def draw_weights(path: str | Path, weights: Array, tokens: list[str], title: str = "") -> None:
    """Draw attention weights as a heat map, or as a grid of heat maps.

    Parameters
    ----------
    path : str or Path
    weights : array [n_seq, n_ctx]
        Or [n_head, n_seq, n_ctx]: one panel for each head.
    tokens : list of str
        n_ctx texts.
    title : str

    Raises
    ------
    MissingExtraError
        When matplotlib is not installed.
    """
    panels = np.asarray(weights).reshape(-1, *np.shape(weights)[-2:])
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    side = max(3.0, 0.3 * len(tokens)) if len(panels) == 1 else 2.6
    figure = new_figure((side * columns + 1, side * lines + 0.6))
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(lines, columns, number + 1)
        axes.imshow(panel, cmap="Blues", vmin=0, vmax=1)
        if len(panels) > 1:
            axes.set_title(f"head {number}", fontsize=8)
        _label_tokens(axes, [] if len(panels) > 1 else tokens, len(panel))
    figure.suptitle(title, fontsize=9, parse_math=False)
    save_figure(figure, path)


def _label_tokens(axes: Any, tokens: list[str], n_seq: int) -> None:
    """Write the keys below a panel and the queries, the last n_seq of them, beside it."""
    names = [repr(token)[1:-1] for token in tokens]
    queries = names[-n_seq:]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7, parse_math=False)
    axes.set_yticks(range(len(queries)), queries, fontsize=7, parse_math=False)


def new_figure(size: tuple[float, float]) -> Any:
    """Create an empty figure that is saved to a file and needs no display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            f'plots need matplotlib ({error}); pip install "npllm[plot]"'
        ) from error
    return Figure(figsize=size)


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure to a file, whose suffix chooses the format.

    Raises
    ------
    NpllmOSError
        When the file cannot be written, or no such format exists.
    """
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise NpllmOSError(f"{path}: cannot be written ({error})") from None
