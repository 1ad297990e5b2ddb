"""A comparison as text for a person."""

from collections.abc import Iterator
from typing import Any

from npllm.config.strict_json import printable

__all__ = ["lines_of", "number", "shown", "summary"]

MARKS = {"wrong": "✗", "wrong capture": "✗", "harmless": "~", "not decidable": "?", "no gold": "?"}
NEAR = 4  # rows before a wrong one that are shown
MOST = 40  # rows


def lines_of(comparison: Any, *, everything: bool = False) -> list[str]:
    """Lay a comparison out.

    Parameters
    ----------
    comparison : Comparison
    everything : bool
        Every row, instead of the wrong ones with what stands around the first.

    Returns
    -------
    lines : list of str
    """
    lines = [printable(text) for text in comparison.differences]
    lines += [f"✗ {printable(text)}" for text in _findings(comparison, everything)]
    lines += [printable(text) for text in comparison.notes]
    rows = comparison.rows if everything else shown(comparison.rows)
    if rows:
        lines.append(
            f"  layer  {'op':<24} {'total':>8} {'introduced':>11} {'inherited':>10} {'gain':>7}  "
            "(x budget)"
        )
    lines += [_line(row) for row in rows]
    left_out = len(comparison.rows) - len(rows)
    if rows and left_out > 0:
        lines.append(f"  {left_out} more rows: --all shows them")
    return lines + [printable(text) for text in summary(comparison)]


def shown(rows: list[Any]) -> list[Any]:
    """Choose the rows that matter: what is wrong, what comes just before the first, and after."""
    if not any(row.status in MARKS for row in rows):
        return _worst(rows)
    first = next((n for n, row in enumerate(rows) if row.status in MARKS), 0)
    kept = set(range(max(0, first - NEAR), min(len(rows), first + NEAR)))
    kept |= {n for n, row in enumerate(rows) if row.status in MARKS}
    kept |= {n for n, row in enumerate(rows) if row.status == "amplified"}
    return [rows[n] for n in sorted(kept)[:MOST]]


def _worst(rows: list[Any]) -> list[Any]:
    """The rows of the largest shares, in their order."""
    by_share = sorted(range(len(rows)), key=lambda n: -(rows[n].introduced or 0.0))[:NEAR]
    last = [len(rows) - 1] if rows else []
    return [rows[n] for n in sorted({*by_share, *last})]


def _line(row: Any) -> str:
    layer = "-" if row.layer is None else str(row.layer)
    numbers = [number(value) for value in (row.total, row.introduced, row.inherited, row.gain)]
    op = row.op + (f"@{row.step}" if row.step else "")
    parts = [row.diagnosis, row.status if row.status not in ("within", "wrong") else "", row.note]
    if row.status == "wrong" and not row.diagnosis:
        parts[1] = "wrong"
    text = "; ".join(part for part in parts if part)
    line = (
        f"{MARKS.get(row.status, ' ')} {layer:>5}  {op:<24} {numbers[0]:>8} {numbers[1]:>11} "
        f"{numbers[2]:>10} {numbers[3]:>7}  {text}"
    )
    return printable(line.rstrip())


def number(value: float | None) -> str:
    """A share of the budget in three characters or a power of ten."""
    if value is None:
        return "-"
    if value == 0 or 0.05 <= value < 999.5:
        return f"{value:.1f}"
    return f"{value:.1e}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")


def _findings(comparison: Any, everything: bool) -> Iterator[str]:
    """What the parameters show; those of one kind in one line."""
    groups: dict[tuple[str, str], list[str]] = {}
    for one in comparison.weights:
        if everything or one.status != "same":
            groups.setdefault((one.status, one.says), []).append(one.name)
    for (_, says), names in groups.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"weights: {names[0]}{more}: {says}"


def summary(comparison: Any) -> Iterator[str]:
    """The verdict in words."""
    wrong = comparison.wrong
    if comparison.differences:
        yield "differs: the tokens are not the same, so that no value can be compared"
        return
    if wrong:
        first = wrong[0]
        noun = "wrong op" if len(wrong) == 1 else "wrong ops, the first"
        text = f"{len(wrong)} {noun}: {_place(first)}"
        yield text + (f": {first.diagnosis}" if first.diagnosis else "")
    elif comparison.status == "same":
        yield f"same: {len(comparison.rows)} values, each within the budget of its operation"
    else:
        yield f"{comparison.status}: {len(comparison.rows)} values"
    yield from _arithmetics(comparison)
    yield from _logits(comparison.logits)


def _place(row: Any) -> str:
    text = row.op if row.layer is None else f"layer {row.layer} {row.op}"
    return text + (f" in step {row.step}" if row.step else "")


def _arithmetics(comparison: Any) -> Iterator[str]:
    """Which arithmetic explains the values, where it is not one rounding in float32."""
    found: dict[str, set[str]] = {}
    for row in comparison.rows:
        if row.status not in MARKS and row.arithmetic:
            found.setdefault(row.arithmetic, set()).add(row.op.rsplit(".", 1)[-1])
    for text, ops in found.items():
        if text not in ("float32", "float64"):
            yield f"arithmetic: {text}: {', '.join(sorted(ops))}"


def _logits(logits: dict[str, Any]) -> Iterator[str]:
    if not logits:
        return
    text = f"top-1 differs at {logits['changed']} of {logits['positions']} positions"
    if logits["changed"]:
        text += f"; margins <= {logits['largest_margin']:.3g}"
    yield text
