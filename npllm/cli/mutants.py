"""The command `npllm mutants`: which planted bugs do the user's own tests miss?"""

from typing import Any

import click

from npllm.cli.streams import print_json, usage_errors
from npllm.progress import report

__all__ = ["COMMANDS"]

MISSED = 1


@click.command()
@click.argument("command")
@click.option("--only", metavar="TEXT", help="Plant only bugs whose name contains this.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def mutants(context: click.Context, command: str, only: str | None, as_json: bool) -> None:
    """Run COMMAND, such as "pytest tests/test_mine.py", once for each planted bug.

    The bug takes the place of the function that the tests get from npllm.testing.adapt,
    npllm.testing.under_test or the fixture npllm_op.  Prints the bugs that the tests miss: their
    error in units of the budget, and a case that would have shown them.

    Exit codes: 0 none is missed, 1 some are, 2 usage.
    """
    with usage_errors():
        facts = _tried(command, only)
    if as_json:
        print_json(facts)
    else:
        click.echo("\n".join(report_lines(facts)))
    context.exit(MISSED if facts["missed"] else 0)


def _tried(text: str, only: str | None) -> dict[str, Any]:
    """Run the tests with each bug; return what is printed."""
    from npllm.testing.mutation import (
        baseline,
        command_of,
        facts_of,
        missed_bug,
        named_bugs,
        survives,
    )

    command = command_of(text)
    ops = baseline(command)
    names = list(named_bugs(ops, only))
    missed = []
    for n, name in enumerate(names, 1):
        is_missed = survives(command, name)
        report(f"{n}/{len(names)} {'MISSED' if is_missed else 'found '} {name}")
        if is_missed:
            missed.append(facts_of(missed_bug(name)))
    return {"command": text, "ops": ops, "bugs": len(names), "missed": missed}


def report_lines(facts: dict[str, Any]) -> list[str]:
    """Lay out what `mutants` found: each bug that was missed, by how much, and what shows it."""
    n_found = facts["bugs"] - len(facts["missed"])
    lines = [f"{n_found} of {facts['bugs']} planted bugs of {', '.join(facts['ops'])} are found"]
    for missed in facts["missed"]:
        used = "the budget is 0" if missed["used"] is None else f"{missed['used']:.3g} budgets"
        lines += ["", f"missed   {missed['name']}", f"         {missed['says']}"]
        lines += [f"error    {used}: {missed['law']}", f"shown by {missed['case']}"]
    return lines


COMMANDS = (mutants,)
"""What `npllm` registers."""
