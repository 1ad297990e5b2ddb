"""`explain`: from a model and a prompt to the page."""

from typing import Any

from npllm.errors import NpllmValueError
from npllm.page.page import Page, check_writable
from npllm.page.render import render
from npllm.page.run import MOST_BYTES, record
from npllm.page.sections import SECTIONS

__all__ = ["explain"]


def explain(
    model: Any,
    prompt: Any,
    path: Any = None,
    *,
    layer: int | None = None,
    max_new_tokens: int = 12,
    docs: str = "docs",
) -> Page:
    """Show one prompt in every figure of the chapter, with the numbers of the model.

    Parameters
    ----------
    model : Model
    prompt : str, list of messages or integer array [1, n_prompt]
    path : str or Path, optional
        The page is written there as well.
    layer : int, optional
        Whose attention is shown step by step.  None: the middle one.
    max_new_tokens : int
        Tokens of the loop, 1 to 32.
    docs : str
        Folder or address of npllm's docs, for the links.

    Returns
    -------
    page : Page
        Jupyter shows it inline; `page.save(path)` writes one HTML file below 6 MB that loads
        nothing, `page.data` has its numbers.

    Raises
    ------
    NpllmTypeError, NpllmValueError
        For an encoder, several prompts, a layer that does not exist, a prompt longer than
        `npllm.page.run.most_tokens(model.config)`.
    NpllmOSError
        When the file cannot be written.
    MissingExtraError
        When Jinja2 is not installed.

    Notes
    -----
    All values of the model come from one traced run (`npllm.trace`); the edited prompt, the packed
    documents, the beam search and the measured times are runs of their own.
    """
    if path is not None:
        check_writable(path)
    run = record(model, prompt, layer, max_new_tokens)
    data = {section.name: section.data(run) for section in SECTIONS}
    page = Page(render(data, docs), data)
    n_bytes = len(page.html.encode())
    if n_bytes > MOST_BYTES:
        raise NpllmValueError(
            f"the page must be below {MOST_BYTES} bytes, got {n_bytes}: shorten the prompt"
        )
    if path is not None:
        page.save(path)
    return page
