"""Pictures: every rule in one, the weights of one head and of all, and what happens without
matplotlib.
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from npllm.analysis import plots
from npllm.errors import MissingExtraError, NpllmOSError
from npllm.ops import mask

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def picture(tmp_path):
    """Path of a picture; the test is skipped where nothing can draw."""
    pytest.importorskip("matplotlib", reason="plots need matplotlib (the extra plot)")
    return tmp_path / "picture.png"


def pixels(path):
    from matplotlib.image import imread

    assert path.read_bytes().startswith(PNG)
    image = imread(path)
    assert image.size and image[..., :3].std() > 0.01, "not one plain colour"
    return image


@pytest.mark.parametrize("n", [8, 32])
def test_there_is_an_example_of_every_rule(n):
    rules, slots = plots.example_rules(n), np.arange(n)
    shown = {
        name: np.broadcast_to(rule(slots[:, None], slots[None, :]), (1, 1, n, n))
        for name, rule in rules.items()
    }
    assert all(table.any() for table in shown.values())
    assert shown["bidirectional"].all() and (shown["causal"] == np.tri(n, dtype=bool)).all()
    named = " ".join(rules)
    makers = {
        name
        for name in mask.__all__
        if callable(getattr(mask, name)) and name not in ("Rule", "to_bool")
    }
    assert {name for name in makers if name not in named} == set()


@pytest.mark.parametrize("n", [8, 32])
def test_examples_are_named_by_the_call_that_makes_them(n):
    """A title may be typed in."""
    slots, rules = np.arange(n), plots.example_rules(n)
    called = {name: rule for name, rule in rules.items() if name.endswith(")")}
    assert len(called) >= 10
    for name, rule in called.items():
        same = eval(name, vars(mask) | {})
        assert (
            same(slots[:, None], slots[None, :]) == rule(slots[:, None], slots[None, :])
        ).all(), name


@pytest.mark.slow
def test_all_rules_are_drawn_into_one_picture(picture):
    plots.draw_masks(picture)
    height, width = pixels(picture).shape[:2]
    assert height > width > 800, "4 columns, as many lines as it takes"


def test_a_rule_is_drawn_where_it_is_true(picture, figures):
    """What reaches the canvas: the table of the rule in three colours, its name and share."""
    rules = {
        "mine": mask.sliding_window(3),
        "rows": mask.documents(np.array([[0, 0, 1, 1], [0, 1, 1, 1]])),
        "never itself": mask.causal() & ~mask.sliding_window(1),
    }
    plots.draw_masks(picture, rules, n=4)
    mine, rows, never = figures[0].axes
    drawn = np.asarray(mine.images[0].get_array())
    sees = np.tri(4, dtype=bool) & ~np.tri(4, k=-3, dtype=bool)
    assert np.array_equal(drawn, np.where(np.eye(4), 2, sees))
    assert mine.get_title().startswith("mine") and "56%" in mine.get_title()
    assert rows.images[0].get_array().shape == (4, 4)
    assert np.asarray(never.images[0].get_array()).max() == 1, "no query sees itself"
    for axes in (mine, rows, never):
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("key position", "query position")
    key = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert key == ["not visible", "visible", "current position, visible to itself"]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    from matplotlib.figure import Figure

    saved, save = [], Figure.savefig

    def savefig(figure, *args, **options):
        saved.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


@pytest.mark.parametrize("shape", [(5, 5), (1, 5), (3, 5, 5), (9, 5, 5)])
def test_weights_are_drawn_for_one_head_and_for_all(picture, figures, shape):
    weights, tokens = np.random.default_rng(0).random(shape), ["The", " cat", " sat", "\n", " on"]
    size = plots.draw_weights(picture, weights, tokens, title="layer 3")
    height, width = pixels(picture).shape[:2]
    assert size == f"{width} x {height} pixels, {picture.stat().st_size / 1000:.0f} kB"
    (figure,) = figures
    *panels, scale = figure.axes
    drawn = [panel.images[0].get_array() for panel in panels]
    assert np.array_equal(drawn, weights.reshape(-1, *shape[-2:]))
    titles = [panel.get_title() for panel in panels]
    assert titles == ([""] if len(shape) == 2 else [f"head {n}" for n in range(len(drawn))])
    assert figure.get_suptitle() == "layer 3"
    assert (figure.get_supxlabel(), figure.get_supylabel()) == ("key position", "query position")
    assert scale.get_ylabel() == "attention weight" and scale.get_ylim() == (0, 1)
    labels = ["0 The", "1 ␣cat", "2 ␣sat", "3 \\n", "4 ␣on"]
    for panel in panels:
        assert texts_of(panel, "x") == labels and texts_of(panel, "y") == labels[-shape[-2] :]


def texts_of(panel, axis):
    return [label.get_text() for label in getattr(panel, f"get_{axis}ticklabels")()]


def test_a_head_keeps_its_number(picture, figures):
    plots.draw_weights(picture, np.ones((2, 1, 1)), ["a"], heads=[7, 3])
    assert [panel.get_title() for panel in figures[0].axes[:2]] == ["head 7", "head 3"]


ODD = ["$\\frac{$", "日", "é", "<|end|>", "\u200b", "<0xE2>", "\ufffd", "\n\n", "\t", "ab" * 40, ""]


@pytest.mark.parametrize(
    ("n_head", "n"),
    [
        (1, 5),
        (3, 20),
        *(pytest.param(h, n, marks=pytest.mark.slow) for h in (1, 8, 32) for n in (5, 20, 200)),
    ],
)
def test_no_text_is_cut_or_lies_on_another(picture, figures, n_head, n):
    tokens = [ODD[k % len(ODD)] for k in range(n)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that is missing
        plots.draw_weights(picture, np.ones((n_head, n, n)), tokens, "".join(tokens) + "日$x^")
    (figure,) = figures
    boxes = list(boxes_of_texts(figure))
    width, height = figure.get_size_inches() * figure.dpi
    assert len(boxes) > 2 * n_head * min(n, 8)
    low, high = np.array(boxes)[:, :2], np.array(boxes)[:, 2:]
    assert (low > 0).all() and (high < [width, height]).all()
    common = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
    common[np.eye(len(boxes), dtype=bool)] = 0
    assert not (common > 0.5).all(axis=-1).any()


def boxes_of_texts(figure):
    """[x0, y0, x1, y1] of every text of a picture."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if text.get_text() and text.get_visible():
            yield text.get_window_extent().extents
            assert not text.get_parse_math() or "$" not in text.get_text()


