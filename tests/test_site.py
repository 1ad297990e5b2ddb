"""The documentation site: every page is in its table of contents, links inside resolve, notebooks
are stored without outputs and run.
"""

import json
import os
import pydoc
import re
import time
from pathlib import Path

import optional
import pytest
from notions import IN_SITE

from npllm.page.sections import SECTIONS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("**/*.md"))
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def anchors(page):
    """The anchors of a page's headings, as GitHub and MyST write them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#{1,3} (.*)$", text, re.M)
    return {
        re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-") for heading in headings
    }


def links(text):
    """Each relative link of a Markdown text: (file, anchor)."""
    return re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text)


def test_every_page_is_in_the_table_of_contents():
    listed = re.findall(
        r"^([\w/-]+)$",
        "\n".join(re.findall(r"```\{toctree\}(.*?)```", (DOCS / "index.md").read_text(), re.S)),
        re.M,
    )
    files = {
        path.relative_to(DOCS).with_suffix("").as_posix()
        for suffix in ("md", "rst", "ipynb")
        for path in DOCS.glob(f"**/*.{suffix}")
        if "api" not in path.relative_to(DOCS).parts
    }
    assert len(listed) == len(set(listed))
    assert {*listed, "index"} == files | {"api/npllm"}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_links_inside_resolve(page):
    for file, anchor in links(page.read_text(encoding="utf-8")):
        target = page.parent / file if file else page
        assert target.exists(), file
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{file}#{anchor}"


def test_links_of_notebooks_resolve():
    for notebook in NOTEBOOKS:
        for file, _ in links(json.loads(notebook.read_text(encoding="utf-8"))["cells"].__str__()):
            assert (notebook.parent / file).exists(), f"{notebook.name}: {file}"


def notion_rows():
    """The rows of the table of notions: its cells."""
    lines = (DOCS / "notions.md").read_text(encoding="utf-8").splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if "](" in line
    ]
    return [row for row in rows if len(row) == 3]


def test_the_table_of_notions_has_the_sections_of_the_offline_page():
    """In their order, with the section of the chapter and the functions that the page names."""
    assert len(notion_rows()) == len(SECTIONS) == 20
    for (notion, where, functions), section in zip(notion_rows(), SECTIONS, strict=True):
        assert notion.strip("* ") == section.title
        assert f"({section.docs})" in where, section.title
        assert re.findall(r"`([\w.]+)`", functions)[: len(section.functions)] == list(
            section.functions
        )


def test_each_notion_has_a_heading_of_its_own():
    assert len({section.docs for section in SECTIONS}) == len(SECTIONS)


def test_every_notion_of_the_chapter_is_in_the_contents_of_the_front_page():
    """The contents list the headings of two levels, `##` among them."""
    (options,) = re.findall(
        r":caption: Tutorial\n(.*?)\n\nchapter$", (DOCS / "index.md").read_text(), re.M | re.S
    )
    assert options == ":maxdepth: 2"
    headings = re.findall(r"^## (.*)$", (DOCS / "chapter.md").read_text("utf-8"), re.M)
    assert set(IN_SITE.values()) <= set(headings)
    listed = {section.docs.partition("#")[2] for section in SECTIONS}
    slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
    assert listed <= slugs, "each section of the page links to an entry of the contents"


def test_functions_of_the_notions_exist():
    for _, _, functions in notion_rows():
        for name in re.findall(r"`([\w.]+)`", functions):
            assert pydoc.locate(name) is not None, name


def test_there_are_three_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["check-my-kernel", "first-steps", "inside-a-head"]


@every_notebook
def test_a_notebook_is_stored_without_outputs(notebook):
    """So that a difference shows what was changed; the site is built with outputs."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.slow
@pytest.mark.weights
@every_notebook
def test_a_notebook_runs_in_a_minute(notebook, tmp_path):
    """In a kernel of its own, as Jupyter runs it; the site's build does so in CI."""
    nbclient = optional.module("nbclient")
    nbformat = optional.module("nbformat")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    client = nbclient.NotebookClient(
        nbformat.read(notebook, as_version=4),
        timeout=120,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    start = time.perf_counter()
    client.execute(env=os.environ | {"PYTHONPATH": path})
    assert time.perf_counter() - start < 60
