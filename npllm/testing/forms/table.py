"""The operations: names of their inputs, shape of their output, form to evaluate."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from npllm.errors import NpllmValueError
from npllm.testing.forms import attention, rope, rows, sampler
from npllm.testing.forms.common import EXACT, Answer, Array, Choice, Work

__all__ = ["OPS", "Op", "evaluate", "op_named", "prepare"]


@dataclass(frozen=True)
class Op:
    """An operation under the name that `diagnose` knows.

    Parameters
    ----------
    form : function (inputs, choice, work) -> Answer
    arrays : dict
        Names of the required array inputs, each with its axes.
    required : tuple of str
        Names of the required numbers.
    defaults : dict
        Names of the optional inputs and their values.
    shape : function (inputs) -> tuple
        Shape of the output.
    rows_axis : int
        The axis of the output that `Work.rows` cuts, counted from the end.  0: none.
    """

    form: Callable[[dict, Choice, Work], Answer]
    arrays: Mapping[str, str]
    required: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    shape: Callable[[dict], tuple] = lambda inputs: inputs["x"].shape
    rows_axis: int = 0


_ATTENTION = {
    "q": "[..., n_head, n_seq, d_head]",
    "k": "[..., n_kv_head, n_ctx, d_head]",
    "v": "[..., n_kv_head, n_ctx, d_value]",
}
_MASKS = {
    "causal": True,
    "window": None,
    "valid": None,
    "scale": None,
    "bias": None,
    "softcap": None,
    "documents": None,
    "mask": None,
    "d_rope": None,
}


def _half(inputs: dict) -> tuple:
    shape = inputs["gate_up"].shape
    return (*shape[:-1], shape[-1] // 2)


def _qkv_shape(inputs: dict) -> tuple:
    *batch, n_seq, _ = inputs["x"].shape
    n_all = inputs["n_head"] + 2 * inputs["n_kv_head"]
    return (*batch, n_all, n_seq, len(inputs["weight"]) // n_all)


OPS: dict[str, Op] = {
    "attention": Op(
        attention.attention,
        _ATTENTION,
        defaults=_MASKS,
        rows_axis=2,
        shape=lambda a: (*a["q"].shape[:-1], a["v"].shape[-1]),
    ),
    "attention_lse": Op(
        attention.attention_lse,
        _ATTENTION,
        defaults=_MASKS,
        rows_axis=1,
        shape=lambda a: a["q"].shape[:-1],
    ),
    "rope": Op(
        rope.rope,
        {"x": "[..., n_head, n_seq, d_head]", "positions": "[n_batch or 1, n_seq]"},
        ("base", "d_rope"),
        {"magnitude": 1.0, "factors": None, "n_original": None},
    ),
    "rms_norm": Op(rows.rms_norm, {"x": "[..., d_model]", "weight": "[d_model]"}, ("eps",)),
    "swiglu": Op(rows.swiglu, {"gate_up": "[..., 2*d_ff]"}, shape=_half),
    "linear": Op(
        rows.linear,
        {"x": "[..., d_in]", "weight": "[d_out, d_in]"},
        (),
        {"bias": None},
        lambda a: (*a["x"].shape[:-1], len(a["weight"])),
    ),
    "qkv_projection": Op(
        rows.qkv_projection,
        {"x": "[..., n_seq, d_model]", "weight": "[d_qkv, d_model]"},
        ("n_head", "n_kv_head"),
        {"bias": None},
        _qkv_shape,
    ),
    "embed": Op(
        rows.embed,
        {"ids": "[...]", "weight": "[n_vocab, d_model]"},
        shape=lambda a: (*a["ids"].shape, a["weight"].shape[-1]),
    ),
    "lm_head": Op(
        rows.lm_head,
        {"hidden": "[..., d_model]", "weight": "[n_vocab, d_model]"},
        (),
        {"embedding": None},
        lambda a: (*a["hidden"].shape[:-1], len(a["weight"])),
    ),
    "sampler": Op(
        sampler.sampler,
        {"logits": "[..., n_vocab]"},
        (),
        {
            "temperature": None,
            "top_k": None,
            "top_p": None,
            "min_p": None,
            "seen": None,
            "repetition_penalty": None,
        },
        lambda a: a["logits"].shape,
    ),
}
"""Name -> Op.  "attention_lse": log-sum-exp of the rows.  "detokenize" works on strings."""

_INTEGERS = ("window", "d_rope", "n_head", "n_kv_head", "top_k", "n_original")
_MAYBE_ARRAYS = ("valid", "mask", "bias", "documents", "factors", "seen", "embedding")


def op_named(op: str) -> Op:
    """Return the entry of an operation; raise for a name that has none."""
    if op not in OPS:
        raise NpllmValueError(f"op must be one of {', '.join(OPS)}, detokenize; got {op!r}")
    return OPS[op]


def prepare(op: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Check the names of an operation's inputs, and fill in the defaults.

    Raises
    ------
    NpllmValueError
        For a missing or unknown input, or one with too few axes.
    """
    entry = op_named(op)
    wanted = [*entry.arrays, *entry.required]
    unknown = sorted(set(inputs) - set(wanted) - set(entry.defaults))
    missing = [name for name in wanted if inputs.get(name) is None]
    if unknown or missing:
        raise NpllmValueError(
            f"inputs of {op} must be {', '.join(wanted)}, "
            f"and may be {', '.join(entry.defaults) or 'no other'}; "
            f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
        )
    prepared = dict(entry.defaults)
    for name, value in inputs.items():
        prepared[name] = _converted(name, value, name in entry.arrays)
    for name, axes in entry.arrays.items():
        _check_axes(name, prepared[name], axes)
    return prepared


def _converted(name: str, value: Any, is_array: bool) -> Any:
    if value is None:
        return None
    if is_array or name in _MAYBE_ARRAYS or (name == "weight"):
        return np.asarray(value)
    number = np.asarray(value).item()
    return int(number) if name in _INTEGERS else number


def _check_axes(name: str, x: Array, axes: str) -> None:
    least = len(
        [axis for axis in axes.strip("[]").split(", ") if axis not in ("...", "n_batch or 1")]
    )
    if x.ndim < least:
        raise NpllmValueError(f"{name} must be {axes}, got {list(x.shape)}")


def evaluate(op: str, inputs: dict, choice: Choice | None = None, work: Work = EXACT) -> Answer:
    """Evaluate an operation under some options; axes before the last ones are flattened to one.

    Parameters
    ----------
    op : str
        A key of `OPS`.
    inputs : dict
        As `prepare` returns them.
    choice : mapping, optional
        Convention id to option.  Default: the definition.
    work : Work, optional

    Raises
    ------
    NotApplicableError
        Where an option cannot be run on these inputs.
    """
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        return OPS[op].form(inputs, choice or {}, work)
