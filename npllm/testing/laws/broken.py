"""What a broken law says: the law in words, the case, the share of the budget, the diagnosis."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from npllm.errors import NpllmError

__all__ = ["Finding", "LawBroken", "case_text", "replay_line"]

DEFAULTS = {"layout": "contiguous", "size": "plain", "hidden": "same", "dtype": "float32"}
"""Values of a case that go without saying."""


@dataclass(frozen=True)
class Finding:
    """One law that one case broke.

    Parameters
    ----------
    law : str
        What must hold, as a sentence.
    says : str
        What was found instead.
    op : str, optional
        As in `npllm.testing.diagnose`, where the output can be diagnosed.
    inputs : dict, optional
        For the diagnosis.
    output : array, optional
    used : float, optional
        Share of the error budget.
    cause : Exception, optional
        What the function raised.
    """

    law: str
    says: str
    op: str | None = None
    inputs: dict[str, Any] | None = field(default=None, repr=False)
    output: Any = field(default=None, repr=False)
    used: float | None = None
    cause: BaseException | None = None


class LawBroken(NpllmError, AssertionError):
    """A function broke a law that every correct implementation of the operation keeps.

    Parameters
    ----------
    finding : Finding
    case : dict
        The smallest case that shows it: sizes, features, seed.
    name : str
        Of the operation.
    fn : callable
    seed : int, optional
        Of the search that drew the case.
    """

    def __init__(
        self, finding: Finding, case: dict[str, Any], name: str, fn: Any, seed: int | None = None
    ) -> None:
        self.law, self.case, self.used, self.seed = finding.law, case, finding.used, seed
        self.finding, self.op = finding, name
        self.replay = replay_line(fn, name, case)
        super().__init__(finding.law)

    @cached_property
    def diagnosis(self) -> Any:
        """The convention that explains the output: a Diagnosis, or None where there is no output.

        It is computed when it is asked for, since that takes longer than finding the case.
        """
        return _diagnosis(self.finding)

    def __str__(self) -> str:
        return "\n".join(self._lines(self.op))

    def _lines(self, name: str) -> list[str]:
        lines = [
            "a law is broken",
            f"law         {self.law}",
            f"found       {self.finding.says}",
            f"case        {name}: {case_text(self.case)}",
        ]
        if self.used is not None:
            lines.append(f"budget      {self.used:.3g} of it is used, 1 is allowed")
        if self.diagnosis is not None:
            lines += [line for line in str(self.diagnosis).splitlines() if "undecided" not in line]
        if self.seed is not None:
            lines.append(f"search      seed={self.seed}")
        lines.append(f"replay      {self.replay}")
        return lines


def _diagnosis(finding: Finding) -> Any:
    """Diagnose the output; None where it cannot be diagnosed."""
    if finding.op is None or finding.output is None:
        return None
    from npllm.testing.diagnosis import diagnose

    try:
        return diagnose(finding.op, finding.inputs or {}, finding.output)
    except Exception:  # a failure must be reported whatever the output is
        return None


def case_text(case: dict[str, Any]) -> str:
    """Say a case in words: sizes and what is on."""
    parts = []
    for name, value in case.items():
        is_plain = value is None or value is False or DEFAULTS.get(name) == value
        if is_plain or (name == "padding" and isinstance(value, list) and not any(value)):
            continue
        parts.append(name if value is True else f"{name} {value}")
    return ", ".join(parts)


def replay_line(fn: Any, name: str, case: dict[str, Any]) -> str:
    """Write the line of Python that runs one case again."""
    called = getattr(fn, "__name__", "fn")
    called = called if called.isidentifier() else "fn"
    return f"npllm.testing.replay({called}, {name!r}, {case!r})"
