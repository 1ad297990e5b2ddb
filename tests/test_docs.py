"""The pages under docs/: their examples run in the order they stand, are short, and name what there is."""

import re
from pathlib import Path

import pytest

from npllm import ops

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(DOCS.glob("**/*.md"))
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def examples(page):
    """Every ```python block of a page, as (number of its first line, code)."""
    text = page.read_text(encoding="utf-8")
    return [(text[: match.start(1)].count("\n"), match[1]) for match in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)]


def run(page):
    names = {"__name__": "docs"}
    for line, code in examples(page):
        exec(compile("\n" * line + code, str(page), "exec"), names)
    return names


def needs_weights(page):
    return any("npllm.load(" in code for _, code in examples(page))


def test_there_are_pages():
    assert DOCS / "attention.md" in PAGES
    assert len(examples(DOCS / "attention.md")) >= 10


@every_page
def test_an_example_has_at_most_six_lines(page):
    long = [f"{page.name}:{line + 1}" for line, code in examples(page)
            if sum(1 for text in code.splitlines() if text.strip() and not text.lstrip().startswith("#")) > 6]
    assert long == []


def page_params():
    """Each page; those that load the default checkpoint are marked so."""
    return [pytest.param(page, marks=[pytest.mark.weights] * needs_weights(page), id=page.name) for page in PAGES]


@pytest.mark.parametrize("page", page_params())
def test_examples_run_in_the_order_they_stand(page):
    run(page)


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
NAMES = OTHERS | {name for name in ops.__all__ if getattr(getattr(ops, name), "__module__", "").split(".")[-1] in SUBJECT}


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