def test_many_tokens_are_labelled_in_part(picture, figures):
    plots.draw_weights(picture, np.eye(90)[None].repeat(2, 0), [f"t{n}" for n in range(90)])
    for panel in figures[0].axes[:2]:
        labels, places = texts_of(panel, "x"), panel.get_xticks()
        assert labels == texts_of(panel, "y") == [f"{n} t{n}" for n in places]
        assert 10 <= len(labels) < 45 and places[0] == 0


def test_queries_that_are_fewer_than_keys_are_named_by_the_last_tokens(picture, figures):
    plots.draw_weights(picture, np.eye(4)[2:], ["a", "b", "c", "d"])
    assert texts_of(figures[0].axes[0], "x") == ["0 a", "1 b", "2 c", "3 d"]
    assert texts_of(figures[0].axes[0], "y") == ["2 c", "3 d"]


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: plots.draw_masks(path),
        lambda path: plots.draw_weights(path, np.eye(2), ["a", "b"]),
    ],
)
def test_without_matplotlib_the_error_says_what_to_install(draw, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install -e .\.\[plot\]"):
        draw(tmp_path / "picture.png")
    assert not (tmp_path / "picture.png").exists()


def test_drawing_needs_no_screen_and_leaves_pyplot_alone(picture, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    plots.draw_weights(picture, np.eye(2), ["a", "b"])
    pixels(picture)


@pytest.mark.parametrize("name", ["none/picture.png", "picture.abc"])
def test_a_file_that_cannot_be_written_is_named(picture, name):
    with pytest.raises(NpllmOSError, match=r"(none|picture\.abc).*: cannot be written"):
        plots.save_figure(plots.new_figure((1, 1)), picture.parent / name)


def test_every_picture_is_saved_there():
    """`savefig` raises what the user's path is to blame for: it is called in one place."""
    root = Path(plots.__file__).parents[1]
    calls = [f for f in root.rglob("*.py") for _ in range(f.read_text("utf-8").count(".savefig("))]
    assert calls == [Path(plots.__file__)]
