"""The page docs/conventions.md, written from the registry."""

from npllm.testing.registry import EVIDENCE, conventions
from npllm.testing.registry.convention import Convention

__all__ = ["conventions_page"]

HEAD = """# Conventions

Implementations of one model differ in choices that are each consistent in themselves. This list
names them, and npllm can run each: `npllm.testing.diagnose` tries the options one by one, then in
pairs, until one explains an output.

This page is written from the registry by `python -m npllm.testing.registry docs/conventions.md`; a
test compares the two.

```python
import numpy as np
from npllm import testing

inputs = testing.PROBES["attention-cached"].make()
output = testing.conventions["C9"].run("attention", inputs, "top-left").astype(np.float32)
print(testing.diagnose("attention", inputs, output).names)  # ['C9 top-left']
```

## Kinds of evidence
"""


def conventions_page() -> str:
    """Return the text of the page.

    Returns
    -------
    text : str
        Markdown, ended by a newline.
    """
    kinds = [f"- **{kind}**: {says}." for kind, says in EVIDENCE.items()]
    return (
        "\n".join(
            [HEAD, *kinds, "", "## The list", "", *map(_entry, conventions.values())]
        ).rstrip()
        + "\n"
    )


def _entry(convention: Convention) -> str:
    """One section: title, what is right, a table of the options, the report."""
    rows = ["| option | what it does | shows in |", "| --- | --- | --- |"]
    for name, option in convention.options.items():
        is_ours = name == convention.ours
        shows = "Phi-3" if is_ours else ", ".join(option.ops) or "no single operation"
        evidence = "" if is_ours or option.evidence is None else f" ({option.evidence})"
        rows.append(
            f"| {'**' + name + '**' if is_ours else name} | {option.says} | {shows}{evidence} |"
        )
    title = f"### {convention.id} {convention.title}"
    return "\n".join(
        [
            title,
            "",
            f"{convention.says} Evidence: {convention.evidence}. "
            f"Operations: {', '.join(convention.ops)}. Met in {convention.report}.",
            "",
            *rows,
            "",
        ]
    )
