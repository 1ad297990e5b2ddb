"""What an entry of the registry is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from npllm.arrays import dtype_named
from npllm.errors import NpllmValueError
from npllm.testing.forms import evaluate, op_named, prepare
from npllm.testing.forms.rounding import EMULATORS, emulations
from npllm.testing.forms.text import detokenize

__all__ = ["EVIDENCE", "Convention", "Option"]

EVIDENCE = {
    "algebraic": "off by far more than rounding, on almost any input",
    "edge": "shows only on inputs that contain the edge",
    "rounding": "shows only as a rate of equal bits, never by a tolerance",
    "support": "shows in which tokens may be drawn",
    "text": "shows in strings",
}
"""Kind of evidence -> what it means."""


@dataclass(frozen=True)
class Option:
    """One choice that implementations make.

    Parameters
    ----------
    says : str
        A sentence for the reader: what an implementation with this option does.
    ops : tuple of str
        The operations on which it can be run.  Empty: it is listed, and no single operation shows
        it.
    evidence : str, optional
        A key of `EVIDENCE`, where it is not that of the convention.
    """

    says: str
    ops: tuple[str, ...] = ()
    evidence: str | None = None


@dataclass(frozen=True)
class Convention:
    """A choice on which implementations differ though each is consistent in itself.

    Parameters
    ----------
    id : str
        "C1" ... "C34".
    title : str
    options : mapping
        Name -> `Option`; the one that Phi-3 uses comes first.
    ops : tuple of str
        The operations on which it shows.
    evidence : str
        A key of `EVIDENCE`.
    says : str
        A sentence for the reader: what the right choice is.
    report : str
        Public report in which the wrong choice was met.
    """

    id: str
    title: str
    options: Mapping[str, Option]
    ops: tuple[str, ...]
    evidence: str
    says: str
    report: str

    @property
    def ours(self) -> str:
        """The option that Phi-3 uses."""
        return next(iter(self.options))

    def wrong(self, op: str) -> list[str]:
        """Name the options other than ours that can be run on an operation."""
        return [
            name for name, option in self.options.items() if op in option.ops and name != self.ours
        ]

    def evidence_of(self, option: str) -> str:
        """Kind of evidence that shows an option."""
        return self.options[option].evidence or self.evidence

    def run(self, op: str, inputs: Mapping[str, Any], option: str, dtype: str = "bfloat16") -> Any:
        """Run an operation with this convention chosen otherwise, in float64.

        Parameters
        ----------
        op : str
        inputs : dict
            By parameter name.
        option : str
        dtype : str
            For a convention of rounding: the dtype that is rounded to.

        Returns
        -------
        y : array
            float64 in the shape of the operation's output; float32, of values that `dtype` holds,
            for a convention of rounding; a list of strings for "detokenize".

        Raises
        ------
        NpllmValueError
            For an option that the convention does not have, or that these inputs do not allow.
        """
        if option not in self.options:
            raise NpllmValueError(
                f"{self.id} has the options {', '.join(self.options)}, got {option!r}"
            )
        choice = {} if option == self.ours else {self.id: option}
        if op == "detokenize":
            return detokenize(dict(inputs), choice)
        prepared = prepare(op, inputs)
        shape = op_named(op).shape(prepared)
        if self.evidence_of(option) == "rounding" and (self.id, op) in EMULATORS:
            return emulations(self.id, option, op, prepared, dtype_named(dtype))[0].reshape(shape)
        return evaluate(op, prepared, choice).y.reshape(shape)
