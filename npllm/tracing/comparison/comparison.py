"""The result of a comparison."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from npllm.testing.inputs import f64
from npllm.tracing.comparison.graft import Run
from npllm.tracing.comparison.recorded import Recorded
from npllm.tracing.comparison.report import lines_of
from npllm.tracing.comparison.steps import key_of
from npllm.tracing.comparison.walking_row import Row

__all__ = ["Comparison", "Finding"]

Array = Any

ACCUSED = ("wrong", "wrong capture")


@dataclass
class Finding:
    """What was found of one parameter.

    Parameters
    ----------
    name : str
    status : str
        "same", "rounded", "other order", "different", "missing" or "unknown".
    says : str
        A sentence for the reader.
    """

    name: str
    status: str
    says: str


@dataclass
class Comparison:
    """Where a run departs from the right one.

    Parameters
    ----------
    mine, gold : str
        Where the two came from.
    rows : list of Row
        One for each value that was recorded, in the order of execution.
    weights : list of Finding
        What the parameters show; empty where none were given.
    notes : list of str
        What else was found: config, positions, names.
    logits : dict
        Positions whose most likely token differs, and their margins in the gold.
    """

    mine: str
    gold: str
    rows: list[Row] = field(default_factory=list)
    weights: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    logits: dict[str, Any] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)

    @property
    def first_wrong(self) -> Row | None:
        """The first value that its own operation disagrees with; None where there is none."""
        return next((row for row in self.rows if row.status in ACCUSED), None)

    @property
    def wrong(self) -> list[Row]:
        """All values that their own operations disagree with."""
        return [row for row in self.rows if row.status in ACCUSED]

    @property
    def status(self) -> str:
        """Say "same", "differs" or "not decidable"."""
        if self.differences or self.wrong or any(one.status == "different" for one in self.weights):
            return "differs"
        decided = [row for row in self.rows if row.status not in ("not decidable", "no gold")]
        return "same" if 2 * len(decided) > len(self.rows) else "not decidable"

    def differ(self, text: str) -> None:
        """Record a difference that leaves nothing to compare."""
        self.differences.append(text)

    def read_logits(self, run: Run, gold: Recorded) -> None:
        """Compare the most likely tokens, and how far the gold's are ahead of the second."""
        n_total, changed, margins = 0, 0, []
        for t, setting in enumerate(run.settings):
            key = key_of("lm_head", t)
            if not (run.has("lm_head", t) and gold.has(key)):
                continue
            x, y = f64(run.raw("lm_head", t)), f64(gold.array(key))
            if x.shape != y.shape or x.ndim != 3:
                continue
            real = setting.step.real[:, -x.shape[1] :]
            top = np.argmax(np.nan_to_num(x, nan=-np.inf), axis=-1) != np.argmax(y, axis=-1)
            best = np.partition(y, -2, axis=-1)[..., -2:]
            n_total += int(real.sum())
            changed += int((top & real).sum())
            margins += (best[..., 1] - best[..., 0])[top & real].tolist()
        if n_total:
            largest = max(margins, default=0.0)
            self.logits = {"positions": n_total, "changed": changed, "largest_margin": largest}

    def __str__(self) -> str:
        return "\n".join(lines_of(self))

    def facts(self) -> dict[str, Any]:
        """Return all of it as a dict of what JSON holds."""
        facts = {"status": self.status, **asdict(self)}
        facts["first_wrong"] = self.first_wrong.name if self.first_wrong else None
        return _finite(facts)


def _finite(value: Any) -> Any:
    """Replace infinities and NaN, which JSON lacks, by their names."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value
