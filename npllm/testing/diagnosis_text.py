"""A diagnosis as text for a person."""

from typing import Any

from npllm.testing.registry import conventions

__all__ = ["lines_of"]


def lines_of(diagnosis: Any) -> list[str]:
    """Return the lines that `str` of a diagnosis joins."""
    lines = [f"status      {diagnosis.status}"]
    for name in diagnosis.names:
        lines.append(f"convention  {name}")
        lines += [f"            {says}" for says in _sentences(name)]
    if diagnosis.status == "wrong" and not diagnosis.names:
        lines.append("convention  none of the list explains this output")
    if diagnosis.where:
        lines.append(f"where       {diagnosis.where}")
    if diagnosis.model:
        lines.append(f"arithmetic  {diagnosis.model} explains it")
    if diagnosis.runner_up:
        lines.append(
            f"runner-up   {diagnosis.runner_up[0]}, {diagnosis.runner_up[1]:.3g} budgets away"
        )
    lines += [f"rounding    {name} {option}" for name, option in diagnosis.rounding.items()]
    lines += [f"undecided   {', '.join(group)}" for group in diagnosis.undecided]
    if diagnosis.probe:
        lines.append(f"probe       {diagnosis.probe} tells them apart: npllm probes DIR writes it")
    return lines


def _sentences(name: str) -> list[str]:
    """What the options in a name do, and what is right."""
    sentences = []
    for part in name.replace(" or ", " & ").split(" & "):
        convention = conventions.get(part.split(" ", 1)[0])
        if convention and part.split(" ", 1)[1] in convention.options:
            option = convention.options[part.split(" ", 1)[1]]
            sentences.append(f"{option.says} Right: {convention.says}")
    return sentences
