"""The `npllm` command.

Belongs here: arguments and the layout of text, one file a group of commands.  Does not: any
computation (analysis/, `Model`).
"""

from npllm.cli.commands import main

__all__ = ["main"]
