"""The `npllm` command.

Belongs here: arguments and the layout of text, one file a group of commands.  Does not: any
computation (analysis/, `Model`).
"""

import contextlib
import os
import sys

from npllm.progress import report, write_line

__all__ = ["main"]


def main(args: list[str] | None = None) -> None:
    """Run the command, and end with its exit code.

    Parameters
    ----------
    args : list of str, optional
        Default: those of the process.

    Notes
    -----
    The commands are imported here and not above, so that Ctrl-C, a full memory or a full disk while
    that goes on ends in one line as well.
    """
    try:
        from npllm.cli.commands import main as run

        run(args)
    except KeyboardInterrupt:
        write_line("Aborted!")
    except (MemoryError, OSError) as error:
        report(str(error) or type(error).__name__)
    with contextlib.suppress(AttributeError, OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # drops what is left
    sys.exit(1)
