"""The row of a comparison: what is known of one value."""

from dataclasses import dataclass

__all__ = ["Row", "layer_of"]


@dataclass
class Row:
    """What is known of a value, in units of its budget.

    Parameters
    ----------
    name : str
        With "@t" of a later step.
    op : str
        The last part of the name, with its module.
    layer : int, optional
    step : int
    total : float, optional
        |theirs - gold|; None where one of the two is missing.
    introduced : float, optional
        |theirs - op(their inputs)|.
    inherited : float, optional
        |op(their inputs) - gold|.
    gain : float, optional
        `inherited` over the largest `total` of the inputs.
    status : str
        "within", "wrong", "wrong capture", "inherited", "amplified", "harmless", "not decidable" or
        "no gold".
    diagnosis : str
        Convention and option, or what else is known.
    note : str
        How the value was ordered, or what else was found.
    arithmetic : str
        The strictest level that explains the value.
    """

    name: str
    op: str
    layer: int | None
    step: int
    total: float | None = None
    introduced: float | None = None
    inherited: float | None = None
    gain: float | None = None
    status: str = "within"
    diagnosis: str = ""
    note: str = ""
    arithmetic: str = ""


def layer_of(name: str) -> int | None:
    """The number of a value's layer."""
    parts = name.partition("@")[0].split(".")
    return int(parts[2]) if name.startswith("model.layers.") else None
