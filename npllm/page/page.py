"""The page as an object: its HTML, how Jupyter shows it, and how it is saved."""

import contextlib
import html
from pathlib import Path
from typing import Any

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
            Path(path).write_text(self.html, encoding="utf-8")
        except (OSError, ValueError) as error:  # ValueError: a null character in the name
            raise _cannot_write(path, getattr(error, "strerror", None) or error) from None


def check_writable(path: Any) -> None:
    """Raise, before any work is done, for a path that is no file in a folder that exists."""
    with contextlib.suppress(ValueError):
        if Path(path).is_dir():
            raise _cannot_write(path, "it is a folder")
        if not Path(path).parent.is_dir():
            raise _cannot_write(path, f"there is no folder {Path(path).parent}")


def _cannot_write(path: Any, reason: Any) -> NpllmOSError:
    return NpllmOSError(
        f"{path!s}: cannot be written ({reason}); give a file in a folder that exists"
    )
