"""The `npllm` command.

Belongs here: arguments and the layout of text, one file a group of commands.  Does not: any
computation (analysis/, `Model`).
"""

from npllm.cli import testing
from npllm.cli.check import check
from npllm.cli.commands import main
from npllm.cli.mutants import mutants

__all__ = ["main"]

for _command in testing.COMMANDS:
    main.add_command(_command)
main.add_command(check)
main.add_command(mutants)
