"""The list of conventions, as code: one entry a convention, with the options that are in use.

Belongs here: entries and the page that is written from them.  Does not: the formulas of the options
(forms/).
"""

from collections.abc import Mapping

from npllm.testing.registry import attention, positions, rows, sampling
from npllm.testing.registry.convention import EVIDENCE, Convention, Option

__all__ = ["EVIDENCE", "Convention", "Option", "alternatives", "conventions"]

_ENTRIES = [*positions.ENTRIES, *attention.ENTRIES, *rows.ENTRIES, *sampling.ENTRIES]

conventions: Mapping[str, Convention] = {
    entry.id: entry for entry in sorted(_ENTRIES, key=lambda entry: int(entry.id[1:]))
}
"""Id -> Convention, C1 ... C34."""


def alternatives(op: str, *, rounding: bool = False) -> list[tuple[str, str]]:
    """List the wrong options that can be run on an operation, as (id, option).

    Parameters
    ----------
    op : str
    rounding : bool
        Those whose evidence is a rate of equal bits; by default the others.
    """
    return [
        (entry.id, option)
        for entry in conventions.values()
        for option in entry.wrong(op)
        if (entry.evidence_of(option) == "rounding") is rounding
    ]
