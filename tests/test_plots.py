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
    pytest.importorskip("matplotlib", reason="plots need matplotlib (npllm[plot])")
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


def test_all_rules_are_drawn_into_one_picture(picture):
    plots.draw_masks(picture)
    height, width = pixels(picture).shape[:2]
    assert height > width > 800, "4 columns, as many lines as it takes"


def test_a_rule_is_drawn_where_it_is_true(picture, monkeypatch):
    """What reaches the canvas: the table of the rule, its name and share."""
    drawn = []
    from matplotlib.axes import Axes

    monkeypatch.setattr(Axes, "imshow", lambda _, image, **__: drawn.append(np.array(image)))
    monkeypatch.setattr(Axes, "set_title", lambda _, title, **__: drawn.append(title))
    plots.draw_masks(
        picture,
        {
            "mine": mask.sliding_window(3),
            "rows": mask.documents(np.array([[0, 0, 1, 1], [0, 1, 1, 1]])),
        },
        n=4,
    )
    assert (drawn[0] == np.tri(4, dtype=bool) & ~np.tri(4, k=-3, dtype=bool)).all()
    assert drawn[1].startswith("mine") and "56%" in drawn[1]
    assert drawn[2].shape == (4, 4)
    assert picture.stat().st_size > 0


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
    plots.draw_weights(picture, weights, tokens, title="layer 3")
    pixels(picture)
    (figure,) = figures
    drawn = [panel.images[0].get_array() for panel in figure.axes]
    assert np.array_equal(drawn, weights.reshape(-1, *shape[-2:]))
    titles = [panel.get_title() for panel in figure.axes]
    assert titles == ([""] if len(drawn) == 1 else [f"head {n}" for n in range(len(drawn))])
    assert figure.get_suptitle() == "layer 3"


@pytest.mark.parametrize(
    "tokens", [["$\\frac{$", "$x^$", "$", "_^"], ["日", "é", "<|end|>", "\u200b"]]
)
def test_any_token_can_stand_at_an_axis(picture, figures, tokens):
    """As it is written in Python; a dollar sign begins a formula in matplotlib."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        plots.draw_weights(picture, np.eye(4), tokens, title="".join(tokens))
    pixels(picture)
    labels = [
        label for axis in "xy" for label in getattr(figures[0].axes[0], f"get_{axis}ticklabels")()
    ]
    assert [label.get_text() for label in labels] == [repr(token)[1:-1] for token in tokens] * 2
    assert not any(label.get_parse_math() for label in labels)


def test_queries_that_are_fewer_than_keys_are_named_by_the_last_tokens(picture, monkeypatch):
    from matplotlib.axes import Axes

    named = {}
    for axis in "xy":
        monkeypatch.setattr(
            Axes,
            f"set_{axis}ticks",
            lambda _, __, labels, axis=axis, **___: named.update({axis: labels}),
        )
    plots.draw_weights(picture, np.eye(4)[2:], ["a", "b", "c", "d"])
    assert named == {"x": ["a", "b", "c", "d"], "y": ["c", "d"]}


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
    with pytest.raises(MissingExtraError, match=r"pip install .npllm\[plot\]"):
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
