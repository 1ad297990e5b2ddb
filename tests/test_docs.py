"""The pages under docs/: their examples run in the order they stand, are short, and name what there
is.
"""

import contextlib
import io
import pydoc
import re
import shlex
import warnings
from pathlib import Path

import optional
import pytest

from npllm import ops

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(DOCS.glob("**/*.md"))
# Pages and commands that take seconds; what they show has tests of its own.
LONG = ("chapter", "explain", "masks", "precision", "quantise", "trace")
LIVE = {"evaluate": ("lm_eval",)}  # pages whose examples need packages that CI installs last
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def examples(page):
    """Every ```python block of a page, as (number of its first line, code)."""
    text = page.read_text(encoding="utf-8")
    return [
        (text[: match.start(1)].count("\n"), match[1])
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)
    ]


def run(page):
    """Run the examples, and compare what they print with what their comments say."""
    names = {"__name__": "docs"}
    for line, code in examples(page):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile("\n" * line + code, str(page), "exec"), names)
        if "print(" in code:
            assert out.getvalue().splitlines() == said(code), f"{page.name}:{line + 1}"
    return names


def said(code):
    """The comments of an example that show output: behind a print, or lines of their own."""
    return re.findall(r"^(?:print\(.*\)  )?# (.*)$", code, re.M)


def needs_weights(page):
    return any("npllm.load(" in code for _, code in examples(page))


def test_there_are_pages():
    assert DOCS / "attention.md" in PAGES
    assert len(examples(DOCS / "attention.md")) >= 10


@every_page
def test_an_example_has_at_most_six_lines(page):
    long = [
        f"{page.name}:{line + 1}"
        for line, code in examples(page)
        if sum(
            1 for text in code.splitlines() if text.strip() and not text.lstrip().startswith("#")
        )
        > 6
    ]
    assert long == []


def page_params():
    """Each page; those that load the default checkpoint are marked so, and the slow ones."""
    return [
        pytest.param(
            page,
            marks=[pytest.mark.weights] * needs_weights(page)
            + [pytest.mark.slow] * (page.stem in LONG)
            + [pytest.mark.live, pytest.mark.filterwarnings("ignore")] * (page.stem in LIVE),
            id=page.name,
        )
        for page in PAGES
    ]


@pytest.mark.parametrize("page", page_params())
def test_examples_run_in_the_order_they_stand(page):
    for package in LIVE.get(page.stem, ()):
        pytest.importorskip(package)
    run(page)


def commands(page):
    """Every command of a page's ```sh blocks."""
    return [
        line
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
        for line in block.splitlines()
    ]


def every_command():
    """Each command with whether it is slow: what takes seconds, and what names a command again."""
    seen = set(LONG)
    for command in dict.fromkeys(command for page in PAGES for command in commands(page)):
        name = command.split()[1]
        yield command, name in seen
        seen.add(name)


@pytest.mark.usefixtures("default_model")
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=[pytest.mark.slow] * is_slow)
        for command, is_slow in every_command()
    ],
)
def test_commands_run(command, tmp_path, monkeypatch):
    program, name, *arguments = shlex.split(command)
    if name == "masks":
        pytest.importorskip("matplotlib", reason="pictures need matplotlib (the extra plot)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("warnings.showwarning", warnings.showwarning)  # the command sets its own
    result = optional.invoke([name, *arguments])
    assert program == "npllm"
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()


def test_every_section_of_the_chapter_has_a_function_and_a_result():
    sections = re.split(r"^## ", (DOCS / "chapter.md").read_text(encoding="utf-8"), flags=re.M)[1:]
    assert len(sections) == 22
    for section in sections:
        title = section.splitlines()[0]
        assert re.search(r"`npllm\.\w+", section), title
        assert "print(" in section, title


@every_page
def test_every_section_of_the_attention_page_says_where_it_comes_from(page):
    """A function, a source with its year, and an example."""
    if page.name != "attention.md":
        return
    sections = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.M)[1:]
    assert len(sections) >= 8
    for section in sections:
        title = section.splitlines()[0]
        assert re.search(r"`(ops|npllm)\.\w+", section), title
        assert "```python" in section, title
        assert re.search(r"\b(19|20)\d\d\b", section) or title == "Attention step by step", title


# What is an attention, mask, position or packing function: by the file that it stands in.
SUBJECT = ("attention", "attention_io", "blockwise", "rope", "packing", "steps")
OTHERS = {"add_positions", "mask", "mean_pool_kv_heads", "packing", "sinusoidal_positions"}
NAMES = OTHERS | {
    name
    for name in ops.__all__
    if getattr(getattr(ops, name), "__module__", "").split(".")[-1] in SUBJECT
}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_attention_page_names_every_function_of_its_subject(name):
    assert re.search(rf"\b{name}\b", (DOCS / "attention.md").read_text(encoding="utf-8"))


@every_page
def test_what_a_page_links_to_exists(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@every_page
def test_what_a_page_calls_by_name_exists(page):
    for name in re.findall(r"`ops\.(\w+)", page.read_text(encoding="utf-8")):
        assert hasattr(ops, name), name


@every_page
def test_what_a_page_calls_by_its_full_name_exists(page):
    for name in re.findall(r"`(npllm\.[\w.]+)`", page.read_text(encoding="utf-8")):
        assert pydoc.locate(name) is not None, name
