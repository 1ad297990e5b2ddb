"""The errors a user can cause.  All are `NpllmError`; each is also the built-in error that it is.

A message names what was wrong in axis names, quotes both sides (wanted and got) and says what to
do.
"""

__all__ = [
    "MissingExtraError",
    "NpllmError",
    "NpllmKeyError",
    "NpllmOSError",
    "NpllmRuntimeError",
    "NpllmTypeError",
    "NpllmValueError",
]


class NpllmError(Exception):
    """Base of every error that npllm raises for a mistake outside its own code."""


class NpllmValueError(NpllmError, ValueError):
    """A value, shape, config entry or option that cannot be right."""


class NpllmKeyError(NpllmError, KeyError):
    """A name that a mapping does not hold."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""  # KeyError would put it in quotes


class NpllmTypeError(NpllmError, TypeError):
    """An argument of the wrong kind: a mixture of array libraries, floats where ids belong."""


class NpllmOSError(NpllmError, OSError):
    """A file or folder that is missing, unreadable, truncated or not what its name says."""


class NpllmRuntimeError(NpllmError, RuntimeError):
    """What may not happen at this time: a second call on a cache that is in use."""


class MissingExtraError(NpllmError, ImportError):
    """A feature whose optional packages (the extras "fetch", "cuda", ...) are not installed."""


def install_extra(extra: str) -> str:
    """Return the command that installs the packages of an extra.

    It names no package on an index: the one called npllm on PyPI is another project.
    """
    return f'pip install -e ".[{extra}]" in the folder of npllm\'s source'
