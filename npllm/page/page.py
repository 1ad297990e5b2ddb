"""The page as an object: its HTML, how Jupyter shows it, and how it is saved."""

import html
from typing import Any

from npllm.arguments import check_path
from npllm.errors import NpllmOSError

__all__ = ["Page", "check_writable"]


class Page:
    """A self-contained HTML page that needs no network.

    Parameters
    ----------
    html : str
        The whole document.
    data : dict
        The numbers that it shows, by section.

    Attributes
    ----------
    html, data
        As given.
    """

    def __init__(self, html: str, data: dict[str, Any]) -> None:
        self.html, self.data = html, data

    def __repr__(self) -> str:
        n_bytes = len(self.html.encode())
        return f"<npllm page of {len(self.data)} sections, {n_bytes / 1e6:.1f} MB; .save(path)>"

    def _repr_html_(self) -> str:
        """Return a frame for Jupyter; its scripts cannot reach the notebook."""
        return (
            f'<iframe title="npllm explain" sandbox="allow-scripts" width="100%" height="800" '
            f'style="border: 0" srcdoc="{html.escape(self.html)}"></iframe>'
        )

    def save(self, path: Any) -> None:
        """Write the page to a file.

        Parameters
        ----------
        path : str or Path

        Raises
        ------
        NpllmOSError
            When the file cannot be written.
        """
        try:
            check_path("path", path).write_text(self.html, encoding="utf-8")
        except OSError as error:
            raise _cannot_write(path, error.strerror or error) from None


def check_writable(path: Any) -> None:
    """Raise, before any work is done, for a path that is no file in a folder that exists."""
    file = check_path("path", path)
    if file.is_dir():
        raise _cannot_write(path, "it is a folder")
    if not file.parent.is_dir():
        raise _cannot_write(path, f"there is no folder {file.parent}")


def _cannot_write(path: Any, reason: Any) -> NpllmOSError:
    return NpllmOSError(
        f"{path!s}: cannot be written ({reason}); give a file in a folder that exists"
    )
