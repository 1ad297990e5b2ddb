"""Samplers: constructed logits, the support of what may be drawn, and a chi-square of the draws."""

from typing import Any

import numpy as np

from npllm.errors import NpllmValueError
from npllm.testing.forms import evaluate, prepare
from npllm.testing.laws.arrays import Array
from npllm.testing.laws.broken import Finding
from npllm.testing.laws.chi_square import chi_square
from npllm.testing.laws.trial import Trial
from npllm.testing.search import distance

__all__ = ["FEATURES", "PARAMETERS", "sampler_trials"]

FEATURES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""What can be switched off, one by one."""

PARAMETERS: dict[str, tuple[str, ...]] = {name: (name,) for name in FEATURES}
PARAMETERS["repetition_penalty"] = ("repetition_penalty", "seen")

N_DRAW = 20_000
FALSE_ALARM = 1e-6  # of a whole check of a correct sampler

SUPPORT = "A token is drawn if and only if the filters leave it."
DISTRIBUTION = "Tokens are drawn with the probabilities that the filters leave."
PROBABILITIES = "The probabilities are those of the filtered logits, within rounding."


def sampler_trials(
    case: dict[str, Any], _: frozenset[str], max_examples: int = 200, draws: bool = False
) -> list:
    """Make the trials of a case: probabilities row by row, or many draws of one row."""
    inputs = {"logits": _logits(case)}
    inputs |= {name: case[name] for name in FEATURES if case[name] is not None}
    if "repetition_penalty" in inputs:
        rng = np.random.default_rng(case["seed"] + 1)
        inputs["seen"] = rng.random(inputs["logits"].shape) < 0.4
    if not draws:
        return [Trial((), inputs, lambda output: _judge_rows(inputs, output))]
    return [_draws(case, inputs, FALSE_ALARM / max_examples)]


def _logits(case: dict[str, Any]) -> Array:
    """Multiples of a half: ties, and sums of probabilities that meet the boundaries."""
    rng = np.random.default_rng(case["seed"])
    shape = (case["n_row"], case["n_vocab"])
    if case["size"] == "dyadic":  # probabilities 1/2, 1/4, ...: sums are exact in any order
        ranks = np.tile(np.minimum(np.arange(shape[1]), shape[1] - 2), (shape[0], 1))
        exact = rng.permuted(-np.log(2) * (1 + ranks), axis=-1)
        return (exact * (case["temperature"] or 1.0)).astype(np.float32)
    if case["size"] == "equal":
        return np.zeros(shape, np.float32)
    most = 3 if case["size"] == "flat" else 8  # flat: what min-p takes away moves top-p
    return (rng.integers(-most, most + 1, shape) / 2).astype(np.float32)


def _judge_rows(inputs: dict[str, Any], output: Any) -> tuple[Finding | None, float]:
    """Hold probabilities against the filtered distribution."""
    logits = inputs["logits"]
    if getattr(output, "shape", None) != logits.shape:
        says = (
            f"the probabilities must be {list(logits.shape)}, got {getattr(output, 'shape', None)}"
        )
        return Finding(PROBABILITIES, says), np.nan
    answer = evaluate("sampler", prepare("sampler", inputs))
    found = np.asarray(output, dtype=np.float64).reshape(answer.y.shape)
    sure = np.isfinite(answer.slack).all(axis=-1, keepdims=True) | (answer.y == 0).all()
    other = ((found > 0) != (answer.y > 0)) & sure
    if other.any():
        row, token = (int(n) for n in np.argwhere(other)[0])
        says = (
            f"row {row}, token {token}: {found[row, token]:.6g}, exact {answer.y[row, token]:.6g}"
        )
        return Finding(SUPPORT, says, "sampler", inputs, output), np.nan
    used = distance(found, answer, "float32")
    if used > 1:
        return Finding(
            PROBABILITIES, f"{used:.3g} bounds away", "sampler", inputs, output, used
        ), used
    return None, used


def _draws(case: dict[str, Any], inputs: dict[str, Any], level: float) -> Trial:
    """Draw one row many times; reject at `level`."""
    row = {name: x[:1] if hasattr(x, "shape") else x for name, x in inputs.items()}
    answer = evaluate("sampler", prepare("sampler", row))
    tiled = {
        name: np.repeat(x, N_DRAW, axis=0) if hasattr(x, "shape") else x for name, x in row.items()
    }
    options = {name: x for name, x in tiled.items() if name != "logits"}
    rng = np.random.default_rng(case["seed"] + 2)
    if case["u"]:
        options["u"] = rng.random(N_DRAW)

    def judge(output: Any) -> tuple[Finding | None, float]:
        ids = np.asarray(output)
        if ids.shape != (N_DRAW,) or ids.dtype.kind not in "iu":
            says = f"ids must be integers [{N_DRAW}], got {ids.dtype} {list(ids.shape)}"
            return Finding(DISTRIBUTION, says), np.nan
        if not np.isfinite(answer.slack).all():
            return None, np.nan
        return _judge_ids(ids, answer.y[0], level)

    return Trial((tiled["logits"],), options, judge)


def _judge_ids(ids: Array, p: Array, level: float) -> tuple[Finding | None, float]:
    if ((ids < 0) | (ids >= len(p))).any():
        return Finding(SUPPORT, f"id {int(ids.max())} of {len(p)} tokens"), np.nan
    outside = np.flatnonzero((np.bincount(ids, minlength=len(p)) > 0) & (p == 0))
    if len(outside):
        return Finding(SUPPORT, f"token {int(outside[0])} has probability 0 and was drawn"), np.nan
    value = chi_square(ids, p)
    if value < level:
        says = f"chi-square gives {value:.3g} for {len(ids)} draws, rejected below {level:.3g}"
        return Finding(DISTRIBUTION, says), np.nan
    return None, np.nan


def check_kind(kind: str) -> bool:
    """Tell whether a sampler draws ids.

    Raises
    ------
    NpllmValueError
        For a kind that is neither "draws" nor "probabilities".
    """
    if kind not in ("draws", "probabilities"):
        raise NpllmValueError(f'kind must be "draws" or "probabilities", got {kind!r}')
    return kind == "draws"
