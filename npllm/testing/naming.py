"""Functions of the user's, named as "module:function"."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from npllm.errors import NpllmValueError

__all__ = ["CHECKED", "function_named", "op_in"]

CHECKED = (
    "attention",
    "apply_rope",
    "rope_tables",
    "rope_frequencies",
    "rope",
    "rms_norm",
    "linear",
    "swiglu",
    "qkv_projection",
    "embed",
    "lm_head",
    "sampler",
    "decoder",
)
"""Operations that can be checked, written out so that `npllm --help` imports little."""


def function_named(text: str) -> Callable:
    """Import a function by "module:name"; the current folder is looked in first.

    Parameters
    ----------
    text : str

    Returns
    -------
    fn : callable

    Raises
    ------
    NpllmValueError
        When there is no such module or function.
    """
    module, _, name = text.partition(":")
    if not module or not name:
        raise NpllmValueError(f'the function must be "module:function", got {text!r}')
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise NpllmValueError(f"{text} cannot be imported: {error}") from error
    return found


def op_in(text: str) -> str:
    """Return the operation that the name of a function contains.

    Raises
    ------
    NpllmValueError
        When it contains none.
    """
    name = text.rpartition(":")[2]
    found = [op for op in sorted(CHECKED, key=len, reverse=True) if op in name]
    if not found:
        raise NpllmValueError(
            f"the name {name!r} does not say which operation it is: add --op NAME, one of "
            f"{', '.join(CHECKED)}"
        )
    return found[0]
