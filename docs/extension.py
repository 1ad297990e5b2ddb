"""What Sphinx is told of this house's docstrings and pages.

An indented paragraph of a docstring is a formula, so it becomes a literal block.  A public name
such as `npllm.ops.rms_norm`, in a docstring or in the text of a page, becomes a link to where it is
documented.  The page of a package lists the names that the package takes from its modules.
"""

import pydoc
import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

MARKUP = re.compile(r"(``.*?``|`.*?`)|([|*])")


def formulas_are_literal(
    _: Sphinx, __: str, ___: str, ____: Any, _____: Any, lines: list[str]
) -> None:
    """Mark the indented paragraphs of a docstring as literal; elsewhere `*` and `|` are text."""
    lines[:] = list(_literal_blocks(lines))


def _literal_blocks(lines: list[str]) -> Iterator[str]:
    """Lines of a docstring with `::` before each paragraph that is indented after an empty line."""
    margin, literal = 0, False
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if line.strip() and not (literal and indent > margin):
            after_empty = number > 0 and not lines[number - 1].strip()
            literal = after_empty and indent >= margin + 4
            if literal:
                yield " " * margin + "::"
                yield ""
            else:
                margin = indent
        yield line if literal else escaped(line)


def escaped(line: str) -> str:
    """A line whose `*` and `|` are characters, but for code and the bullet of a list."""
    bullet = re.match(r"\s*\* ", line)
    start = bullet.end() if bullet else 0
    return line[:start] + MARKUP.sub(lambda m: m[1] or "\\" + m[2], line[start:])


def options_are_text(_: Sphinx, __: Any, lines: list[str]) -> None:
    """Escape the help texts of commands."""
    lines[:] = [line if line.startswith("..") else escaped(line) for line in lines]


def link_public_name(app: Sphinx, env: Any, node: nodes.Element, content: Any) -> Any:
    """Resolve a public name at the module that defines it; one that exists nowhere warns."""
    if node.get("refdomain") != "py":
        return None
    thing = pydoc.locate(re.sub(r"^ops\.", "npllm.ops.", node["reftarget"]))
    name = f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', '')}"
    domain = env.get_domain("py")
    if name in domain.objects:
        return domain.resolve_xref(
            env, node["refdoc"], app.builder, "obj", name, node, content.deepcopy()
        )
    return content if thing is not None else None


def link_literals(_: Sphinx, tree: nodes.document) -> None:
    """Make each full name in the text of a page a reference."""
    for literal in list(tree.findall(nodes.literal)):
        name = literal.astext()
        inside = isinstance(literal.parent, nodes.reference | addnodes.pending_xref)
        if inside or not re.fullmatch(r"(npllm|ops)(\.\w+)+", name):
            continue
        link = addnodes.pending_xref("", refdomain="py", reftype="obj", reftarget=name)
        link["refdoc"] = tree.settings.env.docname
        literal.replace_self(link)
        link += literal


def list_public_names(
    _: Sphinx, what: str, name: str, thing: Any, __: Any, lines: list[str]
) -> None:
    """Add to the docstring of a package the public names that it takes from its modules."""
    if what != "module" or not hasattr(thing, "__path__"):
        return
    found = list(_public_names(thing))
    if found:
        lines += ["", ".. list-table::", "   :widths: auto", ""]
    for public, first_line in found:
        lines += [f"   * - `{name}.{public}`", f"     - {escaped(first_line)}"]


def _public_names(package: Any) -> Iterator[tuple[str, str]]:
    """Each public name of a package that a module of it defines, and the first line about it."""
    for public in getattr(package, "__all__", ()):
        thing = getattr(package, public)
        if getattr(thing, "__module__", package.__name__) != package.__name__:
            yield public, (thing.__doc__ or "").strip().partition("\n")[0]


def skip(_: Sphinx, what: str, __: str, thing: Any, skipped: bool, ___: Any) -> bool:
    """Leave out what a module imports, and the fields of a named tuple, which its head shows."""
    if what == "module":
        home = getattr(thing, "__module__", None) or "npllm"
        return skipped or not home.startswith("npllm")
    doc = getattr(thing, "__doc__", None) or ""
    return skipped or doc.startswith("Alias for field number")


def collapse_navigation(
    _: Sphinx, __: str, ___: str, context: dict[str, Any], ____: nodes.document | None
) -> None:
    """Show of the table of contents only the branch of the page: all of it on each of several
    hundred pages takes most of the build's time.
    """
    toctree = context["toctree"]
    context["toctree"] = lambda **options: toctree(**options | {"collapse": True})


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the functions above."""
    app.connect("autodoc-process-docstring", formulas_are_literal, priority=400)  # before numpydoc
    app.connect("autodoc-process-docstring", list_public_names, priority=600)  # after it
    app.connect("autodoc-skip-member", skip)
    app.connect("doctree-read", link_literals)
    app.connect("missing-reference", link_public_name)
    app.connect("html-page-context", collapse_navigation, priority=400)  # before the theme
    for part in ("description", "options", "arguments"):
        app.connect(f"sphinx-click-process-{part}", options_are_text)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
