"""Import of optional packages, with an error that says how to install them."""

import importlib
from typing import Any

from npllm.errors import MissingExtraError, install_extra

__all__ = ["import_extra"]


def import_extra(module: str, purpose: str = "fetching", extra: str = "fetch") -> Any:
    """Import a module of the packages of an extra, such as "fetch".

    Parameters
    ----------
    module : str
        With dots, as in an import statement.
    purpose : str
        What needs it, for the message.
    extra : str

    Raises
    ------
    MissingExtraError
        When it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtraError(
            f"{purpose} needs the package {package}: {install_extra(extra)}"
        ) from error
