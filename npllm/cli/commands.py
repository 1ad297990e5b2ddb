"""The `npllm` command: the group that all commands belong to.

Results go to stdout, progress and statistics to stderr.  Exit codes: 0 success, 1 an error, 2 wrong
usage.
"""

import errno
import io
import os
import sys
import warnings
from contextlib import suppress
from typing import Any

import click

from npllm import __version__
from npllm.cli import (
    batch,
    check,
    checkpoints,
    comparing,
    evaluation,
    explain,
    generation,
    measurements,
    mutants,
    precision,
    predictions,
    serve,
    testing,
    tracing,
    views,
    writing,
)
from npllm.errors import NpllmError
from npllm.kernels import compilation
from npllm.progress import report

__all__ = ["main"]

GROUPS = (
    generation,
    predictions,
    checkpoints,
    writing,
    views,
    explain,
    tracing,
    measurements,
    testing,
    check,
    mutants,
    comparing,
    precision,
    evaluation,
    serve,
    batch,
)


class _Group(click.Group):
    """Prints an NpllmError as one line on stderr, with exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper) and not stream.closed:
                stream.reconfigure(errors="replace")  # "?" for what the encoding lacks
        warnings.showwarning = _show_warning
        compilation.announce(report)
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # here, where a full disk can still be reported
            return result
        except NpllmError as error:
            report(str(error))
        except OSError as error:
            if error.errno == errno.EPIPE:  # `npllm ... | head`: click ends without a word
                raise
            _report_os_error(error)
        except MemoryError as error:
            report(f"not enough memory ({str(error) or 'an allocation failed'})")
        ctx.exit(1)


def _report_os_error(error: OSError) -> None:
    """Say in one line what the operating system refused; drop what cannot be written."""
    place = error.filename or "standard output"
    report(f"{place}: cannot be read or written ({error.strerror or error})")
    if error.filename is None:
        with suppress(OSError, ValueError, io.UnsupportedOperation):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    report(f"warning: {message}")


@click.group(
    cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__)
def main() -> None:
    """Phi-3 language models in plain NumPy and CuPy."""


for _group in GROUPS:
    for _command in _group.COMMANDS:
        main.add_command(_command)
