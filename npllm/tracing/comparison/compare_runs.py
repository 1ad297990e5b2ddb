"""The work of `npllm.compare`: what is looked at first, and what the walk is given."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from npllm import ops
from npllm.config.config import Config
from npllm.errors import NpllmValueError
from npllm.tracing.comparison.comparison import Comparison
from npllm.tracing.comparison.diagnosing import explain
from npllm.tracing.comparison.graft import Run
from npllm.tracing.comparison.levels import SHORT, run_dtype
from npllm.tracing.comparison.operations import Setting
from npllm.tracing.comparison.parameters import Weights, model_of
from npllm.tracing.comparison.recorded import Recorded, recorded
from npllm.tracing.comparison.steps import Step, key_of
from npllm.tracing.comparison.tokens import different_tokens, documents_of
from npllm.tracing.comparison.walking import Walk
from npllm.tracing.comparison.weights_check import check_config, check_weights

__all__ = ["compare_runs"]

Array = Any

SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim",
)  # fmt: skip
SAMPLED = 24  # values from which the dtype of a run is read


def compare_runs(mine: Any, gold: Any, weights: Any, model: Any, names: Any) -> Comparison:
    """Do what `npllm.compare` says."""
    right = recorded(gold, "gold")
    own = recorded(mine, "mine", right, names)
    config = _config(right)
    found = Comparison(own.where, right.where)
    found.notes += check_config(own.config, right.config)
    if different_tokens(own, right, found):
        return found
    reference = model_of(model, right)
    _require_weights(right, config, reference)
    theirs: dict[str, Array] = {}
    if weights is not None:
        found.weights, theirs = check_weights(weights, reference.params, config)
    run = _run(own, right, config, reference.params, theirs)
    walk = Walk(run, right, explain)
    found.rows = walk.all_rows()
    found.notes += _names(own, right, run)
    found.read_logits(run, right)
    return found


def _config(gold: Recorded) -> Config:
    if not isinstance(gold.config, dict):
        raise NpllmValueError(
            f"{gold.where}: its index must hold the content of config.json under config"
        )
    return Config.from_json(gold.config)


def _require_weights(right: Recorded, config: Config, model: Any) -> None:
    """Raise where the gold was made with other weights: then every operation would be accused."""
    sizes = [(name, getattr(config, name), getattr(model.config, name, None)) for name in SIZES]
    wrong = [f"{name} is {one} in the gold, {other}" for name, one, other in sizes if one != other]
    if not wrong and right.has("model.embed_tokens"):
        x, ids = right.array("model.embed_tokens").astype(np.float64), right.steps[0].ids
        rows = np.asarray(ops.embed(ids, model.params.embed_tokens), np.float64)
        if x.shape == rows.shape and np.abs(x - rows).max() > 0.1 * np.abs(rows).max():
            wrong = ["model.embed_tokens of the gold is another one than that"]
    sides = right.index.get("adapter"), getattr(model, "adapter", None)
    if sides[0] != sides[1]:
        wrong.append(f"the adapter is {sides[0]} in the gold, {sides[1]}")
    if wrong:
        raise NpllmValueError(
            f"{right.where}: {wrong[0]} in the model whose weights were given; name the model "
            "that made the gold, with model= or -m"
        )


def _run(
    own: Recorded, right: Recorded, config: Config, params: Any, theirs: dict[str, Array]
) -> Run:
    """Set up what is computed anew: weights as the run holds them, masks as the gold has them."""
    dtypes = {str(own.array(name).dtype) for name in own.names if _is_value(own, name)}
    dtype = run_dtype(own.index, _sample(own))
    is_packed = any(hasattr(params.embed_tokens, name) for name in ("scales", "widened"))
    table = None if is_packed else np.asarray(params.embed_tokens)
    weights = Weights(params, _weight_dtype(own, dtype, table), theirs)
    settings = []
    for t, step in enumerate(right.steps):
        n_kept = _n_kept(own, t, step)
        setting = Setting(config, step, weights, None, n_kept)
        settings.append(setting._replace(documents=documents_of(right, t, setting)))
    return Run(own, config, settings, dtype, dtypes)


def _is_value(own: Recorded, name: str) -> bool:
    return own.has(name) and not _is_pair(name)


def _sample(own: Recorded) -> Iterator[Array]:
    """A few of the values that were recorded whole."""
    names = [name for name in own.names if _is_value(own, name)]
    for place in np.linspace(0, len(names) - 1, min(SAMPLED, len(names))).astype(int):
        yield own.array(names[place])


def _weight_dtype(own: Recorded, dtype: str, table: Array) -> str | None:
    """The 16-bit type that the run rounds its weights to; None: it has ours.

    The rows of the embedding say which.
    """
    if dtype not in SHORT or table is None or str(table.dtype) == dtype:
        return None
    if not own.has("model.embed_tokens"):
        return dtype
    ids = own.steps[0].ids
    x = own.array("model.embed_tokens").astype(np.float64).reshape(-1)
    rows = table[ids.ravel()].astype(np.float64).reshape(-1)
    return None if x.shape == rows.shape and np.array_equal(x, rows) else dtype


def _n_kept(own: Recorded, t: int, step: Step) -> int:
    """Positions that the head scored."""
    for name in ("lm_head.input", "lm_head"):
        key = key_of(name, t)
        if own.has(key) and own.array(key).ndim >= 2:
            return int(own.array(key).shape[-2])
    return step.ids.shape[1]


def _names(own: Recorded, right: Recorded, run: Run) -> list[str]:
    """Say which names are missing on either side."""
    known = {key_of(name, t) for name, t, _ in run.nodes()}
    unknown = [n for n in own.names if n not in known and not _is_pair(n) and n != "logits"]
    unknown += [str(name) for name in own.index.get("ignored") or ()]
    missing = [n for n in right.names if n in known and n not in set(own.names)]
    if not known.intersection(own.names):
        raise NpllmValueError(
            f"{own.where}: none of its {len(own.names)} names is one of npllm's "
            f"(npllm.models.taps.NAMES), such as {next(iter(run.graphs[0]))}; it has "
            f"{', '.join(own.names[:3])}"
        )
    notes = []
    if missing:
        notes.append(f"not recorded: {_listed(missing)}; computed anew from what was")
    if unknown:
        notes.append(f"names that are not npllm's, left out: {_listed(unknown)}")
    return notes


def _is_pair(name: str) -> bool:
    return name.partition("@")[0].endswith((".self_attn.mask", ".self_attn.weights"))


def _listed(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name[:100] for name in names[:most]) + more
