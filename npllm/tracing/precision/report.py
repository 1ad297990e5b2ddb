"""The precision report: plain data, and its layout as text."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from npllm.tracing.precision.extremes import Extreme

__all__ = ["Flip", "Precision", "Row", "Share"]

N_EXTREMES = 8  # operations with the least headroom that the text lists
TITLES = {
    "own": "the model as it is",
    "float64": "float64 definitions",
    "bfloat16": "bfloat16 (emulated)",
    "float16": "float16 (emulated)",
}


class Flip(NamedTuple):
    """A token after which the most likely next token differs."""

    row: int  # of the batch
    column: int  # of the prompt, padding included
    best: int  # id of the most likely token by float64
    here: int  # id of the most likely token of this arithmetic
    margin: float  # by how much float64's logit of `best` exceeds that of `here`


class Share(NamedTuple):
    """What one rounding point causes, as a fraction of the squared error of the logits."""

    point: str
    without: float  # 1 - (error without it / error)**2
    alone: float  # (error of it alone / error)**2


@dataclass(frozen=True)
class Row:
    """One arithmetic against the float64 definitions."""

    type: str
    depth: list[float]  # relative error of the residual stream, for each of Precision.depths
    logits: float  # root mean square error of the logits, without a common shift
    kl_mean: float  # KL divergence of the next token's distribution, in nats
    kl_max: float
    top1: float  # share of tokens with the same most likely next token
    flips: list[Flip]  # the others
    shares: list[Share]  # the largest first; empty where they were not measured

    @property
    def title(self) -> str:
        """What the text calls it."""
        return TITLES.get(self.type, f"{self.type} weights")

    @property
    def is_finite(self) -> bool:
        """Whether no infinity or NaN came up on the way."""
        return math.isfinite(self.logits) and all(map(math.isfinite, self.depth))


@dataclass(frozen=True)
class Precision:
    """What rounding costs a model on a prompt; `str()` is the table, `facts()` plain data."""

    model: str
    ops: str  # the model's own set
    n_tokens: int  # without padding
    depths: list[str]  # "model.embed_tokens", "model.layers.0", ..., "model.norm"
    rows: list[Row]
    largest: list[Extreme]  # of each operation over all layers, in the order of execution
    overflow: Extreme | None  # the first value that float16 cannot hold

    def row(self, name: str) -> Row:
        """Return the row of a type."""
        return next(row for row in self.rows if row.type == name)

    def facts(self) -> dict[str, Any]:
        """Return everything as what JSON can hold; NaN and infinity are null."""
        return {
            "model": self.model,
            "ops": self.ops,
            "tokens": self.n_tokens,
            "depths": self.depths,
            "rows": [_row_facts(row) for row in self.rows],
            "largest": [_extreme_facts(extreme) for extreme in self.largest],
            "overflow": None if self.overflow is None else _extreme_facts(self.overflow),
        }

    def __str__(self) -> str:
        return "\n".join([*_error_lines(self), "", *_extreme_lines(self), *_share_lines(self)])


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _row_facts(row: Row) -> dict[str, Any]:
    return {
        "type": row.type,
        "depth": [_finite(error) for error in row.depth],
        "logits": _finite(row.logits),
        "kl_mean": _finite(row.kl_mean),
        "kl_max": _finite(row.kl_max),
        "top1": row.top1,
        "flips": [flip._asdict() for flip in row.flips],
        "shares": [share._asdict() for share in row.shares],
    }


def _extreme_facts(extreme: Extreme) -> dict[str, Any]:
    facts = {"name": extreme.name, "largest": extreme.largest, "headroom": extreme.headroom}
    return {key: _finite(x) if isinstance(x, float) else x for key, x in facts.items()}


def _error_lines(report: Precision) -> Iterator[str]:
    """The table of errors: the stream at five depths, logits, distribution."""
    n = len(report.depths) - 2
    shown = sorted({0, *(1 + part * (n - 1) // 4 for part in range(1, 5)), n + 1})
    yield (
        f"{report.model}, {report.n_tokens} tokens, {report.ops} operations; "
        "error against the float64 definitions"
    )
    yield ""
    heads = "".join(f"{_depth_name(report.depths[at]):>10}" for at in shown)
    yield f"{'residual stream after':<20}{heads}{'logits':>10}{'KL mean':>10}{'KL max':>10}  top-1"
    for row in report.rows:
        numbers = [*(row.depth[at] for at in shown), row.logits, row.kl_mean, row.kl_max]
        cells = "".join(f"{number:10.1e}" for number in numbers)
        yield f"{row.title:<20}{cells}  {_top1(row, report.n_tokens)}"


def _depth_name(name: str) -> str:
    last = name.rpartition(".")[2]
    return f"layer {last}" if last.isdecimal() else last.removesuffix("_tokens")


def _top1(row: Row, n: int) -> str:
    """Where the most likely token is the same, and how near the others were to a tie."""
    if not row.is_finite:
        return "not finite"
    same = f"{round(row.top1 * n)} of {n}"
    if not row.flips:
        return same
    return f"{same}, margins <= {max(flip.margin for flip in row.flips):.2g}"


def _extreme_lines(report: Precision) -> Iterator[str]:
    """The first overflow, and the operations that come nearest to it."""
    if report.overflow is None:
        yield "No value overflows float16. The largest values, and the bits left to 65520:"
    else:
        yield (
            f"float16 overflows first at {report.overflow.name}: {report.overflow.largest:.6g}. "
            "The largest values, and the bits left to 65520:"
        )
    for extreme in sorted(report.largest, key=lambda extreme: extreme.headroom)[:N_EXTREMES]:
        yield f"  {extreme.name:<46}{extreme.largest:>12.6g}{extreme.headroom:>7.1f} bits"


def _share_lines(report: Precision) -> Iterator[str]:
    """The rounding points, side by side where there are several types."""
    for row in report.rows:
        if row.shares:
            yield ""
            yield f"{row.title}: share of the squared error of the logits"
            yield f"  {'rounding point':<16}{'left out':>10}{'alone':>10}"
            for share in row.shares:
                yield f"  {share.point:<16}{share.without:>10.1%}{share.alone:>10.1%}"
            without, alone = (sum(column) for column in list(zip(*row.shares, strict=True))[1:])
            yield f"  {'sum':<16}{without:>10.1%}{alone:>10.1%}"
