"""Layout of plots: where panels stand, and the texts of tokens as a picture can show them."""

from functools import cache
from typing import Any

__all__ = ["label_tokens", "place_panels", "shorten", "shown_text", "text_width"]

OUTER = 0.35  # inches around all panels, for the names of the axes and the title
POINTS_PER_INCH = 72
DOTS = 150  # per inch
LINE = 1.35  # lines of text at a distance of this many font sizes do not touch


def shown_text(text: str) -> str:
    r"""Return a text as Python writes it, with its spaces visible.

    What has no glyph in the font of the plots is written as an escape, such as \u65e5.
    """
    glyphs = _glyphs()
    written = repr(text)[1:-1].replace(" ", "␣")
    return "".join(c if ord(c) in glyphs else _escape(c) for c in written)


def shorten(text: str, n_most: int) -> str:
    """Return at most n_most characters, the middle of a longer text as an ellipsis."""
    if len(text) <= n_most:
        return text
    head = n_most // 2
    return f"{text[:head]}…{text[len(text) - (n_most - head - 1) :]}"


def text_width(text: str, size: float) -> float:
    """Return how wide a line of the plots' font is, in inches; size is in points."""
    font = _font()
    font.set_size(size, DOTS)
    font.set_text(text)
    return font.get_width_height()[0] / 64 / DOTS


def label_tokens(axes: Any, labels: list[str], n_seq: int, side: float, size: float) -> None:
    """Write the keys below a panel and the queries, the last n_seq of them, beside it.

    Where the labels have no room, every second, third, ... is written.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
    labels : list of str
        n_ctx texts, of the keys.
    n_seq : int
        Queries.
    side : float
        Width and height of the panel in inches.
    size : float
        Of the font, in points.
    """
    room = max(1, int(side * POINTS_PER_INCH / (LINE * size)))
    every = -(-len(labels) // room)
    first = len(labels) - n_seq
    keys = range(0, len(labels), every)
    queries = [n for n in keys if n >= first] or [first]
    style: dict[str, Any] = {"fontsize": size, "parse_math": False}
    axes.set_xticks(list(keys), [labels[n] for n in keys], rotation=90, **style)
    axes.set_yticks([n - first for n in queries], [labels[n] for n in queries], **style)
    axes.tick_params(length=2, pad=1.5)


def place_panels(
    figure: Any,
    n_panels: int,
    columns: int,
    side: float,
    margin: tuple[float, float],
    title: float,
    right: float,
) -> list[Any]:
    """Put square panels on a figure, row by row, and give the figure the size that they need.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
    n_panels, columns : int
    side : float
        Of a panel, in inches, as all lengths.
    margin : tuple of float
        Room for the labels at the left of each panel and below it.
    title : float
        Room for the title above each panel.
    right : float
        Room at the right of all panels.

    Returns
    -------
    panels : list of matplotlib.axes.Axes
    """
    left, below = margin
    lines = -(-n_panels // columns)
    dx, dy = left + side + 0.1, title + side + below
    width, height = OUTER + dx * columns + right, 2 * OUTER + dy * lines
    figure.set_size_inches(width, height)
    corners = [
        (OUTER + k % columns * dx + left, height - OUTER - (k // columns + 1) * dy + below)
        for k in range(n_panels)
    ]
    return [
        figure.add_axes((x / width, y / height, side / width, side / height)) for x, y in corners
    ]


@cache
def _font() -> Any:
    from matplotlib.font_manager import findfont, get_font

    return get_font(findfont("DejaVu Sans"))


@cache
def _glyphs() -> frozenset[int]:
    """Code points that the font of the plots can draw."""
    return frozenset(_font().get_charmap())


def _escape(character: str) -> str:
    return character.encode("ascii", "backslashreplace").decode("ascii")
