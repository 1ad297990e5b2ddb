"""Data to HTML: the templates, the style sheet and the scripts, in one document."""

from importlib.resources import files
from typing import Any

from npllm.errors import MissingExtraError
from npllm.page.sections import SECTIONS

__all__ = ["POLICY", "render"]

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
"""The Content-Security-Policy of the page: no request of any kind."""


def render(data: dict[str, Any], docs: str) -> str:
    """Render the page.

    Parameters
    ----------
    data : dict of str to dict
        By the name of the section; plain data.
    docs : str
        What the links to the docs begin with.

    Returns
    -------
    html : str

    Raises
    ------
    MissingExtraError
        When Jinja2 is not installed.
    """
    environment = _environment()
    return environment.get_template("page.html").render(
        sections=SECTIONS,
        data=data,
        docs=docs.rstrip("/"),
        policy=POLICY,
        style=_read("style.css"),
        script="\n".join(_read(f"scripts/{name}.js") for name in _scripts()),
    )


def _environment() -> Any:
    """Jinja2 with everything escaped; an undefined name is an error."""
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError(
            f"the page needs Jinja2 ({error}); pip install jinja2, which npllm installs as well"
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: _read(f"templates/{name}")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters["shown"] = _shown
    environment.filters["commas"] = lambda n: f"{n:,}"
    return environment


def _scripts() -> list[str]:
    """The scripts in their order: helpers, one for each section, and what starts them."""
    return ["elements", "controls", "charts", *(section.name for section in SECTIONS), "start"]


def _read(name: str) -> str:
    return files("npllm.page").joinpath(name).read_text(encoding="utf-8")


def _shown(text: str) -> str:
    """A token's text with its spaces and line ends visible."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
